"""Noise that follows from a sample's name, whatever batch or process the sample comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_noise(sample_ids: Sequence[object], *shape: int, seed: int = 0, draw: int = 0) -> Tensor:
    """Standard normal noise `(B, *shape)` on the CPU, a function of seed, sample and draw alone.

    A sample has the same first values however long the first axis of `shape` is.

    Args:
        sample_ids: names of the B samples.
        shape: of one sample's noise.
        seed: other seeds give other noise.
        draw: number of the draw, where a sample is drawn several times.
    """
    noise = []
    for sample in sample_ids:
        digest = hashlib.blake2b(f"{seed}/{draw}/{sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        noise.append(torch.randn(*shape, generator=generator, device="cpu"))
    return torch.stack(noise)
