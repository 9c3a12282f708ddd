"""What one step of transfer is: an image classifier of which a method trains a small part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.trainer import Batch, Inference, Trainer
from petl.data.features import PrefixFeatures
from petl.models.inject import PetlModel, delta_parameters, trainable_parameters
from petl.models.prefix import FrozenPrefix
from petl.models.sites import NoSite
from petl.trainer.network import checked_pretrained, require_weights, unchosen


class TransferTrainer(Trainer):
    """Cross-entropy of a tuned network (section 3).

    Args:
        network: from `petl.build` or `petl.inject`.
        smoothing: label smoothing, in timm's form.
        input_shape: `(3, H, W)` of an input.
        transform: from a PIL image to an input, for `tools/infer.py`.
        classes: names of the classes, for `tools/infer.py`.
        cache: where features of what is frozen are kept, so that it is not computed in every step; None: images are
            read and the whole network runs. See `petl.PrefixFeatures`.
        pretrained: `required`: training a network whose config names no pre-trained weights is an error; `optional`.
        frozen: see `core.Trainer`.

    Raises:
        ConfigError: in training, channels that were never chosen, or no pre-trained weights where they are required.
    """

    def __init__(
        self,
        network: PetlModel,
        smoothing: float = 0.0,
        input_shape: Sequence[int] = (3, 224, 224),
        transform: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        cache: PrefixFeatures | None = None,
        pretrained: str = "optional",
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.pretrained, self.cache = checked_pretrained(pretrained), cache
        self._prefix: tuple[FrozenPrefix, ...] = ()
        self.network, self.smoothing, self.transform = network, smoothing, transform
        self.input_shape = tuple(input_shape)
        self.classes = None if classes is None else [str(name) for name in classes]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_cls` and the share of right answers, `accuracy`."""
        if not self.network.chosen:
            raise ConfigError(unchosen(self.network))
        require_weights(self.network, self.pretrained)
        logits, label = self._logits(batch), batch["label"]
        loss = nn.functional.cross_entropy(logits.float(), label, label_smoothing=self.smoothing)
        return {"loss_cls": loss, "accuracy": (logits.detach().argmax(dim=1) == label).float().mean()}

    def predict(self, batch: Batch) -> dict[str, Any]:
        """The batch's `label` and `sample_id` with `logits` `(B, classes)`.

        Where a batch has `allowed` `(B, classes)`, other classes are no answers (ImageNet-A and -R, section 5).
        """
        kept = {key: batch[key] for key in ("label", "sample_id") if key in batch}
        logits = self._logits(batch)
        if "allowed" in batch:
            logits = logits.masked_fill(~batch["allowed"], -torch.inf)
        return {**kept, "logits": logits}

    def _logits(self, batch: Batch) -> Tensor:
        return self.prefix.logits(batch["features"]) if "features" in batch else self.network(batch["image"])

    @property
    def prefix(self) -> FrozenPrefix:
        """What of the network is frozen throughout.

        Raises:
            ConfigError: nothing is.
        """
        if not self._prefix:
            try:
                self._prefix = (FrozenPrefix(self.network),)
            except NoSite as error:
                raise ConfigError(f"model.cache: {error}; train on images with model.cache=null") from None
        return self._prefix[0]

    def training_data(self, dataset: Any) -> Any:
        """`dataset` itself, or features of what is frozen where there is a `cache`."""
        if self.cache is None or not self.keeps_data:
            return dataset
        return self.cache.fill(dataset, self.prefix, self.autocast)

    def evaluation_data(self, dataset: Any) -> Any:
        """As `training_data`, with features beside what the data set has."""
        if self.cache is None or not self.cache.evaluation or not self.keeps_data:
            return dataset
        return self.cache.fill(dataset, self.prefix, self.autocast, beside=True)

    def infer(self, file: Path) -> Inference:
        """The most probable classes of an image file.

        Raises:
            ConfigError: the trainer was built without a `transform`.
        """
        from core.data import load_image

        if self.transform is None:
            raise ConfigError(
                "this experiment has no transform for files: set model.transform (core.data.EvalTransform)"
            )
        image = self.transform(load_image(file)).to(self.device)[None]
        with torch.no_grad(), self.autocast():
            shares = self.network(image).float().softmax(-1)[0]
        best = shares.topk(min(5, len(shares)))
        found = [
            {"class": self.classes[index] if self.classes else index, "probability": round(value, 4)}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return Inference({"file": Path(file).name, "classes": found})

    def facts(self, cfg: Any) -> dict[str, Any]:
        """What a result is worth: method, how its weights were selected, the data's source and normalisation, sizes."""
        dataset = (cfg.get("train_dataloader") or cfg.get("test_dataloader") or {}).get("dataset") or {}
        figures = self.table_figures(cfg)
        return {
            "method": type(self.network.method).__name__,
            "data": {key: dataset[key] for key in ("task", "split", "source", "norm") if key in dataset},
            "weights": self.network.weights,
            **{key: figures[key] for key in ("select", "delta", "trained", "head")},
        }

    def table_figures(self, cfg: Any) -> dict[str, Any]:
        """Figures for tables that need no data, without the head unless the name says so.

        `delta` and `trained` (numbers), `share` (of the backbone, in percent), `head`, `delta_with_head`, and `select`,
        how the reported weights are chosen (`last`, `val` or `test_best`).
        """
        from petl.metrics import selected_by

        network = self.network
        own = [p for name, p in network.backbone.named_parameters() if not network.in_head(f"backbone.{name}")]
        total, delta = sum(p.numel() for p in own), delta_parameters(network)
        whole = delta_parameters(network, head=True)
        return {
            "select": selected_by(cfg),
            "delta": delta,
            "trained": trainable_parameters(network),
            "share": 100 * delta / total,
            "head": whole - delta,
            "delta_with_head": whole,
        }
