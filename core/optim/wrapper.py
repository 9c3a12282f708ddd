"""Optimizer wrappers: precision, gradient accumulation, cleaning and clipping around ``torch.optim``.

`OptimWrapper` extends mmengine's. What it adds: mixed precision on any device behind one argument, accumulation that
can be interrupted and resumed anywhere, clipping that never waits for the device, gradients freed of NaN, and a state
that does not depend on the number of processes. `OptimWrapperDict` holds one wrapper per name for adversarial training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper as _OptimWrapper
from mmengine.optim import OptimWrapperDict as _OptimWrapperDict
from mmengine.utils.dl_utils import has_batch_norm
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from core.errors import ConfigError, nearest
from core.optim.dtensor import is_sharded, local, shard_like, whole
from core.trainer import autocast

_CLIP_KEYS = {"norm": {"max_norm", "norm_type", "error_if_nonfinite"}, "value": {"clip_value"}}
_CLIP_NEEDS = {"norm": "max_norm", "value": "clip_value"}
_CLEAN_KEYS = ("nan", "posinf", "neginf")


class OptimWrapper(_OptimWrapper):
    """One optimizer, the precision it is fed in, and what happens between backward and step.

    A *window* is the run of `accumulative_counts` micro-steps whose gradients make one update; the last window of a run
    may be shorter, and its losses are then averaged over the micro-steps that it has. Every update sees the gradient of
    one big batch (micro-batches of equal size); clipping and cleaning see it whole and unscaled.

    The order at an update: unscale (fp16), clean, watch, clip, step. Nothing of it waits for the device, except that
    fp16's scaler asks whether to skip the step, unless the optimizer is built with ``fused: true``.

    Args:
        optimizer: what updates the parameters; built from the config by `core.OptimConstructor`.
        precision: fp32, or bf16 / fp16 autocast of the forward pass. fp16 scales the loss and skips overflown steps.
        accumulative_counts: micro-steps per update.
        clip_grad: ``{max_norm, norm_type: 2 | inf | p, error_if_nonfinite}`` or ``{type: value, clip_value}``.
            ``max_norm: .inf`` clips nothing and still measures the norm. error_if_nonfinite waits for the device.
        clean_gradients: replacements of non-finite entries, ``{nan: 0, posinf: 1e5, neginf: -1e5}``; a key that is left
            out keeps such entries. With fp16 an overflown step is skipped all the same, so that the scale can fall.
        loss_scale: arguments of ``torch.amp.GradScaler`` (init_scale, growth_interval, ...); fp16 only.

    Attributes:
        updates: how many updates were made, skipped fp16 steps included.
        grad_norm: norm before clipping at the last update, a scalar tensor on the device; None without norm clipping.
        watch: called with the parameters of an update; it is left out where that returns False. The training loop
            looks for gradients that are not finite (`core.engine.hooks.finite`). Not called under fp16, whose scaler
            skips such updates itself.

    Raises:
        ConfigError: an argument that cannot be meant.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        precision: str = "fp32",
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        clean_gradients: Mapping[str, float] | None = None,
        loss_scale: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise ConfigError(f"accumulative_counts must be a whole number from 1 on, not {accumulative_counts!r}")
        super().__init__(optimizer, accumulative_counts=accumulative_counts)
        self.device_type = next(p.device.type for g in optimizer.param_groups for p in g["params"])
        autocast(precision, self.device_type)  # says what is wrong with a misspelt precision
        self.precision = precision
        self._clip_type, self._clip = _check_clip(clip_grad)
        self._clean = _check_clean(clean_gradients)
        if precision == "fp16" and self._clip.get("error_if_nonfinite"):
            raise ConfigError("clip_grad.error_if_nonfinite would stop at fp16's overflows, which are skipped: drop it")
        if loss_scale is not None and precision != "fp16":
            raise ConfigError(f"loss_scale belongs to precision fp16, not {precision}: leave it out")
        scaling = precision == "fp16"
        self.loss_scaler = torch.amp.GradScaler(self.device_type, **(loss_scale or {})) if scaling else None
        self.updates = 0
        self.grad_norm: Tensor | None = None
        self.watch: Callable[[list[nn.Parameter]], bool] | None = None
        self._window_start = 0  # value of _inner_count when the current window began
        self._unsynced = False  # gradients of this window are still those of this process alone
        self._restored = False

    # ------------------------------------------------------------------ the accumulation window
    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Tells where the run stands and how long it is, so that the last window is neither lost nor under-weighted.

        Args:
            model: the model; batch norm under accumulation is warned about.
            init_counts: iterations done, i.e. micro-steps when each iteration takes one.
            max_counts: iterations of the whole run.
        """
        if self._restored:
            # A wrapper that steps more or less often than once per iteration keeps its own count.
            max_counts = max_counts if self._inner_count == init_counts else -1
        else:
            self._inner_count = self._window_start = init_counts
        self._max_counts = max_counts
        self._remainder_counts = max_counts % self._accumulative_counts if max_counts > 0 else -1
        if self._accumulative_counts > 1 and has_batch_norm(model):
            print_log(
                f"batch norm sees micro-batches, one of {self._accumulative_counts} per update, not the whole batch",
                logger="current",
            )

    @property
    def accumulative_counts(self) -> int:
        """Micro-steps per update."""
        return self._accumulative_counts

    @property
    def mid_window(self) -> bool:
        """Whether gradients of unfinished business are being accumulated."""
        return self._inner_count > self._window_start

    def _window(self) -> int:
        """Length of the current window: shorter than usual when the run ends within it."""
        left = self._max_counts - self._window_start
        return min(self._accumulative_counts, left) if left > 0 else self._accumulative_counts

    def should_update(self) -> bool:
        """Whether the window is full (after a backward pass)."""
        return self._inner_count - self._window_start >= self._window()

    def should_sync(self) -> bool:
        """Whether the coming backward pass fills the window, so that processes must average their gradients."""
        return self._inner_count + 1 - self._window_start >= self._window()

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The micro-step's share of the update's loss: divided by the length of its window."""
        window = self._window()
        return loss if window == 1 else loss / window

    # ------------------------------------------------------------------ one step
    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Around the forward pass: autocast, and no gradient averaging before the window's last micro-step.

        FSDP2 modules reduce at every micro-step on purpose: their unreduced gradients are as large as the whole model.
        """
        with contextlib.ExitStack() as stack:
            if not self.should_sync() and hasattr(model, "no_sync"):
                stack.enter_context(model.no_sync())
                self._unsynced = True
            stack.enter_context(autocast(self.precision, self.device_type))
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Back-propagates (scaled for fp16) and counts one micro-step."""
        (loss if self.loss_scaler is None else self.loss_scaler.scale(loss)).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        """One update from the accumulated gradients; ends the window. Gradients stay until `zero_grad`."""
        parameters = [p for p in self._parameters() if p.grad is not None]
        if self.loss_scaler is not None and parameters:
            self.loss_scaler.unscale_(self.optimizer)
        if self._clean:
            for p in parameters:
                gradient = local(p.grad)
                torch.nan_to_num(gradient, **self._clean, out=gradient)
        if self._clip_type == "value" and parameters:
            self._clip_values(parameters)
        if self.loss_scaler is None and self.watch is not None and not self.watch(parameters):
            return  # the weights stay as they were
        if self._clip_type == "norm" and self._clip and parameters:
            self._clip_norm(parameters)
        if self.loss_scaler is None:
            self.optimizer.step(**kwargs)
        elif parameters:
            self.loss_scaler.step(self.optimizer, **kwargs)
            self.loss_scaler.update()
        self.updates += 1
        self._window_start = self._inner_count
        self._unsynced = False

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _clip_values(self, parameters: list[nn.Parameter]) -> None:
        bound, gradients = self._clip["clip_value"], [local(p.grad) for p in parameters]
        torch._foreach_clamp_min_(gradients, -bound)
        torch._foreach_clamp_max_(gradients, bound)

    def _clip_norm(self, parameters: list[nn.Parameter]) -> None:
        norm_type = self._clip["norm_type"]
        # FSDP2 parameters and plain ones do not mix in one foreach call.
        parts = [[p for p in parameters if is_sharded(p.grad) is sharded] for sharded in (False, True)]
        parts = [part for part in parts if part]
        norms = [get_total_norm([p.grad for p in part], norm_type) for part in parts]
        norms = [n.full_tensor() if is_sharded(n) else n for n in norms]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)
        if self._clip["error_if_nonfinite"] and not torch.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm of order {norm_type} is {norm.item()} at update {self.updates}; "
                "set clip_grad.error_if_nonfinite=false to go on, or clean_gradients to replace such entries"
            )
        for part in parts:
            clip_grads_with_norm_(part, self._clip["max_norm"], norm)
        self.grad_norm = norm.detach()

    def log_vars(self) -> dict[str, Tensor]:
        """What the log may show of the last update, as tensors on the device: ``grad_norm``."""
        return {} if self.grad_norm is None else {"grad_norm": self.grad_norm}

    # ------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs: optimizer, loss scale, counters, gradients of an unfinished window.

        Tensors are whole even where parameters are sharded, so every process must call this under FSDP2; and in the
        middle of a window under DistributedDataParallel too (`mid_window`), where gradients are averaged for the state
        (then the continuation equals the uninterrupted run up to rounding; at window boundaries bit for bit).
        """
        state = super().state_dict()
        state["state"] = {k: {n: _whole(v) for n, v in entry.items()} for k, entry in state["state"].items()}
        state["accumulation"] = {
            "accumulative_counts": self._accumulative_counts,
            "inner_count": self._inner_count,
            "window_start": self._window_start,
            "updates": self.updates,
            "gradients": self._gradients() if self.mid_window else {},
        }
        if self.loss_scaler is not None:
            state["loss_scaler"] = self.loss_scaler.state_dict()
        return state

    def _gradients(self) -> dict[int, Tensor]:
        """Accumulated gradients by parameter number, copied: training goes on while a checkpoint is written."""
        gather = self._unsynced and dist.is_initialized() and dist.get_world_size() > 1
        gradients = {}
        for index, p in enumerate(self._parameters()):
            if gather:
                mean = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                dist.all_reduce(mean)
                gradients[index] = mean / dist.get_world_size()
            elif p.grad is not None:
                gradients[index] = whole(p.grad.detach()).clone()
        return gradients

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`; the argument is not changed.

        Raises:
            ConfigError: the state is of other parameters, or stops in a window of another length.
        """
        state = dict(state_dict)
        accumulation = state.pop("accumulation", None)
        scaler = state.pop("loss_scaler", None)
        base = state.pop("base_param_settings", None)
        self._check_parameters(state["param_groups"])
        if accumulation and accumulation["gradients"]:
            counts = accumulation["accumulative_counts"]
            if counts != self._accumulative_counts:
                raise ConfigError(
                    f"the checkpoint lies within a window of {counts} accumulated micro-steps, but accumulative_counts "
                    f"is {self._accumulative_counts}: resume with {counts}, or from a checkpoint between two updates"
                )
        parameters = list(self._parameters())
        state["state"] = {k: _shard_entry(entry, parameters[k]) for k, entry in state["state"].items()}
        self.optimizer.load_state_dict(state)
        if base is not None and self.base_param_settings is not None:
            self.base_param_settings = dict(base)
        if scaler is not None and self.loss_scaler is not None:
            self.loss_scaler.load_state_dict(scaler)
        if accumulation is not None:
            self._restore_window(accumulation, parameters)

    def _restore_window(self, accumulation: Mapping[str, Any], parameters: list[nn.Parameter]) -> None:
        self._inner_count = accumulation["inner_count"]
        self._window_start = accumulation["window_start"]
        self.updates = accumulation["updates"]
        self._restored = True
        for index, p in enumerate(parameters):
            gradient = accumulation["gradients"].get(index)
            p.grad = None if gradient is None else shard_like(gradient.to(p.dtype), p).clone()

    def _check_parameters(self, saved: list[Mapping[str, Any]]) -> None:
        have = [tuple(g.get("param_names", range(len(g["params"])))) for g in self.optimizer.param_groups]
        want = [tuple(g.get("param_names", range(len(g["params"])))) for g in saved]
        if have == want or not all("param_names" in g for g in (*saved, *self.optimizer.param_groups)):
            return
        ours, theirs = {n for g in have for n in g}, {n for g in want for n in g}
        if ours == theirs:
            what = f"the same ones in other groups ({len(want)} saved, {len(have)} now): keep optim_wrapper.paramwise"
        else:
            what = f"only saved: {_few(theirs - ours)}; only here: {_few(ours - theirs)}"
        raise ConfigError(f"optimizer state of other parameters: {what}")


