"""The residual block of both VQGANs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("input", "official_output")


def group_norm(dim: int) -> nn.GroupNorm:
    """The norm of both VQGANs.

    Raises:
        ValueError: a number of channels that 32 groups do not divide.
    """
    if dim % 32:
        raise ValueError(f"{dim} channels cannot be normalised in 32 groups: choose widths that 32 divides")
    return nn.GroupNorm(32, dim, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, beside a shortcut.

    Args:
        in_dim: channels read.
        out_dim: channels given; None: as many.
        bias: whether convolutions have a bias (VQGAN yes, MaskGIT no).
        dropout: before the second convolution.
        shortcut: where widths differ, what the 1x1 convolution of the shortcut reads: the `input`, or
            (`official_output`) the block's own result h, as in MaskGIT's code, where `h + W h` comes out and the input
            is only seen through the convolutions. The paper's parameter counts fit that reading.

    Raises:
        ValueError: an unknown shortcut.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        shortcut: str = "input",
    ) -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise ValueError(f"unknown shortcut {shortcut!r}: use {', '.join(SHORTCUTS)}")
        out_dim = in_dim if out_dim is None else out_dim
        self.reads_output = shortcut == "official_output"
        self.norm1 = group_norm(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=bias)
        source = out_dim if self.reads_output else in_dim
        self.shortcut = nn.Conv2d(source, out_dim, 1, bias=bias) if in_dim != out_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, H, W)` to `(B, out, H, W)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.shortcut is None:
            return x + h
        return h + self.shortcut(h if self.reads_output else x)
