"""`tools/profile.py`: what an experiment costs, alone or beside another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.config.command.messages import to_stderr
from core.config.composition import composer
from core.errors import ConfigError, VitrineError, nearest
from core.output.render import Cell, Column, Row, Table, emit, resolve_format

if TYPE_CHECKING:
    import torch

    from core.profile.measure import Benchmark, Cost, Macs

WHAT = ("macs", "forward", "train", "memory", "loader", "ops")


@dataclass
class Options:
    """Options of ``tools/profile.py``."""

    experiment: str = field(metadata={"help": "what to profile, e.g. stvit/deit_small"})
    vs: str | None = field(default=None, metadata={"help": "what to measure in turn with it: NAME or 'NAME key=value'"})
    batch: int = field(default=32, metadata={"help": "samples per call"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    what: list[str] = field(default_factory=lambda: list(WHAT), metadata={"help": "any of " + ", ".join(WHAT)})
    repeats: int = field(default=15, metadata={"help": "rounds of every timing"})
    budget: float = field(default=60.0, metadata={"help": "seconds per timing after which no round is added"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; null leaves PyTorch's choice"})
    top: int = field(default=12, metadata={"help": "entries in the lists of operators and modules"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs besides the project's own"})
    format: str | None = field(default=None, metadata={"help": "text, md, csv, json or png"})
    output: str | None = field(default=None, metadata={"help": "file instead of standard output"})


@dataclass
class Subject:
    """An experiment on a device, ready to be called: its trainer, its config, an optimizer for steps."""

    trainer: Any
    cfg: Mapping[str, Any]
    device: torch.device
    channels_last: bool
    _wrapper: Any = None

    @classmethod
    def build(cls, cfg: Any, device: torch.device, build_trainer: Callable[..., Any]) -> Subject:
        """Builds the trainer as a run of this config would: precision, memory format and compilation included."""
        import torch

        from core.config.composition import to_dict

        plain = to_dict(cfg)
        runtime = plain.get("runtime") or {}
        trainer = build_trainer(cfg, str(device))
        trainer.precision = runtime.get("precision", "fp32")
        channels_last = bool(runtime.get("channels_last"))
        if channels_last:
            trainer.to(memory_format=torch.channels_last)
        if runtime.get("compile"):
            options = runtime["compile"] if isinstance(runtime["compile"], Mapping) else {}
            for network in trainer.networks().values():
                network.compile(**options)
        return cls(trainer, plain, device, channels_last)

    def forward(self, batch: int) -> Callable[[], None]:
        """One inference pass over `batch` samples, in the run's precision, without gradients."""
        import torch

        network = self.trainer.inference_network()
        inputs = tuple(self.placed(value) for value in self.trainer.example_inputs(batch, self.device))

        def call() -> None:
            network.eval()
            with torch.inference_mode(), self.trainer.autocast():
                network(*inputs)

        return call

    def optimizer(self) -> Any:
        """The optimizer wrapper of the experiment, built when first asked for.

        Raises:
            ConfigError: the experiment has none.
        """
        if not self.cfg.get("optim_wrapper"):
            raise ConfigError(f"{self.cfg['name']} has no optim_wrapper: nothing is trained")
        if self._wrapper is None:
            from core.optim.groups import OptimConstructor

            settings = {k: v for k, v in self.cfg["optim_wrapper"].items() if k != "constructor"}
            self._wrapper = OptimConstructor(settings, precision=self.trainer.precision)(self.trainer)
        return self._wrapper

    def train_step(self, batch: int) -> Callable[[], None]:
        """One optimisation step on a made-up batch: forward, backward, update, as the trainer defines it.

        Raises:
            ConfigError: the experiment has no optimizer.
        """
        wrapper = self.optimizer()
        data = {key: self.placed(value) for key, value in self.trainer.example_batch(batch, self.device).items()}

        def call() -> None:
            self.trainer.train()
            self.trainer.train_step(dict(data), wrapper)

        return call

    def placed(self, value: Any) -> Any:
        """A value of a batch in the run's memory format."""
        import torch

        if self.channels_last and isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
            return value.contiguous(memory_format=torch.channels_last)
        return value


