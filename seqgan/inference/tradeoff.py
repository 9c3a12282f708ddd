"""One picture of the trade-off: what alpha costs in reconstruction and gives in codes and samples.

python -m seqgan.inference.tradeoff                    from results/claims/seqgan_alphas.json
python -m seqgan.inference.tradeoff results=FILE output=PNG

The file is what `tools/table.py seqgan/claim_alphas run=true` writes.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.config.command.cli import parse, run
from core.config.files import read_json
from core.errors import ConfigError
from core.output.figure import figure_pixels, save_png

#: What is drawn against alpha: name of the figure, its title.
PANELS = {
    "l1_1": "L1 of the first phase",
    "bits": "bits per code",
    "consistency_2": "samples of the class asked for",
    "gfid_2": "toy-gFID, second decoder",
}


@dataclass
class Options:
    """Which results, and where the picture goes."""

    results: str = field(default="results/claims/seqgan_alphas.json", metadata={"help": "stored results of the claim"})
    output: str = field(default="seqgan/tradeoff.png", metadata={"help": "PNG file that is written"})


def curve(path: Path) -> dict[float, list[dict[str, float]]]:
    """Figures of every finished run by alpha, in order of alpha.

    Raises:
        ConfigError: no such file, or runs of fewer than two values of alpha.
    """
    if not path.is_file():
        raise ConfigError(f"results={path}: no such file; tools/table.py seqgan/claim_alphas run=true writes it")
    found: dict[float, list[dict[str, float]]] = {}
    for row in read_json(path, keys=("rows",), what="a stored claim")["rows"]:
        word, _, value = row["label"].partition(" ")
        if word == "alpha" and row["runs"]:
            found[float(value)] = [one["metrics"] for one in row["runs"]]
    if len(found) < 2:
        raise ConfigError(
            f"results={path}: finished runs of {len(found)} values of alpha make no curve; run=true trains"
        )
    return dict(sorted(found.items()))


def draw(points: dict[float, list[dict[str, float]]]) -> np.ndarray:
    """The picture `(H, W, 3)` uint8: mean over seeds, every run as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(PANELS), 2.6), dpi=110, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        means = [statistics.fmean(one[name] for one in runs) for runs in points.values()]
        axes.plot(list(points), means, color="C0", marker="o", ms=4)
        for alpha, runs in points.items():
            axes.plot([alpha] * len(runs), [one[name] for one in runs], "o", color="C0", ms=3, alpha=0.35)
        axes.set(title=title, xlabel="alpha of the first phase")
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    return figure_pixels(figure)


def main(argv: list[str]) -> Any:
    """Reads the results and writes the picture."""
    options, _ = parse(argv, Options, doc=__doc__)
    points = curve(Path(options.results))
    target = save_png(draw(points), options.output)
    runs = ", ".join(f"alpha {alpha:g}: {len(found)}" for alpha, found in points.items())
    print(f"{target}: runs of {runs}")


if __name__ == "__main__":
    run(main)
