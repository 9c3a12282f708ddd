"""Draws the training curves of runs: losses of the walks, how many slots are in use, and scores of evaluations.

  python -m slot_walks.inference.curves run=runs/slot_walks/blobworld/2026-01-31_12-00-00 output=curves.png
  python -m slot_walks.inference.curves run=runs/slot_walks/blobworld,runs/slot_walks/blobworld_fe output=curves.png

`run` is the folder of a run (or its log.jsonl), or several with commas, which are drawn together. Of a folder of runs
the newest one is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.command.cli import parse, run
from core.config.files import read_text
from core.errors import ConfigError

#: What is drawn, in this order, where a log has it; scores of evaluations follow.
CURVES = {
    "loss_wpw": "loss of W-P-W, weighted",
    "loss_pwp": "loss of P-W-P, weighted",
    "loss_reconstruction": "loss of the decoder, weighted",
    "pwp_kl": "P-W-P above its lower bound (nats)",
    "effective_slots": "slots in use (effective number)",
}
_EVALUATIONS = ("val/", "test/")
_COLUMNS = 4


@dataclass
class Options:
    """Which runs, and where the picture goes."""

    run: list[str] = field(metadata={"help": "folders of runs, with commas between them"})
    output: str = field(default="curves.png", metadata={"help": "PNG file that is written"})


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


def series(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure that is drawn, by name; values that are no numbers are left out."""
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in CURVES}
    for record in records:
        for name, value in record.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if name in CURVES or (name.startswith(_EVALUATIONS) and not name.endswith("_std")):
                steps, values = found.setdefault(name, ([], []))
                steps.append(int(record["step"]))
                values.append(float(value))
    return {name: points for name, points in found.items() if points[0]}


def draw(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Curves of one or more runs, a panel for each figure; scores of a single evaluation as bars in one panel.

    Args:
        logs: name of a run -> records.

    Returns:
        uint8 `(height, width, 3)`.

    Raises:
        ConfigError: none of the figures is in any log.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = {name: series(records) for name, records in logs.items()}
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    scores = sorted(name for name in names if name not in CURVES)
    repeated = [name for name in scores if any(len(curves.get(name, ((),))[0]) > 1 for curves in runs.values())]
    single = [name for name in scores if name not in repeated]
    panels = [name for name in CURVES if name in names] + repeated
    if not names:
        raise ConfigError(f"nothing to draw: the logs have none of {', '.join(CURVES)}, and no evaluation")
    count = len(panels) + bool(single)
    rows, columns = -(-count // _COLUMNS), min(count, _COLUMNS)
    figure = Figure(figsize=(3.0 * columns, 2.4 * rows + 0.22 * len(runs)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    handles: dict[str, Any] = {}
    for axes, name in zip(grid, panels, strict=False):
        for number, (label, curves) in enumerate(runs.items()):
            if name in curves:
                steps, values = curves[name]
                (line,) = axes.plot(steps, values, color=f"C{number}", marker="o" if len(steps) < 15 else "", ms=3)
                handles.setdefault(label, line)
        axes.set_title(CURVES.get(name, name), fontsize=9)
        axes.set_xlabel("step", fontsize=7)
        axes.grid(alpha=0.25)
        axes.ticklabel_format(useOffset=False)
    if single:
        axes = grid[len(panels)]
        thick = 0.8 / len(runs)
        for number, (label, curves) in enumerate(runs.items()):
            found = [(place, curves[name][1][0]) for place, name in enumerate(single) if name in curves]
            places = [place + (number - (len(runs) - 1) / 2) * thick for place, _ in found]
            bars = axes.barh(places, [value for _, value in found], thick, color=f"C{number}")
            axes.bar_label(bars, fmt="%.3f", fontsize=6, padding=2)
            handles.setdefault(label, bars)
        axes.set_yticks(range(len(single)), single)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title("scores of the evaluation", fontsize=9)
    for axes in grid:
        axes.tick_params(labelsize=7)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", fontsize=8, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def main(argv: list[str]) -> None:
    """Reads the logs and writes the picture."""
    options, _ = parse(argv, Options, doc=__doc__)
    if not options.run:
        raise ConfigError("run= names no folder")
    picture = draw({name: read_log(Path(name)) for name in options.run})
    from PIL import Image

    target = Path(options.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(target, optimize=True)
    print(f"{target}: {picture.shape[1]} x {picture.shape[0]} pixels")


if __name__ == "__main__":
    run(main)
