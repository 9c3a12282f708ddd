"""The network of tune_a_video for `tests/test_model_contract.py`: every kind of attention, position and norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.contract import Subject
from tests.tune_a_video.random_sd import UNET
from tune_a_video.models import TuneAVideoUNet

ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
OPTIONS = {
    "rotary": {"temporal": {"position": "rotary", "conv": "lora"}, "group_norm": "per_frame"},
    "sinusoidal": {"temporal": {"position": "sinusoidal", "conv": "conv3"}, "attention": [0, "first", 1]},
    "full": {"attention": "full", "use_linear_projection": True},
    "window": {"attention": "window:1", "upcast_attention": True},
    "causal": {"attention": "causal", "temporal": {"enabled": False}},
    "first": {"attention": "first", "attention_head_dim": 4},
}


def network(**options: object) -> Callable[[], TuneAVideoUNet]:
    """Weights that make every part count: nothing is at its start, no output is zero."""

    def build() -> TuneAVideoUNet:
        torch.manual_seed(1)
        made = TuneAVideoUNet(**{**UNET, **options})
        with torch.no_grad():
            for value in made.parameters():
                value.add_(0.2 * torch.randn_like(value))
        return made

    return build


def inputs(frames: int = 3, size: tuple[int, int] = (8, 8)) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (
        torch.randn(batch, 4, frames, *size),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, 5, 16),
    )


def sample(model: TuneAVideoUNet, *given: Tensor) -> Tensor:
    return model(*given, return_dict=False)[0]


SUBJECTS = {
    "network": Subject(network(), inputs(), sample, ways=("legacy", "trace"), slow=("export", "dynamo"), batch=2),
    "compiled": Subject(
        network(**{**ONE_LEVEL, "mid_block_type": None}), inputs(), sample, ways=("compile",), quick=False
    ),
    # One level has all exchanged modules, and is quick to record.
    **{
        name: Subject(
            network(**ONE_LEVEL, **options),
            inputs(4),
            sample,
            ways=("dynamo" if name == "rotary" else "export",),
            slow=("trace", "export" if name == "rotary" else "dynamo"),
            batch=2,
        )
        for name, options in OPTIONS.items()
    },
}
ELSEWHERE: tuple[str, ...] = ()
