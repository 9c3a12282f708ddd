"""What an epoch of a thousand training images costs: from the decoded store, and decoded from JPEG files every time.

  python benchmarks/petl_data.py [images=1000] [sizes=[32x32,300x200,500x375]] [batch=64] [rounds=5] [threads=1]
    [num_workers=0] [parts=[samples,loader]] [output=results/benchmarks/petl_data.json]

JPEG files of the given sizes (width x height; usual ones of CIFAR-100, Caltech-101 and Pets) are drawn for it and saved
with PIL's default quality, as the copies of NOAH's archive are. `samples` reads every sample of an epoch. `loader` puts
the engine's loader around it, whose collating both ways have in common; `raw` is the store that leaves normalising to
the trainer, `raw, normalised` includes what the trainer then does. All give the same tensors, which is checked. They
take turns in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config.command.cli import parse, run
from core.data import build_loader
from core.errors import ConfigError
from core.profile.benchmarking import conditions, measure, publish
from core.profile.measure import benchmark
from petl.data import DecodedStore, VTAB1k

TASK = "svhn"
Ways = dict[str, Callable[[], None]]


@dataclass
class Options:
    """What to measure."""

    images: int = 1000
    sizes: list[str] = field(default_factory=lambda: ["32x32", "300x200", "500x375"])
    batch: int = 64
    rounds: int = 5
    threads: int = 1
    num_workers: int = 0
    parts: list[str] = field(default_factory=lambda: ["samples", "loader"])
    output: str | None = None


def draw(root: Path, width: int, height: int, count: int) -> Path:
    """Images of smooth colours with some grain, about as large as photographs of this size, in NOAH's layout."""
    folder = root / TASK / "images" / "train800val200"
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for place in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 12, (height, width, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{place:06d}.jpg")
        lines.append(f"images/train800val200/{place:06d}.jpg {place % 10}\n")
    (root / TASK / "train800val200.txt").write_text("".join(lines))
    return root


def read_samples(data: Dataset) -> Callable[[], None]:
    """An epoch of samples."""

    def epoch() -> None:
        for index in range(len(data)):
            data[index]

    return epoch


def read_batches(data: Dataset, options: Options, then: Callable[[Tensor], Any] | None = None) -> Callable[[], None]:
    """An epoch of batches from the engine's loader, and what is done with their images."""
    config = {"dataset": data, "batch_size": options.batch, "num_workers": options.num_workers}
    loader = build_loader(config, seed=0, training=True)

    def epoch() -> None:
        for fetched in loader:
            if then is not None:
                then(fetched.data["image"])

    return epoch


def measure_samples(options: Options) -> dict[str, Any]:
    """Images a second and times JPEG, sample by sample."""
    return compare(options, lambda files, store, raw: {"jpeg": read_samples(files), "store": read_samples(store)})


def measure_loader(options: Options) -> dict[str, Any]:
    """Images a second and times JPEG, through the engine's loader."""
    return compare(
        options,
        lambda files, store, raw: {
            "jpeg": read_batches(files, options),
            "store": read_batches(store, options),
            "raw": read_batches(raw, options),
            "raw, normalised": read_batches(raw, options, files.transform.normalise),
        },
    )


def compare(options: Options, ways: Callable[[VTAB1k, DecodedStore, DecodedStore], Ways]) -> dict[str, Any]:
    """Images a second of every way, and how many times the first one's that is, by size of the files."""
    figures = {}
    for size in options.sizes:
        words = size.split("x")
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ConfigError(f"sizes: '{size}' is no width x height, such as 500x375")
        with tempfile.TemporaryDirectory() as folder:
            root = draw(Path(folder), int(words[0]), int(words[1]), options.images)
            files = VTAB1k(root, TASK, sizes="report")
            store, raw = (DecodedStore(files, root / "store", raw=raw) for raw in (False, True))
            for index in range(0, options.images, max(1, options.images // 10)):
                image = files[index]["image"]
                assert torch.equal(image, store[index]["image"])
                assert torch.equal(image, files.transform.normalise(raw[index]["image"]))
            epochs = ways(files, store, raw)
            timed = benchmark(epochs, repeats=options.rounds, warmup=1, min_time=0.0, threads=options.threads)
            size_of_all = sum(Path(file).stat().st_size for file in files.source_files())
        figures[size] = {
            "kilobytes_a_file": round(size_of_all / options.images / 1000, 1),
            "images_per_second": {name: round(options.images / timed.time(name).median) for name in epochs},
            "times_jpeg": {
                name: {"median": round(timed.speedup(name, "jpeg").median, 2),
                       "rounds": [round(ratio, 2) for ratio in timed.speedups(name, "jpeg")]}
                for name in epochs if name != "jpeg"
            },
        }  # fmt: skip
    return figures


PARTS = {"samples": measure_samples, "loader": measure_loader}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    figures = measure(PARTS, options) | {
        "images": options.images,
        "batch": options.batch,
        "num_workers": options.num_workers,
        **conditions(__file__, argv, options),
    }
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
