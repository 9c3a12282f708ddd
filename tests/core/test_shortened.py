"""Shorter runs: how far they go, what they leave alone, and that nothing takes them for evidence."""

import json
from pathlib import Path

import pytest
import torch

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import to_dict
from core.config.fingerprint import fingerprint
from core.data.loading.batching import ResumableBatchSampler
from core.data.loading.loader import build_loader
from core.errors import ConfigError, VitrineError
from core.tables.runs import Results, launcher

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"


def drawn(sampler, *epochs, start=0):
    """(index, seed) of every sample of some epochs, batch by batch."""
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        sampler.start, start = start, 0
        found += [[(int(i), i.seed) for i in batch] for batch in sampler]
    return found


def sampler(limit=(), repeat=False, rank=0, world_size=1, **options):
    cfg = {"dataset": list(range(20)), "batch_size": 3, "sampler": options}
    place = {"rank": rank, "world_size": world_size}
    return build_loader(cfg, seed=0, training=True, limit=limit, repeat=repeat, **place).batch_sampler


@pytest.mark.parametrize(
    ("limit", "batches"), [((2,), 2), ((0.5,), 4), ((1.0,), 7), ((0.01,), 1), ((99,), 7), ((5, 0.3), 2)]
)
def test_a_limited_epoch_is_the_beginning_of_the_whole_one(limit, batches):
    whole, limited = sampler(), sampler(limit)
    assert len(limited) == batches and limited.whole == 7
    assert drawn(limited, 0) == drawn(whole, 0)[:batches]
    assert drawn(limited, 1) == drawn(whole, 1)[:batches] != drawn(whole, 0)[:batches]
    assert drawn(sampler(limit), 1, start=batches - 1) == drawn(whole, 1)[batches - 1 : batches]
    assert limited.drawn == sum(map(len, drawn(whole, 1)[:batches]))


@pytest.mark.parametrize("kind", [{}, {"infinite": True}, {"type": "torch.utils.data.RandomSampler"}])
def test_repeated_epochs_have_the_same_samples_with_the_same_seeds(kind):
    repeated = sampler((2,), repeat=True, **kind)
    first = drawn(repeated, 0)
    assert first == drawn(sampler((2,), **kind), 0)
    assert drawn(repeated, 1, 2) == [*first, *first]
    assert drawn(sampler((2,), repeat=True, **kind), 5, start=1) == first[1:]


@pytest.mark.parametrize("kind", [{"infinite": True}, {"type": "mmengine.dataset.InfiniteSampler", "seed": 0}])
def test_what_never_ends_goes_on_where_the_last_epoch_was_cut(kind):
    limited, endless = sampler((3,), **kind), sampler(**kind)
    assert len(limited) == 3 and not limited.infinite and endless.infinite and limited.whole is None
    endless.set_epoch(0)
    chain = [[(int(i), i.seed) for i in batch] for batch, _ in zip(endless, range(12), strict=False)]
    assert drawn(limited, 0, 1, 2, 3) == chain
    assert drawn(sampler((3,), **kind), 2, 3, start=1) == chain[7:]
    with pytest.raises(ConfigError, match=r"never ends.*whole number"):
        sampler((0.5,), **kind)


def test_processes_share_a_limited_epoch():
    ranks = [drawn(sampler((2,), rank=rank, world_size=2), 1) for rank in (0, 1)]
    joint = [sorted([*one, *other]) for one, other in zip(*ranks, strict=True)]
    cfg = {"dataset": list(range(20)), "batch_size": 6}
    whole = drawn(build_loader(cfg, seed=0, training=True, rank=0, world_size=1).batch_sampler, 1)
    assert joint == [sorted(batch) for batch in whole[:2]]


def test_a_batch_sampler_that_keeps_samples_back_begins_every_epoch_anew():
    class Kept:
        """Counts through a pass and begins anew at its end alone, as mmdet's buckets do."""

        sampler, batch_size, held = None, 2, ()

        def __len__(self):
            return 4

        def __iter__(self):
            for index in range(0, 8, 2):
                self.held = (*self.held, index)
                yield [len(self.held), index]
            self.held = ()

    limited = ResumableBatchSampler(Kept(), limit=(2,))
    assert drawn(limited, 0) and [[i for i, _ in b] for b in drawn(limited, 1)] == [[1, 0], [2, 2]]


# ---------------------------------------------------------------------- runs
def count(monkeypatch):
    import mypoints

    seen = {"losses": [], "predict": []}
    for name, calls in seen.items():
        method = getattr(mypoints.Classify, name)
        monkeypatch.setattr(
            mypoints.Classify, name, lambda s, b, m=method, c=calls: c.append(b["sample_id"]) or m(s, b)
        )
    return seen


