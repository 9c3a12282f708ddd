"""Tiny backbones of the three families, and one method of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petl


def tiny_vit(**options: object) -> VisionTransformer:
    return VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, **options}
    )


def tiny_swin() -> SwinTransformer:
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 2), num_classes=5
    )


def tiny_convnext(**options: object) -> ConvNeXt:
    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=5, **options)


BACKBONES: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "swin": tiny_swin, "convnext": tiny_convnext}

METHODS: dict[str, Callable[[], petl.models.methods.Method]] = {
    "linear": petl.Linear,
    "full": petl.Full,
    "partial": petl.Partial,
    "bitfit": petl.BitFit,
    "ln": petl.LNTune,
    "ln_shift": lambda: petl.LNTune("norm_shift"),
    "vpt_shallow": lambda: petl.VPT(3, deep=False),
    "vpt_deep": lambda: petl.VPT(3),
    "adapter": lambda: petl.Adapter(4),
    "adapter_both": lambda: petl.Adapter(4, "both", act="quick_gelu", after_drop_path=True),
    "adaptformer": lambda: petl.AdaptFormer(4),
    "adaptformer_ln": lambda: petl.AdaptFormer(4, norm=True),
    "lora": lambda: petl.LoRA(2),
    "lora_packed": lambda: petl.LoRA(2, targets=("q", "k", "v"), packed=True),
    "lora_all": lambda: petl.LoRA(2, alpha=6, targets=("k", "proj", "fc1", "fc2")),
    "noah": lambda: petl.NOAHSubnet([2, 0], [0, 3], [3, 1]),
    "ssf": petl.SSF,
    "fact_tt": lambda: petl.FacT("tt", 4),
    "fact_tk": lambda: petl.FacT("tk", 4),
    "convpass": lambda: petl.Convpass(4),
    "repadapter": lambda: petl.RepAdapter(4),
    "sct": lambda: petl.SCT(k=0.25),
    "sct_zero": lambda: petl.SCT(k=0.25, init="zero"),
    "sct_mlp": lambda: petl.SCT(k=0.25, site="mlp"),
    "sct_block": lambda: petl.SCT(k=0.25, site="block", form="diagonal"),
    "sct_qv": lambda: petl.SCT(k=0.25, site="qv"),
    "ttc": lambda: petl.TTC(k=0.25, form="lowrank", rank=2),
    "ttc_norm": lambda: petl.TTC(k=0.25, tune_norm=True, form="mlp", rank=3),
    "joint": lambda: petl.Together([petl.LNTune(), petl.TTC(k=0.25)]),
}
#: What a backbone has no place for, by family.
NO_PLACE = {
    "vit": set(),
    "swin": {"vpt_shallow", "vpt_deep", "noah", "fact_tt", "fact_tk"},
    "convnext": {
        *("vpt_shallow", "vpt_deep", "noah", "fact_tt", "fact_tk", "adapter_both", "adaptformer", "adaptformer_ln"),
        *("lora", "lora_packed", "lora_all", "convpass", "repadapter", "sct", "sct_zero", "sct_qv", "ttc", "ttc_norm"),
        "joint",
    },
}
PAIRS = [(family, name) for family in BACKBONES for name in METHODS if name not in NO_PLACE[family]]


def tuned(family: str, name: str, seed: int = 0) -> petl.PetlModel:
    """A method in a backbone, of fixed weights, with every added tensor off its initial value."""
    torch.manual_seed(seed)
    return petl.inject(BACKBONES[family](), METHODS[name](), num_classes=5)


def disturbed(model: petl.PetlModel, seed: int = 1) -> petl.PetlModel:
    """The model with all that it trains moved a little, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
