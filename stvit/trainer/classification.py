"""What one step of STViT is: an image classifier with soft targets, and pictures of its semantic tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.trainer import Batch, Inference, Trainer
from stvit.losses import classification_loss
from stvit.models import SemanticTokenGenerator, SemanticTokenViT


class ClassificationTrainer(Trainer):
    """Cross-entropy of an image classifier, without distillation (section 4.1 of the paper).

    Args:
        network: from images `(B, C, H, W)` to logits `(B, classes)`. Loss terms that its tokens ask for besides
            (`auxiliary_losses()`) are added; semantic tokens ask for none.
        smoothing: label smoothing where labels are integers; mixed targets carry their own.
        mix: mixup and CutMix of a training batch (`core.data.Mix`); None for none.
        input_shape: `(C, H, W)` of an input; None: colour images of the network's `img_size`.
        transform: from a PIL image to an input, for `tools/infer.py`.
        classes: names of the classes, for `tools/infer.py`.
        frozen: see `core.Trainer`.
    """

    def __init__(
        self,
        network: nn.Module,
        smoothing: float = 0.1,
        mix: Callable[[Batch], Batch] | None = None,
        input_shape: Sequence[int] | None = None,
        transform: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.network = network
        self.smoothing = smoothing
        self.mix = mix
        self.transform = transform
        self.classes = None if classes is None else [str(name) for name in classes]
        if input_shape is None and hasattr(network, "img_size"):
            input_shape = (3, *network.img_size)
        self.input_shape = None if input_shape is None else tuple(input_shape)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_cls`, `further_losses`, and where targets are not mixed the share of right answers, `accuracy`."""
        if self.mix is not None:
            batch = self.mix(batch)
        logits = self.network(batch["image"])
        target = batch.get("target", batch["label"])
        terms = {"loss_cls": classification_loss(logits, target, self.smoothing)}
        terms |= self.further_losses(batch["image"], logits)
        if "target" not in batch:
            terms["accuracy"] = (logits.detach().argmax(dim=1) == batch["label"]).float().mean()
        return terms

    def further_losses(self, images: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Terms besides the classifier's, by name: those of the network's pass over `images` `(B, C, H, W)`."""
        return self.network.auxiliary_losses() if hasattr(self.network, "auxiliary_losses") else {}

    def predict(self, batch: Batch) -> dict[str, Any]:
        """The batch's `label` and `sample_id` with `logits` `(B, classes)`."""
        kept = {key: batch[key] for key in ("label", "sample_id") if key in batch}
        return {**kept, "logits": self.network(batch["image"])}

    def media(self, batch: Batch) -> dict[str, Any]:
        """What the semantic tokens of a batch attend to, with predictions: `{"tokens": (height, width, 3) uint8}`."""
        if not self.shows_tokens():
            return {}
        predicted = self.network(batch["image"]).argmax(dim=1).tolist()
        captions = [
            self._name(guess) if guess == label else f"{self._name(guess)}\nis {self._name(label)}"
            for guess, label in zip(predicted, batch["label"].tolist(), strict=True)
        ]
        return {"tokens": self.token_picture(batch["image"], captions)}

    def table_figures(self, cfg: Any) -> dict[str, int | str]:
        """Figures for tables: `tokens`, those that are left behind the last layer."""
        return {"tokens": self.network.remaining_tokens()} if isinstance(self.network, SemanticTokenViT) else {}

    def shows_tokens(self) -> bool:
        """Whether the network has semantic tokens to look at."""
        return isinstance(getattr(self.network, "reducer", None), SemanticTokenGenerator)

    def token_picture(self, images: Tensor, captions: Sequence[str] | None = None, title: str | None = None) -> Any:
        """`(height, width, 3)` uint8: what each semantic token of `images` `(B, C, H, W)` attends to.

        Raises:
            ValueError: the network has no semantic tokens.
        """
        from stvit.inference.visualize import token_picture

        with torch.no_grad(), self.autocast():
            maps = self.network.token_maps(images)
        return token_picture(images, maps, captions, title)

    def infer(self, file: Path) -> Inference:
        """The most probable classes of an image file; a picture of what the semantic tokens attend to.

        Raises:
            ValueError: the trainer was built without a `transform`.
        """
        from core.data import load_image

        if self.transform is None:
            raise ValueError(
                "this experiment has no transform for files: set model.transform (core.data.EvalTransform)"
            )
        image = self.transform(load_image(file)).to(self.device)[None]
        with torch.no_grad(), self.autocast():
            probabilities = self.network(image).float().softmax(dim=1)[0]
        best = probabilities.topk(min(5, len(probabilities)))
        top = [
            {"class": self._name(int(index)), "index": int(index), "probability": float(value)}
            for value, index in zip(best.values, best.indices, strict=True)
        ]
        record = {"class": top[0]["class"], "index": top[0]["index"], "probability": top[0]["probability"], "top": top}
        if not self.shows_tokens():
            return Inference(record)
        caption = f"{top[0]['class']}\n{100 * top[0]['probability']:.0f} %"
        return Inference(record, {"tokens": self.token_picture(image, [caption])})

    def _name(self, index: int) -> str:
        return str(index) if self.classes is None else self.classes[index]
