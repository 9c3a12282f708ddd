"""A resolved config becomes a run: processes, folder, Runner, evaluation, ``result.json``.

Heavy libraries are imported when a config needs them.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from core.config import CONFIGS, experiments, merge, to_dict
from core.errors import ConfigError
from core.results import fingerprint


def run(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Trains and evaluates one config, or its stages one after the other.

    Args:
        cfg: from `core.config.compose` or ``tools/train.py``.

    Returns:
        The content of ``result.json`` (of the last stage).

    Raises:
        ConfigError: anything in the config that cannot be meant; nothing has been built then.
        core.signals.Interrupted: a signal asked to stop; the state is saved.
    """
    plain = _checked(to_dict(cfg))
    _set_up_process(plain["runtime"])
    plain["run_dir"] = str(_choose_run_dir(plain))
    if not plain["stages"]:
        return _run_once(plain)
    return _run_stages(plain)


def build_trainer(cfg: DictConfig | dict[str, Any], device: str = "cpu") -> Any:
    """Only the trainer of a config, on a device; "meta" builds it without memory.

    One of mmdet's detectors comes as a `core.detection.Detector`.

    Raises:
        ConfigError: the config has no model, or names something that does not exist.
    """
    plain = to_dict(cfg)
    _look_in_working_directory()
    if not plain.get("model"):
        raise ConfigError(f"no model in the config: choose an experiment ({_some_experiments()})")
    from core.detection import as_trainer, constructing
    from core.registry import build, check, resolve

    check(plain["model"], "model")
    with constructing(resolve(plain["model"].get("type")), device):
        trainer = as_trainer(build(plain["model"]), plain).to(device)
    trainer.freeze()
    return trainer


def evaluate(cfg: DictConfig | dict[str, Any], checkpoint: str | Path | None, split: str = "test") -> dict[str, Any]:
    """Metrics of a checkpoint on the test split (or the validation split where there is no test split).

    Args:
        cfg: the experiment.
        checkpoint: a run's folder or checkpoint, or a weights file; None: the weights as built.
        split: "test" or "val".

    Raises:
        ConfigError: no such split or file.
    """
    plain = _checked(to_dict(cfg))
    _set_up_process(plain["runtime"])
    if plain["test_dataloader"] is None:
        split = "val"
    if plain[f"{split}_dataloader"] is None:
        raise ConfigError(f"{plain['name']} has no {split}_dataloader")
    plain["train_dataloader"] = plain["train_cfg"] = plain["optim_wrapper"] = plain["param_scheduler"] = None
    plain["ema"] = None
    if checkpoint is not None:
        plain["load_from"] = {"path": str(find_checkpoint(checkpoint))}
    plain["runs_dir"] = str(Path(plain["runs_dir"]) / "evaluations")  # apart from the runs that were trained
    plain["run_dir"] = str(_choose_run_dir(plain))
    runner = _runner(plain)
    return runner.test() if split == "test" else runner.val()


def find_checkpoint(path: str | Path, best: bool = False) -> Path:
    """The newest (or best) whole checkpoint of a run's folder, or the file itself.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    from core.checkpoint import CheckpointStore

    stages = sorted(path.glob("stage_*"))
    folder = (stages[-1] if stages else path) / "checkpoints"
    if folder.is_dir():
        store = CheckpointStore(folder)
        found = (store.best() if best else None) or store.newest()
        if found is not None:
            return found
    raise ConfigError(f"no checkpoint at {path}: give a checkpoint file or a run's folder")


# ---------------------------------------------------------------------- checks
def _some_experiments() -> str:
    return ", ".join(list(experiments())[:6]) + ", ...; tools/train.py --list"


def _checked(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config, if it can be meant: its keys, types and arguments exist."""
    import difflib

    _look_in_working_directory()
    if not cfg.get("model"):
        raise ConfigError(f"choose an experiment: experiment=... ({_some_experiments()})")
    if not cfg["name"]:
        raise ConfigError("the experiment sets no `name` (its id, e.g. stvit/digits)")
    known = _root_keys()
    for key in cfg:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            raise ConfigError(
                f"unknown key '{key}' at the top of the config" + (f"; did you mean {near}?" if near else "")
            )
    _check_components(cfg)
    _check_selection(cfg)
    from core.registry import check

    check({k: v for k, v in cfg.items() if k not in ("stages", "components")})
    for index, stage in enumerate(cfg["stages"]):
        staged = _stage_config(cfg, stage)
        check({k: v for k, v in staged.items() if k not in ("stages", "components")}, f"stages[{index}]")
    cfg["paper"] = cfg["paper"] or cfg["name"].partition("/")[0]
    return cfg


def _root_keys() -> set[str]:
    root = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    return (set(root) - {"defaults", "hydra"}) | {"runtime", "visualizer", "log_every", "resume_from", "stage_of"}


