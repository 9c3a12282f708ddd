"""The two stages through the engine: what is aligned, chosen and tuned, and what a stage takes from the one before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import petl
from core.checkpoint.run_folder import find_checkpoint
from core.config import compose, to_dict
from core.engine.commands.evaluation import evaluate
from core.engine.launch import build_trainer, run
from core.engine.run.config import configured

SHORT = [
    "runtime=cpu",
    "vars.source=null",
    "vars.steps=3",
    "train_dataloader.batch_size=8",
    "train_dataloader.dataset.count=24",
    "test_dataloader.dataset.count=20",
    "train_dataloader.dataset.seed=5",
]


@pytest.fixture
def two_stage(tmp_path, monkeypatch):
    """Runs petl/cue_two_stage at reduced length, in a folder of the test's own; returns its result."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(compose(["experiment=petl/cue_two_stage", *SHORT, *words]))


def state(folder):
    return torch.load(find_checkpoint(folder), weights_only=True)["model"]


def differing(one, other):
    return {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


def test_every_stage_changes_what_is_its_own(two_stage):
    result = two_stage("run_dir=run")
    assert set(result["stages"]) == {"align", "choose", "tune"} and result["stages"]["choose"]["images"] == 24
    aligned, tuned = state("run/stage_0_align"), state("run")
    head = {"network.backbone.head.weight", "network.backbone.head.bias"}
    assert differing(aligned, tuned) == head  # LayerNorms stay at their first stage's values
    added = {name for name in tuned if name not in aligned}
    assert len([name for name in added if name.endswith(".channels")]) == 3
    moved = [tuned[name] for name in added if name.endswith("weight")]
    assert len(moved) == 3 and all(weight.abs().max() > 0 for weight in moved)
    channels, scores = petl.load_choice("run/stage_1_choose/channels.safetensors")
    for block, chosen in enumerate(channels):
        assert tuned[f"network.tuning.blocks_{block}_attn.tuning.channels"].tolist() == chosen
    assert scores.origin["data"]["seed"] == 5 and scores.origin["score"] == "taylor"
    assert Path("run/stage_1_choose/importance.png").stat().st_size > 0


def test_the_choice_is_that_of_the_aligned_network(two_stage):
    two_stage("run_dir=run")
    cfg, file = configured("run/stage_0_align", [])
    trainer = build_trainer(cfg)
    trainer.load_state_dict(torch.load(file, weights_only=True)["model"])
    drawn = petl.CueSwap("target", "train", seed=5, count=24).drawn
    again = petl.channel_scores(trainer.network, [(drawn.image, drawn.factors[:, 0])])
    channels, scores = petl.load_choice("run/stage_1_choose/channels.safetensors")
    assert again.select(16) == channels
    for one, other in zip(again.values[""], scores.values[""], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_one_key_each_gives_the_one_stage_rows(two_stage):
    two_stage("run_dir=joint", "vars.align.type=petl.Linear", "vars.tune_norm=true")
    probed, tuned = state("joint/stage_0_align"), state("joint")
    changed = differing(probed, tuned)
    norms = {name for name in tuned if ".norm" in name}
    assert norms and norms < changed and all("norm" in name or "head" in name for name in changed)
    two_stage("run_dir=alone", "vars.align.type=petl.Linear")
    first, alone = state("alone/stage_0_align"), state("alone")
    assert differing(first, alone) == {"network.backbone.head.weight", "network.backbone.head.bias"}
    assert not differing(first, probed)


def test_finished_and_interrupted_runs_go_on_alike(two_stage):
    whole = two_stage("run_dir=run")
    assert two_stage("run_dir=run", "resume=auto")["finished"] == whole["finished"]
    for keep in (("stage_0_align", "stage_1_choose"), ("stage_0_align",)):
        shutil.rmtree("killed", ignore_errors=True)
        Path("killed").mkdir()
        shutil.copy("run/config.yaml", "killed/config.yaml")
        for name in keep:
            shutil.copytree(f"run/{name}", f"killed/{name}")
        again = two_stage("run_dir=killed", "resume=auto")
        assert again["metrics"] == whole["metrics"] and not differing(state("run"), state("killed"))


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_a_copied_run_is_used_as_it_lies(two_stage, allocation):
    """With a global choice, blocks have modules of other sizes than the config says: the copy's own file decides."""
    whole = two_stage("run_dir=run", f"stages.1.compute.allocation={allocation}")
    shutil.move("run", "elsewhere")
    cfg, file = configured("elsewhere", [])
    assert evaluate(cfg, file)["top1"] == pytest.approx(whole["metrics"]["top1"])


def test_the_head_has_a_rate_of_its_own_in_every_stage():
    rates = ["vars.head_rate=0.03", "vars.rate=0.06", "vars.tune_rate=0.3"]
    plain = to_dict(compose(["experiment=petl/cue_two_stage", *rates]))
    first, last = plain["optim_wrapper"], plain["stages"][2]["optim_wrapper"]
    for wrapper, rate in ((first, 0.06), (last, 0.3)):
        factor = wrapper["paramwise"]["multipliers"]["network.backbone.head"]["lr"]
        assert wrapper["optimizer"]["lr"] == rate and factor * rate == pytest.approx(0.03)


def test_scores_can_come_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(compose(["experiment=petl/cue_scores_first", *SHORT, "run_dir=run"]))
    assert list(result["stages"]) == ["probe", "choose", "align", "tune"]
    channels, _ = petl.load_choice("run/stage_1_choose/channels.safetensors")
    tuned = state("run")
    assert tuned["network.tuning.blocks_2_attn.tuning.channels"].tolist() == channels[2]
    aligned = state("run/stage_2_align")
    assert differing(aligned, tuned) == {"network.backbone.head.weight", "network.backbone.head.bias"}
    assert json.loads(Path("run/stage_1_choose/result.json").read_text())["steps"] == 0
