"""The video network leaves Python right: `torch.export`, ONNX by both exporters, `torch.jit.trace`, in any batch."""

from collections.abc import Callable

import pytest
import torch
from random_sd import UNET
from torch import Tensor

from tests.exported import WAYS, check
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


def network(**options: object) -> TuneAVideoUNet:
    """Weights that make every part count: nothing is at its start, no output is zero."""
    torch.manual_seed(1)
    made = TuneAVideoUNet(**{**UNET, **options}).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return made


def inputs(frames: int = 3, size: tuple[int, int] = (8, 8)) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (
        torch.randn(batch, 4, frames, *size),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, 5, 16),
    )


def sample(model: TuneAVideoUNet, *given: Tensor) -> Tensor:
    return model(*given, return_dict=False)[0]


@pytest.mark.parametrize("way", WAYS)
def test_the_network_leaves_python_as_it_is(way: str, tmp_path) -> None:
    check(way, network(), inputs(), tmp_path, call=sample)


@pytest.mark.parametrize("way", ["trace", "export"])
@pytest.mark.parametrize("name", OPTIONS)
def test_its_options_do_too(name: str, way: str, tmp_path) -> None:
    check(way, network(**ONE_LEVEL, **OPTIONS[name]), inputs(4), tmp_path, call=sample)


def test_a_record_serves_one_video_and_many(tmp_path) -> None:
    for made, asked in ((1, 3), (2, 1)):
        check("trace", network(), inputs(2), tmp_path, call=sample, made=made, asked=asked)
