"""Exponential moving averages of weights.

The law of the decay is a function of how many updates, or samples, were averaged; `EMA` applies it to a module with a
handful of fused kernels. The average lives beside the module (evaluate inside ``with ema.swapped():``), or in another
module that has its own forward pass (a generator's copy, a momentum encoder).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.registry import nearest
from core.sharding import local, reshard, shard_like, whole

WARMUPS = ("none", "ratio")
BUFFERS = ("copy", "average", "keep")


def ratio_decay(update: int, decay: float) -> float:
    """``min(decay, (1 + t) / (10 + t))``: short memory at first. `update` t counts from 1 (TensorFlow's rule)."""
    return min(decay, (1 + update) / (10 + update))


def half_life_decay(samples: int, batch: int, half_life: float, ramp: float | None = None) -> float:
    """``0.5 ** (batch / h)`` with ``h = min(half_life, ramp * samples)`` (StyleGAN2, EG3D, PV3D).

    Args:
        samples: training samples seen before this batch; with a ramp the first average is the weights themselves.
        batch: samples of this update, over all processes.
        half_life: samples after which a weight's share has halved.
        ramp: the half-life is at most this share of the samples seen; None: no ramp.
    """
    h = half_life if ramp is None else min(half_life, ramp * samples)
    return 0.5 ** (batch / max(h, 1e-8))


class EMA:
    """The moving average of a module's trained parameters.

    ``average = decay * average + (1 - decay) * weights`` in float32 where weights are of lower precision. Sharded
    (FSDP2) parameters are averaged shard by shard. Under data parallelism every process keeps the same average.

    Args:
        module: whose parameters are averaged; those that require no gradient now are not part of it.
        decay: constant decay per averaging; or give `half_life`.
        half_life: in samples; see `half_life_decay`. `update` then needs the batch size.
        ramp: see `half_life_decay`.
        warmup: "ratio" begins with a short memory (`ratio_decay`); "none": `decay` from the start.
        every: average at every n-th call of `update`.
        buffers: floating-point buffers (batch norm statistics) are "copy": the module's newest, "average": averaged
            like the weights, or "keep": left as they were in `target` (without a target the same as copy). Integer
            buffers are never averaged.
        target: a module of the same structure that holds the average, e.g. a deep copy with its own forward pass; its
            weights belong to its owner's state dict. All its parameters take part, trained or not.

    Raises:
        ConfigError: arguments that cannot be meant; nothing to average; a `target` with other parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float | None = None,
        *,
        half_life: float | None = None,
        ramp: float | None = None,
        warmup: str = "none",
        every: int = 1,
        buffers: str = "copy",
        target: nn.Module | None = None,
    ) -> None:
        check_options(decay=decay, half_life=half_life, ramp=ramp, warmup=warmup, every=every, buffers=buffers)
        self.module, self.target = module, target
        self.decay, self.half_life, self.ramp, self.warmup = decay, half_life, ramp, warmup
        self.every, self.buffers = every, buffers
        self.calls = self.updates = self.samples = 0
        self._batch = 0  # samples since the last averaging
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad or target is not None}
        floating = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
        self._sources: dict[str, Tensor] = parameters | (floating if buffers == "average" else {})
        if not self._sources:
            raise ConfigError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to average")
        self._aliases = self._other_names()
        self._held: dict[str, Tensor] = {}
        if target is not None:
            self._held = self._find_held(target)
        self._average = {n: self._start(n, p) for n, p in self._sources.items()}
        self._backup: dict[str, Tensor] | None = None

    def _other_names(self) -> dict[str, str]:
        """Further names of tied parameters; a state dict lists those too."""
        first = {id(p): name for name, p in self._sources.items()}
        every = self.module.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if name not in self._sources and id(p) in first}

    def _find_held(self, target: nn.Module) -> dict[str, Tensor]:
        tensors = dict(target.named_parameters()) | dict(target.named_buffers())
        ours = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        different = set(tensors) ^ set(ours) or {n for n in ours if tensors[n].shape != ours[n].shape}
        if different:
            raise ConfigError(f"EMA target differs from the module in {sorted(different)[:5]}")
        target.requires_grad_(False)
        return {name: tensors[name] for name in self._sources}

    def _start(self, name: str, source: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is not None and not _low(held):
            return held.detach()
        start = (source if held is None else held).detach()
        return start.to(torch.float32, copy=True) if _low(start) else start.clone()

    # ------------------------------------------------------------------ averaging
    def next_decay(self) -> float:
        """The decay that the next averaging will use, given the samples reported so far."""
        if self.half_life is not None:
            return half_life_decay(self.samples - self._batch, self._batch, self.half_life, self.ramp)
        return self.decay if self.warmup == "none" else ratio_decay(self.updates + 1, self.decay)

    @torch.no_grad()
    def update(self, batch: int = 0) -> None:
        """Call after each optimizer update.

        Args:
            batch: samples of the update, over all processes; needed with `half_life`.

        Raises:
            RuntimeError: the averaged weights are swapped in.
            ConfigError: `half_life` without a batch size.
        """
        if self._backup is not None:
            raise RuntimeError("EMA.update within swapped(): the module holds the averaged weights")
        if self.half_life is not None and batch < 1:
            raise ConfigError("EMA with half_life needs the number of samples: update(batch=...)")
        self.calls += 1
        self.samples += batch
        self._batch += batch
        if self.calls % self.every:
            return
        weight = 1.0 - self.next_decay()
        averages = [local(a) for a in self._average.values()]
        sources = [local(s.detach()) for s in self._sources.values()]
        sources = [s.float() if _low(s) else s for s in sources]
        torch._foreach_lerp_(averages, sources, weight)
        self.updates += 1
        self._batch = 0
        self._fill_target()

    def _fill_target(self) -> None:
        if self.target is None:
            return
        low = [n for n, held in self._held.items() if _low(held)]
        if low:
            torch._foreach_copy_([local(self._held[n]) for n in low], [local(self._average[n]) for n in low])
        if self.buffers == "keep":
            return
        averaged = self._sources if self.buffers == "average" else {}
        for (name, held), buffer in zip(self.target.named_buffers(), self.module.buffers(), strict=True):
            if name not in averaged:
                held.copy_(buffer)

    @torch.no_grad()
    def reset(self) -> None:
        """The average becomes the weights as they are now, and counting begins anew."""
        self.calls = self.updates = self.samples = self._batch = 0
        for name, average in self._average.items():
            local(average).copy_(local(self._sources[name].detach()))
        self._fill_target()

    # ------------------------------------------------------------------ evaluation
    @property
    def swapped_in(self) -> bool:
        """Whether the module holds the averaged weights now."""
        return self._backup is not None

    @torch.no_grad()
    def swap_in(self) -> None:
        """Puts the averaged weights into the module; the trained ones wait for `swap_out`.

        Raises:
            RuntimeError: they are in already.
        """
        if self._backup is not None:
            raise RuntimeError("the averaged weights are in the module already")
        reshard(self.module)
        self._backup = {name: local(s.detach()).clone() for name, s in self._sources.items()}
        for name, source in self._sources.items():
            local(source.detach()).copy_(local(self._average[name]))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts the trained weights back, bit for bit.

        Raises:
            RuntimeError: they are there already.
        """
        if self._backup is None:
            raise RuntimeError("the averaged weights are not in the module")
        reshard(self.module)
        for name, source in self._sources.items():
            local(source.detach()).copy_(self._backup[name])
        self._backup = None

    @contextlib.contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The module with averaged weights, for the time of a ``with`` block."""
        self.swap_in()
        try:
            yield self.module
        finally:
            self.swap_out()

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Counters and the average by parameter name, as whole tensors (so every process must call this under FSDP2).

        Tied parameters are listed under each of their names. With a `target` the average is in the state of the
        target's owner; only float32 masters of lower precision are here.
        """
        average = {n: whole(a.detach()) for n, a in self._own().items()}
        average |= {alias: average[name] for alias, name in self._aliases.items() if name in average}
        return {
            "calls": self.calls,
            "updates": self.updates,
            "samples": self.samples,
            "batch": self._batch,
            "average": average,
        }

    def _own(self) -> dict[str, Tensor]:
        """Averages that no target holds."""
        return {n: a for n, a in self._average.items() if n not in self._held or _low(self._held[n])}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ConfigError: names or shapes differ from this module's.
        """
        own = self._own()
        saved = {n: a for n, a in state["average"].items() if n not in self._aliases}
        missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
        if missing or unknown:
            raise ConfigError(f"averaged weights: not in the checkpoint {missing[:5]}, only there {unknown[:5]}")
        for name, average in own.items():
            if average.shape != saved[name].shape:
                raise ConfigError(
                    f"averaged weights: '{name}' is {tuple(saved[name].shape)} in the checkpoint, "
                    f"{tuple(average.shape)} here"
                )
        for name, average in own.items():
            local(average).copy_(local(shard_like(saved[name], average)))
        self.calls, self.updates = state["calls"], state["updates"]
        self.samples, self._batch = state["samples"], state["batch"]


def check_options(
    *, decay: float | None, half_life: float | None, ramp: float | None, warmup: str, every: int, buffers: str
) -> None:
    """Holds the options of an `EMA` against each other.

    Raises:
        ConfigError: one that cannot be meant.
    """
    if (decay is None) == (half_life is None):
        raise ConfigError("EMA: give either decay or half_life")
    if decay is not None and not 0 <= decay <= 1:
        raise ConfigError(f"EMA decay {decay} is not between 0 and 1")
    if half_life is not None and half_life <= 0:
        raise ConfigError(f"EMA half_life {half_life} is not positive")
    if ramp is not None and half_life is None:
        raise ConfigError("EMA ramp belongs to half_life; with decay use warmup=ratio")
    if warmup not in WARMUPS or (warmup != "none" and decay is None):
        raise ConfigError(f"EMA warmup '{warmup}' is not one of {WARMUPS} with decay{nearest(warmup, WARMUPS)}")
    if every < 1:
        raise ConfigError(f"EMA every {every} is not a positive number of updates")
    if buffers not in BUFFERS:
        raise ConfigError(f"EMA buffers '{buffers}' is not one of {BUFFERS}{nearest(buffers, BUFFERS)}")


def _low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
