"""The models of stvit for `tests/test_model_contract.py`: every option that changes what is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stvit.models import LVViT, SemanticTokenViT, STViTRSwin, STViTSwin, SwinTransformer
from stvit.models.recovery_vit import RecoveryViT
from stvit.models.segmentation import FCNHead, SegmentationNetwork, UperHead
from stvit.models.small import SmallSemanticTokenViT
from stvit.models.stvit_video import STViTVideoSwin
from stvit.models.video_swin import VideoSwin
from tests.contract import Subject, images, squares
from tests.stvit import tiny_reducers, tiny_vit
from tests.stvit.tiny_swin import VARIANTS as SWINS
from tests.stvit.tiny_swin import tiny as tiny_swin

VIT = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=16, depth=4, num_heads=2, base_depth=1, token_grid=3)
SWIN = dict(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), num_classes=5)
STVIT = SWIN | dict(depths=(1, 1, 4, 1))
R_SWIN = SWIN | dict(depths=(1, 1, 6, 1), layer_scale=0.1)
CLIP = dict(clip_size=(4, 32, 32), num_classes=5, embed_dim=8, num_heads=(1, 2), depths=(2, 2), window=(2, 7, 7))
VIDEO = dict(CLIP, depths=(2, 4, 2), num_heads=(2, 2, 4), base_depth=1, drop_path_rate=0.0)
# `make test` takes each graph through torch.export and a trace (ONNX by the legacy exporter); the dynamo exporter, ten
# times as dear as these, takes one model of every kind.
USUAL = ("export", "legacy")
REST = ("dynamo", "trace")
BOTH = ("dynamo", "legacy")
BARE = ("export", "trace")


def enlivened(model: nn.Module) -> nn.Module:
    """Weights that make every part count: positions, norms, scales and batch statistics are not at their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            noise = torch.randn(value.shape, generator=generator)
            value.add_(0.2 * noise) if value.ndim < 2 else value.copy_(noise / math.sqrt(value[0].numel()))
    return model


