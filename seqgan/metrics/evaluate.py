"""FID, Inception score, precision and recall of a set of pictures against another.

  python -m seqgan.metrics.evaluate samples=out/samples_50000x256x256x3.npz reference=VIRTUAL_imagenet256_labeled.npz \\
    weights=weights-inception-2015-12-05-6726825d.pth
  python -m seqgan.metrics.evaluate samples=out reference=/data/ffhq weights=... statistics=ffhq.npz output=figures.json

`samples` and `reference` are a folder of pictures or an array, uint8 (N, H, W, 3): an NPY file, or `arr_0` in an NPZ
file, as ADM's evaluation has them. Sheets of several pictures that `tools/infer.py` wrote into the folder are left out.
Where the reference has statistics `mu` and `sigma`, FID is taken against these; without pictures beside them there are
no precision and recall. Pictures are compared at their own size.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config.command.cli import parse, run
from core.config.files import reading
from core.data import load_image
from core.data.sources.files import IMAGE_EXTENSIONS, image_files
from core.errors import ConfigError
from core.output.progress import Progress


@dataclass
class Options:
    """What is compared with what."""

    samples: str = field(metadata={"help": "folder of pictures, or NPZ or NPY file"})
    reference: str = field(
        metadata={"help": "folder of pictures, NPZ or NPY file with pictures, or NPZ file with statistics"}
    )
    weights: str = field(metadata={"help": "torch-fidelity's Inception"})
    layer: int = field(default=2048, metadata={"help": "features: 64, 192, 768 or 2048"})
    splits: int = field(default=10, metadata={"help": "of the Inception score; 0: none"})
    neighbours: int = field(default=3, metadata={"help": "of precision and recall; 0: none"})
    batch: int = 50
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    statistics: str | None = field(default=None, metadata={"help": "NPZ file for mu and sigma of the reference"})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


class Pictures:
    """A folder of pictures, in order, or those of an NPZ or NPY file.

    Args:
        path: of either.
        key: what it is called in errors.

    Raises:
        ConfigError: neither, nothing in it, or an array that is not of pictures.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.array: np.ndarray | None = None
        self.files: list[Path] = []
        if path.is_dir():
            found = [path / name for name in image_files(path, deep=True)]
            overviews = _overviews(found)
            for file in overviews:
                print(f"{key}: {file} is left out: it shows pictures that lie beside it")
            self.files = [file for file in found if file not in overviews]
            if not self.files:
                more = " besides overviews: give the .npz file beside them" if overviews else ""
                raise ConfigError(f"{key}={path}: no pictures in it{more} ({', '.join(IMAGE_EXTENSIONS)})")
        elif path.is_file() and path.suffix in (".npz", ".npy"):
            with reading(path):
                found = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
                self.array = found if isinstance(found, np.ndarray) else found.get("arr_0")
            if self.array is not None and (self.array.dtype != np.uint8 or self.array.shape[3:] != (3,)):
                what = f"{self.array.dtype} {self.array.shape}"
                raise ConfigError(f"{key}={path}: the array is {what}: pictures are uint8 (N, H, W, 3)")
        else:
            raise ConfigError(f"{key}={path}: neither a folder nor an .npz or .npy file")

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 `(B, 3, H, W)`; pictures of a folder that differ in size come in batches of their own."""
        if self.array is not None:
            for start in range(0, len(self.array), size):
                yield torch.from_numpy(np.array(self.array[start : start + size])).movedim(-1, 1).contiguous()
            return
        waiting: list[np.ndarray] = []
        for file in self.files:
            picture = np.asarray(load_image(file))
            if waiting and (len(waiting) == size or picture.shape != waiting[0].shape):
                yield torch.from_numpy(np.stack(waiting)).movedim(-1, 1).contiguous()
                waiting = []
            waiting.append(picture)
        if waiting:
            yield torch.from_numpy(np.stack(waiting)).movedim(-1, 1).contiguous()


def _overviews(files: list[Path]) -> set[Path]:
    """Those of the files that `tools/infer.py` wrote as a sheet of its samples or completions.

    Theirs is the name of a sheet, and beside them lie the pictures, numbered, or the NPZ file of all of them.
    """
    numbered = {match[1] for file in files if (match := re.fullmatch(r"(.+)_\d{4,}", str(file.with_suffix(""))))}
    found = set()
    for file in files:
        stem = str(file.with_suffix(""))
        prefix = stem.removesuffix("_grid") if stem.endswith("_grid") else None
        arrays = () if prefix is None else file.parent.glob(f"{glob.escape(Path(prefix).name)}_*x3.npz")
        if prefix in numbered or any(arrays) or (stem.endswith("_completed") and stem in numbered):
            found.add(file)
    return found


def evaluate(options: Options) -> dict[str, Any]:
    """The figures, and how many pictures they rest on.

    Raises:
        ConfigError: sources that are not there or do not fit.
    """
    from core.engine.runner import pick_device
    from core.metrics.frechet import read_statistics, write_statistics
    from seqgan.metrics.evaluators import ImageScores
    from seqgan.metrics.fidelity import Inception

    device = pick_device(options.device)
    made, real = Pictures(Path(options.samples), "samples"), Pictures(Path(options.reference), "reference")
    if not len(made):
        raise ConfigError(f"samples={options.samples} has no pictures (arr_0)")
    file = Path(options.reference)
    found = read_statistics(file) if file.is_file() and file.suffix == ".npz" else None
    if found is None and not len(real):
        raise ConfigError(f"reference={options.reference} has neither pictures (arr_0) nor statistics (mu, sigma)")
    compare = options.neighbours if len(real) else 0
    network = Inception(options.weights, options.layer, logits=options.splits > 0)
    scores = ImageScores(network, None, options.splits, compare).to(device)
    if found is not None and len(found.mean) != network.width:
        raise ConfigError(f"{options.reference} has statistics of {len(found.mean)} features: set layer= to that")
    size = options.batch
    for images in Progress().over(made.batches(size), "samples", -(-len(made) // size)):
        scores.update(images.to(device))
    if found is None or compare:
        for images in Progress().over(real.batches(size), "reference", -(-len(real) // size)):
            scores.update(None, images.to(device))
    scores.reference = found
    figures: dict[str, Any] = {name: float(value) for name, value in scores.compute().items()}
    if options.statistics is not None:
        write_statistics(options.statistics, scores.statistics("real") if found is None else found)
    return {
        **figures,
        "samples": len(made),
        "reference": len(real),
        "reference_statistics": "computed" if found is None else "of the file",
        "layer": options.layer,
    }


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures = evaluate(options)
    print(json.dumps(figures, indent=1))
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
