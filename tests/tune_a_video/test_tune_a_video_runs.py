"""Runs over data sets: two processes tune as one does, a sweep over the benchmark fills a submission."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.config import compose
from core.data import MissingDataError
from core.engine.launch import run
from core.engine.state.randomness import own_rows
from core.errors import ConfigError
from tests import forked
from tune_a_video.data import LoveuTGVE

ROOT = Path(__file__).resolve().parents[2]


def write_frames(folder, count, seed):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:05d}.jpg")


def command(tool_arguments, processes=0):
    script = str(ROOT / "tools" / "train.py")
    done = forked.run([script, *tool_arguments], os.getcwd(), dict(os.environ), processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# ------------------------------------------------------------------ several processes


@pytest.mark.processes
def test_two_processes_tune_as_one_with_the_joint_batch(sd_folder, tmp_path):
    for seed, name in enumerate(("bear", "camel", "car", "dog")):
        write_frames(tmp_path / "davis/JPEGImages/480p" / name, 3, seed)
    captions = {name: f"a {name} walks" for name in ("bear", "camel", "car", "dog")}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    given = [
        "experiment=tune_a_video/davis",
        "runtime=cpu",
        "log_every=1",
        f"model.base={sd_folder}",
        f"train_dataloader.dataset.root={tmp_path / 'davis'}",
        f"train_dataloader.dataset.captions={tmp_path / 'captions.json'}",
        "train_dataloader.dataset.size=16",
        "+train_dataloader.num_workers=0",
        "+test_dataloader.num_workers=0",
        "model.n_frames=3",
        "model.caption_dropout=0.5",
        "model.prompts=['a cat']",
        "model.sample.steps=1",
        "optim_wrapper.optimizer.lr=1.0e-3",
        "train_cfg.max_steps=4",
    ]
    run(compose([*given, f"run_dir={tmp_path / 'one'}", "train_dataloader.batch_size=2"]))
    command([*given, f"run_dir={tmp_path / 'two'}", "train_dataloader.batch_size=1"], processes=2)

    one, two = (load_file(tmp_path / name / "tuned.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4)
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    about = [json.loads((tmp_path / name / "tuned.json").read_text()) for name in ("one", "two")]
    assert sorted(about[0]["clips"]) == sorted(about[1]["clips"]) == sorted(captions)
    assert about[0]["base_hash"] == about[1]["base_hash"]
    for name in ("one", "two"):  # each process writes the pages of its clips, in both runs all of them
        pages = {path.parent.name for path in (tmp_path / name / "page").glob("*/index.html")}
        assert pages == set(captions)


def test_rows_of_processes_are_those_of_one_with_the_joint_batch(monkeypatch):
    def draw(rows):
        return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))

    whole = draw(6)
    torch.testing.assert_close(own_rows(draw, 6), whole, atol=0, rtol=0)
    for rank in range(3):
        monkeypatch.setattr("core.engine.state.randomness.get_dist_info", lambda rank=rank: (rank, 3))
        torch.testing.assert_close(own_rows(draw, 2), whole[rank::3], atol=0, rtol=0)


# ------------------------------------------------------------------ LOVEU-TGVE-2023

COLUMNS = ["Style Change Caption", "Object Change Caption", "Background Change Caption", "Multiple Changes Caption"]


@pytest.fixture
def benchmark(tmp_path):
    root = tmp_path / "loveu-tgve-2023"
    write_frames(root / "DAVIS_480p/480p_frames/bear", 3, 0)
    write_frames(root / "videvo_480p/480p_frames/lake", 4, 1)
    write_frames(root / "youtube_480p/480p_frames/lake-2", 3, 2)
    rows = [
        ["DAVIS Videos:", *[""] * 5],
        ["bear", "a bear", "a bear, oil", "a cat", "a bear in snow", "a cat in snow"],
        ["Videvo Videos:", *[""] * 5],
        ["lake", "a lake", "a lake, oil", "", "a lake at night", "a sea at night"],
        ["lake-2", "another lake", "it, oil", "a sea", "it at night", "a sea at night"],
    ]
    with open(root / "LOVEU-TGVE-2023_Dataset.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["Video name", "Our GT caption", *COLUMNS], *rows])
    return root


def benchmark_overrides(sd_folder, benchmark, tmp_path):
    return [
        "experiment=tune_a_video/loveu_tgve",
        "runtime=cpu",
        f"runs_dir={tmp_path / 'runs'}",
        f"model.base={sd_folder}",
        f"train_dataloader.dataset.root={benchmark}",
        "+train_dataloader.num_workers=0",
        "+test_dataloader.num_workers=0",
        "model.sample.steps=1",
        "train_cfg.max_steps=1",
    ]


@pytest.mark.child
def test_a_sweep_over_the_benchmark_fills_a_submission(sd_folder, benchmark, tmp_path):
    given = benchmark_overrides(sd_folder, benchmark, tmp_path)
    command(["-m", *given, "train_dataloader.dataset.clip=range(2)", f"hydra.sweep.dir={tmp_path / 'sweep'}"])
    team = tmp_path / "runs" / "submission" / "vitrine"
    written = {str(path.relative_to(team)) for path in team.rglob("*.jpg")}
    kinds = {"bear": ("style", "object", "background", "multiple"), "lake": ("style", "background", "multiple")}
    assert written == {
        f"{group}/{clip}/{kind}/{i:05d}.jpg"
        for group, clip, frames in (("DAVIS_480p", "bear", 3), ("videvo_480p", "lake", 4))
        for kind in kinds[clip]
        for i in range(frames)
    }
    clips = [json.loads(path.read_text())["clips"] for path in (tmp_path / "runs").rglob("tuned.json")]
    assert sorted(clips) == [["DAVIS_480p/bear"], ["videvo_480p/lake"]]
    pages = {path.parent.name for path in (tmp_path / "runs").rglob("index.html")}
    assert pages == {"DAVIS_480p-bear", "videvo_480p-lake"}


def test_prompts_that_are_not_the_benchmarks_make_no_submission(sd_folder, benchmark, tmp_path):
    given = benchmark_overrides(sd_folder, benchmark, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.prompts=null"):
        run(compose([*given, "model.prompts=['a','b','c','d']"]))
    with pytest.raises(ConfigError, match="team="):
        run(compose([*given, "custom_hooks.submission.team=a/b"]))


def test_scores_of_the_benchmark_are_asked_for_by_one_key(sd_folder, benchmark, tmp_path):
    given = benchmark_overrides(sd_folder, benchmark, tmp_path)
    assert compose(given)["test_evaluator"] == {"type": "tune_a_video.PlainScores"}  # works without another model
    asked = "{type: tune_a_video.EditQuality, clip: folder, pick_score: other}"
    cfg = compose([*given, f"+test_evaluator={asked}"])
    assert cfg["test_evaluator"] == {"type": "tune_a_video.EditQuality", "clip": "folder", "pick_score": "other"}


def test_clips_of_the_benchmark_are_chosen_by_row_and_name(benchmark):
    for wanted in (1, "lake", "videvo_480p/lake"):
        data = LoveuTGVE(benchmark, n_frames=None, clip=wanted)
        assert len(data) == 1 and data[0]["sample_id"] == "videvo_480p/lake"
        assert set(data[0]["edits"]) == {"style", "background", "multiple"}
    for seed in range(5):  # the place of a clip does not depend on what else is read
        options = {"n_frames": 2, "start": None, "seed": seed}
        chosen, whole = LoveuTGVE(benchmark, clip="lake", **options)[0], LoveuTGVE(benchmark, **options)[1]
        assert torch.equal(chosen["video"], whole["video"])
    with pytest.raises(ConfigError, match="0 to 2"):
        LoveuTGVE(benchmark, clip=3)
    with pytest.raises(ConfigError, match="lake"):
        LoveuTGVE(benchmark, clip="lak")
    with pytest.raises(MissingDataError):
        LoveuTGVE(benchmark / "DAVIS_480p", clip=0)
