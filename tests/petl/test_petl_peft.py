"""Deltas in peft's layout, read back by peft itself."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import petl
from tests.petl.backbones import disturbed, tiny_vit


@pytest.mark.parametrize(
    "method",
    [
        petl.LoRA(2),
        petl.LoRA(3, alpha=6, targets=("q", "k", "v"), packed=True),
        petl.LoRA(2, alpha=8, targets=("q", "v", "proj", "fc1", "fc2")),
        petl.LoRA([1, 3], targets=("v", "fc2")),
        petl.LNTune(),
    ],
)
def test_peft_reads_it(method: petl.models.methods.Method, images: torch.Tensor, tmp_path) -> None:
    torch.manual_seed(0)
    base = tiny_vit()
    model = disturbed(petl.inject(copy.deepcopy(base), method)).eval()
    petl.export_peft(model, tmp_path, base="tiny")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)


def test_other_methods_are_refused(tmp_path) -> None:
    with pytest.raises(petl.DeltaError, match="peft has no SSF"):
        petl.export_peft(petl.inject(tiny_vit(), petl.SSF()), tmp_path)
    with pytest.raises(petl.DeltaError, match="norm_shift alone"):
        petl.export_peft(petl.inject(tiny_vit(), petl.LNTune("norm_shift")), tmp_path)
    assert not list(tmp_path.iterdir())
