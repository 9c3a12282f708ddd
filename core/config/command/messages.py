"""Several processes, one console: the first one speaks, what the others are warned of goes to logs of their own.

Imports nothing heavy: `first_process_speaks` comes before the libraries that warn while they are imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_WARNINGS = "py.warnings"  # the logger of logging.captureWarnings


def first_process() -> bool:
    """Whether this process prints and writes: under torchrun or Slurm all of them run, one of them speaks."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def first_process_speaks() -> None:
    """Under torchrun or Slurm, keeps the other processes' warnings and their libraries' messages from the console.

    Errors are shown by every process. Called again it sees to the handlers that libraries have added since.
    """
    if first_process():
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.captureWarnings(True)
    warned = logging.getLogger(_WARNINGS)
    warned.propagate = False
    if not warned.handlers:
        warned.addHandler(logging.NullHandler())
    for handler in console_handlers():
        handler.setLevel(max(handler.level, logging.ERROR))


def console_handlers(logger: logging.Logger | None = None) -> list[logging.StreamHandler]:
    """Every logger's handlers that write to the console, and those of `logger`."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values(), *([logger] if logger is not None else [])]
    handlers = {id(h): h for one in loggers for h in getattr(one, "handlers", ())}.values()
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)]


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """What runs and builders print goes to standard error: standard output belongs to the table."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def log_warnings(folder: str | os.PathLike[str], rank: int) -> None:
    """Where the warnings of a process that is not the first go: ``run_rank<N>.log``, which the first warning makes.

    Args:
        folder: the run's folder; warnings no longer go to an earlier run's.
        rank: of the process; the first one's warnings are on the console.
    """
    if rank == 0:
        return
    warned = logging.getLogger(_WARNINGS)
    for handler in [h for h in warned.handlers if isinstance(h, logging.FileHandler)]:
        warned.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(Path(folder) / f"run_rank{rank}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    warned.addHandler(handler)


def unlogged(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    """In place of `handler.handleError`: a line that cannot be written ends the run, as in any other file.

    Raises:
        OSError: the disk is full, or the like; names the file. Other errors are printed, as logging does.
    """
    error = sys.exc_info()[1]
    if isinstance(error, OSError):
        raise OSError(error.errno, error.strerror, handler.baseFilename) from None
    logging.Handler.handleError(handler, record)
