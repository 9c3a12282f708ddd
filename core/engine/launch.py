"""A resolved config becomes a run: processes, folder, Runner, evaluation, ``result.json``.

Heavy libraries are imported when a config needs them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core.checkpoint.latest import point_latest
from core.checkpoint.run_folder import finished, rank, unwritable, writable, write_json
from core.config.command.messages import first_process_speaks
from core.config.command.processes import first_decides, managers_unlocked
from core.config.command.signals import StopRequest
from core.config.composition import CONFIGS, to_dict
from core.config.fingerprint import fingerprint
from core.config.key import config_key
from core.config.shortened import TRIAL, is_trial
from core.engine.keys.check import checked, look_in_working_directory, some_experiments
from core.engine.keys.kinds import check_kinds
from core.engine.keys.objective import objective
from core.engine.run import sweep
from core.engine.run.resume import Origin
from core.engine.run.stages import from_stage, plan_stages, stage_configs, with_files
from core.engine.run.start import Start, enter, opened, plan
from core.engine.switches import switches
from core.errors import ConfigError, VitrineError


def run(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Trains and evaluates one config, or its stages one after the other.

    Args:
        cfg: from `core.config.composition.compose` or ``tools/train.py``.

    Returns:
        The content of ``result.json`` (of the last stage).

    Raises:
        ConfigError: anything in the config that cannot be meant; nothing has been built then. Only an `objective` that
            the run's metrics turn out not to have is found at the end, when ``result.json`` is written.
        core.config.command.signals.Interrupted: a signal asked to stop; the state is saved.
    """
    plain = to_dict(cfg)
    kept = "; go on with resume=auto" if plain.get("resume") else ""
    with StopRequest(f"stopped before training {'went on' if kept else 'began'}: nothing is lost{kept}") as stop:
        plain = checked(plain)
        with process_set_up(plain["runtime"]), managers_unlocked(), opened(plain) as source:
            if rank() == 0:
                point_latest(plain)
            sweep.note(run_dir=plain["run_dir"])
            result = _run_stages(plain, source) if plain["stages"] else _run_whole(plain, source)
            stop.defer()
            figure = _objective(plain, result)
            if result.get("objective") != figure:
                result = {**result, "objective": figure}
                if rank() == 0:
                    write_json(Path(plain["run_dir"]) / "result.json", result)
        return result


def _objective(cfg: dict[str, Any], result: dict[str, Any]) -> float | list[float] | None:
    try:
        return objective(cfg, result)
    except ConfigError:
        if result["status"] != TRIAL:  # which may lack what cannot be computed of a few samples
            raise
        return None


def build_trainer(cfg: DictConfig | dict[str, Any], device: str = "cpu") -> Any:
    """Only the trainer of a config, on a device; "meta" builds it without memory.

    One of mmdet's detectors comes as a `core.engine.detection.Detector`.

    Raises:
        ConfigError: the config has no model, or names something that does not exist.
    """
    plain = with_files(to_dict(cfg))
    look_in_working_directory()
    if not plain.get("model"):
        raise ConfigError(f"no model in the config: choose an experiment ({some_experiments()})")
    from core.config.registry import build, check, resolve
    from core.engine.detection import as_trainer, constructing

    check_kinds({"model": plain["model"]})
    check(plain["model"], "model")
    with config_key("model"), constructing(resolve(plain["model"].get("type")), device):
        trainer = as_trainer(build(plain["model"]), plain).to(device)
        trainer.freeze()
    return trainer


# ---------------------------------------------------------------------- processes and folders
@contextlib.contextmanager
def process_set_up(runtime: dict[str, Any]) -> Iterator[None]:
    """Threads, anomaly detection, and the process group under torchrun or a Slurm job.

    Afterwards the process has its own switches again, whatever the run has set; the process group stays.
    """
    with switches(runtime):
        _join_processes(runtime)
        yield