@pytest.mark.parametrize("length", ["train_cfg.max_epochs=3", "train_cfg.max_epochs=null +train_cfg.max_steps=30"])
def test_a_fast_dev_run_takes_so_many_steps_and_batches(tiny, monkeypatch, length):
    seen = count(monkeypatch)
    rates = []
    import core.engine.hooks.logging as logging_hook

    after = logging_hook.LoggingHook.after_train_iter
    monkeypatch.setattr(
        logging_hook.LoggingHook,
        "after_train_iter",
        lambda self, runner, *a, **k: (
            rates.append(runner.optim_wrapper.get_lr()["lr"][0]) or after(self, runner, *a, **k)
        ),
    )
    result = tiny(TEST, *length.split(), "runtime.fast_dev_run=2", "checkpoint.metric=accuracy", "evaluate=best")
    assert result["status"] == "trial" and result["steps"] == 2 and result["epochs"] == 1
    assert result["stopped_early"] is None
    assert len(seen["losses"]) == 2
    assert [len(batch) for batch in seen["predict"]] == [8, 8, 4, 4]  # no sanity pass
    assert result["val_metrics"]["seen"] == 16 and result["metrics"]["seen"] == 8
    whole = []
    monkeypatch.setattr(
        logging_hook.LoggingHook,
        "after_train_iter",
        lambda self, runner, *a, **k: (
            whole.append(runner.optim_wrapper.get_lr()["lr"][0]) or after(self, runner, *a, **k)
        ),
    )
    assert tiny(*length.split())["status"] == "finished"
    assert rates == whole[:2] and len(whole) == 30


def test_true_is_one_step_and_a_long_one_is_as_long_as_its_config(tiny):
    assert tiny("runtime.fast_dev_run=true")["steps"] == 1
    assert tiny("runtime.fast_dev_run=50", "train_cfg.max_epochs=2")["steps"] == 20


def test_all_stages_are_shortened_and_go_on(tiny, monkeypatch):
    stages = "stages=[{name: one}, {name: two, load_from: {stage: one}}]"
    import mypoints

    seen = count(monkeypatch)
    losses = mypoints.Classify.losses

    def broken(self, batch):
        if len(seen["losses"]) == 3:
            seen["losses"].append(None)
            raise KeyboardInterrupt
        return losses(self, batch)

    monkeypatch.setattr(mypoints.Classify, "losses", broken)
    with pytest.raises(KeyboardInterrupt):
        tiny(stages, "runtime.fast_dev_run=2", "run_dir=staged")
    first = Path("staged/stage_0_one/result.json")
    before = first.stat().st_mtime_ns
    result = tiny(stages, "runtime.fast_dev_run=2", "run_dir=staged", "resume=auto")
    assert result["status"] == "trial" and first.stat().st_mtime_ns == before
    assert len(seen["losses"]) == 4 + 2  # of the first stage nothing is done again
    assert {json.loads(p.read_text())["status"] for p in Path("staged").rglob("result.json")} == {"trial"}


