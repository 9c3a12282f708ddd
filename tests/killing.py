"""Runs of this process that end in the middle of a step, as if they were killed there, and go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.trainer import Trainer

# Of a result: what tells of time, machine and place, and of who commits meanwhile.
PASSING = {"commit", "seconds", "finished", "resumed_from", "run_dir", "overrides", "peak_memory_mb", "fingerprint"}


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


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest checkpoint of a run, or of each of its stages, by the stage's folder."""
    stores = sorted(folder.rglob("checkpoints"))
    names = {"" if store.parent == folder else store.parent.name: store for store in stores}
    return {name: torch.load(max(store.glob("step_*.pt")), weights_only=True) for name, store in names.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by stage and name."""
    return {f"{stage}:{key}": value for stage, one in newest(folder).items() for key, value in one["model"].items()}


def states(folder: Path) -> dict[str, Any]:
    """All that a run's newest checkpoint goes on from but times and the log's place, flat, by stage and name."""
    parts = ("model", "optim", "schedulers", "position", "random", "step", "beginning")
    found: dict[str, Any] = {}
    for stage, state in newest(folder).items():
        kept = {part: state[part] for part in parts}
        kept["average"] = state["hooks"].get("EMAHook")
        kept["attributes"], kept["added"] = state["kept"]["processes"], state["kept"]["checkpoint"]
        found |= dict(_flat(kept, stage))
    return found


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{index}")
    else:
        yield path, value


def losses(run: Path) -> dict[int, float]:
    """{step: loss} of a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what tells of time, machine and place."""
    return {key: value for key, value in result.items() if key not in PASSING}


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
        first, second = lasting(result), lasting(results[1][name])
        assert first == second, (name, {k for k in first | second if first.get(k) != second.get(k)})