# --- measuring ------------------------------------------------------------------------------------------------------


class Profiler:
    """Measures one experiment, or two in turn, and keeps what it found as rows.

    Args:
        configs: one or two resolved configs by experiment name; the first is the subject, the second the yardstick.
        options: what and how.
        build_trainer: ``(cfg, device) -> trainer``.
    """

    def __init__(self, configs: Mapping[str, Any], options: Options, build_trainer: Callable[..., Any]) -> None:
        self.configs = dict(configs)
        self.options = options
        self._build = build_trainer
        self.names = list(configs)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.lists: list[Table] = []
        from core.engine.runner import pick_device

        self.device = pick_device(options.device)
        self._subjects: dict[str, Subject] = {}

    def tables(self) -> list[Table]:
        """Everything asked for, measured: the summary first, then the lists."""
        steps = {
            "macs": self._macs,
            "forward": self._forward,
            "train": self._train,
            "memory": self._memory,
            "loader": self._loader,
            "ops": self._ops,
        }
        for what in self.options.what:
            print(f"profile: {what} ...", file=sys.stderr, flush=True)
            steps[what]()
        return [self._summary(), *self.lists]

    @property
    def subjects(self) -> dict[str, Subject]:
        """The experiments on the device, built when first asked for."""
        if not self._subjects:
            self._subjects = {n: Subject.build(cfg, self.device, self._build) for n, cfg in self.configs.items()}
        return self._subjects

    def _summary(self) -> Table:
        from core.profile.measure import device_name

        columns = [Column("quantity", align="left"), Column("unit", align="left")]
        for name in self.names:
            columns += [Column(f"{name}:{part}", part, group=name) for part in ("median", "q1", "q3")]
        if len(self.names) == 2:
            columns += [Column(f"ratio:{part}", part, group="ratio") for part in ("median", "q1", "q3")]
        title = f"{self.names[0]}" + (f" against {self.names[1]}" if len(self.names) == 2 else "")
        threads = f", {self.options.threads} CPU threads" if self.options.threads else ""
        notes = [f"{device_name(self.device)}{threads}; q1, q3: quartiles over the rounds.", *self.notes]
        if len(self.names) == 2:
            notes.insert(1, f"ratio: {self.names[0]} / {self.names[1]}, round by round, the two timed in turn.")
        return Table(f"profile of {title}", columns, self.rows, notes, name="summary")

    def _add(self, quantity: str, unit: str, values: Mapping[str, Any], ratio: Any = None) -> None:
        """One row: a plain number or a Spread per experiment; exact numbers get their exact ratio."""
        cells: dict[str, Any] = {"quantity": quantity, "unit": unit}
        for name, value in values.items():
            if hasattr(value, "median"):
                cells |= {f"{name}:median": value.median, f"{name}:q1": value.low, f"{name}:q3": value.high}
            elif value is not None:
                cells[f"{name}:median"] = value
        numbers = [values.get(name) for name in self.names]
        if ratio is not None:
            cells |= {"ratio:median": ratio.median, "ratio:q1": ratio.low, "ratio:q3": ratio.high}
        elif len(numbers) == 2 and all(isinstance(n, int | float) for n in numbers) and numbers[1]:
            cells["ratio:median"] = numbers[0] / numbers[1]
        self.rows.append(Row(cells))

    def _macs(self) -> None:
        from core.profile.measure import count_macs, count_parameters

        parameters, trainable, macs = {}, {}, {}
        for name, cfg in self.configs.items():
            trainer = self._build(cfg, "meta")
            network = trainer.inference_network()
            parameters[name], trainable[name] = count_parameters(network)
            counted = count_macs(network, trainer.example_inputs(1, "meta"))
            macs[name] = counted.total
            self.lists.append(self._module_list(name, network, counted))
            if counted.uncounted:
                self.notes.append(
                    f"{name}: operators without a formula, not in the MACs: {', '.join(counted.uncounted)}"
                )
        self._add("parameters", "", parameters)
        self._add("trainable parameters", "", trainable)
        prefix, scale = _prefix(max(macs.values()))
        self._add("forward pass of one sample", f"{prefix}MACs", {name: n / scale for name, n in macs.items()})

    def _module_list(self, name: str, network: Any, counted: Macs) -> Table:
        from core.profile.measure import count_parameters

        found = dict(network.named_modules())
        prefix, scale = _prefix(counted.total)
        dearest = sorted(counted.by_module.items(), key=lambda item: -item[1])[: self.options.top]
        rows = [
            Row(
                {
                    "module": module,
                    "class": type(found[module]).__name__ if module in found else "",
                    "macs": macs / scale,
                    "share": 100.0 * macs / counted.total if counted.total else 0.0,
                    "parameters": count_parameters(found[module])[0] if module in found else None,
                }
            )
            for module, macs in dearest
        ]
        columns = [
            Column("module", align="left"),
            Column("class", align="left"),
            Column("macs", f"{prefix}MACs"),
            Column("share", unit="%", digits=1),
            Column("parameters"),
        ]
        return Table(f"multiply-accumulates by module, {name} (children included)", columns, rows, name=f"macs:{name}")

    def _time(self, calls: Mapping[str, Callable[[], None]]) -> Benchmark:
        from core.profile.measure import benchmark

        options = self.options
        return benchmark(
            calls,
            device=self.device,
            repeats=options.repeats,
            warmup=2,
            threads=options.threads,
            budget=options.budget,
        )

    def _forward(self) -> None:
        for batch in dict.fromkeys((1, self.options.batch)):
            timed = self._time({name: subject.forward(batch) for name, subject in self.subjects.items()})
            self._add_rate(f"forward, batch {batch}", timed, batch)

    def _train(self) -> None:
        batch = self.options.batch
        timed = self._time({name: subject.train_step(batch) for name, subject in self.subjects.items()})
        self._add_rate(f"training step, batch {batch}", timed, batch)

    def _add_rate(self, quantity: str, timed: Benchmark, batch: int) -> None:
        from core.profile.measure import Spread

        ratio = timed.speedup(self.names[0], over=self.names[1]) if len(self.names) == 2 else None
        milliseconds = {name: Spread.of([1e3 * s for s in timed.seconds[name]]) for name in self.names}
        inverse = None
        if ratio is not None:
            inverse = Spread.of([1 / r for r in timed.speedups(self.names[0], over=self.names[1])])
        self._add(quantity, "ms", milliseconds, inverse)
        self._add(quantity, "samples/s", {name: timed.rate(name, batch) for name in self.names}, ratio)

    def _memory(self) -> None:
        from core.profile.measure import peak_memory

        batch, mib = self.options.batch, 2**20
        forward = {n: peak_memory(s.forward(batch), device=self.device) for n, s in self.subjects.items()}
        self._add(
            f"peak tensors of a forward pass, batch {batch}", "MiB", {n: m.tensors / mib for n, m in forward.items()}
        )
        method = next(iter(forward.values())).method
        if all(subject.cfg.get("optim_wrapper") for subject in self.subjects.values()):
            train = {n: peak_memory(s.train_step(batch), device=self.device) for n, s in self.subjects.items()}
            quantity = f"peak tensors of a training step, batch {batch}"
            self._add(quantity, "MiB", {n: m.tensors / mib for n, m in train.items()})
            if self.device.type == "cpu":
                resident = {n: (m.resident or 0) / mib for n, m in train.items()}
                self._add("growth of the resident set in a training step", "MiB", resident)
                method += "; resident set by psutil, which depends on what was freed before"
            elif len(self.names) == 1:
                total = {n: m.total / mib for n, m in train.items() if m.total is not None}
                self._add("peak with weights and optimizer state", "MiB", total)
        self.notes.append(f"memory: beyond the weights alive before the call; {method}.")

    def _loader(self) -> None:
        rates: dict[str, Any] = {}
        for name, cfg in self.configs.items():
            try:
                rates[name] = loader_rate(cfg, seconds=min(10.0, self.options.budget))
            except VitrineError as error:
                self.notes.append(f"{name}: loader not measured: {error}")
                rates[name] = None
        self._add("training loader", "samples/s", rates)

    def _ops(self) -> None:
        from core.profile.measure import where_time_goes

        for name, subject in self.subjects.items():
            trains = bool(subject.cfg.get("optim_wrapper"))
            call = subject.train_step(self.options.batch) if trains else subject.forward(self.options.batch)
            network = subject.trainer.inference_network()
            modules = {n: m for n, m in network.named_modules() if n and n.count(".") < 3}
            operators, inside = where_time_goes(call, modules, device=self.device, calls=3, top=self.options.top)
            step = f"a {'training step' if trains else 'forward pass'} of {name}"
            self.lists.append(_costs(f"operators by own time in {step}", operators, f"operators:{name}"))
            title = f"modules by time in the forward part of {step} (children included)"
            self.lists.append(_costs(title, inside, f"modules:{name}"))