def test_limits_hold_for_every_split_and_resume_is_exact(tiny, monkeypatch):
    options = (
        TEST,
        "train_cfg.max_epochs=2",
        "runtime.limit_batches={train: 3, val: 0.5, test: 1}",
        "ema={decay: 0.9}",
    )
    whole = tiny(*options)
    assert (whole["steps"], whole["val_metrics"]["seen"], whole["metrics"]["seen"]) == (6, 16, 4)
    import mypoints

    calls, losses = [], mypoints.Classify.losses

    def stopped(self, batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return losses(self, batch)

    every = "checkpoint.every_steps=1"
    monkeypatch.setattr(mypoints.Classify, "losses", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny(*options, every, "run_dir=limited")
    resumed = tiny(*options, every, "resume=limited")
    assert len(calls) == 7 and resumed["status"] == "trial"
    one, other = (model_state(find_checkpoint(r["run_dir"])) for r in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_overfitting_sees_the_same_batches_every_epoch(tiny, monkeypatch):
    seen = count(monkeypatch)
    result = tiny("runtime.overfit_batches=2", "train_cfg.max_epochs=3", "runtime.sanity_batches=0")
    assert seen["losses"][:2] * 3 == seen["losses"] and seen["losses"][0] != seen["losses"][1]
    assert result["val_metrics"]["seen"] == 16


def test_the_figures_of_a_limited_evaluation_have_their_own_denominator(tiny_config, recwarn):
    from core.engine.commands.evaluation import evaluate

    judge = (
        "~val_evaluator",
        "+val_evaluator={type: core.metrics.TorchMetrics, metrics: {top1: {type: "
        "torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: micro}}}",
    )
    metrics = evaluate(tiny_config(*judge, "runtime.limit_batches.val=2"), None, "val")
    assert float(metrics["top1"] * 16).is_integer()
    assert not [w for w in recwarn if "samples were evaluated" in str(w.message)]


def test_a_metric_is_told_of_what_it_has_not_seen(tiny, monkeypatch):
    import mypoints

    told, evaluate = [], mypoints.Accuracy.evaluate
    monkeypatch.setattr(mypoints.Accuracy, "partial", None, raising=False)
    monkeypatch.setattr(
        mypoints.Accuracy, "evaluate", lambda self, size: told.append((self.partial, size)) or evaluate(self, size)
    )
    for limit in (2, 3):
        tiny("train_cfg.max_epochs=1", f"runtime.limit_batches.val={limit}", "runtime.sanity_batches=0")
    assert told == [(True, 16), (False, 21)]


def test_a_figure_that_a_few_samples_do_not_give_is_left_out_of_a_trial_only(tiny, monkeypatch):
    import mypoints

    monkeypatch.setattr(mypoints.Accuracy, "evaluate", lambda self, size: {"accuracy": [0.5][size < 21]})
    options = ("checkpoint.metric=accuracy", "objective=accuracy", "runtime.sanity_batches=0", "train_cfg.max_epochs=1")
    result = tiny(*options, "runtime.fast_dev_run=1")
    assert result["val_metrics"] == {} and result["objective"] is None
    assert "cannot be computed of 8 of 21 samples: IndexError" in (Path(result["run_dir"]) / "run.log").read_text()
    monkeypatch.setattr(mypoints.Accuracy, "evaluate", lambda self, size: {"accuracy": [][0]})
    with pytest.raises(IndexError):
        tiny(*options, "runtime.fast_dev_run=3")  # all 21


# ---------------------------------------------------------------------- evidence
def test_nothing_takes_a_trial_for_evidence(tiny, tiny_config):
    from core.engine.launch import run

    short = ("runtime.fast_dev_run=1", "train_cfg.max_epochs=1")
    trial = tiny(*short)
    results = Results("runs", lambda overrides: tiny_config(*overrides))
    for options in (short, short[1:]):
        assert results.match(tiny_config(*options)) is None
    with pytest.raises(VitrineError, match=r"a trial ran through, but is no evidence.*fast_dev_run"):
        launcher(run)(tiny_config(*short))
    again = tiny(*short, "resume=auto")
    assert again["run_dir"] != trial["run_dir"] and again["resumed_from"] is None
    for options in ((f"resume={trial['run_dir']}",), (f"run_dir={trial['run_dir']}", "resume=auto")):
        with pytest.raises(ConfigError, match=r"is a trial that has ended .fast_dev_run of runtime.*load_from="):
            tiny(*short, *options)
    assert not Path("runs/mine/tiny/latest").exists()
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find_checkpoint("runs/mine/tiny/latest")
    whole = tiny(short[1], "resume=auto")
    assert whole["status"] == "finished" and whole["resumed_from"] is None
    assert find_checkpoint("runs/mine/tiny/latest").is_relative_to(whole["run_dir"])
    with pytest.raises(ConfigError, match=r"runtime\.limit_batches"):
        tiny(short[1], f"resume={whole['run_dir']}", "runtime.limit_batches.train=1")


def test_only_keys_that_are_set_make_another_run(tiny_config):
    plain = to_dict(tiny_config())
    older = {**plain, "runtime": {"precision": plain["runtime"]["precision"], "debug": False}}
    assert fingerprint(plain) == fingerprint(older)
    prints = [
        fingerprint(tiny_config(*options))
        for options in ((), ["runtime.fast_dev_run=1"], ["runtime.overfit_batches=1"], ["runtime.limit_batches.val=1"])
    ]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("runtime.fast_dev_run=-1", "runtime.fast_dev_run", "true or false or a whole number from 1 on"),
        ("runtime.fast_dev_run=two", "runtime.fast_dev_run", "two is a text"),
        ("runtime.limit_batches.train=0", "runtime.limit_batches.train", "above 0, at most 1"),
        ("runtime.limit_batches.val=1.5", "runtime.limit_batches.val", "a whole number from 1 on"),
        ("runtime.limit_batches=3", "runtime.limit_batches", "a mapping"),
        ("+runtime.limit_batches.vall=3", "runtime.limit_batches.vall", "did you mean .?val"),
        ("runtime.overfit_batches=true", "runtime.overfit_batches", "true"),
        ("runtime.sanity_batches=some", "runtime.sanity_batches", "a whole number from 0 on"),
    ],
)
def test_other_values_are_refused(tiny, override, key, expected):
    with pytest.raises(ConfigError) as error:
        tiny(override)
    assert key in str(error.value)
    import re

    assert re.search(expected, str(error.value)), str(error.value)
