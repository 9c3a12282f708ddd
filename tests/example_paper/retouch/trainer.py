"""What one step is: an update of the restorer, then one of the critic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.data import load_image
from core.trainer import Batch, Inference, Trainer
from retouch.data import cut, to_tensor
from retouch.losses import critic_loss, generator_loss


class RetouchTrainer(Trainer):
    """Restores images with holes, by L1 and a critic.

    Args:
        restorer: gives an image without its hole.
        critic: tells real from restored images.
        adversarial_weight: of the critic's opinion in the restorer's loss.
        input_shape: `(3, H, W)`, for profiles.
        frozen: see `core.Trainer`.
    """

    optimizer_parts = ("restorer", "critic")

    def __init__(
        self,
        restorer: nn.Module,
        critic: nn.Module,
        adversarial_weight: float = 0.05,
        input_shape: Sequence[int] = (3, 16, 16),
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.restorer, self.critic = restorer, critic
        self.adversarial_weight = adversarial_weight
        self.input_shape = tuple(input_shape)

    def train_step(self, data: Batch, optim_wrapper: Any) -> dict[str, Tensor]:
        with optim_wrapper.only("restorer"):
            first = self.phase("restorer_losses", data, optim_wrapper["restorer"])
        with optim_wrapper.only("critic"):
            second = self.phase("critic_losses", data, optim_wrapper["critic"])
        return {**second, **first, "loss": first["loss"] + second["loss"]}

    def restorer_losses(self, batch: Batch) -> dict[str, Tensor]:
        restored = self.restorer(batch["damaged"], batch["hole"])
        return {
            "loss_l1": (restored - batch["image"]).abs().mean(),
            "loss_adversarial": self.adversarial_weight * generator_loss(self.critic(restored)),
        }

    def critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            restored = self.restorer(batch["damaged"], batch["hole"])
        return {"loss_critic": critic_loss(self.critic(batch["image"]), self.critic(restored))}

    def predict(self, batch: Batch) -> dict[str, Any]:
        return {"image": batch["image"], "restored": self.restorer(batch["damaged"], batch["hole"]).clamp(0, 1)}

    def media(self, batch: Batch) -> dict[str, Any]:
        shown = self.predict(batch)
        rows = [batch["damaged"], shown["restored"], shown["image"]]  # each (B, 3, H, W)
        return {"images": to_pixels(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))}

    def infer(self, file: Path) -> Inference:
        image = to_tensor(load_image(file))
        damaged, hole = cut(image, *[(side - side // 4) // 2 for side in image.shape[1:]])
        restored = self.restorer(damaged[None].to(self.device), hole[None].to(self.device))[0].clamp(0, 1).cpu()
        difference = (restored - image).abs().mean()
        return Inference(
            {"difference": float(difference)}, {"damaged": to_pixels(damaged), "restored": to_pixels(restored)}
        )

    def inference_network(self) -> nn.Module:
        return self.restorer

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        image = torch.zeros(batch_size, *self.input_shape, device=device)
        return image, image[:, :1]

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        damaged, hole = self.example_inputs(batch_size, device)
        names = [str(i) for i in range(batch_size)]
        return {"image": torch.ones_like(damaged), "damaged": damaged, "hole": hole, "sample_id": names}


def to_pixels(image: Tensor) -> np.ndarray:
    """uint8 `(H, W, 3)` of `image` `(3, H, W)` in [0, 1]."""
    return (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
