"""Every model leaves Python right: `torch.export`, ONNX by both exporters, `torch.jit.trace`, at another batch size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stvit.models import LVViT, SemanticTokenViT, STViTRSwin, STViTSwin, SwinTransformer
from stvit.models.recovery_vit import RecoveryViT
from stvit.models.segmentation import FCNHead, SegmentationNetwork, UperHead
from stvit.models.small import SmallSemanticTokenViT
from stvit.models.stvit_video import STViTVideoSwin
from stvit.models.video_swin import VideoSwin
from tests.exported import WAYS, check

VIT = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=16, depth=4, num_heads=2, base_depth=1, token_grid=3)
SWIN = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), num_classes=5)
R_SWIN = SWIN | dict(depths=(1, 1, 6, 1), layer_scale=0.1)
CLIP = dict(clip_size=(4, 32, 32), num_classes=5, embed_dim=8, num_heads=(1, 2), depths=(2, 2), window=(2, 7, 7))


def vit(**options: object) -> Callable[[], nn.Module]:
    return lambda: SemanticTokenViT(**(VIT | options))


def reduced(tokens: str, class_token: bool = False, **options: object) -> Callable[[], nn.Module]:
    return vit(tokens=tokens, class_token=class_token, token_options=options)


def segmentation() -> nn.Module:
    backbone = STViTRSwin(**R_SWIN, features_only=True)
    dims = (8, 16, 32, 64)
    return SegmentationNetwork(backbone, UperHead(dims, 4, 8), FCNHead(dims[2], 4, 8))


# One of every class goes through the slow dynamo exporter too. Sizes: of the image, or frames and size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (vit(), (32, 32)),  # 8 x 8 patches pooled to 3 x 3: padded by one, which is odd
    "swin": (lambda: SwinTransformer(**SWIN), (96, 64)),
    "stvit_swin": (lambda: STViTSwin(**SWIN | dict(depths=(1, 1, 4, 1))), (96, 160)),
    "r_swin": (lambda: STViTRSwin(**R_SWIN), (112, 112)),
    "dense": (lambda: STViTRSwin(**R_SWIN, features_only=True), (160, 224)),
    "recovery_vit": (
        lambda: RecoveryViT(img_size=32, patch_size=4, embed_dim=16, num_heads=2, units=1, token_grid=3),
        (32, 32),
    ),
    "small": (lambda: SmallSemanticTokenViT(embed_dim=16), (28, 28)),
    "segmentation": (segmentation, (96, 128)),
    "video_swin": (lambda: VideoSwin(**CLIP), (4, 32, 64)),
    "stvit_video": (lambda: STViTVideoSwin(**CLIP | dict(base_depth=0, depths=(2, 1))), (4, 32, 64)),
    "tome": (reduced("tome", r=6), (32, 32)),
    "lvvit": (lambda: LVViT(**VIT), (32, 32)),
}
MORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit_other_size": (vit(), (40, 52)),
    "vit_max": (vit(pool="max", token_grid=(2, 3)), (36, 28)),
    "vit_avg": (vit(pool="avg"), (32, 32)),
    "vit_relative": (vit(token_position="relative", global_in="key"), (32, 32)),
    "vit_conv": (vit(token_position="conv", stem="conv", use_global=False), (32, 32)),
    "lvvit_semantic": (lambda: LVViT(**VIT, tokens="semantic"), (40, 32)),
    "vit_all": (vit(tokens="all", class_token=True), (32, 32)),
    "pooled": (vit(tokens="pooled"), (32, 32)),
    "random": (reduced("random", num_tokens=20), (32, 32)),
    "tome_class": (reduced("tome", True, r=6, inflect=-1.0), (36, 32)),
    "evit": (reduced("evit", True, keep_rate=0.5), (32, 32)),
    "topk": (reduced("topk", keep_rate=0.5), (32, 32)),
    "dynamicvit": (reduced("dynamicvit", keep_ratio=0.6), (32, 32)),
    "ats": (reduced("ats", True, keep_rate=0.5), (32, 32)),
    "swin_192x224": (lambda: SwinTransformer(**SWIN), (192, 224)),
    "swin_dense": (lambda: SwinTransformer(**SWIN, features_only=True, stem="conv"), (100, 75)),
    "stvit_swin_9": (lambda: STViTSwin(**SWIN | dict(depths=(1, 1, 4, 1)), per_window=3), (96, 160)),
    "stvit_swin_options": (
        lambda: STViTSwin(
            **SWIN | dict(depths=(1, 1, 4, 1)), use_global=True, relative_pos=True, use_conv_pos=True, learned_pos=True,
            key_windows=(10, None), pool="weighted", img_size=224,
        ),
        (192, 224),
    ),
    "r_swin_options": (
        lambda: STViTRSwin(
            **R_SWIN, use_global=True, relative_pos=True, use_conv_pos=True, stem="patch", pool="weighted_offset"
        ),
        (192, 224),
    ),
    "r_swin_reuse": (lambda: STViTRSwin(**R_SWIN, recover="reuse", per_window=4), (192, 160)),
    "r_swin_none": (lambda: STViTRSwin(**R_SWIN, recover="none", tokens="random"), (192, 224)),
    "dense_official": (lambda: STViTRSwin(**R_SWIN, features_only=True, mask_mode="official"), (160, 224)),
    "dense_gather": (
        lambda: STViTRSwin(**R_SWIN, features_only=True, attn_impl="gather", per_window=4, pool="avg"),
        (160, 240),
    ),
    "video_swin_padded": (lambda: VideoSwin(**CLIP, mask_padding=False), (5, 60, 60)),
    "stvit_video_other": (
        lambda: STViTVideoSwin(**CLIP | dict(base_depth=1, depths=(3, 1)), pool="weighted", key_windows=(10, 14)),
        (5, 60, 60),
    ),
}  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """Weights that make every part count: positions, norms, scales and batch statistics are not at their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            noise = torch.randn(value.shape, generator=generator)
            value.add_(0.2 * noise) if value.ndim < 2 else value.copy_(noise / math.sqrt(value[0].numel()))
    return model.eval()


def inputs(model: nn.Module, size: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    chans = 1 if isinstance(model, SmallSemanticTokenViT) else 3
    return lambda batch: (torch.randn(batch, chans, *size),)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_models_leave_python_as_they_are(name: str, way: str, tmp_path) -> None:
    build, size = MODELS[name]
    model = lively(build())
    check(way, model, inputs(model, size), tmp_path)


@pytest.mark.parametrize("name", MORE)
def test_their_options_do_too(name: str, tmp_path) -> None:
    """By the exporter that records numbers: it asks the most of a model, and is quick."""
    build, size = MORE[name]
    model = lively(build())
    check("legacy", model, inputs(model, size), tmp_path)


@pytest.mark.parametrize("name", ["dynamicvit", "stvit_swin_options", "r_swin_none", "dense_official"])
def test_options_whose_batch_might_be_frozen_do_too(name: str, tmp_path) -> None:
    build, size = MORE[name]
    model = lively(build())
    check("export", model, inputs(model, size), tmp_path)


def test_a_record_takes_the_input_that_it_was_made_of(tmp_path) -> None:
    """And batches of one, from which and to which a record is often made."""
    model = lively(MODELS["stvit_swin"][0]())
    for made, asked in ((2, 2), (2, 1), (1, 3)):
        check("trace", model, inputs(model, (96, 160)), tmp_path, made=made, asked=asked)
