"""Several evaluation sets in one split: each is evaluated as if it were alone, and all figures have its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_experiment import losses, train

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import to_dict
from core.config.fingerprint import fingerprint
from core.engine.commands.evaluation import evaluate
from core.engine.keys.check import checked
from core.engine.keys.eval_sets import loaders
from core.engine.launch import run
from core.errors import ConfigError

SETS = "{clean: {}, noisy: {dataset: {seed: 7, count: 13}}, few: {batch_size: 2, dataset: {count: 5}}}"
VAL = f"+val_dataloader.sets={SETS}"
TEST = (
    "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, seed: 5, augment: false},"
    " sets: {small: {dataset: {count: 6}}, large: {dataset: {count: 17}}}}"
)
FEW_TOO = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 5, seed: 1, augment: false}}"
TOP1 = "{top1: {type: torchmetrics.classification.MulticlassAccuracy, num_classes: 2}}"


class Score:
    """The mean logit: another number for every other set of weights and of samples."""

    def __init__(self):
        self.dataset_meta, self.seen = None, []

    def process(self, data_batch, data_samples):
        noise = torch.rand(())  # evaluation that samples
        self.seen.append(data_samples["logits"][:, 1].double() + noise)

    def evaluate(self, size):
        seen, self.seen = torch.cat(self.seen), []
        assert len(seen) == size
        return {"mean": float(seen.mean())}


SCORED = "val_evaluator={type: test_eval_sets.Score}"


def logged(result):
    """{step: mean of the noisy set} of a run's log."""
    lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["val/noisy/mean"] for line in lines if "val/noisy/mean" in line}


def test_every_set_is_evaluated_as_if_it_were_alone(tiny):
    together = tiny(SCORED, VAL, "train_cfg.max_epochs=2")
    assert set(together["metrics"]) == {"clean/mean", "noisy/mean", "few/mean"}
    words = {
        "clean": (),
        "noisy": ("val_dataloader.dataset.seed=7", "val_dataloader.dataset.count=13"),
        "few": ("val_dataloader.batch_size=2", "val_dataloader.dataset.count=5"),
    }
    alone = {name: tiny(SCORED, *given, "train_cfg.max_epochs=2") for name, given in words.items()}
    for name, result in alone.items():
        assert together["metrics"][f"{name}/mean"] == result["metrics"]["mean"], name
    assert losses(together["run_dir"]) == losses(alone["clean"]["run_dir"])  # training draws what it drew
    logged = [json.loads(line) for line in (Path(together["run_dir"]) / "log.jsonl").read_text().splitlines()]
    assert [line["val/noisy/mean"] for line in logged if "val/noisy/mean" in line][-1] == together["metrics"][
        "noisy/mean"
    ]


def test_a_set_of_its_own_judge(tiny):
    result = tiny(
        VAL,
        "~val_evaluator",
        "+val_evaluator={sets: {clean: {type: mypoints.Accuracy}, few: [{type: mypoints.Accuracy}],"
        " noisy: {type: test_eval_sets.Score}}}",
        "val_dataloader.sets.few.dataset.count=4",
        "train_cfg.max_epochs=1",
    )
    assert set(result["metrics"]) == {"clean/accuracy", "clean/seen", "noisy/mean", "few/accuracy", "few/seen"}
    assert (result["metrics"]["clean/seen"], result["metrics"]["few/seen"]) == (21, 4)


def test_test_sets_the_best_by_a_set_and_the_tools(tiny, tiny_config):
    words = (SCORED, VAL, TEST, "checkpoint.metric={noisy/mean: lower}", "train_cfg.max_epochs=4")
    result = tiny(*words, "evaluate=best", "objective=-val/noisy/mean")
    assert set(result["metrics"]) == {"small/mean", "large/mean"}
    judged = logged(result)
    best = min(judged, key=judged.get)
    path = find_checkpoint(result["run_dir"], best=True)
    assert path.name == f"step_{best:08d}.pt" and result["val_metrics"]["noisy/mean"] == judged[best]
    assert result["objective"] == -judged[best]
    assert evaluate(tiny_config(*words), path) == result["metrics"]
    assert evaluate(tiny_config(*words), path, split="val") == result["val_metrics"]