def _prefix(value: float) -> tuple[str, float]:
    """The decimal prefix in which a count is readable, and its size."""
    return ("G", 1e9) if value >= 1e9 else ("M", 1e6) if value >= 1e6 else ("K", 1e3)


def loader_rate(cfg: Any, *, seconds: float = 10.0) -> float:
    """Samples per second that the training loader delivers when nobody computes, after its first batch.

    Args:
        cfg: the resolved config; its `train_dataloader` is built as a run would build it, workers included.
        seconds: stop after this long, or at the end of the first epoch; two batches are timed at least where there are.

    Raises:
        ConfigError: the experiment trains on nothing, or the loader gives fewer than two batches.
        VitrineError: the data is not there, in its reader's words.
    """
    import time

    from core.config.composition import to_dict
    from core.data.loading.batch import batch_size
    from core.data.loading.loader import build_loader

    plain = to_dict(cfg)
    if not plain.get("train_dataloader"):
        raise ConfigError(f"{plain['name']} has no train_dataloader")
    loader = build_loader(dict(plain["train_dataloader"]), seed=plain["seed"], training=True)
    loader.set_epoch(0)
    batches = iter(loader)
    next(batches)  # workers have started and caches are warm when the clock starts
    samples = 0
    start = time.perf_counter()
    for index, fetched in enumerate(batches):
        samples += 0 if fetched.data is None else batch_size(fetched.data)
        if index >= 1 and time.perf_counter() - start > seconds:
            break
    elapsed = time.perf_counter() - start
    if samples == 0:
        raise ConfigError(f"{plain['name']}: one epoch of the training loader is a single batch, too little to time")
    return samples / elapsed


