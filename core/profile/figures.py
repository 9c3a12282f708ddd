"""Figures that need no data and no training: what a table can compute on the spot from a config.

The model is built on the ``meta`` device, so parameters and multiply-accumulates cost neither memory nor arithmetic. A
trainer adds its paper's own figures (tokens, trainable share of a part, ...) by offering
``table_figures(cfg) -> dict[str, number | str]``. Measured figures (throughput, memory) are a second, smaller set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.config.kinds import Count
from core.errors import ConfigError, nearest

BuildTrainer = Callable[..., Any]
Figure = int | float | str

COMPUTED = {
    "parameters": "parameters of the inference network",
    "trainable": "its trainable parameters",
    "trainable_share": "their share in per cent",
    "macs": "multiply-accumulates of one sample's forward pass",
    "macs/NAME": "the same inside NAME, a child that the inference network calls",
    "parameters/NAME, trainable/NAME": "the same of one of trainer.networks()",
}
MEASURED = {
    "throughput": "samples per second of the forward pass",
    "latency": "seconds per forward pass of one sample",
    "train_throughput": "samples per second of a training step",
    "forward_memory": "bytes of tensors alive at the peak of a forward pass, beyond the weights",
    "train_memory": "bytes of tensors alive at the peak of a training step, beyond the weights",
}


class Figures:
    """Data-free figures of configs; every config is built once, however many columns ask.

    Args:
        build_trainer: ``(cfg, device) -> trainer``.
    """

    def __init__(self, build_trainer: BuildTrainer) -> None:
        self._build = build_trainer
        self._cache: dict[str, dict[str, Figure]] = {}
        self._lazy_macs: dict[str, Any] = {}

    def of(self, cfg: Any, name: str) -> Figure:
        """The figure `name` of a resolved config; the last stage's where a stage computes what it is built from.

        Raises:
            ConfigError: nothing computes that figure for this experiment; names the nearest that exist.
        """
        from core.config.composition import to_dict
        from core.config.fingerprint import digest
        from core.engine.keys.check import stage_config

        cfg = to_dict(cfg)
        if any(stage.get("compute") for stage in cfg.get("stages") or ()):
            cfg = stage_config(cfg, cfg["stages"][-1])
        key = digest(cfg)  # not the fingerprint: what changes no result, as an input's shape, changes counts
        if key not in self._cache:
            trainer = self._build(cfg, "meta")
            self._cache[key] = _cheap_figures(trainer, cfg)
            self._lazy_macs[key] = trainer
        known = self._cache[key]
        if name.partition("/")[0] == "macs" and "macs" not in known:
            known |= _macs(self._lazy_macs.pop(key))
        if name not in known:
            choices = sorted({*known, "macs"})
            raise ConfigError(
                f"no figure '{name}' for {cfg['name']}{nearest(name, choices)} (there are: {', '.join(choices)}; "
                f"a trainer adds its own through table_figures(cfg))"
            )
        return known[name]


def _cheap_figures(trainer: Any, cfg: Any) -> dict[str, Figure]:
    from core.profile.measure import count_parameters

    figures: dict[str, Figure] = {}
    for name, part in trainer.networks().items():
        total, trainable = count_parameters(part)
        figures |= {f"parameters/{name}": total, f"trainable/{name}": trainable}
    network = _inference_network(trainer)
    if network is not None:
        total, trainable = count_parameters(network)
        figures |= {"parameters": total, "trainable": trainable}
        figures["trainable_share"] = 100.0 * trainable / total if total else 0.0
    if hasattr(trainer, "table_figures"):
        figures |= trainer.table_figures(cfg)
    return figures


def _inference_network(trainer: Any) -> Any | None:
    """The network that inference runs; None where a trainer of several does not say which."""
    try:
        return trainer.inference_network()
    except ConfigError:
        return None


def _macs(trainer: Any) -> dict[str, int]:
    from core.profile.measure import count_macs

    network = trainer.inference_network()
    counted = count_macs(network, trainer.example_inputs(1, "meta"))
    called = [name for name, _ in network.named_children() if name in counted.by_module]
    return {"macs": counted.total, **{f"macs/{name}": counted.by_module[name] for name in called}}


@dataclass(frozen=True)
class MeasureSettings:
    """How timings are taken: samples per call, rounds, CPU threads, device."""

    batch: Count = 32
    repeats: Count = 15
    threads: Count | None = None
    device: str = "auto"

    def where(self) -> str:
        """What a measurement with these settings was taken on, in words."""
        from core.engine.runner import pick_device
        from core.profile.measure import device_name

        threads = f", {self.threads} CPU thread(s)" if self.threads else ""
        return f"{device_name(pick_device(self.device))}{threads}, batch {self.batch}, {self.repeats} rounds"


@dataclass(frozen=True)
class Measured:
    """A measured figure of one config: the middle of its rounds, and every round for paired comparisons."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Measured:
        """Median and quartiles of these rounds."""
        from core.profile.measure import Spread

        spread = Spread.of(rounds)
        return cls(spread.median, spread.low, spread.high, tuple(rounds))


def measure_figures(
    configs: Mapping[str, Any], names: Sequence[str], settings: MeasureSettings, build_trainer: BuildTrainer
) -> dict[str, dict[str, Measured]]:
    """Measures figures of several configs side by side in this process, interleaved round by round.

    Args:
        configs: label -> resolved config.
        names: which of `MEASURED`.
        settings: batch, rounds, threads, device.
        build_trainer: ``(cfg, device) -> trainer``.

    Returns:
        figure -> label -> what was measured; rounds with the same index were taken close together.
    """
    from core.engine.runner import pick_device
    from core.profile.experiment import Subject
    from core.profile.measure import benchmark, peak_memory

    device = pick_device(settings.device)
    subjects = {label: Subject.build(cfg, device, build_trainer) for label, cfg in configs.items()}
    results: dict[str, dict[str, Measured]] = {}
    for name in names:
        if name not in MEASURED:
            raise ConfigError(f"no measured figure '{name}' (there are: {', '.join(MEASURED)})")
        training = name.startswith("train")
        batch = 1 if name == "latency" else settings.batch
        calls = {label: (s.train_step(batch) if training else s.forward(batch)) for label, s in subjects.items()}
        if name.endswith("memory"):
            values = {label: (float(peak_memory(call, device=device).tensors),) for label, call in calls.items()}
        else:
            timed = benchmark(calls, device=device, repeats=settings.repeats, threads=settings.threads)
            values = {
                label: seconds if name == "latency" else tuple(batch / s for s in seconds)
                for label, seconds in timed.seconds.items()
            }
        results[name] = {label: Measured.of(rounds) for label, rounds in values.items()}
    return results