class OptimWrapperDict(_OptimWrapperDict):
    """One `OptimWrapper` per name, for several optimizers: ``optim_wrapper["generator"].update_params(loss)``.

    Under accumulation each wrapper's ``update_params`` is taken to be called once per iteration; then its last window
    is exact too. A phase that runs only every k-th iteration belongs into a wrapper without accumulation.
    """

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """See `OptimWrapper.initialize_count_status`, for every wrapper."""
        for wrapper in self.values():
            wrapper.initialize_count_status(model, cur_iter, max_iters)

    @property
    def updates(self) -> int:
        """Updates of the wrapper that made most."""
        return max(wrapper.updates for wrapper in self.values())

    @property
    def mid_window(self) -> bool:
        """Whether any wrapper is accumulating."""
        return any(wrapper.mid_window for wrapper in self.values())

    def log_vars(self) -> dict[str, Tensor]:
        """``{name}.grad_norm`` of every wrapper that clips."""
        return {f"{name}.{key}": value for name, w in self.items() for key, value in w.log_vars().items()}

    @contextlib.contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Within it, parameters of the other wrappers require no gradient: the phase trains `names` alone.

        Raises:
            ConfigError: no wrapper has that name.
        """
        for name in names:
            if name not in self:
                raise ConfigError(
                    f"there is no optimizer '{name}'{nearest(name, self.keys())}; only {list(self.keys())}"
                )
        others = [w for name, w in self.items() if name not in names]
        with _without_gradients(p for w in others for g in w.optimizer.param_groups for p in g["params"]):
            yield

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores every wrapper.

        Raises:
            ConfigError: the names differ.
        """
        missing, unknown = set(self.keys()) - set(state_dict), set(state_dict) - set(self.keys())
        if missing or unknown:
            raise ConfigError(
                f"optimizers differ: not in the checkpoint {sorted(missing)}, only there {sorted(unknown)}"
            )
        for name, wrapper in self.items():
            wrapper.load_state_dict(state_dict[name])


