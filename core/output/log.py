"""The records of a run's ``log.jsonl``, which `core.output.backends.JsonLines` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.config.files import read_text
from core.errors import ConfigError


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run's log, in order.

    Args:
        path: a run's folder, a folder of runs (the newest is taken), or a log file.

    Raises:
        ConfigError: there is no log, or nothing in it.
    """
    if path.is_dir():
        logs = sorted(path.glob("log.jsonl")) or sorted(path.glob("*/log.jsonl"))
        if not logs:
            raise ConfigError(f"run={path}: no log.jsonl in it; give the folder of a run")
        path = logs[-1]
    if not path.is_file():
        raise ConfigError(f"run={path}: no such folder or log")
    records = []
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that was killed
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    if not records:
        raise ConfigError(f"run={path}: the log has no records; does the run write JSON lines (logger=local)?")
    return records
