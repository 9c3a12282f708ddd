"""Repeatable slot noise in evaluation.

The released model samples its slots also when it is tested, so its results change from run to run. Here the noise of a
picture follows from a seed, its sample id and the number of the draw, whatever batch or process it comes in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_noise(sample_ids: Sequence[object], num_slots: int, dim: int, seed: int = 0, draw: int = 0) -> Tensor:
    """Standard normal noise `(B, K, D)` on the CPU, a function of seed, sample and draw alone.

    The first k slots of a sample have the same noise whatever K is.
    """
    noise = []
    for sample in sample_ids:
        digest = hashlib.blake2b(f"{seed}/{draw}/{sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        noise.append(torch.randn(num_slots, dim, generator=generator, device="cpu"))
    return torch.stack(noise)