def lively(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: enlivened(build())


def vit(**options: object) -> Callable[[], nn.Module]:
    return lively(lambda: SemanticTokenViT(**(VIT | options)))


def reduced(tokens: str, class_token: bool = False, **options: object) -> Callable[[], nn.Module]:
    return vit(tokens=tokens, class_token=class_token, token_options=options)


def swin(cls: type[nn.Module], **options: object) -> Callable[[], nn.Module]:
    return lively(lambda: cls(**options))


def with_shares(model: nn.Module, out: Any) -> Tensor:
    """The logits and what reducers ask of training."""
    return squares(model, out) + sum(model.auxiliary_losses().values())


def segmentation() -> nn.Module:
    backbone = STViTRSwin(**R_SWIN, features_only=True)
    dims = (8, 16, 32, 64)
    return SegmentationNetwork(backbone, UperHead(dims, 4, 8), FCNHead(dims[2], 4, 8))


# What is dear, once for every graph. Maps of the third stage at 240 x 270 have 15 x 17 tokens: windows are attended row
# by row, and both sides are padded.
TRACED = {
    "vit": Subject(vit(), images(32, 32), ways=("compile", "train", *BOTH, "trace"), slow=("export",)),
    "swin": Subject(swin(SwinTransformer, **SWIN), images(96, 64), ways=USUAL, slow=REST),
    "swin_padded": Subject(swin(SwinTransformer, **SWIN), images(240, 270), ways=("compile", "export")),
    "stvit_swin": Subject(swin(STViTSwin, **STVIT), images(96, 160), ways=("trace", *BOTH), slow=("export",)),
    "stvit_padded": Subject(swin(STViTSwin, **STVIT), images(240, 270), ways=("compile",), slow=("export",)),
    "r_swin": Subject(swin(STViTRSwin, **R_SWIN), images(112, 112), ways=USUAL, slow=("compile", *REST)),
    "dense": Subject(swin(STViTRSwin, **R_SWIN, features_only=True), images(160, 224), ways=USUAL, slow=REST),
    "dense_padded": Subject(
        swin(STViTRSwin, **R_SWIN, features_only=True, drop_path_rate=0.1),
        images(240, 270), ways=("compile",), slow=("train", "export"),
    ),
    "dense_official": Subject(
        swin(STViTRSwin, **R_SWIN, features_only=True, mask_mode="official"),
        images(240, 270), ways=("export", "legacy"), slow=("compile",),
    ),
    "recovery_vit": Subject(
        lively(lambda: RecoveryViT(img_size=32, patch_size=4, embed_dim=16, num_heads=2, units=1, token_grid=3)),
        images(32, 32), ways=USUAL, slow=("compile", *REST),
    ),
    "small": Subject(
        lively(lambda: SmallSemanticTokenViT(embed_dim=16)), images(28, 28, chans=1), ways=USUAL, slow=REST
    ),
    "segmentation": Subject(  # the auxiliary head has a loss of its own in training
        lively(segmentation), images(96, 128), ways=BOTH, slow=BARE, idle=("auxiliary_head.",)
    ),
    "video_swin": Subject(lively(lambda: VideoSwin(**CLIP)), images(4, 32, 64), ways=USUAL, slow=("compile", *REST)),
    "stvit_video": Subject(
        lively(lambda: STViTVideoSwin(**CLIP | dict(base_depth=0, depths=(2, 1)))),
        images(4, 32, 64), ways=("compile", *BOTH), slow=BARE,
    ),
    "lvvit": Subject(lively(lambda: LVViT(**VIT)), images(32, 32), ways=USUAL, slow=("compile", *REST)),
    "tome": Subject(reduced("tome", r=6), images(32, 32), loss=with_shares, ways=("compile", *BOTH), slow=BARE),
}  # fmt: skip
# Further options: recorded by the legacy exporter, which asks the most of a model and is quick; compiled where they are
# other operators. One model has several that do not touch each other.
OPTIONS = {
    "vit_other_size": Subject(vit(), images(40, 52), ways=("legacy",)),
    "vit_max": Subject(
        vit(pool="max", token_grid=(2, 3), token_position="learned", global_in="key"),
        images(36, 28), ways=("compile", "legacy"),
    ),
    "vit_avg": Subject(
        vit(pool="avg", token_position="conv", stem="conv", use_global=False),
        images(32, 32), ways=("compile", "legacy"),
    ),
    "vit_relative": Subject(
        vit(token_position="relative", pool="none"), images(32, 32), ways=("compile", "legacy")
    ),
    "lvvit_semantic": Subject(
        lively(lambda: LVViT(**VIT, tokens="semantic")), images(40, 32), ways=("compile", "legacy")
    ),
    "vit_all": Subject(vit(tokens="all", class_token=True), images(32, 32), ways=("compile", "legacy")),
    "pooled": Subject(vit(tokens="pooled"), images(32, 32), ways=("compile", "legacy")),
    "random": Subject(reduced("random", num_tokens=20), images(32, 32), ways=("compile", "legacy"), slow=("train",)),
    "tome_class": Subject(
        reduced("tome", True, r=6, inflect=-1.0), images(36, 32), ways=("legacy",), slow=("train",)
    ),
    "evit": Subject(reduced("evit", True, keep_rate=0.5), images(32, 32), ways=("compile", "legacy")),
    "topk": Subject(reduced("topk", keep_rate=0.5), images(32, 32), ways=("compile", "legacy")),
    "dynamicvit": Subject(
        reduced("dynamicvit", True, keep_ratio=0.6),
        images(32, 32), loss=with_shares, ways=("compile", "train", "legacy", "export"),
    ),
    "ats": Subject(reduced("ats", True, keep_rate=0.5), images(32, 32), ways=("legacy",)),
    "swin_192x224": Subject(swin(SwinTransformer, **SWIN), images(192, 224), ways=("legacy",)),
    "swin_dense": Subject(
        swin(SwinTransformer, **SWIN, features_only=True, stem="conv"), images(100, 75), ways=("legacy",)
    ),
    "stvit_swin_9": Subject(swin(STViTSwin, **STVIT, per_window=3), images(96, 160), ways=("legacy",)),
    "stvit_swin_options": Subject(
        swin(
            STViTSwin, **STVIT, use_global=True, relative_pos=True, use_conv_pos=True, learned_pos=True,
            key_windows=(10, None), pool="weighted", img_size=224,
        ),
        images(192, 224), ways=("legacy", "export"),
    ),
    "r_swin_options": Subject(
        swin(
            STViTRSwin, **R_SWIN, use_global=True, relative_pos=True, use_conv_pos=True, stem="patch",
            pool="weighted_offset",
        ),
        images(192, 224), ways=("legacy",),
    ),
    "r_swin_reuse": Subject(
        swin(STViTRSwin, **R_SWIN, recover="reuse", per_window=4), images(192, 160), ways=("legacy",)
    ),
    "r_swin_none": Subject(
        swin(STViTRSwin, **R_SWIN, recover="none", tokens="random"),
        images(192, 224), ways=("legacy", "export"), slow=("compile",),
    ),
    "dense_gather": Subject(
        swin(STViTRSwin, **R_SWIN, features_only=True, attn_impl="gather", per_window=4, pool="avg"),
        images(160, 240), ways=("legacy",),
    ),
    "video_swin_padded": Subject(
        lively(lambda: VideoSwin(**CLIP, mask_padding=False)), images(5, 60, 60), ways=("legacy",)
    ),
    "stvit_video_other": Subject(
        lively(
            lambda: STViTVideoSwin(
                **CLIP | dict(base_depth=1, depths=(3, 1)), pool="weighted", key_windows=(10, 14)
            )
        ),
        images(5, 60, 60), ways=("legacy",),
    ),
}  # fmt: skip
# Their layers are asked what is cheap below, apart from these.
WHOLE = ("recovery_vit", "small", "segmentation")
DEAR = {name: replace(subject, quick=name in WHOLE) for name, subject in {**TRACED, **OPTIONS}.items()}
# What is cheap, of every option by itself, with the weights that a model begins with.
QUICK = {
    **{
        f"vit/{name}": Subject(lambda options=options: tiny_vit.tiny(**options), images(32, 32))
        for name, options in tiny_vit.VARIANTS.items()
    },
    **{
        f"reduced/{method}_{kind}": Subject(
            lambda method=method, kind=kind: tiny_reducers.lively(tiny_reducers.build(method, kind == "class")),
            images(32, 32), loss=with_shares,
        )
        for method in tiny_reducers.METHODS
        for kind in ("class", "mean")
    },
    **{f"swin/{name}": Subject(lambda name=name: tiny_swin(name), images(112, 150), batch=2) for name in SWINS},
    "video/video_swin": Subject(lively(lambda: VideoSwin(**CLIP)), images(9, 36, 60), batch=2),
    "video/stvit": Subject(lively(lambda: STViTVideoSwin(**VIDEO)), images(9, 36, 60), batch=2),
}  # fmt: skip
SUBJECTS = {**DEAR, **QUICK}
# Parts that stand in none of the models above, with their own tests.
ELSEWHERE: tuple[str, ...] = ()