def test_a_resumed_run_gives_the_same_figures(tiny):
    words = (SCORED, VAL, TEST, "train_cfg.max_epochs=3", "model.network.dropout=0.2", "checkpoint.keep_last=null")
    whole, stopped = tiny(*words), tiny(*words)
    folder = Path(stopped["run_dir"])
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step_00000030.pt").unlink()
    resumed = tiny(*words, f"resume={folder}")
    assert resumed["resumed_from"].endswith("step_00000020.pt")
    assert (resumed["metrics"], resumed["val_metrics"]) == (whole["metrics"], whole["val_metrics"])
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_stages_with_sets(tiny):
    result = tiny(
        "stages=[{name: one, val_dataloader: null}, {name: two, load_from: {stage: one}}]",
        SCORED,
        VAL,
        TEST,
        "train_cfg.max_epochs=1",
    )
    assert set(result["stages"]["two"]) == {"small/mean", "large/mean"}


def test_pictures_bear_the_name_of_the_set(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "mydrawer.py").write_text(
        "import torch\n\nimport mypoints\n\n\n"
        "class Drawer(mypoints.Classify):\n"
        "    def media(self, batch):\n"
        "        return {'points': torch.zeros(len(batch['label']), 4, 3, dtype=torch.uint8)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mydrawer", raising=False)
    result = run(tiny_config("model.type=mydrawer.Drawer", SCORED, VAL, TEST, "train_cfg.max_epochs=1"))
    names = sorted(path.name for path in (Path(result["run_dir"]) / "media").iterdir())
    assert names == [
        *(f"{name}_points_step_00000010.png" for name in ("clean", "few", "noisy")),
        *(f"test_{name}_points_step_00000010.png" for name in ("large", "small")),
    ]


@pytest.mark.processes
def test_two_processes_count_every_sample_of_every_set_once(user, tmp_path):
    train(user, VAL, "train_cfg.max_epochs=1", f"run_dir={tmp_path / 'run'}", torchrun=2)
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {name: metrics[f"{name}/seen"] for name in ("clean", "noisy", "few")} == {"clean": 21, "noisy": 13, "few": 5}


def test_a_set_is_switched_off_and_counts_as_another_run(tiny_config):
    fewer = tiny_config(VAL, "val_dataloader.sets.few=null")
    assert list(loaders(to_dict(fewer)["val_dataloader"], "val_dataloader")) == ["clean", "noisy"]
    assert fingerprint(fewer) != fingerprint(tiny_config(VAL))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("+val_dataloader.sets=3",), r"val_dataloader\.sets=3: a mapping of names"),
        (("+val_dataloader.sets={}",), r"val_dataloader\.sets names no set"),
        (("+val_dataloader.sets={a/b: {}}",), r"'a/b' cannot be a set's name"),
        (("+val_dataloader.sets={a: 3}",), r"val_dataloader\.sets\.a=3: a loader's keys"),
        ((VAL, "+val_dataloader.sets.noisy.dataset.sed=3"), r"val_dataloader\.sets\.noisy.*did you mean 'seed'"),
        ((VAL, "~val_dataloader.dataset"), r"val_dataloader\.sets\.clean has no dataset"),
        (("~val_evaluator", "+val_evaluator={sets: {a: {type: mypoints.Accuracy}}}"), r"dataloader has no `sets`"),
        (
            (VAL, "~val_evaluator", "+val_evaluator={sets: {clean: {type: mypoints.Accuracy}}}"),
            r"missing \['few', 'noisy'\]",
        ),
        ((VAL, "+val_evaluator.sets={clean: {type: mypoints.Accuracy}}"), r"val_evaluator\.type stands beside"),
        ((VAL, FEW_TOO, "evaluate=best", "checkpoint.metric=few/accuracy"), r"would select the checkpoint on the test"),
        ((VAL, "train_cfg.max_epochs=1", "checkpoint.metric=accuracy"), r"'accuracy' is none of \['clean/accuracy'"),
    ],
)
def test_sets_that_cannot_be_meant(tiny, words, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*words)


def test_an_objective_is_looked_up_by_set(tiny_config):
    words = (VAL, "~val_evaluator", f"+val_evaluator={{type: core.metrics.TorchMetrics, metrics: {TOP1}}}")
    checked(to_dict(tiny_config(*words, "objective=noisy/top1")))
    with pytest.raises(ConfigError, match=r"no metric is called 'nosy/top1'.*did you mean 'noisy/top1'"):
        checked(to_dict(tiny_config(*words, "objective=nosy/top1")))
