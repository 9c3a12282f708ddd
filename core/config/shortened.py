"""Runs that are shorter than their config says: `fast_dev_run`, `limit_batches` and `overfit_batches` of ``runtime``.

They are Lightning's: does everything run, does it run on less data, can the model learn a few batches by heart. What
such a run finds is no evidence: its ``result.json`` has the status "trial", which tables, claims, ablations and
``resume=auto`` pass over.

==================  ===================================================================================================
``fast_dev_run``    N steps of training as one epoch, and N batches of every evaluation (true: 1). Rates are those of
                    the first steps of the whole run. The sanity pass is left out and no cache is filled.
``limit_batches``   of every epoch, or evaluation, N batches of each process, or a share of them. Schedules are those
                    of the shorter run.
``overfit_batches`` every epoch has the same first N batches (or a share of them) in the same order, and every sample
                    the same augmentation. Evaluations take the first N batches of their own sets.
==================  ===================================================================================================

Where several are given, the smallest holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.config.kinds import Count, Share

SPLITS = ("train", "val", "test")
TRIAL = "trial"  # status in result.json
Batches = Count | Share | None  # a number of batches, or a share of a pass
KEYS = ("fast_dev_run", "limit_batches", "overfit_batches")


@dataclass(frozen=True)
class Limits:
    """How many batches a pass over each split has at most, each a number or a share.

    fast: steps of the whole training; None: as many as its config says.
    repeat: every epoch is the first one.
    """

    batches: Mapping[str, tuple[int | float, ...]]
    fast: int | None = None
    repeat: bool = False


def limits(runtime: Mapping[str, Any]) -> Limits:
    """What a config's ``runtime`` says about a shorter run."""
    fast = int(runtime.get("fast_dev_run") or 0) or None
    overfit, shares = runtime.get("overfit_batches"), runtime.get("limit_batches") or {}
    given = {split: (fast, overfit, shares.get(split)) for split in SPLITS}
    return Limits({k: tuple(one for one in v if one is not None) for k, v in given.items()}, fast, overfit is not None)


def settings(runtime: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keys above that make a run shorter; empty for a whole run."""
    shares = {key: value for key, value in (runtime.get("limit_batches") or {}).items() if value is not None}
    return {key: value for key in KEYS if (value := shares if key == "limit_batches" else runtime.get(key))}


def is_trial(runtime: Mapping[str, Any]) -> bool:
    """Whether a run with this ``runtime`` is no evidence."""
    return bool(settings(runtime))


def planned(loop: Any) -> tuple[int, int | None]:
    """Steps of a training and of an epoch, as schedules count them (see `planned` of the training loop)."""
    return getattr(loop, "planned", None) or (loop.max_iters, loop.steps_per_epoch)
