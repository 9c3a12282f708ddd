"""What the final figures of a run are figures of: the weights that its config chooses, and no others."""

import json
from pathlib import Path

import pytest
import torch

from core.checkpoint.run_folder import find_checkpoint
from core.config import compose
from core.engine.commands.evaluation import evaluate
from core.errors import ConfigError

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"
BEST = (TEST, "evaluate=best", "checkpoint={metric: mean, direction: higher}", "optim_wrapper.optimizer.lr=0.1")
SCORE = ("val_evaluator={type: test_engine_evaluation.Score}",)


class Score:
    """The mean logit: another number for every other set of weights."""

    def __init__(self):
        self.dataset_meta, self.seen = None, []

    def process(self, data_batch, data_samples):
        self.seen.append(data_samples["logits"][:, 1].double())

    def evaluate(self, size):
        seen, self.seen = torch.cat(self.seen), []
        return {"mean": float(seen.mean()), "note": f"of {len(seen)}"}


def epochs(run, split="val"):
    """{step: mean logit} as logged."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[f"{split}/mean"] for line in lines if f"{split}/mean" in line}


def figures(user, checkpoint, *overrides, split="test"):
    """What tools/test.py gives."""
    cfg = compose(["experiment=mine/tiny", "runtime=cpu", TEST, *SCORE, *overrides], config_dir=user / "configs")
    return evaluate(cfg, checkpoint, split=split)


@pytest.mark.parametrize(
    ("average", "network", "better"),
    [
        ("ema={decay: 0.7}", "model.network.dropout=0.0", max),
        ("ema={decay: 0.7, buffers: average}", "model.network.dropout=0.1", min),
        ("custom_hooks=[{type: core.EMAHook, decay: 0.7}]", "model.network.dropout=0.0", max),
    ],
)
def test_the_best_averages_are_tested_not_the_last(tiny, user, average, network, better):
    direction = {max: "higher", min: "lower"}[better]
    result = tiny(*BEST, *SCORE, average, network, f"checkpoint.direction={direction}", "train_cfg.max_epochs=4")
    judged = epochs(result["run_dir"])
    best = better(judged, key=judged.get)
    assert best != max(judged), "the last epoch is the best one: the test would say nothing"
    path = find_checkpoint(result["run_dir"], best=True)
    assert path.name == f"step_{best:08d}.pt"
    assert result["metrics"] == figures(user, path, network)
    assert result["metrics"] != figures(user, find_checkpoint(result["run_dir"]), network)
    assert result["val_metrics"] == figures(user, path, network, split="val") == {"mean": judged[best], "note": "of 21"}


def test_without_a_test_split_the_figures_are_those_of_the_best(tiny):
    result = tiny(*BEST[1:], *SCORE, "ema={decay: 0.7}", "train_cfg.max_epochs=4")
    judged = epochs(result["run_dir"])
    assert max(judged.values()) != judged[max(judged)]
    assert result["metrics"] == result["val_metrics"] == {"mean": max(judged.values()), "note": "of 21"}


def test_a_stage_begins_from_the_best_of_an_earlier_one(tiny, user):
    stages = (
        "stages=[{name: first, train_cfg: {max_epochs: 4}}, {name: second, train_cfg: {max_epochs: 1},"
        " load_from: {stage: first, best: true}, optim_wrapper: {optimizer: {lr: 0.0, weight_decay: 0.0}}}]"
    )
    result = tiny(*BEST, *SCORE, "ema={decay: 0.7}", "param_scheduler=null", "run_dir=staged", stages)
    first = Path("staged/stage_0_first")
    judged = epochs(first)
    assert max(judged.values()) != judged[max(judged)]
    assert result["val_metrics"]["mean"] == pytest.approx(max(judged.values()), abs=1e-6)  # learning rate 0


def test_best_of_a_run_that_judged_nothing_is_refused(tiny):
    result = tiny("train_cfg.max_epochs=1")
    with pytest.raises(ConfigError, match="was judged"):
        find_checkpoint(result["run_dir"], best=True)


def test_pictures_of_the_final_test_lie_beside_those_of_the_validation(tiny, monkeypatch):
    import mypoints

    shown = []

    def media(self, batch):
        shown.append(self.network.head.weight.clone())
        return {"points": torch.zeros(4, 4, 3, dtype=torch.uint8)}

    monkeypatch.setattr(mypoints.Classify, "media", media, raising=False)
    hook = "custom_hooks=[{type: core.MediaHook}]"
    result = tiny(*BEST, *SCORE, "ema={decay: 0.7}", "train_cfg.max_epochs=4", hook)
    judged = epochs(result["run_dir"])
    best = max(judged, key=judged.get)
    names = {path.name for path in (Path(result["run_dir"]) / "media").iterdir()}
    assert names == {f"points_step_{step:08d}.png" for step in judged} | {f"test_points_step_{best:08d}.png"}
    assert torch.equal(shown[-1], shown[sorted(judged).index(best)])  # the averages of the best epoch
