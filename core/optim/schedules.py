"""Learning rates and other optimizer settings as closed functions of the step.

The functions take a step (any real number, in any unit) and give a value; `Schedule` puts them into optimizers under
mmengine's parameter-scheduler interface. Its whole state is one counter, so a resumed run cannot drift.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.optim.scheduler.param_scheduler import INF

from core.config.registry import PARAM_SCHEDULERS
from core.errors import ConfigError, nearest


# ---------------------------------------------------------------------- functions of the step
def _warming_up(step: float, lr: float, warmup: float, warmup_lr: float) -> float:
    return warmup_lr + (lr - warmup_lr) * step / warmup


def constant(step: float, *, lr: float, warmup: float = 0, warmup_lr: float = 0.0) -> float:
    """`lr`, after a linear rise from `warmup_lr` over `warmup` steps."""
    return _warming_up(step, lr, warmup, warmup_lr) if step < warmup else lr


def warmup_cosine(
    step: float,
    *,
    total: float,
    lr: float,
    warmup: float = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    prefix: bool = False,
) -> float:
    """Half a cosine from `lr` to `min_lr`, after a linear rise from `warmup_lr`.

    Args:
        step: 0 is the first.
        total: steps of the whole schedule; `min_lr` from there on.
        lr: the highest value.
        warmup: steps of the rise.
        warmup_lr: value at step 0 of the rise.
        min_lr: the last value (for weight decay it may lie above `lr`).
        prefix: False counts the cosine from step 0, so that the rise cuts its beginning off (timm, Swin);
            True begins the cosine where the rise ends (MAE).
    """
    if step < warmup:
        return _warming_up(step, lr, warmup, warmup_lr)
    if prefix:
        step, total = step - warmup, total - warmup
    if step >= total:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / total))


def polynomial(
    step: float,
    *,
    total: float,
    lr: float,
    power: float = 1.0,
    warmup: float = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    prefix: bool = False,
) -> float:
    """``min_lr + (lr - min_lr) (1 - step / total) ** power``; the other arguments as in `warmup_cosine`."""
    if step < warmup:
        return _warming_up(step, lr, warmup, warmup_lr)
    if prefix:
        step, total = step - warmup, total - warmup
    if step >= total:
        return min_lr
    return min_lr + (lr - min_lr) * (1 - step / total) ** power


def multi_step(
    step: float,
    *,
    lr: float,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup: float = 0,
    warmup_lr: float = 0.0,
) -> float:
    """`lr`, multiplied by `gamma` at each milestone, after a linear rise."""
    if step < warmup:
        return _warming_up(step, lr, warmup, warmup_lr)
    return lr * gamma ** sum(step >= m for m in milestones)


def exponential(
    step: float,
    *,
    lr: float,
    period: float,
    gamma: float = 0.5,
    staircase: bool = False,
    warmup: float = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """``lr gamma ** (step / period)``, never below `min_lr`. The rise multiplies the decay instead of replacing it.

    Args:
        step: 0 is the first.
        lr: value at step 0 without a rise.
        period: steps in which the value falls by `gamma` (with gamma 0.5: the half-life).
        gamma: factor per period.
        staircase: fall at the ends of periods instead of all along.
        warmup: steps of the rise; ``lr min(1, step / warmup) gamma ** (step / period)`` with `warmup_lr` 0.
        warmup_lr: value at step 0 of the rise.
        min_lr: the floor.
    """
    periods = math.floor(step / period) if staircase else step / period
    top = _warming_up(step, lr, warmup, warmup_lr) if step < warmup else lr
    return max(min_lr, top * gamma**periods)


def linear_ramp(step: float, *, begin: float = 0, end: float, first: float, last: float) -> float:
    """From `first` at step `begin` in a straight line to `last` at step `end`; constant outside. For loss weights."""
    share = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return first + (last - first) * share


def cosine_ramp(step: float, *, begin: float = 0, end: float, first: float, last: float) -> float:
    """From `first` at step `begin` along half a cosine to `last` at step `end`; constant outside."""
    share = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


KINDS: dict[str, Callable[..., float]] = {
    "constant": constant,
    "warmup_cosine": warmup_cosine,
    "polynomial": polynomial,
    "multi_step": multi_step,
    "exponential": exponential,
}


def value(
    kind: str,
    step: float,
    *,
    lr: float,
    lag: float = 0,
    hold: float = 0,
    hold_lr: float = 0.0,
    ceiling: float | None = None,
    **options: Any,
) -> float:
    """One of `KINDS` at a step, with what recipes add to all of them.

    Args:
        kind: name of the function.
        step: 0 is the first.
        lr: the base value.
        lag: the function is read that many steps late (a loop that updates the schedule after use has lag 1).
        hold: for the first `hold` steps the value is `hold_lr`; the function runs on underneath.
        hold_lr: see `hold`.
        ceiling: no value above this one.
        options: of the function.
    """
    step = max(step - lag, 0)
    if step < hold:
        return hold_lr
    result = KINDS[kind](step, lr=lr, **options)
    return result if ceiling is None else min(result, ceiling)


# ---------------------------------------------------------------------- in an optimizer
_LENGTHS = ("total", "warmup", "period", "hold", "lag")
_WITH_UNIT = re.compile(r"\s*([0-9.eE+-]+)\s*(step|epoch)s?\s*")


@PARAM_SCHEDULERS.register_module()
class Schedule(_ParamScheduler):
    """A closed-form schedule of one optimizer setting; mmengine's parameter-scheduler interface.

    The value of step 0 is set before the first update. Steps are counted in updates: accumulation over k micro-steps
    leaves the schedule as it would be with the big batch. Every group keeps its ratio to the base value (layer decay,
    multipliers), floors and warm-up values included.

    Lengths (total, warmup, period, milestones, hold, lag) are numbers in the schedule's own unit, shares of the total
    (a float below 1, e.g. ``warmup: 0.05``), or texts with a unit: ``"500 steps"``, ``"20 epochs"``.

    Args:
        optimizer: an optimizer wrapper or optimizer; filled in by the Runner.
        kind: constant, warmup_cosine, polynomial, multi_step or exponential; see the functions of those names for
            warmup, warmup_lr, min_lr, prefix, power, milestones, gamma, period and staircase.
        param_name: what is scheduled: lr, weight_decay or momentum (Adam's first beta).
        by_epoch: True: the unit is the epoch and the value changes at epochs' ends; False: the unit is the update.
            With mmengine's ``convert_to_iter_based: true`` the unit is the epoch and the value changes at every update.
        total: length of the schedule; None: the whole run.
        lag: see `value`.
        hold: see `value`.
        hold_lr: see `value`.
        ceiling: see `value`.
        groups: tags of parameter groups (``optim_wrapper.paramwise.groups``, and ``default`` for the rest) that are
            scheduled; None: all.
        count: ``updates``, or ``iterations`` to count micro-steps.
        end: length of the run in the schedule's unit as mmengine's Runner fills it in; read when `resolve` is not
            called.
        last_step: steps already taken, less one.
        epoch_length: iterations per epoch, as mmengine fills it in.

    Raises:
        ConfigError: an unknown kind, an option that the kind does not have, a length that cannot be meant.
    """

    def __init__(
        self,
        optimizer: Any,
        kind: str = "constant",
        *,
        param_name: str = "lr",
        by_epoch: bool = True,
        total: float | str | None = None,
        warmup: float | str | None = None,
        warmup_lr: float | None = None,
        min_lr: float | None = None,
        prefix: bool | None = None,
        power: float | None = None,
        milestones: Sequence[float | str] | None = None,
        gamma: float | None = None,
        period: float | str | None = None,
        staircase: bool | None = None,
        lag: float | str = 0,
        hold: float | str = 0,
        hold_lr: float = 0.0,
        ceiling: float | None = None,
        groups: Sequence[str] | None = None,
        count: str = "updates",
        end: float = INF,
        last_step: int = -1,
        epoch_length: int | None = None,
    ) -> None:
        # Not calling mmengine's constructor: it patches optimizer.step and sets a value before lengths are known.
        if kind not in KINDS:
            raise ConfigError(f"schedule kind '{kind}' does not exist{nearest(kind, KINDS)}; there are {list(KINDS)}")
        if count not in ("updates", "iterations"):
            raise ConfigError(f"schedule count '{count}' is neither 'updates' nor 'iterations'")
        self.optimizer, self.kind, self.param_name = optimizer, kind, param_name
        self.by_epoch, self.unit = by_epoch, "epoch" if by_epoch else "step"
        given = {
            "warmup": warmup,
            "warmup_lr": warmup_lr,
            "min_lr": min_lr,
            "prefix": prefix,
            "power": power,
            "milestones": milestones,
            "gamma": gamma,
            "period": period,
            "staircase": staircase,
        }
        self.options = {name: option for name, option in given.items() if option is not None}
        self._takes = inspect.signature(KINDS[kind]).parameters
        for name in (*self.options, *(["total"] if total is not None else [])):
            if name not in self._takes:
                own = [n for n in self._takes if n not in ("step", "lr")]
                raise ConfigError(f"schedule kind '{kind}' has no option '{name}'; it takes {own}")
        for name, parameter in self._takes.items():
            if parameter.default is parameter.empty and name not in ("step", "lr", "total", *self.options):
                raise ConfigError(f"schedule kind '{kind}' needs '{name}'")
        self.total, self.lag, self.hold, self.hold_lr, self.ceiling = total, lag, hold, hold_lr, ceiling
        self.groups, self.count, self.end = groups, count, end
        self._max_steps: int | None = None
        self._epoch_length = epoch_length
        self._lengths: dict[str, Any] | None = None
        self._base, self._ratios = self._find_base()
        self.last_step = last_step + 1
        self._apply(must=False)

    @classmethod
    def build_iter_from_epoch(
        cls, optimizer: Any, *args: Any, by_epoch: bool = True, epoch_length: int, **options: Any
    ) -> Schedule:
        """mmengine's ``convert_to_iter_based``: lengths in epochs, a new value at every update."""
        schedule = cls(optimizer, *args, by_epoch=True, epoch_length=epoch_length, **options)
        schedule.by_epoch, schedule._lengths = False, None
        schedule._apply(must=False)
        return schedule

    def resolve(self, max_steps: int, steps_per_epoch: int | None) -> None:
        """Tells the length of the run, in iterations, and sets the value for where the schedule stands.

        Raises:
            ConfigError: a length in epochs, and the run has none (`steps_per_epoch` None); a warm-up beyond the total.
        """
        self._max_steps = max_steps
        self._epoch_length = steps_per_epoch if steps_per_epoch is not None else self._epoch_length
        self._lengths = None
        self._apply(must=True)

    def step(self) -> None:
        """One iteration (or epoch, with `by_epoch`) is done: sets the value of the next."""
        self.last_step += 1
        self._apply(must=True)

    def at(self, index: float) -> float:
        """The base value at a step of the schedule's unit.

        Raises:
            ConfigError: see `resolve`.
        """
        return value(self.kind, index, lr=self._base, **self._resolved())

    def get_last_value(self) -> list[float]:
        """The setting as it is in every scheduled group."""
        return [self._get(group) for group, _ in self._scheduled()]

    def state_dict(self) -> dict[str, int]:
        """The counter."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes to a counter and sets the value there."""
        self.last_step = state_dict["last_step"]
        self._apply(must=False)

    # ------------------------------------------------------------------ position
    @property
    def _window(self) -> int:
        """Iterations per counted step."""
        return getattr(self.optimizer, "_accumulative_counts", 1) if self.count == "updates" else 1

    def _index(self) -> float:
        if self.by_epoch:
            return self.last_step
        steps = self.last_step // self._window
        return steps / self._steps_per_epoch() if self.unit == "epoch" else steps

    def _steps_per_epoch(self) -> float:
        if not self._epoch_length:
            raise ConfigError("a schedule counts in epochs, but the run has none: give its lengths in steps")
        return self._epoch_length / self._window

    def _apply(self, must: bool) -> None:
        """Sets the current value; without `must`, only when the length of the run is known already."""
        if not must and not self._known():
            return
        current = self.at(self._index())
        for group, ratio in self._scheduled():
            self._set(group, current * ratio)

    # ------------------------------------------------------------------ lengths
    def _known(self) -> bool:
        return self._max_steps is not None or (
            self.end != INF and (bool(self._epoch_length) or not self._mixes_units())
        )

    def _mixes_units(self) -> bool:
        """Whether a length is given in the other unit, so that steps per epoch are needed."""
        lengths = [self.total, self.hold, self.lag, *self.options.get("milestones", ())]
        lengths += [self.options.get(name) for name in ("warmup", "period")]
        found = (_WITH_UNIT.fullmatch(length) for length in lengths if isinstance(length, str))
        return any(match is not None and match[2] != self.unit for match in found)

    def _resolved(self) -> dict[str, Any]:
        if self._lengths is None:
            self._lengths = self._resolve_lengths()
        return self._lengths

    def _resolve_lengths(self) -> dict[str, Any]:
        resolved = {**self.options, "hold_lr": self.hold_lr, "ceiling": self.ceiling}
        needs_total = "total" in self._takes
        shares = [n for n in ("warmup", "period") if _is_share(self.options.get(n))]
        total = None
        if needs_total or shares or _is_share(self.hold) or any(map(_is_share, self.options.get("milestones", ()))):
            total = self._total()
        for name in ("warmup", "period"):
            if name in resolved:
                resolved[name] = self._length(resolved[name], name, total)
        if "milestones" in resolved:
            resolved["milestones"] = [self._length(m, "milestones", total) for m in resolved["milestones"]]
        resolved["hold"] = self._length(self.hold, "hold", total)
        resolved["lag"] = self._length(self.lag, "lag", total)
        if needs_total:
            resolved["total"] = total
            if resolved.get("warmup", 0) > total:
                raise ConfigError(
                    f"schedule: warmup of {resolved['warmup']:g} {self.unit}s is longer than its total of {total:g}"
                )
        return resolved

    def _total(self) -> float:
        if self.total is not None:
            if _is_share(self.total):
                raise ConfigError(f"schedule total {self.total} is below one {self.unit}: give a length, or null")
            return self._length(self.total, "total", None)
        if self._max_steps is not None:
            steps = math.ceil(self._max_steps / self._window)
            return steps / self._steps_per_epoch() if self.unit == "epoch" else steps
        if self.end != INF:
            return self.end if self.unit == "epoch" else math.ceil(self.end / self._window)
        raise ConfigError("schedule: the length of the run is not known; call resolve(), or set total")

    def _length(self, length: float | str, name: str, total: float | None) -> float:
        if isinstance(length, str):
            found = _WITH_UNIT.fullmatch(length)
            if found is None:
                raise ConfigError(f"schedule {name} '{length}': write '500 steps', '20 epochs' or a number")
            number, unit = float(found[1]), found[2]
            if unit == self.unit:
                return number
            per_epoch = self._steps_per_epoch()
            return number * per_epoch if unit == "epoch" else number / per_epoch
        if length < 0:
            raise ConfigError(f"schedule {name} {length} is negative")
        return length * total if _is_share(length) and total is not None else length

    # ------------------------------------------------------------------ groups
    def _scheduled(self) -> list[tuple[dict[str, Any], float]]:
        """The scheduled groups as they are now (loading a state replaces them) with their ratios to the base value."""
        pairs = zip(self.optimizer.param_groups, self._ratios, strict=True)
        return [(group, ratio) for group, ratio in pairs if ratio is not None]

    def _find_base(self) -> tuple[float, list[float | None]]:
        """The base value, and every group's ratio to it; None for groups that are not scheduled."""
        groups, initial = self.optimizer.param_groups, f"initial_{self.param_name}"
        for group in groups:
            group.setdefault(initial, self._get(group))
        base = self._base_value(groups)
        ratios = [self._ratio(group, group[initial], base) for group in groups]
        if self.groups is None:
            return base, ratios
        tags = {group.get("tag", "default") for group in groups}
        for tag in self.groups:
            if tag not in tags:
                raise ConfigError(f"schedule.groups: no group '{tag}'{nearest(tag, tags)}; there are {sorted(tags)}")
        chosen = ["params" in g and g.get("tag") in self.groups for g in groups]
        return base, [ratio if c else None for ratio, c in zip(ratios, chosen, strict=True)]

    def _ratio(self, group: dict[str, Any], initial: float, base: float) -> float:
        if self.param_name == "lr" and "lr_scale" in group:
            return group["lr_scale"]
        return initial / base if base else 0.0

    def _base_value(self, groups: list[dict[str, Any]]) -> float:
        if self.param_name == "lr":
            scaled = [g for g in groups if g.get("lr_scale")]
            for group in sorted(scaled, key=lambda g: g["lr_scale"] != 1):
                return group["initial_lr"] / group["lr_scale"]
        defaults = self.optimizer.defaults
        if self.param_name == "momentum" and "momentum" not in defaults:
            return defaults["betas"][0]
        return defaults[self.param_name]

    def _get(self, group: dict[str, Any]) -> float:
        if self.param_name == "momentum" and "momentum" not in group and "betas" in group:
            return group["betas"][0]
        if self.param_name not in group:
            known = nearest(self.param_name, group)
            raise ConfigError(f"schedule param_name '{self.param_name}' is no setting of the optimizer{known}")
        return group[self.param_name]

    def _set(self, group: dict[str, Any], current: float) -> None:
        if self.param_name == "momentum" and "momentum" not in group:
            group["betas"] = (current, *group["betas"][1:])
        else:
            group[self.param_name] = current


def _is_share(length: Any) -> bool:
    return isinstance(length, float) and 0 < length < 1
