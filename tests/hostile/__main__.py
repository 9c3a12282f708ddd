"""Write hostile and broken weight files and have every tool read each of them.

    python -m tests.hostile
    python -m tests.hostile bombs          only files whose name contains a word
    python -m tests.hostile --no-record    without writing results/hostile_files.json

For every file and every reader: the tool ends with status 2 and one line that says what is wrong, nothing in the file
was executed, and it took at most 2 seconds and 1 GB (torch included). One line per file; the last one counts. The exit
status is 0 when all files were refused so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from tests.hostile.files import FILES, READERS
from tests.hostile.readers import ROOT, Readers, attempt

_RECORD = ROOT / "results" / "hostile_files.json"


def main(arguments: list[str] | None = None) -> int:
    """Read all files and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only files whose name contains one of these")
    parser.add_argument("--no-record", action="store_true", help="do not write the figures to results/")
    options = parser.parse_args(arguments)
    names = [name for name in FILES if not options.words or any(word in name for word in options.words)]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = _read_all(Path(folder), names)
    refused = sum(not entry["faults"] for entry in figures.values())
    executed = sum(entry["executed"] for entry in figures.values())
    slowest = max(figures, key=lambda name: figures[name]["seconds"])
    largest = max(figures, key=lambda name: figures[name]["megabytes"])
    summary = {
        "command": "python -m tests.hostile",
        "readers": list(READERS),
        "files": len(figures),
        "one_line_refusals": refused,
        "executed": executed,
        "most_seconds": [figures[slowest]["seconds"], slowest],
        "most_megabytes": [figures[largest]["megabytes"], largest],
    }
    seconds, megabytes = figures[slowest]["seconds"], figures[largest]["megabytes"]
    print(
        f"{len(figures)} files, {refused} refused in one line by every reader, {executed} executed something; "
        f"at most {seconds:.2f} s ({slowest}) and {megabytes} MB ({largest})"
    )
    if not options.words and not options.no_record:
        _RECORD.write_text(json.dumps({**summary, "seconds_and_megabytes": _short(figures)}, indent=1) + "\n")
    return 0 if refused == len(figures) and not executed else 1


def _short(figures: dict[str, dict]) -> dict[str, str]:
    return {name: f"{entry['seconds']:.2f} {entry['megabytes']}" for name, entry in figures.items()}


def _read_all(folder: Path, names: list[str]) -> dict[str, dict]:
    readers = Readers(folder)
    for name in READERS:  # imports what the tools import, once, so that each fork measures reading alone
        attempt_here(readers, name, folder / "nothing.pt")
    figures = {}
    for index, name in enumerate(names):
        hostile = FILES[name]
        place = folder / f"{index:03d}"
        place.mkdir()
        path, mark = place / f"weights{hostile.suffix}", place / "mark"
        hostile.write(path, mark)
        outcomes = {reader: attempt(readers[reader], path) for reader in hostile.readers}
        faults = {reader: fault for reader, o in outcomes.items() if (fault := o.fault(hostile.reason))}
        figures[name] = {
            "seconds": round(max(o.seconds for o in outcomes.values()), 3),
            "megabytes": round(max(o.megabytes for o in outcomes.values())),
            "executed": mark.exists(),
            "faults": faults,
        }
        print(
            f"{'FAIL' if faults or mark.exists() else 'refused':8}{name:48}{figures[name]['seconds']:6.2f} s",
            flush=True,
        )
        for reader, fault in faults.items():
            print(f"    {reader}: {fault[:600]}", flush=True)
        if not path.is_dir():
            path.unlink()
    return figures


def attempt_here(readers: Readers, name: str, path: Path) -> None:
    """Reads a file that is not there, in this process."""
    from core.errors import VitrineError

    try:
        readers[name](path)
    except VitrineError:
        return
    raise RuntimeError(f"{name} reads a file that is not there")


if __name__ == "__main__":
    sys.exit(main())
