"""What one step of video classification is, and how several views of a video become one prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from core.trainer import Batch, Inference, Trainer
from stvit.losses import classification_loss
from stvit.models.stvit_video import STViTVideoSwin


class VideoClassificationTrainer(Trainer):
    """Cross-entropy of a classifier of clips; a video's prediction is the mean of its views' probabilities.

    Batches hold `video`, `(B, C, T, H, W)` or `(B, V, C, T, H, W)` with V views, `label` `(B,)` and `sample_id`.

    Args:
        network: from clips `(B, C, T, H, W)` to logits `(B, classes)`.
        smoothing: label smoothing.
        input_shape: `(C, T, H, W)` of a clip; None: colour clips of the network's `clip_size`.
        views_at_once: most clips in one forward pass of a prediction, to bound memory; None: all of the batch.
        views: from a file's path to its views `(V, C, T, H, W)`, for `tools/infer.py` (`stvit.ClipViews`).
        classes: names of the classes, for `tools/infer.py`.
        frozen: see `core.Trainer`.

    Raises:
        ValueError: `views_at_once` below 1.
    """

    def __init__(
        self,
        network: nn.Module,
        smoothing: float = 0.0,
        input_shape: Sequence[int] | None = None,
        views_at_once: int | None = 4,
        views: Callable[[Path], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        if views_at_once is not None and views_at_once < 1:
            raise ValueError(f"views_at_once={views_at_once}: at least one clip, or null for all")
        self.network = network
        self.smoothing = smoothing
        self.views_at_once = views_at_once
        self.views = views
        self.classes = None if classes is None else [str(name) for name in classes]
        if input_shape is None and hasattr(network, "clip_size"):
            input_shape = (3, *network.clip_size)
        self.input_shape = None if input_shape is None else tuple(input_shape)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_cls`, and the share of right answers, `accuracy`; every view is a sample."""
        clips, count = _flat(batch["video"])
        label = batch["label"].repeat_interleave(count)
        logits = self.network(clips)
        return {
            "loss_cls": classification_loss(logits, label, self.smoothing),
            "accuracy": (logits.detach().argmax(dim=1) == label).float().mean(),
        }

    def predict(self, batch: Batch) -> dict[str, Any]:
        """The batch's `label` and `sample_id` with `probability` `(B, classes)`, float32, one row for a video."""
        kept = {key: batch[key] for key in ("label", "sample_id") if key in batch}
        return {**kept, "probability": self.probability(batch["video"])}

    def probability(self, video: Tensor) -> Tensor:
        """Mean softmax over the views of `(B, V, C, T, H, W)`, or softmax of `(B, C, T, H, W)`: `(B, classes)`."""
        clips, count = _flat(video)
        parts = clips.split(self.views_at_once or len(clips))
        probability = torch.cat([self.network(part).float().softmax(dim=1) for part in parts])
        return rearrange(probability, "(b v) k -> b v k", v=count).mean(dim=1)

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """A batch for a training step on made-up data."""
        batch = super().example_batch(batch_size, device)
        return {"video": batch.pop("image"), **batch}

    def table_figures(self, cfg: Any) -> dict[str, int | str]:
        """Figures for tables: `tokens` of a slice in the last stage but one (after the reduction)."""
        if not hasattr(self.network, "token_grid"):
            return {}
        return {"tokens": math.prod(self.network.token_grid()[1:])}

    def media(self, batch: Batch) -> dict[str, Any]:
        """What the semantic tokens of the first clip attend to: `{"tokens": (T', height, width, 3) uint8}`."""
        if not isinstance(self.network, STViTVideoSwin):
            return {}
        clip = _flat(batch["video"][:1])[0][:1]
        guess, label = int(self.probability(clip).argmax()), int(batch["label"][0])
        caption = self._name(guess) if guess == label else f"{self._name(guess)}\nis {self._name(label)}"
        return {"tokens": self.token_film(clip, caption)}

    def token_film(self, clip: Tensor, caption: str | None = None) -> Any:
        """Token pictures of the slices of a clip `(1, C, T, H, W)` in order: uint8 `(T', height, width, 3)`."""
        import numpy as np

        from stvit.inference.visualize import token_picture

        with torch.no_grad(), self.autocast():
            maps = self.network.token_maps(clip)[0]
        step = -(-clip.shape[2] // len(maps))
        frames = rearrange(clip[0, :, ::step], "c t h w -> t 1 c h w")  # the first frame of every slice stands for it
        captions = None if caption is None else [caption]
        return np.stack([token_picture(frame, one[None], captions) for frame, one in zip(frames, maps, strict=True)])

    def infer(self, file: Path) -> Inference:
        """The most probable classes of a video file; a film of what the semantic tokens attend to.

        Raises:
            ValueError: the trainer was built without `views`.
        """
        if self.views is None:
            raise ValueError("this experiment has no reader for files: set model.views (stvit.ClipViews)")
        video = self.views(file).to(self.device)[None]
        with torch.no_grad(), self.autocast():
            probability = self.probability(video)[0]
        best = probability.topk(min(5, len(probability)))
        top = [
            {"class": self._name(int(index)), "index": int(index), "probability": float(value)}
            for value, index in zip(best.values, best.indices, strict=True)
        ]
        record = {**top[0], "views": video.shape[1], "top": top}
        if not isinstance(self.network, STViTVideoSwin):
            return Inference(record)
        caption = f"{top[0]['class']}\n{100 * top[0]['probability']:.0f} %"
        middle = video[:, video.shape[1] // 2]
        return Inference(record, {"tokens": self.token_film(middle, caption)})

    def _name(self, index: int) -> str:
        return str(index) if self.classes is None else self.classes[index]


def _flat(video: Tensor) -> tuple[Tensor, int]:
    """Clips `(B*V, C, T, H, W)`, views of a video next to each other, and V."""
    if video.ndim == 5:
        return video, 1
    return rearrange(video, "b v c t h w -> (b v) c t h w"), video.shape[1]
