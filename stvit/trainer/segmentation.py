"""What one step of semantic segmentation is: cross-entropy of every pixel; predictions over scales and mirrorings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import ConfigError
from core.trainer import Batch, Inference, Trainer
from stvit.losses import IGNORE, segmentation_loss


class SegmentationTrainer(Trainer):
    """Cross-entropy of the head, and with a weight that of the auxiliary head (section 3 of the recipe).

    Batches: `image` `(B, C, H, W)`, `mask` `(B, h, w)` int64 with `IGNORE` where nothing is known. In evaluation masks
    may be of another size than the images (ADE20K's are those of the original picture); scores are brought to theirs.

    Args:
        network: `SegmentationNetwork`.
        auxiliary_weight: of the auxiliary head's loss.
        scales: sizes at which an image is evaluated, as factors; their probabilities are averaged.
        flip: evaluate mirrored images too.
        divisor: scaled images have sides that this divides.
        input_shape: `(C, H, W)` of an input, for profiling.
        transform: from a PIL image to an input, for `tools/infer.py`.
        classes: names of the classes, for `tools/infer.py`.
        frozen: see `core.Trainer`.
    """

    def __init__(
        self,
        network: nn.Module,
        auxiliary_weight: float = 0.4,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        divisor: int = 32,
        input_shape: Sequence[int] = (3, 512, 512),
        transform: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        if not scales:
            raise ConfigError("SegmentationTrainer: scales is empty; [1.0] evaluates images as they are")
        self.network = network
        self.auxiliary_weight = auxiliary_weight
        self.scales, self.flip, self.divisor = tuple(scales), flip, divisor
        self.input_shape = tuple(input_shape)
        self.transform = transform
        self.classes = None if classes is None else [str(name) for name in classes]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_seg`, `loss_aux` where there is an auxiliary head, and the share of right pixels, `accuracy`."""
        scores, extra = self.network(batch["image"], auxiliary=True)
        terms = {"loss_seg": segmentation_loss(scores, batch["mask"])}
        if extra is not None:
            terms["loss_aux"] = self.auxiliary_weight * segmentation_loss(extra, batch["mask"])
        known = batch["mask"] != IGNORE
        right = (scores.detach().argmax(dim=1) == batch["mask"]) & known
        terms["accuracy"] = right.sum() / known.sum().clamp(min=1)
        return terms

    def predict(self, batch: Batch) -> dict[str, Any]:
        """The batch's `mask` and `sample_id` with `prediction` `(B, h, w)`, the most probable class of every pixel."""
        size = batch["mask"].shape[-2:] if "mask" in batch else batch["image"].shape[-2:]
        kept = {key: batch[key] for key in ("mask", "sample_id") if key in batch}
        return {**kept, "prediction": self.probabilities(batch["image"], size).argmax(dim=1)}

    def probabilities(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """`(B, K, *size)` float32: mean over scales and mirrorings of what `images` `(B, C, H, W)` are."""
        total: Tensor | float = 0.0
        for scale in self.scales:
            scaled = images if scale == 1 else self._scaled(images, scale)
            views = (False, True) if self.flip else (False,)
            for mirrored in views:
                scores = self.network(scaled.flip(-1) if mirrored else scaled).float()
                scores = scores.flip(-1) if mirrored else scores
                scores = F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)
                total = total + scores.softmax(dim=1)
        return total / (len(self.scales) * (2 if self.flip else 1))

    def _scaled(self, images: Tensor, scale: float) -> Tensor:
        size = [max(1, round(scale * side / self.divisor)) * self.divisor for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """Noise with class 0 everywhere."""
        batch = super().example_batch(batch_size, device)
        _, height, width = self.input_shape
        batch["mask"] = torch.zeros(batch_size, height, width, dtype=torch.long, device=device)
        del batch["label"]
        return batch

    # ------------------------------------------------------------------ pictures
    def media(self, batch: Batch) -> dict[str, Any]:
        """A column for every image: itself, prediction, truth. `{"segmentation": (height, width, 3) uint8}`."""
        size = batch["image"].shape[-2:]
        predicted = self.probabilities(batch["image"], size).argmax(dim=1)
        truths = F.interpolate(batch["mask"][:, None].float(), size=size)[:, 0].long()
        columns = []
        for image, found, truth in zip(batch["image"], predicted, truths, strict=True):
            picture = _as_picture(image)
            parts = (picture, laid_over(picture, found), laid_over(picture, truth))
            columns.append(np.concatenate([_fitted(part, 160) for part in parts], axis=0))
        return {"segmentation": np.concatenate(columns, axis=1)}

    def infer(self, file: Path) -> Inference:
        """The classes in an image file with their share of its area; beside it, their colours laid over it.

        Raises:
            ValueError: the trainer was built without a `transform`.
        """
        from core.data import load_image

        if self.transform is None:
            raise ValueError("this experiment has no transform for files: set model.transform")
        picture = load_image(file)
        images = self.transform(picture).to(self.device)[None]
        with torch.no_grad(), self.autocast():
            found = self.probabilities(images, (picture.height, picture.width)).argmax(dim=1)[0].cpu()
        counts = found.flatten().bincount()
        present = counts.argsort(descending=True)[: int((counts > 0).sum())].tolist()
        record = {
            "width": picture.width,
            "height": picture.height,
            "classes": [
                {"class": self._name(index), "index": index, "share": round(float(counts[index] / found.numel()), 4)}
                for index in present
            ],
        }
        plain = np.asarray(picture)
        beside = np.concatenate([plain, laid_over(plain, found)], axis=1)
        return Inference(record, {"segmentation": _fitted(beside, 960), "labels": found.numpy().astype(np.uint8)})

    def _name(self, index: int) -> str:
        return str(index) if self.classes is None else self.classes[index]


def colours(mask: Tensor) -> np.ndarray:
    """uint8 `(H, W, 3)`: a colour per class (class 0 and `IGNORE` black)."""
    return _palette()[mask.cpu().numpy().astype(np.uint8)]


def laid_over(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """The classes' colours over a picture uint8 `(H, W, 3)` in grey; class 0 and `IGNORE` leave it darker."""
    grey = picture.mean(axis=-1, keepdims=True)
    return np.round(0.35 * grey + 0.65 * colours(mask)).astype(np.uint8)


@lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    """uint8 `(256, 3)`: from black on, each colour of a grid in turn that is farthest from all before it."""
    steps = np.round(np.linspace(0, 255, 7)).astype(int)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    palette = np.zeros((256, 3), np.uint8)
    distance = np.linalg.norm(grid, axis=1)
    distance[np.ptp(grid, axis=1) < 64] = 0  # greys could be mistaken for the picture
    for index in range(1, IGNORE):
        palette[index] = grid[distance.argmax()]
        distance = np.minimum(distance, np.linalg.norm(grid - palette[index].astype(int), axis=1))
    return palette


def _as_picture(image: Tensor) -> np.ndarray:
    """A normalised image `(C, H, W)` stretched to uint8 `(H, W, 3)`."""
    low, high = image.min(), image.max()
    grey = (image - low) / (high - low).clamp(min=1e-6)
    return np.round(255 * grey.expand(3, -1, -1).permute(1, 2, 0).float().cpu().numpy()).astype(np.uint8)


def _fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """Small pictures enlarged by a whole factor, so that pixels stay visible."""
    factor = max(1, side // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
