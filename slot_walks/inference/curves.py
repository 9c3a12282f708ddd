"""Draws the training curves of runs: losses of the walks, how many slots are in use, and scores of evaluations.

  python -m slot_walks.inference.curves run=runs/slot_walks/blobworld/2026-01-31_12-00-00 output=curves.png
  python -m slot_walks.inference.curves run=runs/slot_walks/blobworld,runs/slot_walks/blobworld_fe output=curves.png
  python -m slot_walks.inference.curves run=results/slot_walks_curves.json figures=val/mbo_i output=curves.png

`run` is the folder of a run (or its log.jsonl), or several with commas, which are drawn together. Of a folder of runs
the newest one is taken. `keep=FILE.json` also writes what is drawn to a file, which `run` takes in turn; runs are named
there by experiment, steps and seed, and seeds of one experiment and length share a colour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config.command.cli import parse, run
from core.config.files import read_json, read_yaml
from core.errors import ConfigError
from core.output.figure import figure_pixels, save_png
from core.output.log import read_log

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
_WIDE = 10  # largest over smallest loss from which on its axis is logarithmic


@dataclass
class Options:
    """Which runs, and where the picture goes."""

    run: list[str] = field(metadata={"help": "folders of runs, with commas between them"})
    output: str = field(default="curves.png", metadata={"help": "PNG file that is written"})
    figures: list[str] | None = field(default=None, metadata={"help": "names of what is drawn; null: all there is"})
    keep: str | None = field(default=None, metadata={"help": "JSON file that keeps what is drawn"})


def run_name(folder: Path) -> str:
    """`EXPERIMENT, N steps, seed S` of a run's folder, as its config says.

    Raises:
        ConfigError: there is no config.yaml in it, or it is not that of a run.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"run={folder}: keep= names runs by their config.yaml, and there is none")
    cfg = read_yaml(config)
    try:
        return f"{cfg['name']}, {cfg['train_cfg']['max_steps']} steps, seed {cfg['seed']}"
    except (KeyError, TypeError):
        raise ConfigError(f"run={folder}: config.yaml is not the config of a run") from None


def read_runs(names: Sequence[str], keep: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Records by the name of the run, of folders, logs and files that `keep=` wrote.

    Args:
        names: paths.
        keep: name runs by their config, not by their path.

    Raises:
        ConfigError: see `read_log` and `run_name`; a JSON file without runs.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        path = Path(name)
        if path.suffix == ".json":
            runs = read_json(path, keys=("runs",))["runs"]
            if not isinstance(runs, dict) or not all(isinstance(records, list) for records in runs.values()):
                raise ConfigError(f"run={path}: it holds no curves; give a file that keep= wrote")
            found |= runs
        else:
            found[run_name(path) if keep else name] = read_log(path)
    return found


def chosen(records: Sequence[Mapping[str, Any]], figures: Sequence[str] | None) -> list[dict[str, Any]]:
    """Steps and the drawn figures of records, to five digits, without the records that have none of them."""
    kept = []
    for record in records:
        names = [n for n in record if n in (figures or CURVES) or (not figures and n.startswith(_EVALUATIONS))]
        values = {n: float(f"{record[n]:.5g}") for n in names if isinstance(record[n], int | float)}
        if values:
            kept.append({"step": record["step"], **values})
    return kept


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
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    handles: dict[str, Any] = {}
    groups = {label: label.partition(", seed ")[0] for label in runs}  # seeds of one experiment share a colour
    colours = {group: f"C{number}" for number, group in enumerate(dict.fromkeys(groups.values()))}
    for axes, name in zip(grid, panels, strict=False):
        for label, curves in runs.items():
            if name in curves:
                steps, values = curves[name]
                mark = "o" if len(steps) < 15 else ""
                (line,) = axes.plot(steps, values, color=colours[groups[label]], marker=mark, ms=3)
                handles.setdefault(groups[label], line)
        axes.set_title(CURVES.get(name, name), fontsize=9)
        axes.set_xlabel("step", fontsize=7)
        axes.grid(alpha=0.25)
        drawn = [value for curves in runs.values() for value in curves.get(name, ((), ()))[1]]
        if name.startswith("loss") and 0 < _WIDE * min(drawn) < max(drawn):
            axes.set_yscale("log")  # else the first steps hide whether a loss still falls at the end
        else:
            axes.ticklabel_format(useOffset=False)
    if single:
        axes = grid[len(panels)]
        thick = 0.8 / len(runs)
        for number, (label, curves) in enumerate(runs.items()):
            found = [(place, curves[name][1][0]) for place, name in enumerate(single) if name in curves]
            places = [place + (number - (len(runs) - 1) / 2) * thick for place, _ in found]
            bars = axes.barh(places, [value for _, value in found], thick, color=colours[groups[label]])
            axes.bar_label(bars, fmt="%.3f", fontsize=6, padding=2)
            handles.setdefault(groups[label], bars)
        axes.set_yticks(range(len(single)), single)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title("scores of the evaluation", fontsize=9)
    for axes in grid:
        axes.tick_params(labelsize=7)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", fontsize=8, frameon=False)
    return figure_pixels(figure)


def main(argv: list[str]) -> None:
    """Reads the logs and writes the picture."""
    options, _ = parse(argv, Options, doc=__doc__)
    if not options.run:
        raise ConfigError("run= names no folder")
    runs = read_runs(options.run, keep=options.keep is not None)
    if options.figures or options.keep:
        runs = {name: chosen(records, options.figures) for name, records in runs.items()}
    picture = draw(runs)
    if options.keep:
        from core.checkpoint import write_text_atomic

        write_text_atomic(json.dumps({"runs": runs}, indent=None) + "\n", Path(options.keep))
    target = save_png(picture, options.output)
    print(f"{target}: {picture.shape[1]} x {picture.shape[0]} pixels")


if __name__ == "__main__":
    run(main)
