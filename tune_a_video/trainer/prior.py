"""Prior preservation (DreamBooth, Ruiz et al. 2023): images of the untuned model are trained on beside the clip.

They keep the words that the clip does not show from drifting with those that it shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tune_a_video.interop.pipeline import TuneAVideoPipeline


@dataclass(frozen=True)
class Prior:
    """What the untuned model is asked for.

    prompts: of its images; None: the clip's own caption.
    samples: images of each prompt.
    steps, guidance_scale: of sampling them.
    seed: of their noise.

    Raises:
        ValueError: an unknown field, numbers below 1, or prompts that are no texts.
    """

    prompts: Sequence[str] | None = None
    samples: int = 4
    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.steps < 1:
            raise ValueError(f"prior: samples={self.samples}, steps={self.steps}: at least 1")
        texts = self.prompts
        if texts is not None and (isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts)):
            raise ValueError(f"prior: prompts={texts!r}: a list of texts, or null for the clip's caption")

    @classmethod
    def of(cls, value: Mapping[str, Any] | None) -> Prior:
        """From a mapping of the fields."""
        unknown = sorted(set(value or {}) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"prior has no {', '.join(unknown)}: {', '.join(f.name for f in dataclasses.fields(cls))}")
        return cls(**(value or {}))

    def draw(self, pipe: TuneAVideoPipeline, caption: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Latents of images `(N, c, 1, h, w)` and their texts `(N, L, d)`.

        Args:
            pipe: the untuned model.
            caption: for want of prompts.
            size: h and w.
        """
        prompts = [text for text in self.prompts or [caption] for _ in range(self.samples)]
        channels = pipe.unet.config.in_channels
        generator = torch.Generator().manual_seed(self.seed)
        images = []
        for prompt in prompts:  # one by one: memory is the clip's
            noise = torch.randn(1, channels, 1, *size, generator=generator)
            options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
            images.append(pipe(prompt, latents=noise, output_type="latent", **options).videos)
        return torch.cat(images), pipe.encode_prompt(prompts)


@contextlib.contextmanager
def untuned(network: nn.Module, names: Sequence[str], base: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with the parameters that it had before it was tuned, in place.

    Args:
        network: that is tuned.
        names: of the parameters that tuning changes.
        base: their values before; low-rank updates have none, and are left out.
    """
    own = {name: network.get_parameter(name) for name in names}
    tuned = {name: parameter.detach().clone() for name, parameter in own.items()}
    mode = network.training
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(base[name] if name in base else torch.zeros_like(parameter))
        network.eval()
        try:
            yield
        finally:
            network.train(mode)
            for name, parameter in own.items():
                parameter.copy_(tuned[name])