def _check_components(cfg: dict[str, Any]) -> None:
    for name, component in cfg["components"].items():
        wrong = set(component) ^ {"key", "default", "alternatives"}
        if wrong:
            raise ConfigError(f"components.{name} has to give key, default and alternatives (see {sorted(wrong)})")


def _check_selection(cfg: dict[str, Any]) -> None:
    if cfg["evaluate"] not in ("last", "best"):
        raise ConfigError(f"evaluate={cfg['evaluate']}: last or best")
    if cfg["evaluate"] == "best":
        if cfg["checkpoint"]["metric"] is None:
            raise ConfigError("evaluate=best needs checkpoint.metric")
        val, test = cfg["val_dataloader"], cfg["test_dataloader"]
        if val and test and val.get("dataset") == test.get("dataset") and not cfg["select_on_test"]:
            raise ConfigError(
                "evaluate=best would select the checkpoint on the test split: give val_dataloader a split of its own, "
                "or say select_on_test=true"
            )


def _look_in_working_directory() -> None:
    """A user's own package beside the command is importable, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


# ---------------------------------------------------------------------- processes and folders
def _set_up_process(runtime: dict[str, Any]) -> None:
    """Threads, and the process group under torchrun or a Slurm job."""
    import torch
    import torch.distributed as dist

    if runtime["threads"]:
        torch.set_num_threads(int(runtime["threads"]))
    if runtime["debug"]:
        torch.autograd.set_detect_anomaly(True)
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export()
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available() and runtime["device"] in ("auto", "cuda")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        timeout = datetime.timedelta(seconds=runtime["timeout_s"])
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _choose_run_dir(cfg: dict[str, Any]) -> Path:
    """The same folder on every process."""
    import torch.distributed as dist

    chosen: list[Any] = [None]
    if _rank() == 0:
        try:
            chosen = [str(_run_dir(cfg))]
        except ConfigError as error:
            chosen = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], ConfigError):
        raise chosen[0]
    return Path(chosen[0])


def _run_dir(cfg: dict[str, Any]) -> Path:
    resume = cfg["resume"]
    if cfg["run_dir"]:
        return Path(cfg["run_dir"])
    home = Path(cfg["runs_dir"]) / cfg["name"]
    if resume == "auto" or resume is True:
        mine = fingerprint(cfg)
        for folder in sorted((p.parent for p in home.glob("*/config.yaml")), key=lambda p: p.name, reverse=True):
            if fingerprint(yaml.safe_load((folder / "config.yaml").read_text())) == mine:
                return folder
    elif resume:
        path = Path(resume)
        folder = path.parent.parent if path.is_file() else path
        if not folder.is_dir():
            raise ConfigError(f"resume={resume}: no such run folder or checkpoint")
        return folder
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1000):
        folder = home / (stamp if number == 0 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise ConfigError(f"cannot find a free folder name in {home}")


def _checkpoint_to_resume(cfg: dict[str, Any]) -> Path | None:
    """Where a run goes on: the checkpoint that was named, or its folder's newest whole one."""
    resume, folder = cfg["resume"], Path(cfg["run_dir"]) / "checkpoints"
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{cfg['run_dir']} already holds checkpoints: resume=auto goes on, another run_dir starts anew"
            )
        return None
    if isinstance(resume, str) and Path(resume).is_file():
        return Path(resume)
    from core.checkpoint import CheckpointStore

    return CheckpointStore(folder).newest() if folder.is_dir() else None


# ---------------------------------------------------------------------- running
def _run_stages(cfg: dict[str, Any]) -> dict[str, Any]:
    """Every stage in a folder of its own; finished ones are skipped, later ones start from an earlier one's weights.

    What later stages are tested with is built before the first one trains, so that a wrong setting shows at once.
    """
    from core.runner import build_test

    if _rank() == 0:
        _write_config(cfg)
    results: dict[str, dict[str, Any]] = {}
    names = [stage.get("name") for stage in cfg["stages"]]
    if None in names or len(set(names)) != len(names):
        raise ConfigError(f"stages need distinct names, not {names}")
    stages = [_stage_config(cfg, stage) for stage in cfg["stages"]]
    for index, (name, staged) in enumerate(zip(names, stages, strict=True)):
        staged["run_dir"] = str(Path(cfg["run_dir"]) / f"stage_{index}_{name}")
        staged["stage_of"] = cfg["run_dir"]
    later = [staged for staged in stages[1:] if staged["test_dataloader"] and _finished(staged) is None]
    tests = {staged["run_dir"]: build_test(staged) for staged in later}
    for index, (name, staged) in enumerate(zip(names, stages, strict=True)):
        staged["load_from"] = _from_stage(staged["load_from"], cfg, names[:index])
        results[name] = _run_once(staged, tests.pop(staged["run_dir"], None))
    last = dict(results[names[-1]])
    last["stages"] = {name: result["metrics"] for name, result in results.items()}
    last["seconds"] = sum(result["seconds"] for result in results.values())
    last["run_dir"] = cfg["run_dir"]
    if _rank() == 0:
        _write_json(Path(cfg["run_dir"]) / "result.json", last)
    return last


