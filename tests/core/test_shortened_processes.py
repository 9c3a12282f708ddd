"""Two processes: what shorter runs count, what the look at the evaluations finds, and a sweep of rates."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.errors import ConfigError
from tests import forked

TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"
JUDGE = (
    "~val_evaluator",
    "+val_evaluator={type: core.metrics.TorchMetrics, metrics: {top1: {type: "
    "torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: micro}}}",
)


def _work(rank: int, user: str, folder: str) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    sys.path.insert(0, user)
    os.chdir(folder)
    import mypoints

    from core.config import compose
    from core.config.command.processes import alone
    from core.engine.commands.lr_finder import Options, find_lr
    from core.engine.launch import run

    def config(*overrides):
        words = ["experiment=mine/tiny", "runtime=cpu", "train_dataloader.batch_size=2", *overrides]
        return compose(words, config_dir=Path(user, "configs"))

    said = {}
    limits = "runtime.limit_batches={train: 3, val: 1, test: 0.5}"
    said["limited"] = run(config(TEST, limits, "train_cfg.max_epochs=1", "run_dir=limited"))
    said["judged"] = run(config(*JUDGE, "runtime.fast_dev_run=1", "run_dir=judged"))

    with alone():
        said["alone"] = [dist.is_initialized(), mypoints.torch.distributed.is_initialized()]
    said["together"] = dist.get_world_size()

    trained = []
    losses = mypoints.Classify.losses
    mypoints.Classify.losses = lambda self, batch: trained.append(1) or losses(self, batch)
    try:
        run(config(*JUDGE, "checkpoint.metric=top1/3", "run_dir=misnamed"))
    except ConfigError as error:
        said["misnamed"] = [str(error), len(trained)]
    evaluate, looked = mypoints.Accuracy.evaluate, []

    def fails_once(self, size):
        if not looked and rank == 0:
            looked.append(1)
            raise ValueError("too few here")
        return evaluate(self, size)

    mypoints.Accuracy.evaluate = fails_once
    said["failing"] = run(config("train_cfg.max_epochs=1", "checkpoint.metric=accuracy", "run_dir=failing"))
    mypoints.Accuracy.evaluate = evaluate

    sweep = Options("mine/tiny", min=1e-4, max=1.0, steps=12)
    said["rates"] = vars(find_lr(config("param_scheduler=null"), sweep, Path(folder, f"rates{rank}")))
    wild = Options("mine/tiny", min=1e-4, max=1e38, steps=40)
    said["wild"] = vars(find_lr(config("param_scheduler=null"), wild, Path(folder, "wild")))
    Path(folder, f"said{rank}.json").write_text(json.dumps(said, default=float))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(user, tmp_path_factory):
    """What two processes have found, in their order."""
    folder = tmp_path_factory.mktemp("two")
    forked.pair(_work, str(user), str(folder))
    return folder, [json.loads((folder / f"said{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.processes
def test_every_process_takes_its_limited_share_and_all_samples_count_once(said):
    for one in said[1]:
        limited = one["limited"]
        assert (limited["status"], limited["steps"]) == ("trial", 3)
        assert limited["val_metrics"]["seen"] == 16  # one batch of 8 each
        assert limited["metrics"]["seen"] == 8  # of 5 and 4 samples in batches of 4: one batch each
        assert float(one["judged"]["val_metrics"]["top1"] * 16).is_integer()
    assert "evaluated on 16 of 21 samples" in (said[0] / "limited" / "run.log").read_text()


@pytest.mark.processes
def test_figures_are_looked_at_before_training_without_waiting_for_each_other(said):
    for one in said[1]:
        assert one["alone"] == [False, False] and one["together"] == 2
        assert one["misnamed"] == ["checkpoint.metric 'top1/3' is none of ['top1']", 0]
        assert one["failing"]["val_metrics"]["seen"] == 21
    assert "ValueError: too few here" in (said[0] / "failing" / "run.log").read_text()


@pytest.mark.processes
def test_a_sweep_of_rates_is_the_same_on_both_processes(said):
    first, second = (one["rates"] for one in said[1])
    assert first == second and len(first["rates"]) == 12 and len(set(first["losses"])) == 12
    assert (said[0] / "rates0").is_dir() and not (said[0] / "rates1").exists()
    first, second = (one["wild"] for one in said[1])
    assert first["diverged"] == second["diverged"] and len(first["rates"]) < 40
