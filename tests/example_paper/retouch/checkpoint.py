"""The authors' layout of the restorer's weights, and the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Entries of their files that have no place in ours, with the reason.
DROPPED = {"netD.*": "their critic has another architecture"}


def convert(state: Mapping[str, Tensor], target: Any = None) -> dict[str, Tensor]:
    """`netG.conv3.weight` becomes `layers.2.weight`, `netG.out.bias` becomes `head.bias`."""
    ours = {}
    for name, value in state.items():
        if found := re.fullmatch(r"netG\.conv(\d+)\.(weight|bias)", name):
            ours[f"layers.{int(found[1]) - 1}.{found[2]}"] = value
        elif name.startswith("netG.out."):
            ours[name.replace("netG.out.", "head.")] = value
    return ours


def revert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    theirs = {}
    for name, value in state.items():
        if found := re.fullmatch(r"layers\.(\d+)\.(weight|bias)", name):
            theirs[f"netG.conv{int(found[1]) + 1}.{found[2]}"] = value
        elif name.startswith("head."):
            theirs[name.replace("head.", "netG.out.")] = value
    return theirs
