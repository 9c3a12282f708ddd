"""Counting and timing: parameters, multiply-accumulates, paired timings, peak memory, and where the time goes.

Every number comes with what it needs to be believed: operators that could not be counted are named, timings of several
candidates are taken in turn inside one process and compared round by round, and memory says how it was measured.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from core.errors import VitrineError

# Operators that multiply but that FlopCounterMode has no formula for: they are named instead of silently left out.
_UNCOUNTED = (
    "_cudnn_rnn",
    "mkldnn_rnn_layer",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "_fft_c2c",
    "_fft_r2c",
    "_fft_c2r",
    "grid_sampler_2d",
    "grid_sampler_3d",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_grouped_mm",
    "_trilinear",
    "_cdist_forward",
    "_int_mm",
)
_COUNTED_NAMESPACES = ("aten", "prim", "prims", "profiler")


# --- counting -------------------------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of parameters and of trainable ones; a tensor that several modules share counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass (matrix products, attention and convolutions; 1 MAC = 2 FLOPs).

    `by_module` has every submodule's dotted name with its children included, `by_operator` the total per ATen operator;
    `uncounted` names operators met on the way that no formula covers.
    """

    total: int
    by_module: Mapping[str, int]
    by_operator: Mapping[str, int]
    uncounted: tuple[str, ...] = ()


