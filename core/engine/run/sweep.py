"""Runs that follow each other: one that fails does not end the others, and what failed is reported at the end.

`contained` serves every tool that trains several runs. `Sweep` is Hydra's part of it, a callback for multiruns that
configs/train.yaml names: every job leaves ``job.json`` in its folder below the sweep's, with its overrides, its status
and its run's folder, from its beginning on; ``runs.json`` in the sweep's folder holds those of all jobs. Imports Hydra
only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
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

from core.config.command.messages import first_process
from core.errors import VitrineError

RECORD = "job.json"
RUNS = "runs.json"


class RunFailed(VitrineError):
    """A run ended by an error that is not one of the project's own; the traceback has been printed."""


def contained(run: Callable[[Any], dict[str, Any]], cfg: Any) -> dict[str, Any]:
    """``run(cfg)``, whose every failure is one of the project's errors, which callers report before they go on.

    Raises:
        VitrineError: the run's own; `RunFailed` for anything else, an exit inside the run included.
        core.config.command.signals.Interrupted: the run was asked to stop, which is meant for the runs to come as well.
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
        run: `core.engine.launch.run`.

    Returns:
        The run's objective (see configs/train.yaml), for sweepers that optimise.

    Raises:
        RunFailed: the run has failed. It holds a text alone, so that a launcher can send it between processes.
        core.config.command.signals.Interrupted: the run was asked to stop.
    """
    global _job
    _job = {"job": HydraConfig.get().job.num, "overrides": OmegaConf.to_container(cfg.overrides)}
    note(status="running")
    from core.config.command.signals import Interrupted

    try:
        result = contained(run, cfg)
        note(status="finished", run_dir=result["run_dir"], objective=result["objective"])
        return result["objective"]
    except Interrupted:
        note(status="stopped")
        raise
    except VitrineError as error:
        print(f"job {_job['job']} failed, the multirun goes on: {error}", file=sys.stderr, flush=True)
        note(status="failed", error=str(error))
        raise RunFailed(str(error)) from None
    except BaseException:  # Ctrl-C where nothing makes an Interrupted of it
        note(status="stopped")
        raise
    finally:
        _job = None


_job: dict[str, Any] | None = None  # the record of the job that this process runs


def note(**news: Any) -> None:
    """Adds to the record of the multirun's job that this process runs; nothing outside of multiruns."""
    if _job is not None:
        _job.update(news)
        if first_process():
            from core.checkpoint.run_folder import write_json

            write_json(Path(HydraConfig.get().runtime.output_dir) / RECORD, _job)


def _records() -> list[dict[str, Any]]:
    """What the jobs of the multirun that this process has started have noted; empty without one."""
    if Sweep.folder is None or not Sweep.folder.is_dir():
        return []
    return sorted((json.loads(p.read_text()) for p in Sweep.folder.rglob(RECORD)), key=lambda record: record["job"])


def report() -> str | None:
    """What failed in the multirun that this process has started, a line for each job; None when nothing did."""
    records = _records()
    failed = [record for record in records if record["status"] == "failed"]
    if not failed:
        return None
    lines = [f"  job {r['job']} ({' '.join(r['overrides'])}): {_first_line(r['error'])}" for r in failed]
    return "\n".join([f"{len(failed)} of {len(records)} jobs failed, recorded in {Sweep.folder}:", *lines])


def conclude() -> None:
    """Writes ``runs.json`` of the multirun that this process has started, and prints which job is which run."""
    records = _records()
    if not records or not first_process():
        return
    from core.checkpoint.run_folder import write_json
    from core.output.render import Column, Row, Table, emit

    write_json(Sweep.folder / RUNS, records)
    common = set.intersection(*(set(record["overrides"]) for record in records))
    rows = [
        Row(
            {
                **{key: record.get(key) for key in ("job", "status", "run_dir")},
                "overrides": " ".join(word for word in record["overrides"] if word not in common),
                "objective": _shown(record.get("objective")),
            }
        )
        for record in records
    ]
    columns = [Column("job"), Column("status", align="left"), Column("overrides", align="left")]
    if any(record.get("objective") is not None for record in records):
        columns.append(Column("objective"))
    columns.append(Column("run_dir", "run's folder", align="left"))
    emit(Table("runs of the multirun", columns, rows, [f"Kept in {Sweep.folder / RUNS}."]))


def _shown(objective: Any) -> Any:
    return " ".join(f"{value:.4g}" for value in objective) if isinstance(objective, list) else objective


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
