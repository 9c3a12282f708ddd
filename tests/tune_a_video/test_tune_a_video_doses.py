"""Edits of tuned clips at doses of noise: what is read, from whose weights, and what the file keeps."""

from __future__ import annotations

import json

import pytest
import torch

from core.config import build, compose
from core.data.prepare import run_task
from core.engine.launch import run
from core.errors import ConfigError
from core.tables.claim_file import load_claim
from tune_a_video.inference import doses

SMALL = ["unet_steps=3", "clip_steps=3", "judge_steps=3", "channels=8,16", "tower=0.25", "batch=4", "check_steps=0"]
CLAIM = """
statement: x
metric: agree
direction: higher
seeds: [5, 6]
rows:
  - {{label: tuned, role: ours, experiment: tune_a_video/moving_shapes, overrides: {given}}}
  - {{label: untuned, role: baseline, experiment: tune_a_video/moving_shapes, overrides: {untuned}}}
comparisons:
  - {{better: tuned, than: untuned}}
"""


@pytest.fixture(scope="module")
def claim(tmp_path_factory):
    """A claim of two clips whose runs are there, and the folder of its runs."""
    root = tmp_path_factory.mktemp("doses")
    run_task("tune_a_video", "tiny_sd", [f"output={root / 'tiny_sd'}", *SMALL])
    given = ["runtime=cpu", f"model.base={root / 'tiny_sd'}", "model.sample.steps=2", "train_cfg.max_steps=2"]
    given.append("optim_wrapper.optimizer.lr=0.1")
    untuned = [*given[:3], "train_cfg.max_steps=0", given[4]]
    path = root / "tune_a_video/tables/claim_small.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(CLAIM.format(given=json.dumps(given), untuned=json.dumps(untuned)))
    for seed in (5, 6):
        for words in (given, untuned):
            run(compose(["experiment=tune_a_video/moving_shapes", *words, f"seed={seed}", f"runs_dir={root / 'runs'}"]))
    return load_claim(path), root / "runs"


def test_a_dose_is_read_from_the_tuned_weights(claim, monkeypatch):
    statement, runs = claim
    known: dict = {}
    *_, clips = doses.read_claim(statement, ["tuned", "untuned"], [0.5, 1.0], str(runs), known)
    assert {seed for seed in clips["tuned"]} == {"5", "6"} and set(clips["untuned"]["5"]) == {"0.5", "1.0"}
    assert set(clips["tuned"]["5"]["0.5"]) == set(doses.READINGS)
    assert clips["tuned"]["5"]["1.0"] != clips["untuned"]["5"]["1.0"], "the delta was not loaded"
    # The source shines through a small dose: the more noise, the farther from it.
    for seed in ("5", "6"):
        held = clips["untuned"][seed]
        assert held["0.5"]["outside_psnr"] > held["1.0"]["outside_psnr"]
    # A second call takes what is known.
    monkeypatch.setattr(doses, "read_dose", lambda *_: pytest.fail("sampled again"))
    *_, again = doses.read_claim(statement, ["tuned", "untuned"], [0.5, 1.0], str(runs), known)
    assert again == clips
    found = doses.differences(clips, "tuned", "untuned")["0.5"]["path"]
    by_hand = [clips["tuned"][s]["0.5"]["path"] - clips["untuned"][s]["0.5"]["path"] for s in ("5", "6")]
    assert found["difference"] == pytest.approx(sum(by_hand) / 2)
    assert found["interval95"][0] < found["difference"] < found["interval95"][1]
    picture = doses.draw({"doses": doses.differences(clips, "tuned", "untuned")})
    assert picture.dtype.name == "uint8" and picture.shape[2] == 3 and picture.std() > 10


def test_an_untouched_source_keeps_everything(claim):
    """With a sampler that gives the source back, readings of what is kept are whole."""
    statement, runs = claim
    cfg = compose(["experiment=tune_a_video/moving_shapes", *statement.rows[0].overrides, "seed=5", f"runs_dir={runs}"])
    sample = build(cfg.train_dataloader.dataset)[0]

    class Same:
        sample = build(cfg.model).sample

        def edits(self, video, caption, prompts, sample_id):
            assert self.sample.init == "sdedit:0.5"
            source = (video.transpose(0, 1) / 2 + 0.5).clamp(0, 1)
            return type("Made", (), {"source": source, "videos": source.expand(len(prompts), -1, -1, -1, -1)})

    class Knowing:
        def looks(self, frames):
            return sample["looks"].expand(len(frames), 3)

    trainer = Same()
    before = trainer.sample
    read = doses.read_dose(trainer, sample, 0.5, Knowing())
    assert trainer.sample is before
    assert read["kept"] == 1 and read["outside_psnr"] == 100 and read["path"] < 0.25
    assert read["words"] == 0, "every edit asks for another word"
    assert torch.tensor(read["motion_cosine"]) > 0.9


def test_what_is_missing_is_named(claim, tmp_path):
    statement, runs = claim
    with pytest.raises(ConfigError, match="no row 'tunned'"):
        next(iter(doses.read_claim(statement, ["tunned"], [0.5], str(runs), {})))
    with pytest.raises(ConfigError, match="no run of 'tuned', seed 5"):
        next(iter(doses.read_claim(statement, ["tuned"], [0.5], str(tmp_path), {})))
    with pytest.raises(ConfigError, match=r"no tuned\.safetensors"):
        doses.tuned_trainer(compose(["experiment=tune_a_video/moving_shapes"]), tmp_path)
    with pytest.raises(ConfigError, match="no such claim"):
        doses.main(["claim=tune_a_video/claim_nothing", f"output={tmp_path / 'x.json'}"])
