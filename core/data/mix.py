"""Mixup and CutMix over a batch."""

from typing import Any

import numpy as np
from einops import rearrange
from timm.data import Mixup
from timm.data.mixup import mixup_target

from core.data.loading.seeds import preserved_random_state


class _AnySize(Mixup):
    """timm's Mixup also for odd batches where its arithmetic allows them: only pairs need an even one."""

    def __call__(self, x: Any, target: Any) -> tuple[Any, Any]:
        mix = {"batch": self._mix_batch, "pair": self._mix_pair, "elem": self._mix_elem}[self.mode]
        lam = mix(x)
        return x, mixup_target(target, self.num_classes, lam, self.label_smoothing)


class Mix:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) between a batch and its reverse, with soft labels.

    A batch ``{"image": (B, C, H, W), "label": (B,)}`` comes back as a new dict with the images mixed and
    ``"target": (B, num_classes)`` float beside the untouched label. Works on any device. Videos (B, C, T, H, W) are cut
    alike in all frames. In an odd batch the middle sample is mixed with itself.

    Randomness: numpy's global generator (which the engine saves and restores), or the ``generator`` of the call.

    Args:
        mixup, cutmix: alpha of the Beta distribution; 0 switches it off.
        switch_prob: of CutMix, where both are on.
        prob: of mixing at all.
        smoothing: label smoothing of the targets.
        num_classes: K.
        mode: one mixing coefficient per "batch", "pair" or "elem".
        key: of the images in the batch ("video").
    """

    def __init__(
        self,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch_prob: float = 0.5,
        prob: float = 1.0,
        smoothing: float = 0.1,
        num_classes: int = 1000,
        mode: str = "batch",
        key: str = "image",
    ) -> None:
        if mixup <= 0 and cutmix <= 0 and prob > 0:
            raise ValueError("mixup and cutmix are both 0: leave Mix out, or set prob to 0 for smoothed labels alone")
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"mode must be 'batch', 'pair' or 'elem', not {mode!r}")
        self.key = key
        self.num_classes = num_classes
        self._mixup = _AnySize(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: dict[str, Any], generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The mixed batch.

        Raises:
            TypeError: images that are no floats.
            ValueError: a label outside the classes (seen on the CPU), or an odd batch in mode "pair".
        """
        images, labels = batch[self.key], batch["label"]
        if not images.is_floating_point():
            raise TypeError(f"{self.key!r} is {images.dtype}: mix after the images are normalised floats")
        if self._mixup.mode == "pair" and len(images) % 2:
            raise ValueError(f"mode 'pair' needs an even batch, not {len(images)}; set drop_last or mode: batch")
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(f"labels {labels.min()}..{labels.max()} do not fit num_classes={self.num_classes}")
        frames = images.shape[2] if images.ndim == 5 else None
        # timm mixes in place and knows one axis between batch and height.
        mixed = images.clone() if frames is None else rearrange(images, "b c t h w -> b (c t) h w").clone()
        if generator is None:
            mixed, target = self._mixup(mixed, labels)
        else:
            with preserved_random_state():
                np.random.seed(generator.integers(2**32))
                mixed, target = self._mixup(mixed, labels)
        if frames is not None:
            mixed = rearrange(mixed, "b (c t) h w -> b c t h w", t=frames)
        return {**batch, self.key: mixed, "target": target}