def _join_processes(runtime: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export()
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available() and runtime["device"] in ("auto", "cuda")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        timeout = datetime.timedelta(seconds=runtime["timeout_s"])
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    first_process_speaks()


# ---------------------------------------------------------------------- running
def _run_whole(cfg: dict[str, Any], source: Origin | None) -> dict[str, Any]:
    """A run without stages."""
    elsewhere = source is not None and source.is_elsewhere(Path(cfg["run_dir"]))
    return _run_once(cfg, first_decides(lambda: plan(cfg, source, source.folder if elsewhere else None)))


def _run_stages(cfg: dict[str, Any], source: Origin | None) -> dict[str, Any]:
    """Every stage in a folder of its own; finished ones are skipped, later ones start from an earlier one's weights.

    What later stages are tested with is built before the first one trains, so that a wrong setting shows at once.
    """
    from core.engine.runner import build_test

    folder, stages = Path(cfg["run_dir"]), stage_configs(cfg)
    places, plans = first_decides(lambda: plan_stages(cfg, stages, source))
    if all(start.result is not None for start in plans.values()) and (result := finished(folder)) is not None:
        return _already(cfg, result)
    later = [name for name in list(stages)[1:] if stages[name]["test_dataloader"] and plans[name].result is None]
    tests = {name: build_test(stages[name]) for name in later}
    results: dict[str, dict[str, Any]] = {}
    for name, staged in stages.items():
        start = first_decides(lambda staged=staged, name=name: plan(staged, source, places.get(name)))
        earlier = {done: stages[done]["run_dir"] for done in results}
        if start.result is None:
            goes_on = start.checkpoint is not None
            staged["load_from"] = from_stage(staged["load_from"], earlier, goes_on=goes_on)
        results[name] = _run_once(staged, start, tests.pop(name, None))
    last = dict(results[name])
    last["stages"] = {name: result["metrics"] for name, result in results.items()}
    last["seconds"] = sum(result["seconds"] for result in results.values())
    last["run_dir"] = cfg["run_dir"]
    if rank() == 0:
        write_json(folder / "result.json", last)
    return last


def _already(cfg: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    if rank() == 0:
        print(f"{cfg['name']}: already finished in {cfg['run_dir']}, this is its result", flush=True)
    return result


def _run_once(cfg: dict[str, Any], start: Start, test: dict[str, Any] | None = None) -> dict[str, Any]:
    if start.result is not None:
        return _already(cfg, start.result)
    resume_from = None if start.checkpoint is None else str(start.checkpoint)
    with StopRequest(_before_training({**cfg, "resume_from": resume_from})) as stop:
        stop.check()  # deferred from the first step on, to the end of this context
        cfg = with_files({**first_decides(lambda: enter(cfg, start)), "resume_from": resume_from})
        runner = make_runner(cfg, test)
        try:
            with _written(runner, Path(cfg["run_dir"])):
                _train(runner, cfg)
                stop.defer()
                result = _result(runner, cfg)
                if rank() == 0:
                    done = Path(cfg["run_dir"]) / "result.json"
                    write_json(done, result)
                    runner.logger.info(f"{cfg['name']}: {_brief(result['metrics'])} -> {done}")
        finally:
            with contextlib.suppress(OSError):  # a full disk, of which the error that ended the run has told
                runner.visualizer.close()
    return result


@contextlib.contextmanager
def _written(runner: Any, folder: Path) -> Iterator[None]:
    """A log that can no longer be written (a disk is full) ends the run with what is saved of it, in one error."""
    try:
        yield
    except OSError as error:
        if isinstance(error, VitrineError) or not unwritable(error, folder):
            raise
        with writable(folder, f"; {runner.farewell(f'at step {runner.iter}')}"):
            raise


def _before_training(cfg: dict[str, Any]) -> str:
    """What is said when a run is stopped while it starts."""
    if cfg["train_dataloader"] is None:
        return "stopped before the result was there"
    if cfg["resume_from"]:
        return "stopped before training went on: nothing is lost; go on with resume=auto"
    kept = ", finished stages are kept; go on with resume=auto" if cfg.get("stage_of") else ""
    return f"stopped before training began: nothing is lost{kept}"


def make_runner(cfg: dict[str, Any], test: dict[str, Any] | None = None) -> Any:
    """The Runner of a checked config, in its folder."""
    from core.engine.runner import Runner

    folder = Path(cfg["run_dir"])
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return Runner(cfg, test)
    except OSError as error:
        if not unwritable(error, folder):
            raise
        with writable(folder):  # logs are opened there
            raise


def _train(runner: Any, cfg: dict[str, Any]) -> None:
    if cfg["compute"] is not None:
        runner.compute()
        return
    if cfg["train_dataloader"] is not None:
        runner.train()
        if cfg["evaluate"] == "best":
            runner.use_best()
    if cfg["test_dataloader"] is not None:
        runner.test()
    elif cfg["train_dataloader"] is None and cfg["val_dataloader"] is not None:
        runner.val()


def _result(runner: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    import torch

    from core.config.command.processes import total
    from core.engine.runner import versions
    from core.trainer import Trainer, unwrap

    parameters = list(unwrap(runner.model).parameters())
    loops = {split: getattr(runner, f"_{split}_loop") for split in ("val", "test")}
    figures = {split: loop.metrics for split, loop in loops.items() if hasattr(loop, "metrics")}
    if runner.evaluated_step is not None:  # evaluate=best: figures of the weights that are tested, not of the last
        figures["val"] = runner.store.metrics(runner.evaluated_step)
    metrics = figures.get("test") or figures.get("val") or runner.computed
    if runner.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    trained = cfg["train_dataloader"] is not None
    trainer = unwrap(runner.model)
    facts = trainer.facts(cfg) if isinstance(trainer, Trainer) else {}
    return {
        "name": cfg["name"],
        "paper": cfg["paper"],
        "overrides": cfg["overrides"],
        "fingerprint": fingerprint(cfg),
        "seed": cfg["seed"],
        "status": TRIAL if is_trial(cfg["runtime"]) else "finished",
        "metrics": metrics,
        "val_metrics": figures.get("val", {}),
        "objective": None,  # read from the metrics when they are written: an unknown name loses no result
        "steps": runner.train_loop.iter if trained else 0,
        "epochs": runner.train_loop.epoch if trained else 0,
        "stopped_early": _stopped_early(runner.train_loop) if trained else None,
        "skipped_samples": total(runner.train_loop.skipped_samples) if trained else 0,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        **({"facts": facts} if facts else {}),
        "seconds": round(runner.seconds, 2),
        "resumed_from": cfg.get("resume_from"),
        **({"resume_history": cfg["resume_history"]} if cfg.get("resume_history") else {}),
        "peak_memory_mb": round(peak, 1),
        "device": torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else _cpu_name(),
        "processes": runner.world_size,
        "versions": versions(),
        "commit": _commit(),
        "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        "run_dir": cfg["run_dir"],
    }


def _stopped_early(loop: Any) -> str | None:
    """Why a training has fewer steps than its config says; None where it has all of them."""
    if not loop.stop_training or loop.iter >= loop.max_iters:
        return None
    return getattr(loop, "stop_reason", None) or "a hook set stop_training"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or "cpu"


def _commit() -> str | None:
    command = ["git", "-C", str(CONFIGS.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _brief(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()) or "done"