def count_macs(module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any]) -> Macs:
    """Counts the multiply-accumulates of ``module(*inputs)`` (or ``module(**inputs)``) in evaluation mode.

    Works on any device; on ``meta`` it costs neither memory nor arithmetic. Attention is counted as the two dense
    matrix products whatever kernel would run, masks and causality notwithstanding; element-wise work, normalisation
    and softmax are not counted, as is usual. Training flags and gradient flags are restored afterwards.

    Args:
        module: the network; a ``torch.compile`` wrapper is looked through.
        inputs: positional arguments, or keyword arguments as a mapping; on the module's device.
    """
    module = getattr(module, "_orig_mod", module)
    training = {child: child.training for child in module.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_vector_formulas())
    watch = _Uncounted()
    try:
        module.eval()
        with torch.no_grad(), _countable(module), watch, counter:
            if isinstance(inputs, Mapping):
                module(**inputs)
            else:
                module(*inputs)
    finally:
        for child, flag in training.items():
            child.training = flag
    counts = counter.get_flop_counts()
    root = type(module).__name__
    by_module = {}
    for name, operators in counts.items():
        if name.startswith(f"{root}."):
            by_module[name.removeprefix(f"{root}.")] = sum(operators.values()) // 2
    by_operator = {str(operator): flops // 2 for operator, flops in counts.get("Global", {}).items()}
    return Macs(counter.get_total_flops() // 2, by_module, by_operator, tuple(sorted(watch.seen)))


@contextlib.contextmanager
def _countable(module: nn.Module) -> Iterator[None]:
    """Keeps attention and recurrent layers in the form that the counter has formulas for."""
    # Views of parameters keep asking for gradients under no_grad, and the counter's hooks then look for their graph.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # about other vendors' devices
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_()
            torch.backends.mha.set_fastpath_enabled(fastpath)


def _vector_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of products with a vector, which the counter's own table leaves out."""
    aten = torch.ops.aten

    def mv(matrix: Sequence[int], _vector: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(matrix)

    def addmv(_bias: Sequence[int], matrix: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(matrix)

    def addbmm(_bias: Sequence[int], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    return {aten.mv: mv, aten.dot: mv, aten.vdot: mv, aten.addmv: addmv, aten.addbmm: addbmm}


class _Uncounted(TorchDispatchMode):
    """Collects the names of operators that do arithmetic nobody counts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace not in _COUNTED_NAMESPACES or name in _UNCOUNTED:
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


# --- timing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The middle of some figures: median, lower and upper quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation (numpy's default); a single value is its own quartiles."""
        if not values:
            raise ValueError("no values to summarise")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Benchmark:
    """Seconds per call of each candidate, one value per round; round i of all candidates was taken close together."""

    seconds: Mapping[str, tuple[float, ...]]

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def rate(self, name: str, per_call: int = 1) -> Spread:
        """Things per second, where one call handles `per_call` of them."""
        return Spread.of([per_call / s for s in self.seconds[name]])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`: quartiles of the rounds' ratios, so that drift cancels."""
        return Spread.of(self.speedups(name, over))

    def speedups(self, name: str, over: str) -> list[float]:
        """The ratio of every round."""
        return [b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]


def benchmark(
    functions: Callable[[], Any] | Mapping[str, Callable[[], Any]],
    *,
    device: str | torch.device = "cpu",
    repeats: int = 15,
    warmup: int = 3,
    min_time: float = 0.02,
    threads: int | None = None,
    budget: float | None = None,
) -> Benchmark:
    """Times callables in turn: every round runs each of them once, in an order that reverses from round to round.

    A round repeats a short call until `min_time` has passed. The device is waited for before the clock is read, garbage
    collection is held off, and the thread count is restored afterwards.

    Args:
        functions: name -> callable without arguments; a single callable is named ``"call"``.
        device: where the work happens (decides how to wait for it).
        repeats: rounds.
        warmup: calls of each before the first round.
        min_time: shortest measured stretch in seconds.
        threads: CPU threads during the measurement; None leaves them.
        budget: seconds after which no further round begins; three rounds are taken at least.

    Raises:
        ValueError: no callable, or fewer than one round.
    """
    candidates = dict(functions) if isinstance(functions, Mapping) else {"call": functions}
    if not candidates or repeats < 1:
        raise ValueError("benchmark needs at least one callable and one round")
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with _threads(threads):
        calls = {}
        for name, function in candidates.items():
            for _ in range(warmup):
                function()
            calls[name] = max(1, math.ceil(min_time / max(_stretch(function, 1, device), 1e-9)))
        order = list(candidates)
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        started = time.perf_counter()
        try:
            for done in range(repeats):
                if budget is not None and done >= 3 and time.perf_counter() - started > budget:
                    break
                for name in order:
                    seconds[name].append(_stretch(candidates[name], calls[name], device) / calls[name])
                order.reverse()
        finally:
            if collecting:
                gc.enable()
    return Benchmark({name: tuple(values) for name, values in seconds.items()})


def _stretch(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of `calls` calls, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str | torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    kind = torch.device(device).type
    if kind not in ("cpu", "meta"):
        torch.get_device_module(kind).synchronize()


def device_name(device: str | torch.device) -> str:
    """What a timing was taken on, e.g. ``cpu (x86_64), torch 2.15.0``."""
    import platform

    device = torch.device(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{device.type} ({where}), torch {torch.__version__}"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Peak of a call: bytes of tensors allocated beyond those alive before it, and the process's growth on CPU.

    `total` is the device allocator's peak with everything alive (CUDA only), `resident` the growth of the resident set
    (CPU only; it depends on what the allocator kept from before, so compare `tensors`), `method` names the sources.
    """

    tensors: int
    method: str
    total: int | None = None
    resident: int | None = None


def peak_memory(function: Callable[[], Any], *, device: str | torch.device = "cpu") -> Memory:
    """Peak memory of one call after a first, unmeasured one.

    CUDA: the caching allocator's own statistics. CPU: the allocator's events as torch.profiler records them (exact and
    repeatable), and the resident set sampled by psutil every millisecond.
    """
    device = torch.device(device)
    function()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        total = torch.cuda.max_memory_allocated(device)
        return Memory(total - before, "torch.cuda.max_memory_allocated", total=total)
    resident = _resident_growth(function)
    return Memory(_allocated_peak(function), "allocator events (torch.profiler)", resident=resident)


def _allocated_peak(function: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise VitrineError("torch.profiler recorded no allocation: this build of PyTorch cannot measure CPU memory")
    events.sort(key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _resident_growth(function: Callable[[], Any]) -> int:
    import psutil

    process = psutil.Process()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        highest = max(highest, process.memory_info().rss)
        done.set()
        watcher.join()
    return max(0, highest - before)


# --- where the time goes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Time spent under a name: seconds per call of the profiled function, its share of all, and how often it ran."""

    name: str
    seconds: float
    share: float
    calls: float


def where_time_goes(
    function: Callable[[], Any],
    modules: Mapping[str, nn.Module],
    *,
    device: str | torch.device = "cpu",
    calls: int = 5,
    top: int = 12,
) -> tuple[list[Cost], list[Cost]]:
    """The dearest operators (own time) and modules (children included) of a callable, through torch.profiler.

    Module times cover the forward pass only: autograd runs backward outside the modules.

    Args:
        function: what to profile, e.g. a training step.
        modules: name -> module whose forward calls are to be told apart.
        device: CUDA times are the kernels', CPU times the operators'.
        calls: profiled calls, after one that is not.
        top: entries per list.

    Returns:
        Operators and modules, dearest first.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.device(device).type == "cuda"
    function()
    with (
        _marked(modules) as prefix,
        profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler,
    ):
        for _ in range(calls):
            function()
        synchronize(device)
    averages = profiler.key_averages()
    own = {
        e.key: ((e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6, e.count)
        for e in averages
        if not e.key.startswith((prefix, "ProfilerStep")) and not (cuda and e.key.startswith("cuda"))
    }
    whole = sum(seconds for seconds, _ in own.values()) or math.inf
    # In kernel order a marked range has no children's kernels of its own, so its device time is the total one.
    inside: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in averages:
        if event.key.startswith(prefix):
            seconds = (event.device_time_total if cuda else event.cpu_time_total) / 1e6
            name = event.key.removeprefix(prefix)
            if seconds >= inside[name][0]:
                inside[name] = (seconds, event.count)

    def ranked(costs: Mapping[str, tuple[float, int]]) -> list[Cost]:
        entries = [Cost(n, s / calls, s / whole, count / calls) for n, (s, count) in costs.items() if s > 0]
        return sorted(entries, key=lambda cost: -cost.seconds)[:top]

    return ranked(own), ranked(inside)


@contextlib.contextmanager
def _marked(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Wraps every module's forward in a profiler range named by the yielded prefix and the module's name."""
    prefix = "module:"
    handles, open_ranges = [], defaultdict(list)

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            mark = torch.profiler.record_function(prefix + name)
            mark.__enter__()
            open_ranges[name].append(mark)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges[name].pop().__exit__(None, None, None)

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
        yield prefix
    finally:
        for handle in handles:
            handle.remove()