@contextlib.contextmanager
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    changed = [p for p in parameters if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)


def _check_clip(config: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    if config is None:
        return "norm", {}
    options = dict(config)
    kind = options.pop("type", "norm")
    if kind not in _CLIP_KEYS:
        raise ConfigError(f"clip_grad.type '{kind}' is neither 'norm' nor 'value'")
    for key in options:
        if key not in _CLIP_KEYS[kind]:
            raise ConfigError(f"clip_grad has no key '{key}' for type {kind}{nearest(key, _CLIP_KEYS[kind])}")
    if _CLIP_NEEDS[kind] not in options:
        raise ConfigError(f"clip_grad of type {kind} needs {_CLIP_NEEDS[kind]}")
    if kind == "value":
        return kind, {"clip_value": float(options["clip_value"])}
    return kind, {
        "max_norm": float(options["max_norm"]),
        "norm_type": float(options.get("norm_type", 2.0)),
        "error_if_nonfinite": bool(options.get("error_if_nonfinite", False)),
    }


def _check_clean(config: Mapping[str, float] | None) -> dict[str, float]:
    # A command line's {nan: 0} has the number as its key.
    config = {"nan" if key != key else key: value for key, value in (config or {}).items()}
    for key in config:
        if key not in _CLEAN_KEYS:
            raise ConfigError(f"clean_gradients has no key '{key}'{nearest(key, _CLEAN_KEYS)}; it takes {_CLEAN_KEYS}")
    if not config:
        return {}
    # nan_to_num replaces what it is not told about by the dtype's extremes: name everything.
    kept = {"nan": float("nan"), "posinf": float("inf"), "neginf": float("-inf")}
    return {**kept, **{key: float(value) for key, value in config.items()}}


def _whole(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def _shard_entry(entry: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """One parameter's optimizer state, its moments spread like the parameter."""
    if not is_sharded(parameter):
        return dict(entry)
    return {
        name: shard_like(v, parameter) if isinstance(v, Tensor) and v.shape == parameter.shape else v
        for name, v in entry.items()
    }


def _few(names: Iterable[str], count: int = 5) -> str:
    listed = sorted(map(str, names))
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more or "none"
