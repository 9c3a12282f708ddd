"""Running cases through the papers' adapters and reporting one line each."""

from __future__ import annotations

import importlib
import importlib.util
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .cases import Mismatch, UnknownPiece, find_cases, load_case

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


@dataclass(frozen=True)
class Result:
    """Outcome of one file.

    Attributes:
        case: `paper/name`.
        status: `PASS`, `FAIL`, or `NOT RUN` for an inventory that no adapter knows.
        error: largest relative error, None where nothing was compared.
        reason: why it failed or was not run.
        trace: traceback of an unexpected exception.
    """

    case: str
    status: str
    error: float | None = None
    reason: str = ""
    trace: str = ""

    def line(self) -> str:
        """The line that the runner prints."""
        error = "" if self.error is None else f" {self.error:.2e}"
        return f"{self.status} {self.case}{error}" + (f"  {self.reason}" if self.reason else "")


def adapter_of(paper: str) -> ModuleType:
    """The adapter module of a paper.

    Raises:
        UnknownPiece: there is none.
    """
    module = f"{__package__}.adapters.{paper}"
    if not paper.isidentifier() or importlib.util.find_spec(module) is None:
        raise UnknownPiece(f"no adapter for paper {paper!r} (tests/parity/adapters/{paper}.py)")
    return importlib.import_module(module)


def run_file(path: Path) -> Result:
    """Run one JSON file; nothing that an adapter does escapes as an exception."""
    label = f"{path.parent.name}/{path.stem}"
    case = None
    try:
        case = load_case(path)
        adapter = adapter_of(path.parent.name)
        if case is None:
            return _run_inventory(adapter, label, path)
        return Result(label, PASS, case.compare(adapter.run(case)))
    except UnknownPiece as unknown:
        inventory = case is None
        return Result(label, NOT_RUN if inventory else FAIL, reason=str(unknown))
    except Mismatch as mismatch:
        return Result(label, FAIL, mismatch.worst, str(mismatch))
    except Exception as error:  # an adapter may raise anything; the others must still run
        text = " | ".join(str(error).splitlines())
        return Result(label, FAIL, reason=f"{type(error).__name__}: {text}", trace=traceback.format_exc())


def _run_inventory(adapter: ModuleType, label: str, path: Path) -> Result:
    if not hasattr(adapter, "inventory"):
        raise UnknownPiece("inventory, unknown to the adapter")
    adapter.inventory(path.stem, json.loads(path.read_text()))
    return Result(label, PASS, 0.0)


def run_folders(folders: list[Path]) -> Iterator[Result]:
    """Results of all files below the folders, one after the other."""
    for folder in folders:
        for path in find_cases(folder):
            yield run_file(path)