def _costs(title: str, costs: list[Cost], name: str) -> Table:
    columns = [
        Column("name", align="left"),
        Column("ms", "time", "ms"),
        Column("share", unit="%", digits=1),
        Column("calls", digits=1),
    ]
    rows = [Row({"name": c.name, "ms": 1e3 * c.seconds, "share": Cell(100 * c.share), "calls": c.calls}) for c in costs]
    return Table(title, columns, rows, name=name)


# --- the tool -------------------------------------------------------------------------------------------------------


def profile_experiment(options: Options, overrides: list[str]) -> list[Table]:
    """The tables of ``tools/profile.py``.

    Args:
        options: the tool's options.
        overrides: Hydra overrides for both experiments.

    Raises:
        ConfigError: unknown experiment, unknown `what`, or a config that cannot be built.
    """
    from core.engine.launch import build_trainer

    compose = composer(options.config_dir)
    for what in options.what:
        if what not in WHAT:
            raise ConfigError(f"what={what}{nearest(what, WHAT)} (there are: {', '.join(WHAT)})")
    configs = {options.experiment: compose([f"experiment={options.experiment}", *overrides])}
    if options.vs is not None:
        other, *changes = options.vs.split()
        if options.vs == options.experiment:
            raise ConfigError("vs= is the experiment itself: name another, or a change: vs='NAME key=value'")
        label = " ".join(changes) if other == options.experiment else options.vs
        configs[label] = compose([f"experiment={other}", *overrides, *changes])
    with to_stderr():
        return Profiler(configs, options, build_trainer).tables()


def main(argv: list[str], doc: str) -> None:
    """``tools/profile.py``."""
    import os

    from core.config.command.cli import parse

    options, overrides = parse(argv, Options, doc=doc, positional="experiment", overrides=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    format = resolve_format(options.format, options.output)
    emit(profile_experiment(options, overrides), format, options.output)
