"""What tuning adds at every dose of noise: edits of a claim's tuned clips that start from their sources, noised so far.

  python -m tune_a_video.inference.doses claim=tune_a_video/claim_noise tuned=Tune-A-Video untuned=untuned \\
    output=results/tune_a_video_doses.json
  python -m tune_a_video.inference.doses claim=tune_a_video/claim_noise output=results/tune_a_video_doses.json \\
    picture=doses.png

The rows' finished runs are found below `runs_dir`; nothing is trained, one tuning of a clip serves all doses. The file
keeps the readings of every clip, and of each dose and reading both means and the paired difference, tuned minus
untuned, with its t interval. What the file holds is not sampled again; `picture` draws it.

  path, motion_cosine, words, agree, agree_right   as `tune_a_video.standin` reads them
  kept           share of frames' looks that an edit leaves alone and that are the source's
  outside_psnr   dB of the pixels outside the object, of edits that keep the background's word
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.checkpoint import write_text_atomic
from core.config import build, compose
from core.config.command.cli import parse, run
from core.config.files import read_json
from core.errors import ConfigError
from core.output.figure import figure_pixels, save_png
from core.tables.claim_file import Claim, load_claim
from core.tables.paired import Paired
from core.tables.runs import Results
from core.tables.table import default_roots, find_tables
from tune_a_video.metrics.outside import outside_psnr
from tune_a_video.standin import Judge, edits, load_judge, measure, motion, parse_caption, words_of_looks

if TYPE_CHECKING:
    from tune_a_video.trainer import TuneAVideoTrainer

READINGS = ("path", "motion_cosine", "kept", "outside_psnr", "words", "agree", "agree_right")


@dataclass
class Options:
    """Whose clips, which doses, and where the readings go."""

    claim: str = field(metadata={"help": "PAPER/claim_NAME, whose seeds are clips of the drawn world"})
    output: str = field(metadata={"help": "JSON file that keeps the readings"})
    tuned: str = field(default="Tune-A-Video", metadata={"help": "the claim's row that is tuned"})
    untuned: str = field(default="untuned", metadata={"help": "the row that it is held against"})
    doses: list[float] = field(
        default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], metadata={"help": "strengths of SDEdit, above 0, to 1"}
    )
    runs_dir: str = field(default="runs", metadata={"help": "where the claim's runs are"})
    picture: str | None = field(default=None, metadata={"help": "PNG file with the curves"})


def tuned_trainer(cfg: Any, folder: Path) -> TuneAVideoTrainer:
    """The trainer of a finished run, with what its tuning has left in the run's folder.

    Raises:
        ConfigError: the folder lacks it.
    """
    delta = folder / "tuned" / "tuned.safetensors"
    delta = delta if delta.is_file() else folder / "tuned.safetensors"
    if not delta.is_file():
        raise ConfigError(f"{folder} holds no tuned.safetensors: train it with the hook tune_a_video.ResultsPage")
    cfg = cfg.copy()
    cfg.model.delta = str(delta)
    return build(cfg.model).eval()


def read_dose(trainer: TuneAVideoTrainer, sample: Mapping[str, Any], dose: float, judge: Judge) -> dict[str, float]:
    """Readings of a clip's eight edits from a dose of noise, each a mean over the edits that have it.

    Args:
        trainer: the network under test; its other ways of sampling stay.
        sample: of `tune_a_video.DrawnClip`.
        dose: strength of SDEdit.
        judge: of looks.
    """
    asked = edits(parse_caption(sample["caption"]))
    kept_sample, trainer.sample = trainer.sample, replace(trainer.sample, init=f"sdedit:{dose}")
    try:
        made = trainer.edits(sample["video"], sample["caption"], [e.prompt for e in asked], sample["sample_id"])
    finally:
        trainer.sample = kept_sample
    source = words_of_looks(sample["looks"])
    read: dict[str, list[float]] = {name: [] for name in READINGS}
    for one, video in zip(asked, made.videos.float(), strict=True):
        frames = 2 * video.transpose(0, 1) - 1
        found = measure(frames, sample["centres"], one.words, judge)
        for name in ("path", "words", "agree", "agree_right"):
            read[name].append(getattr(found, name))
        read["motion_cosine"].append(motion(frames, sample["centres"]).motion_cosine)
        same = torch.tensor(one.words) == source
        if same.any():
            read["kept"].append((judge.looks(frames) == sample["looks"])[:, same].float().mean().item())
        if same[2]:
            read["outside_psnr"].append(outside_psnr(video, made.source, sample["mask"]).item())
    return {name: statistics.fmean(values) for name, values in read.items()}


def read_claim(
    claim: Claim, rows: Sequence[str], doses: Sequence[float], runs_dir: str, known: dict[str, Any]
) -> Iterable[dict[str, Any]]:
    """The readings `{row: {seed: {dose: {reading: value}}}}`, whole after each clip; what is known stays.

    Raises:
        ConfigError: no such row, or a run that is not there.
    """
    results = Results(runs_dir, compose)
    by_label = {row.label: row for row in claim.rows}
    if missing := [label for label in rows if label not in by_label]:
        raise ConfigError(f"{claim.id} has no row '{missing[0]}': {', '.join(by_label)}")
    for seed in claim.seeds:
        for label in rows:
            held = known.setdefault(label, {}).setdefault(str(seed), {})
            wanted = [dose for dose in doses if str(dose) not in held]
            if not wanted:
                continue
            row = by_label[label]
            words = [f"experiment={row.experiment}", *row.overrides, f"runs_dir={runs_dir}", f"seed={seed}"]
            cfg = compose(words)
            result = results.match(cfg)
            if result is None:
                raise ConfigError(f"no run of '{label}', seed {seed}: python tools/table.py {claim.id} run=true")
            trainer = tuned_trainer(cfg, result.path.parent)
            sample, judge = build(cfg.train_dataloader.dataset)[0], load_judge(cfg.model.base)
            held |= {str(dose): read_dose(trainer, sample, dose, judge) for dose in wanted}
        yield known


def differences(clips: Mapping[str, Any], tuned: str, untuned: str) -> dict[str, dict[str, Any]]:
    """By dose and reading: both means, and the difference over clips, tuned minus untuned, with its t interval."""
    doses = next(iter(clips[tuned].values()))
    found: dict[str, dict[str, Any]] = {}
    for dose in doses:
        found[dose] = {}
        for name in READINGS:
            sides = [{seed: of[dose][name] for seed, of in clips[label].items()} for label in (tuned, untuned)]
            pairs = Paired.of(*sides)
            found[dose][name] = {
                "tuned": statistics.fmean(sides[0].values()),
                "untuned": statistics.fmean(sides[1].values()),
                "difference": pairs.mean,
                "standard_error": pairs.error,
                "interval95": None if pairs.interval is None else list(pairs.interval),
            }
    return found


def draw(record: Mapping[str, Any]) -> Any:
    """The curves of a record, one panel for each reading: uint8 `(H, W, 3)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    doses = list(record["doses"])
    *panels, corner = figure.subplots(2, 4).flat
    for axes, name in zip(panels, READINGS, strict=True):
        for side in ("tuned", "untuned"):
            axes.plot(
                [float(d) for d in doses], [record["doses"][d][name][side] for d in doses], "o-", ms=4, label=side
            )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("dose of noise", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    corner.set_axis_off()
    corner.legend(*axes.get_legend_handles_labels(), loc="center", fontsize=9, frameon=False)
    return figure_pixels(figure)


def main(argv: list[str]) -> None:
    """Samples what is missing, writes the file after every clip, prints the differences."""
    options, _ = parse(argv, Options, doc=__doc__)
    paths = find_tables(default_roots())
    if options.claim not in paths:
        raise ConfigError(f"claim={options.claim}: no such claim")
    claim, target = load_claim(paths[options.claim]), Path(options.output)
    rows = [options.tuned, options.untuned]
    known = read_json(target)["clips"] if target.is_file() else {}
    given = {"claim": claim.id, "tuned": rows[0], "untuned": rows[1], "output": str(target)}
    given["doses"] = ",".join(f"{dose:g}" for dose in options.doses)
    words = [f"{key}={value}" for key, value in given.items()]
    command = shlex.join(["python", "-m", "tune_a_video.inference.doses", *words])
    for clips in read_claim(claim, rows, options.doses, options.runs_dir, known):
        record = {"command": command, "claim": claim.id, "doses": differences(clips, *rows), "clips": clips}
        write_text_atomic(json.dumps(record, indent=1) + "\n", target)
    record = read_json(target)
    for dose, readings in record["doses"].items():
        for name, one in readings.items():
            low, high = one["interval95"] or (float("nan"), float("nan"))
            sides = f"{one['tuned']:7.3f} {one['untuned']:7.3f} {one['difference']:+7.3f}"
            print(f"{dose:5} {name:14} {sides} [{low:+.3f}, {high:+.3f}]")
    if options.picture:
        save_png(draw(record), options.picture)


if __name__ == "__main__":
    run(main)
