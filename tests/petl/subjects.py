"""The networks of petl for `tests/test_model_contract.py`: a backbone of every family with a method of every kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import petl
from tests.contract import Subject, images
from tests.petl.backbones import BACKBONES, METHODS, disturbed

# `make test` takes one graph of every kind of place through every way; the others have the same hooks.
USUAL = ("export", "legacy")
REST = ("dynamo", "trace")


def network(family: str, name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = disturbed(petl.inject(BACKBONES[family](), METHODS[name](), num_classes=5))
        return model

    return build


def subject(family: str, name: str, ways: tuple[str, ...] = (), slow: tuple[str, ...] = ()) -> Subject:
    return Subject(network(family, name), images(32, 32), ways=ways, slow=slow)


SUBJECTS = {
    "ttc": subject("vit", "sct", ("compile", "train", *USUAL, *REST)),
    "qv": subject("vit", "sct_qv", ("compile", "legacy"), ("dynamo",)),
    "lora": subject("vit", "lora", ("compile", *USUAL), REST),
    "fact": subject("vit", "fact_tk", ("compile", "legacy"), ("export", *REST)),
    "convpass": subject("vit", "convpass", ("compile", "export"), ("legacy", *REST)),
    "vpt": subject("vit", "vpt_deep", ("compile", *USUAL), REST),
    "adaptformer": subject("vit", "adaptformer_ln", ("compile",), (*USUAL, *REST)),
    "repadapter": subject("vit", "repadapter", ("legacy",), ("export", *REST)),
    "ssf": subject("vit", "ssf", ("trace",), (*USUAL, "dynamo")),
    "noah": subject("vit", "noah", (), USUAL),
    "swin": subject("swin", "ttc", ("export",), ("legacy", *REST)),
    "convnext": subject("convnext", "sct_block", ("export",), ("legacy", *REST)),
}
# A part of the networks above; and several of them in one, which test_petl_packing.py holds against each alone.
ELSEWHERE: tuple[str, ...] = ("ChannelTuning", "PackedModel")
