"""Exponential moving averages of weights.

The law of the decay is a function of how many updates, or samples, were averaged; `EMA` applies it to a module with a
handful of fused kernels. The average lives beside the module (evaluate inside ``with ema.swapped():``), or in another
module that has its own forward pass (a generator's copy, a momentum encoder).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, nearest
from core.optim.dtensor import local, reshard, shard_like, whole

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
    Without a `target`, make it after the module was placed on its device and sharded.

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
        target: a module of the same structure that holds the average; its weights belong to its owner's state dict.
            All its parameters take part, trained or not. `AveragedNetwork` makes one.

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
        self._backup: dict[str, Tensor] | None = None
        self._names = self._averaged_names()
        if not self._names:
            raise ConfigError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to average")
        if target is not None:
            _check_same(module, target)
            target.requires_grad_(False)
        # Averages that live here: all without a target, else only those that the target could hold in low precision.
        start = self._tensors(module if target is None else target)
        self._own = {
            n: t.to(torch.float32, copy=True) if _low(t) else t.clone()
            for n, t in start.items()
            if target is None or _low(t)
        }

    def _averaged_names(self) -> list[str]:
        names = [n for n, p in self.module.named_parameters() if p.requires_grad or self.target is not None]
        if self.buffers == "average":
            names += [n for n, b in self.module.named_buffers() if b.is_floating_point()]
        return names

    def _tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The averaged tensors of a module as they are now: moving and sharding a module replaces them."""
        tensors = dict(module.named_parameters())
        if self.buffers == "average":
            tensors |= dict(module.named_buffers())
        return {name: tensors[name].detach() for name in self._names}

    def _averages(self) -> dict[str, Tensor]:
        held = {} if self.target is None else self._tensors(self.target)
        return held | self._own

    def averaged_buffers(self) -> list[tuple[str, Tensor]]:
        """Names and averages of buffers, where buffers are averaged."""
        buffers = {name for name, _ in self.module.named_buffers()}
        return [(name, average) for name, average in self._averages().items() if name in buffers]

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
        averages, sources = self._averages(), self._tensors(self.module)
        weights = [local(sources[name]) for name in averages]
        weights = [w.float() if _low(w) else w for w in weights]
        torch._foreach_lerp_([local(a) for a in averages.values()], weights, 1.0 - self.next_decay())
        self.updates += 1
        self._batch = 0
        self._fill_target()

    def _fill_target(self) -> None:
        """Rounds low-precision averages into the target and brings its other buffers up to date."""
        if self.target is None:
            return
        held = self._tensors(self.target)
        if self._own:
            torch._foreach_copy_([local(held[n]) for n in self._own], [local(a) for a in self._own.values()])
        if self.buffers == "keep":
            return
        for (name, mine), theirs in zip(self.target.named_buffers(), self.module.buffers(), strict=True):
            if name not in held:
                mine.copy_(theirs)

    @torch.no_grad()
    def reset(self) -> None:
        """The average becomes the weights as they are now, and counting begins anew."""
        self.calls = self.updates = self.samples = self._batch = 0
        sources = self._tensors(self.module)
        for name, average in self._averages().items():
            local(average).copy_(local(sources[name]))
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
        sources, averages = self._tensors(self.module), self._averages()
        self._backup = {name: local(source).clone() for name, source in sources.items()}
        for name, source in sources.items():
            local(source).copy_(local(averages[name]))

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts the trained weights back, bit for bit.

        Raises:
            RuntimeError: they are there already.
        """
        if self._backup is None:
            raise RuntimeError("the averaged weights are not in the module")
        reshard(self.module)
        for name, source in self._tensors(self.module).items():
            local(source).copy_(self._backup[name])
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
        average = {n: whole(a) for n, a in self._own.items()}
        average |= {alias: average[name] for alias, name in self._aliases().items() if name in average}
        return {**self.counters(), "average": average}

    def counters(self) -> dict[str, int]:
        """What the law of the decay depends on."""
        return {"calls": self.calls, "updates": self.updates, "samples": self.samples, "batch": self._batch}

    def load_counters(self, state: Mapping[str, int]) -> None:
        """Restores `counters`."""
        self.calls, self.updates = state["calls"], state["updates"]
        self.samples, self._batch = state["samples"], state["batch"]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ConfigError: names or shapes differ from this module's.
        """
        aliases = self._aliases()
        saved = {n: a for n, a in state["average"].items() if n not in aliases}
        missing, unknown = sorted(set(self._own) - set(saved)), sorted(set(saved) - set(self._own))
        if missing or unknown:
            raise ConfigError(f"averaged weights: not in the checkpoint {missing[:5]}, only there {unknown[:5]}")
        for name, average in self._own.items():
            if average.shape != saved[name].shape:
                raise ConfigError(
                    f"averaged weights: '{name}' is {tuple(saved[name].shape)} in the checkpoint, "
                    f"{tuple(average.shape)} here"
                )
        for name, average in self._own.items():
            local(average).copy_(local(shard_like(saved[name], average)))
        self.load_counters(state)

    def _aliases(self) -> dict[str, str]:
        """Further names of tied parameters, as a state dict lists them too."""
        first = {id(p): name for name, p in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if name != first[id(p)]}


class AveragedNetwork(nn.Module):
    """A network's moving average as a network of its own: a generator to sample from, a momentum encoder.

    It is a submodule of the trainer beside its source; weights and counters travel in the trainer's state dict. It
    requires no gradients and stays in evaluation mode.

    Args:
        source: the trained network; the average begins as a copy of it (in float32).
        options: of `EMA`: decay or half_life and ramp, warmup, every, buffers.
    """

    COUNTERS = ("calls", "updates", "samples", "batch")

    def __init__(self, source: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network = copy.deepcopy(source).float().eval()
        self.ema = EMA(source, target=self.network, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged network's forward pass."""
        return self.network(*args, **kwargs)

    def update(self, batch: int = 0) -> None:
        """See `EMA.update`."""
        self.ema.update(batch)

    def train(self, mode: bool = True) -> AveragedNetwork:
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def counters(self) -> Tensor:
        """The counters as they are saved, (4,) int64."""
        state = self.ema.counters()
        return torch.tensor([state[name] for name in self.COUNTERS])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}counters"] = self.counters

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list, *rest: Any
    ) -> None:
        counters = state_dict.get(f"{prefix}counters")
        if counters is None:
            missing.append(f"{prefix}counters")
        else:
            self.ema.load_counters(dict(zip(self.COUNTERS, counters.tolist(), strict=True)))
        own = {key: value for key, value in state_dict.items() if key != f"{prefix}counters"}
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, *rest)


def _check_same(module: nn.Module, target: nn.Module) -> None:
    ours = dict(module.named_parameters()) | dict(module.named_buffers())
    theirs = dict(target.named_parameters()) | dict(target.named_buffers())
    different = set(ours) ^ set(theirs) or {n for n in ours if ours[n].shape != theirs[n].shape}
    if different:
        raise ConfigError(f"EMA target differs from the module in {sorted(different)[:5]}")


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
