"""Optimizers and schedules of a run that goes on, also with another length, other rates, or other batches.

A checkpoint keeps the settings that its optimizers and schedules were made from. Where they are still the same, all of
their state is put back bit for bit. Where they differ, moments and counters are put back, and the settings are those
that the new config has at this step of its run: rates, weight decay and schedules of the new length.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.logging import print_log

from core.config.shortened import planned
from core.optim.schedules import Schedule


def regime(runner: Any) -> dict[str, Any]:
    """What optimizers and schedules are made from, as plain containers."""
    loop, settings = runner.train_loop, runner.settings
    return {
        "optim_wrapper": _plain(settings["optim_wrapper"]),
        "param_scheduler": _plain(settings["param_scheduler"]),
        "max_steps": loop.max_iters,
        "steps_per_epoch": loop.steps_per_epoch,
    }


def scheduler_states(schedulers: Any) -> Any:
    """The states of a list of schedules, or of lists by the names of their optimizers."""
    if isinstance(schedulers, dict):
        return {name: [s.state_dict() for s in group] for name, group in schedulers.items()}
    return [s.state_dict() for s in schedulers or []]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def restore_regime(runner: Any, state: Mapping[str, Any]) -> None:
    """Puts back optimizers and schedules from a checkpoint; the loop is at its position already.

    Raises:
        ConfigError: state of other parameters, or of other optimizers.
    """
    saved, now = state.get("regime"), regime(runner)
    if saved is None or saved == now:
        runner.optim_wrapper.load_state_dict(state["optim"])
        for schedule, one in _pairs(runner.param_schedulers, state["schedulers"]):
            schedule.load_state_dict(one)
        return
    changed = sorted(key for key in now if now[key] != saved.get(key))
    print_log(f"{', '.join(changed)}: not as in the checkpoint; from here on those of this run's config", "current")
    optimizers = list(_optimizers(runner.optim_wrapper))
    fresh = [[_settings(group) for group in optimizer.param_groups] for optimizer in optimizers]
    kinds = _kinds(now["optim_wrapper"]) == _kinds(saved.get("optim_wrapper"))
    if kinds:
        runner.optim_wrapper.load_state_dict(state["optim"])
    else:
        print_log("another kind of optimizer: its moments begin anew", "current", logging.WARNING)
    for optimizer, groups in zip(optimizers, fresh, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)
    _forward(runner, state["schedulers"] if saved.get("param_scheduler") == now["param_scheduler"] else None)


def _kinds(node: Any) -> list[str]:
    """Types of optimizers anywhere in a config."""
    if isinstance(node, list):
        return [kind for inner in node for kind in _kinds(inner)]
    if not isinstance(node, Mapping):
        return []
    own = [str(node["optimizer"].get("type"))] if isinstance(node.get("optimizer"), Mapping) else []
    return own + [kind for key, inner in sorted(node.items()) if key != "optimizer" for kind in _kinds(inner)]


def _optimizers(wrapper: Any) -> Iterator[Any]:
    inner = getattr(wrapper, "optim_wrappers", None)
    for one in [wrapper] if inner is None else inner.values():
        yield one.optimizer


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _pairs(schedulers: Any, states: Any) -> list[tuple[Any, Any]]:
    if isinstance(schedulers, dict):
        return [(s, t) for name, group in schedulers.items() for s, t in zip(group, states[name], strict=True)]
    return list(zip(schedulers or [], states, strict=True))


def _forward(runner: Any, states: Any) -> None:
    """Takes schedules, as they were built, to the loop's step.

    Ours are functions of the step. mmengine's are recursions and are walked there, in the order of training; those that
    follow a metric (ReduceOnPlateau) get their own state back where there is one.
    """
    loop, built = runner.train_loop, runner.param_schedulers
    schedulers = [s for group in (built.values() if isinstance(built, dict) else [built or []]) for s in group]
    walked = []
    for schedule in schedulers:
        if isinstance(schedule, Schedule):
            schedule.resolve(*planned(loop))
            schedule.load_state_dict({"last_step": loop.epoch if schedule.by_epoch else loop.iter})
        elif "Plateau" not in type(schedule).__name__:
            walked.append(schedule)
    if states is not None:
        for schedule, state in _pairs(built, states):
            if "Plateau" in type(schedule).__name__:
                schedule.load_state_dict(state)
    if walked:
        _walk(walked, loop.iter, loop.epoch, loop.steps_per_epoch)


def _walk(schedulers: list[Any], steps: int, epochs: int, steps_per_epoch: int | None) -> None:
    """Steps schedules as training would have done, an epoch's after those of its last step."""
    done = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Detected call of|Seems like)")  # no update belongs to these steps
        for step in range(1, steps + 1):
            _step(schedulers, by_epoch=False)
            if steps_per_epoch and step % steps_per_epoch == 0 and done < epochs:
                done += 1
                _step(schedulers, by_epoch=True)
        for _ in range(epochs - done):
            _step(schedulers, by_epoch=True)
    for schedule in schedulers:
        schedule.optimizer._global_step = steps


def _step(schedulers: list[Any], *, by_epoch: bool) -> None:
    for schedule in schedulers:
        if schedule.by_epoch == by_epoch:
            schedule.step()
