"""Runs that follow each other: one that fails does not end the others, and what failed is reported at the end.

`contained` serves every tool that trains several runs. `Sweep` is Hydra's part of it, a callback for multiruns that
configs/train.yaml names: every job leaves ``job.json`` in its folder below the sweep's, with its overrides, how it
ended, and its run's folder. Imports Hydra only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from core.errors import VitrineError

RECORD = "job.json"


class RunFailed(VitrineError):
    """A run ended by an error that is not one of the project's own; the traceback has been printed."""


def contained(run: Callable[[Any], dict[str, Any]], cfg: Any) -> dict[str, Any]:
    """``run(cfg)``, whose every failure is one of the project's errors, which callers report before they go on.

    Raises:
        VitrineError: the run's own; `RunFailed` for anything else, an exit inside the run included.
        core.signals.Interrupted: the run was asked to stop, which is meant for the runs to come as well.
    """
    try:
        return run(cfg)
    except VitrineError:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        # Without the cause: its frames would keep the run's tensors alive as long as the report.
        raise RunFailed(f"{type(error).__name__}: {error}") from None


class Sweep(Callback):
    """Follows a multirun: where its jobs leave their records, and that a failed one does not end it."""

    #: Folder of the multirun that this process has started; None for a single run.
    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook point: the folder is known here even where a launcher runs the jobs elsewhere."""
        Sweep.folder = Path(config.hydra.sweep.dir)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Hydra's hook point: a failed job of Hydra's own sweeper counts as done; its record says that it failed.

        Hydra's sweeper reads a return value only to raise the job's exception, and drops the batches to come then. A
        sweeper that optimises, and a launcher that collects jobs from other processes, do get the exception: they have
        rules of their own for failed jobs (``hydra.sweeper.max_failure_rate``).
        """
        parts = (config.hydra.sweeper, config.hydra.launcher)
        plain = all(str(part.get("_target_", "")).startswith("hydra._internal.core_plugins.basic_") for part in parts)
        if in_multirun() and plain and job_return.status is JobStatus.FAILED:
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED


def in_multirun() -> bool:
    """Whether this process runs a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def run_job(cfg: DictConfig, run: Callable[[DictConfig], dict[str, Any]]) -> Any:
    """One job of a multirun, with its record.

    Args:
        cfg: the job's config.
        run: `core.launch.run`.

    Returns:
        The run's objective (see configs/train.yaml), for sweepers that optimise.

    Raises:
        RunFailed: the run has failed. It holds a text alone, so that a launcher can send it between processes.
        core.signals.Interrupted: the run was asked to stop.
    """
    from core.signals import Interrupted

    record = {"job": HydraConfig.get().job.num, "overrides": OmegaConf.to_container(cfg.overrides)}
    try:
        result = contained(run, cfg)
    except Interrupted:
        raise
    except VitrineError as error:
        print(f"job {record['job']} failed, the multirun goes on: {error}", file=sys.stderr, flush=True)
        _write({**record, "status": "failed", "error": str(error)})
        raise RunFailed(str(error)) from None
    _write({**record, "status": "finished", "run_dir": result["run_dir"], "objective": result["objective"]})
    return result["objective"]


def _write(record: dict[str, Any]) -> None:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        (Path(HydraConfig.get().runtime.output_dir) / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def report() -> str | None:
    """What failed in the multirun that this process has started, a line for each job; None when nothing did."""
    if Sweep.folder is None or not Sweep.folder.is_dir():
        return None
    records = [json.loads(path.read_text()) for path in Sweep.folder.rglob(RECORD)]
    failed = sorted((r for r in records if r["status"] == "failed"), key=lambda record: record["job"])
    if not failed:
        return None
    lines = [f"  job {r['job']} ({' '.join(r['overrides'])}): {_first_line(r['error'])}" for r in failed]
    return "\n".join([f"{len(failed)} of {len(records)} jobs failed, recorded in {Sweep.folder}:", *lines])


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
