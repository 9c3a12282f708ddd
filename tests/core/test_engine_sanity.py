"""Every evaluation is tried out before training, and the run does not notice."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.errors import ConfigError

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"
RUN = (TEST, "train_cfg.max_epochs=2", "model.network.dropout=0.2", "run_dir=here")


def test_a_bug_in_an_evaluation_shows_before_the_first_step(tiny, monkeypatch):
    import mypoints

    trained = []
    losses = mypoints.Classify.losses
    monkeypatch.setattr(mypoints.Classify, "losses", lambda self, batch: trained.append(1) or losses(self, batch))

    def broken(self, batch):
        if len(batch["sample_id"]) == 4:  # a batch of the test split
            raise KeyError("no such key")
        return {"logits": self.network(batch["image"]), "label": batch["label"]}

    monkeypatch.setattr(mypoints.Classify, "predict", broken)
    with pytest.raises(KeyError, match="no such key"):
        tiny(*RUN)
    assert not trained and not list(Path("here").glob("checkpoints/*"))
    with pytest.raises(KeyError, match="no such key"):
        tiny(*RUN, "runtime.sanity_batches=0", "resume=auto")
    assert len(trained) == 20


def test_a_wrong_metric_is_found_before_the_first_step(tiny):
    with pytest.raises(ConfigError, match=r"checkpoint.metric 'acuracy' is none of \['accuracy', 'seen'\]"):
        tiny(*RUN, "checkpoint.metric=acuracy")
    assert not list(Path("here").glob("checkpoints/*"))


def test_a_figure_that_needs_more_samples_is_a_warning(tiny, monkeypatch):
    import mypoints

    evaluate = mypoints.Accuracy.evaluate

    def wants_all(self, size):
        if self.seen < size:
            raise ValueError("too few samples")
        return evaluate(self, size)

    monkeypatch.setattr(mypoints.Accuracy, "evaluate", wants_all)
    assert tiny(*RUN, "checkpoint.metric=accuracy")["metrics"]["seen"] == 9
    assert "too few samples" in Path("here/run.log").read_text()


def test_the_run_does_not_notice(tiny):
    def run(*options):
        torch.manual_seed(0)
        return tiny(TEST, "train_cfg.max_epochs=2", "model.network.dropout=0.2", "ema={decay: 0.9}", *options)

    def log(result):
        lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k.startswith(("step", "loss", "val/", "test/"))} for line in lines]

    with_it, without = run(), run("runtime.sanity_batches=0")
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (with_it, without))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert log(with_it) == log(without)
    assert all(with_it[k] == without[k] for k in ("metrics", "val_metrics", "fingerprint"))


def test_generators_and_batch_norms_are_as_they_were(tiny, monkeypatch):
    import core.engine.loops.train

    check, seen = core.engine.loops.train.check_evaluations, []

    def states(runner):
        return [
            torch.get_rng_state(),
            torch.tensor(np.random.get_state()[1].astype("int64")),
            random.getstate()[1],
            {k: v.clone() for k, v in runner.model.state_dict().items()},
            runner.model.training,
        ]

    def watched(runner, batches):
        before = states(runner)
        check(runner, batches)
        after = states(runner)
        seen.append(batches)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]
        assert all(torch.equal(before[3][k], after[3][k]) for k in before[3]) and before[4] == after[4]

    monkeypatch.setattr(core.engine.loops.train, "check_evaluations", watched)
    tiny(*RUN)
    assert seen == [2]


@pytest.mark.parametrize(("options", "calls"), [((), 4), (("runtime.sanity_batches=1",), 2)])
def test_only_the_first_batches_and_not_where_a_trainer_says_so(tiny, monkeypatch, options, calls):
    import mypoints

    predicted, at_first_step = [], []
    predict, losses = mypoints.Classify.predict, mypoints.Classify.losses
    monkeypatch.setattr(mypoints.Classify, "predict", lambda s, b: predicted.append(1) or predict(s, b))
    monkeypatch.setattr(mypoints.Classify, "losses", lambda s, b: at_first_step.append(len(predicted)) or losses(s, b))
    tiny(TEST, "train_cfg.max_epochs=1", *options)
    assert at_first_step[0] == calls
    predicted.clear()
    at_first_step.clear()
    monkeypatch.setattr(mypoints.Classify, "sanity_check", False)
    tiny(TEST, "train_cfg.max_epochs=1", *options)
    assert at_first_step[0] == 0


MEASURES = (
    "~val_evaluator",
    "+val_evaluator={type: core.metrics.TorchMetrics, prefix: mine, metrics: {"
    "top1: {type: torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: micro}, "
    "each: {type: torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: none}}}",
)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        # Two that are found before anything is built.
        ("mine/top2", "'mine/top2' is none of mine/each, mine/top1.*did you mean 'mine/top1'"),
        ("top1", "'top1' is none of mine/each, mine/top1"),
        ("mine/top1/1", r"'mine/top1/1' is none of \['mine/each/0', 'mine/each/1', 'mine/top1'\]"),
        ("mine/each/2", r"'mine/each/2' is none of \['mine/each/0'"),
        ("mine/each/last", r"'mine/each/last' is none of \['mine/each/0'"),
    ],
)
def test_a_metric_with_a_slash_that_nothing_gives_is_found_as_early_as_can_be(tiny, metric, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*MEASURES, f"checkpoint.metric={metric}", "run_dir=here")
    assert not list(Path("here").glob("checkpoints/*")) and not list(Path().glob("here/media"))


SETS = "+val_dataloader.sets={one: {}, two: {dataset: {count: 9}}}"


def test_sets_of_a_validation_are_looked_at_too(tiny, monkeypatch):
    import mypoints

    assert tiny(*MEASURES, SETS, "train_cfg.max_epochs=1", "checkpoint.metric=two/mine/each/1")["status"] == "finished"
    with pytest.raises(ConfigError, match="'tow/mine/top1' is none of one/mine/each"):
        tiny(*MEASURES, SETS, "checkpoint.metric=tow/mine/top1")
    monkeypatch.setattr(mypoints.Classify, "losses", lambda self, batch: {}["not reached"])
    for metric in ("tow/accuracy", "two/acuracy", "two/accuracy/1"):
        with pytest.raises(ConfigError, match=rf"'{metric}' is none of \['one/accuracy', 'one/seen', 'two/accuracy'"):
            tiny(SETS, f"checkpoint.metric={metric}")


def test_a_group_that_may_still_occur_is_a_warning(tiny, monkeypatch):
    import mypoints

    evaluate = mypoints.Accuracy.evaluate

    def groups(self, size):
        late = {"group/late": 1.0} if self.seen == size else {}
        return {**evaluate(self, size), **late}

    monkeypatch.setattr(mypoints.Accuracy, "evaluate", groups)
    result = tiny("checkpoint.metric=group/late", "train_cfg.max_epochs=1")
    assert result["val_metrics"]["group/late"] == 1
    assert "'group/late' is not a figure of the first batches" in (Path(result["run_dir"]) / "run.log").read_text()
