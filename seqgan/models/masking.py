"""How many codes are masked, and which: schedules of parallel decoding, and masks of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "uniform", "square", "cubic", "log", "exp", "powX")
_POWERS = {"linear": 1.0, "uniform": 1.0, "square": 2.0, "cubic": 3.0}


def mask_ratio(schedule: str, progress: Tensor, total: int | Tensor) -> Tensor:
    """Share of codes that stay masked at `progress` in (0, 1], within [1e-6, 1].

    Computed in float32: counts of masked codes are rounded down, and with another precision some come out one higher.

    Args:
        schedule: `cosine`; `linear` (or `uniform`), `square`, `cubic`, or `pow` and an exponent, `pow2.5`: one minus
            that power of progress; `log`; `exp`.
        progress: any shape.
        total: number of codes that were masked at the start, which `log` and `exp` depend on; a tensor that
            broadcasts with progress where it differs between images.

    Raises:
        ValueError: an unknown schedule.
    """
    progress = progress.float()
    bits = torch.as_tensor(total, dtype=torch.float32, device=progress.device).clamp_min(2).log2()
    if schedule == "cosine":
        ratio = torch.cos(math.pi / 2 * progress)
    elif schedule == "log":
        ratio = -torch.log2(progress) / bits
    elif schedule == "exp":
        ratio = 1 - torch.exp2(-bits * (1 - progress))
    else:
        ratio = 1 - progress ** _power(schedule)
    return ratio.clamp(1e-6, 1.0)


def _power(schedule: str) -> float:
    try:
        return _POWERS[schedule] if schedule in _POWERS else float(schedule.removeprefix("pow"))
    except ValueError:
        raise ValueError(f"unknown mask schedule {schedule!r}: use {', '.join(SCHEDULES)}") from None


def mask_count(schedule: str, step: int, steps: int, masked: Tensor, unknown: Tensor) -> Tensor:
    """How many codes are masked again after `step` (from 0) of `steps`.

    Args:
        schedule: see `mask_ratio`.
        step: of decoding.
        steps: of decoding.
        masked: `(B,)`, how many are masked now; at least one of them becomes known.
        unknown: `(B,)`, how many were masked at the start.

    Returns:
        `(B,)` int64, at least one.
    """
    progress = torch.tensor((step + 1) / steps, dtype=torch.float32, device=unknown.device)
    ratio = mask_ratio(schedule, progress, unknown)
    count = (unknown.float() * ratio).floor().long()
    return torch.minimum(count, masked - 1).clamp_min(1)


def training_mask(ratio: Tensor, score: Tensor, min_rate: float = 0.0) -> Tensor:
    """Masks of training: a cosine share of the positions, those of smallest score.

    Args:
        ratio: `(B,)`, uniform in [0, 1].
        score: `(B, N)`, uniform: a random order of the positions.
        min_rate: a share below it is raised to it.

    Returns:
        `(B, N)`, True where masked; at least one per row.
    """
    rate = torch.cos(math.pi / 2 * ratio.float()).clamp_min(min_rate)
    count = (rate * score.shape[1]).floor().long().clamp(1, score.shape[1])
    rank = score.argsort(dim=1).argsort(dim=1)
    return rank < count[:, None]
