"""ARI, FG-ARI and mBO of a data set: one table per image for all figures, against scikit-learn and loops over masks.

  python benchmarks/slot_walks_metrics.py [images=64] [size=320] [rounds=3] [threads=1] [output=FILE]

The loop is what evaluation scripts of slot models do: for every image `sklearn.metrics.adjusted_rand_score` of all
pixels and of the foreground, and one comparison of masks for every object and slot. Both sides start from the same
label maps on the CPU and have to agree to 1e-6. They run in turn in one process; the ratio is the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sklearn
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from core.config.command.cli import parse, run
from core.metrics import GroupingScores
from core.profile.benchmarking import conditions, publish

NAMES = ("ari", "fg_ari", "mbo")


def label_maps(images: int, size: int, objects: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Objects as discs on a background, and slots that follow them but for their borders: uint8 `(B, size, size)`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    truth = np.zeros((images, size, size), np.uint8)
    for image in truth:
        for label in range(1, objects + 1):
            cx, cy, r = *rng.uniform(0.15, 0.85, 2), rng.uniform(0.08, 0.22)
            image[(x - cx) ** 2 + (y - cy) ** 2 < r**2] = label
    moved = np.roll(truth, (size // 40, size // 30), axis=(1, 2))
    noise = rng.random(truth.shape) < 0.02
    prediction = np.where(noise, rng.integers(0, slots, truth.shape), moved % slots).astype(np.uint8)
    return torch.from_numpy(truth), torch.from_numpy(prediction)


def batched(truth: Tensor, prediction: Tensor, batch: int) -> dict[str, float]:
    """Ours."""
    metric = GroupingScores(NAMES)
    for start in range(0, len(truth), batch):
        metric.update(prediction[start : start + batch], truth[start : start + batch])
    return {name: float(value) for name, value in metric.compute().items()}


def looped(truth: Tensor, prediction: Tensor, ari: bool = True, mbo: bool = True) -> dict[str, float]:
    """Image by image, mask by mask."""
    scores: dict[str, list[float]] = {name: [] for name in NAMES}
    for t, p in zip(truth.numpy(), prediction.numpy(), strict=True):
        thing = t > 0
        if ari:
            scores["ari"].append(adjusted_rand_score(t.ravel(), p.ravel()))
            scores["fg_ari"].append(adjusted_rand_score(t[thing], p[thing]))
        if mbo:
            best = []
            for label in np.unique(t[thing]):
                true = t == label
                best.append(max(_iou(true, p == slot) for slot in np.unique(p)))
            scores["mbo"].append(float(np.mean(best)))
    return {name: float(np.mean(values)) for name, values in scores.items() if values}


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Wall-clock time of a call, and what it gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@dataclass
class Options:
    """What to measure."""

    images: int = 64
    size: int = 320
    objects: int = 5
    slots: int = 7
    batch: int = 16
    rounds: int = 3
    threads: int = 1
    output: str | None = "results/benchmarks/slot_walks_metrics.json"


def main(argv: list[str]) -> None:
    """Prints the figures and writes them as JSON."""
    options, _ = parse(argv, Options, doc=__doc__)
    torch.set_num_threads(options.threads)
    truth, prediction = label_maps(options.images, options.size, options.objects, options.slots)
    batched(truth[: options.batch], prediction[: options.batch], options.batch)  # warm
    times: dict[str, list[float]] = {"ours": [], "ari": [], "mbo": []}
    for _ in range(options.rounds):
        taken, ours = seconds(lambda: batched(truth, prediction, options.batch))
        times["ours"].append(taken)
        theirs: dict[str, float] = {}
        for part in ("ari", "mbo"):
            taken, found = seconds(lambda part=part: looped(truth, prediction, part == "ari", part == "mbo"))
            times[part].append(taken)
            theirs |= found
        for name in NAMES:
            if abs(ours[name] - theirs[name]) > 1e-6:
                raise SystemExit(f"{name}: {ours[name]} and {theirs[name]} differ")
    each = {name: 1e3 * statistics.median(values) / options.images for name, values in times.items()}
    ari = [a / o for a, o in zip(times["ari"], times["ours"], strict=True)]
    both = [(a + m) / o for a, m, o in zip(times["ari"], times["mbo"], times["ours"], strict=True)]
    figures = {
        "milliseconds_per_image": {
            "all three from one table": round(each["ours"], 3),
            "scikit-learn ARI and FG-ARI": round(each["ari"], 3),
            "mBO by loops": round(each["mbo"], 3),
        },
        "times_faster_than_scikit_learn_ari_alone": round(statistics.median(ari), 1),
        "times_faster_than_all": round(statistics.median(both), 1),
        "times_faster_than_all_per_round": [round(r, 1) for r in both],
        "seconds_per_round": {name: [round(one, 3) for one in values] for name, values in times.items()},
        "images": options.images,
        "size": options.size,
        **conditions(__file__, argv, options),
        "scikit_learn": sklearn.__version__,
    }
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
