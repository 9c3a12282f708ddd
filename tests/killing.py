"""Runs of this process that end in the middle of a step, as if they were killed there, and go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.trainer import Trainer

# Of a result: what tells of time, machine and place.
PASSING = {"seconds", "finished", "resumed_from", "run_dir", "overrides", "peak_memory_mb", "fingerprint"}


class Killed(BaseException):
    """Passes through whatever the engine catches, so that nothing more of the run happens."""


@contextmanager
def killed_in_phase(number: int) -> Iterator[None]:
    """Within it, a run ends in its `number`-th phase of optimisation (a step has one, or several), counted from 1."""
    phase, seen = Trainer.phase, 0

    def counting(self: Trainer, *args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed
        return phase(self, *args, **options)

    Trainer.phase = counting
    try:
        yield
    except Killed:
        pass
    else:
        raise AssertionError(f"the run ended after {seen} phases, before it was killed")
    finally:
        Trainer.phase = phase


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by stage and name."""
    found = {}
    for store in sorted(folder.rglob("checkpoints")):
        newest = max(store.glob("step_*.pt"))
        state = torch.load(newest, weights_only=True)["model"]
        found |= {f"{store.parent.name if store.parent != folder else ''}:{name}": v for name, v in state.items()}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Weights and results of two runs are equal bit for bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and first
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    results = [
        {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("result.json"))}
        for folder in (one, other)
    ]
    assert results[0].keys() == results[1].keys()
    for name, result in results[0].items():
        assert _lasting(result) == _lasting(results[1][name]), name


def _lasting(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in PASSING}
