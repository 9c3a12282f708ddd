"""A sweep in one go: several tasks on one frozen backbone, every step for all of them (section 12)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.trainer import Batch, Trainer
from petl.models.methods import Method
from petl.models.packing import PackedModel
from petl.trainer.network import build, checked_pretrained, require_weights


def build_packed(
    backbone: nn.Module,
    method: Method,
    num_classes: Sequence[int],
    weights: str | Path | None = None,
    head_init: str = "trunc",
    frozen_mode: str = "eval",
) -> PackedModel:
    """Networks of `petl.build`, one for every task, packed; each begins as it would alone with the run's seed.

    Args:
        backbone, method, weights, head_init, frozen_mode: see `petl.build`. With `frozen_mode="train"` stochastic depth
            draws for every task, other numbers than each task alone would draw.
        num_classes: of every task.

    Raises:
        ConfigError, NoSite: see `petl.build`.
    """
    start = torch.get_rng_state()
    networks = []
    for classes in num_classes:
        torch.set_rng_state(start)
        own = copy.deepcopy(backbone), copy.deepcopy(method)
        networks.append(build(*own, classes, weights, head_init=head_init, frozen_mode=frozen_mode))
    packed = PackedModel(networks)
    packed.weights = networks[0].weights
    return packed


class PackedTrainer(Trainer):
    """Cross-entropy of several tasks at once; a batch has `image` `(B, T, 3, H, W)` and `label` `(B, T)`.

    Every task has the loss of its own mean, and their sum is trained, so that no task's gradients depend on the others.
    In evaluation a batch belongs to one task, `task` `(B,)`.

    Args:
        network: from `petl.build_packed`.
        tasks: their names, for the log.
        smoothing: see `TransferTrainer`.
        input_shape: of one image.
        pretrained: see `TransferTrainer`.
        frozen: see `core.Trainer`.

    Raises:
        ValueError: another number of names than of networks.
        ConfigError: in training, no pre-trained weights where they are required.
    """

    def __init__(
        self,
        network: PackedModel,
        tasks: Sequence[str],
        smoothing: float = 0.0,
        input_shape: Sequence[int] = (3, 224, 224),
        pretrained: str = "optional",
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.pretrained = checked_pretrained(pretrained)
        if len(tasks) != len(network.classes):
            raise ValueError(f"{len(tasks)} tasks for {len(network.classes)} networks: {list(tasks)}")
        self.network, self.tasks, self.smoothing = network, list(tasks), smoothing
        self.input_shape = tuple(input_shape)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_TASK` of every task."""
        require_weights(self.network, self.pretrained)
        logits, label = self.network(batch["image"].transpose(0, 1)), batch["label"]
        terms = {}
        for number, (task, classes) in enumerate(zip(self.tasks, self.network.classes, strict=True)):
            own = logits[number, :, :classes].float()
            terms[f"loss_{task}"] = nn.functional.cross_entropy(own, label[:, number], label_smoothing=self.smoothing)
        return terms

    def predict(self, batch: Batch) -> dict[str, Any]:
        """`logits` `(B, classes)` of the one task that the batch belongs to, with `label` and `sample_id`."""
        kept = {key: batch[key] for key in ("label", "sample_id") if key in batch}
        (task,) = set(batch["task"].tolist())
        return {**kept, "logits": self.network.of(task, batch["image"])}

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Tensor]:
        """Images of every task, `(T, B, 3, H, W)`."""
        return (torch.zeros(len(self.tasks), batch_size, *self.input_shape, device=device),)

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """Made-up images of every task, of class 0."""
        (image,) = self.example_inputs(batch_size, device)
        return {
            "image": image.transpose(0, 1),
            "label": torch.zeros(batch_size, len(self.tasks), dtype=torch.long, device=device),
            "sample_id": [str(i) for i in range(batch_size)],
        }

    def table_figures(self, cfg: Any) -> dict[str, Any]:
        """`tasks`, and `trained`: numbers of all tasks together, heads as wide as the widest included."""
        return {"tasks": len(self.tasks), "trained": sum(p.numel() for p in self.network.stacked.values())}
