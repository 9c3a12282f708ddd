"""One picture of runs of the stand-in: what both decoders make of test images, and of sampled codes.

python -m seqgan.standin.sheet runs=[runs/seqgan/shape_glyphs/A,runs/seqgan/shape_glyphs/B] titles=[alpha 0,alpha 1]

Runs have to share data set and seed. Reconstructions stand below the images, samples below the classes asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config.command.cli import parse, run
from core.config.registry import DATASETS, build
from core.errors import ConfigError
from core.output.figure import figure_pixels, save_png
from seqgan.inference.pictures import to_pixels
from seqgan.standin.trainer import TwoDecoderTransformer


@dataclass
class Options:
    """Which runs, and where the picture goes."""

    runs: list[str] = field(default_factory=list, metadata={"help": "folders of finished runs"})
    titles: list[str] = field(default_factory=list, metadata={"help": "of the runs; empty: their folders' names"})
    output: str = field(default="seqgan/samples.png", metadata={"help": "PNG file that is written"})


def loaded(folder: Path) -> tuple[TwoDecoderTransformer, dict[str, Any]]:
    """A run's transformer with both tokenizers, and the config of its test images.

    Raises:
        ConfigError: no finished run of the stand-in.
    """
    from core.checkpoint.run_folder import find_checkpoint, read_config
    from core.checkpoint.weights import load_weights
    from core.engine.launch import build_trainer

    checkpoint = find_checkpoint(folder)
    config = read_config(checkpoint.parents[1])
    trainer = build_trainer(config)
    if not isinstance(trainer, TwoDecoderTransformer):
        raise ConfigError(f"runs: {folder} ends with a {type(trainer).__name__}: give runs of seqgan/shape_glyphs")
    load_weights(trainer, checkpoint)
    return trainer.eval(), config["test_dataloader"]["dataset"]


@torch.no_grad()
def rows(trainer: TwoDecoderTransformer, image: torch.Tensor) -> dict[str, np.ndarray]:
    """Reconstructions of images `(B, 3, H, W)` and one sample of each class, by both decoders; uint8 rows."""
    codes = trainer.tokenizer.encode(image)
    drawn = trainer.sample(torch.arange(trainer.network.num_classes))
    return {
        "reconstruction, phase 1": to_pixels(trainer.tokenizer.decode(codes)),
        "reconstruction, phase 2": to_pixels(trainer.second.decode(codes)),
        "samples, phase 1": to_pixels(trainer.tokenizer.decode(drawn)),
        "samples, phase 2": to_pixels(trainer.second.decode(drawn)),
    }


def draw(image: np.ndarray, found: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """The picture `(H, W, 3)` uint8: a column for each run, in it a line of pictures for each of its rows.

    Args:
        image: uint8 `(B, H, W, 3)`.
        found: title of a run -> what `rows` gave.
    """
    from matplotlib.figure import Figure

    lines = {title: {"test images": image, **made} for title, made in found.items()}
    names = list(next(iter(lines.values())))
    figure = Figure(figsize=(5.2 * len(lines), 0.66 * len(names)), dpi=110, layout="constrained")
    panels = figure.subplots(len(names), len(lines), squeeze=False)
    for column, (title, made) in enumerate(lines.items()):
        for line, name in enumerate(names):
            axes = panels[line][column]
            axes.imshow(np.concatenate(list(made[name]), axis=1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{title}: {name}" if line == 0 else name, fontsize=8, loc="left", pad=2)
            for side in axes.spines.values():
                side.set_visible(False)
    return figure_pixels(figure)


def main(argv: list[str]) -> Any:
    """Reads the runs and writes the picture.

    Raises:
        ConfigError: no runs, other titles than runs, or runs on different images.
    """
    options, _ = parse(argv, Options, doc=__doc__)
    titles = options.titles or [Path(folder).name for folder in options.runs]
    if not options.runs or len(titles) != len(options.runs):
        raise ConfigError(f"runs: {len(options.runs)} with {len(titles)} titles: give runs=[A,B] titles=[a,b]")
    found: dict[str, dict[str, np.ndarray]] = {}
    shared: dict[str, Any] | None = None
    for title, folder in zip(titles, options.runs, strict=True):
        trainer, data = loaded(Path(folder))
        if shared is None:
            shared, dataset = data, build(data, DATASETS)
            first = {int(dataset[i]["label"]): i for i in reversed(range(len(dataset)))}  # an image of each class
            image = torch.stack([dataset[first[label]]["image"] for label in sorted(first)])
        elif data != shared:
            raise ConfigError(
                f"runs: {folder} was tested on {data}, the first on {shared}: they cannot share a picture"
            )
        found[title] = rows(trainer, image)
    target = save_png(draw(to_pixels(image), found), options.output)
    print(f"{target}: {', '.join(f'{t} from {f}' for t, f in zip(titles, options.runs, strict=True))}")


if __name__ == "__main__":
    run(main)