def _stage_config(cfg: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    staged = merge({**cfg, "stages": []}, {k: v for k, v in stage.items() if k != "name"})
    return staged


def _from_stage(load_from: Any, cfg: dict[str, Any], earlier: list[str]) -> Any:
    if isinstance(load_from, list):
        return [_from_stage(one, cfg, earlier) for one in load_from]
    if not isinstance(load_from, dict) or "stage" not in load_from:
        return load_from
    name = load_from["stage"]
    if name not in earlier:
        raise ConfigError(f"load_from.stage '{name}' is no earlier stage ({', '.join(earlier) or 'there is none'})")
    folder = Path(cfg["run_dir"]) / f"stage_{earlier.index(name)}_{name}"
    options = {k: v for k, v in load_from.items() if k not in ("stage", "best")}
    return {"path": str(find_checkpoint(folder, best=load_from.get("best", False))), **options}


def _finished(cfg: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run that goes on where there is nothing left to do."""
    done = Path(cfg["run_dir"]) / "result.json"
    result = json.loads(done.read_text()) if cfg["resume"] and done.is_file() else {}
    return result if result.get("status") == "finished" else None


def _run_once(cfg: dict[str, Any], test: dict[str, Any] | None = None) -> dict[str, Any]:
    if (result := _finished(cfg)) is not None:
        print(f"{cfg['name']}: already finished in {cfg['run_dir']}", flush=True)
        return result
    cfg = {**cfg, "resume_from": (lambda p: str(p) if p else None)(_checkpoint_to_resume(cfg))}
    if _rank() == 0:
        _write_config(cfg)
    started = time.perf_counter()
    runner = _runner(cfg, test)
    _train(runner, cfg)
    result = _result(runner, cfg, time.perf_counter() - started)
    if _rank() == 0:
        done = Path(cfg["run_dir"]) / "result.json"
        _write_json(done, result)
        runner.logger.info(f"{cfg['name']}: {_brief(result['metrics'])} -> {done}")
    runner.visualizer.close()
    return result


def _runner(cfg: dict[str, Any], test: dict[str, Any] | None = None) -> Any:
    from core.runner import Runner

    Path(cfg["run_dir"]).mkdir(parents=True, exist_ok=True)
    return Runner(cfg, test)


def _train(runner: Any, cfg: dict[str, Any]) -> None:
    if cfg["train_dataloader"] is not None:
        runner.train()
    if cfg["test_dataloader"] is not None:
        if cfg["evaluate"] == "best" and runner.store.best() is not None:
            from core.trainer import unwrap
            from core.weights import load_weights

            runner.logger.info(load_weights(unwrap(runner.model), runner.store.best()))
        runner.test()
    elif cfg["train_dataloader"] is None and cfg["val_dataloader"] is not None:
        runner.val()


def _result(runner: Any, cfg: dict[str, Any], seconds: float) -> dict[str, Any]:
    import torch

    from core.runner import versions
    from core.trainer import unwrap

    parameters = list(unwrap(runner.model).parameters())
    loops = {split: getattr(runner, f"_{split}_loop") for split in ("val", "test")}
    figures = {split: loop.metrics for split, loop in loops.items() if hasattr(loop, "metrics")}
    metrics = figures.get("test") or figures.get("val") or {}
    if runner.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    trained = cfg["train_dataloader"] is not None
    return {
        "name": cfg["name"],
        "paper": cfg["paper"],
        "overrides": cfg["overrides"],
        "fingerprint": fingerprint(cfg),
        "seed": cfg["seed"],
        "status": "finished",
        "metrics": metrics,
        "val_metrics": figures.get("val", {}),
        "steps": runner.train_loop.iter if trained else 0,
        "epochs": runner.train_loop.epoch if trained else 0,
        "skipped_samples": runner.train_loop.skipped_samples if trained else 0,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "seconds": round(seconds, 2),
        "resumed_from": cfg.get("resume_from"),
        "peak_memory_mb": round(peak, 1),
        "device": torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else _cpu_name(),
        "processes": runner.world_size,
        "versions": versions(),
        "commit": _commit(),
        "finished": datetime.datetime.now().isoformat(timespec="seconds"),
        "run_dir": cfg["run_dir"],
    }


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


def _write_config(cfg: dict[str, Any]) -> None:
    folder = Path(cfg["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (folder / "overrides.txt").write_text("".join(f"{o}\n" for o in cfg["overrides"]))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=float))
    os.replace(partial, path)
