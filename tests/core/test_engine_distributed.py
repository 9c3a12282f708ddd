"""Two CPU processes give what one gives; sharded runs write checkpoints that any run reads."""

import pytest
import torch
from tiny_experiment import losses, train

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose
from core.engine.commands.evaluation import evaluate

QUIET = ["train_dataloader.dataset.augment=true", "train_cfg.max_epochs=2", "train_dataloader.num_workers=0"]


@pytest.fixture(scope="module")
def single(user):
    """One process, global batch 4."""
    train(user, *QUIET, "run_dir=single", "train_dataloader.batch_size=4")
    return user / "single"


def assert_close(one, other):
    first, second = (model_state(find_checkpoint(r)) for r in (one, other))
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys()
    assert all(abs(a[step] - b[step]) < 1e-4 for step in a)


@pytest.mark.processes
def test_data_parallel_gives_the_single_process_weights(user, single):
    done = train(user, *QUIET, "run_dir=double", "train_dataloader.batch_size=2", torchrun=2)
    assert_close(single, user / "double")
    assert '"seen": 21' in (user / "double" / "result.json").read_text(), done.stdout  # 21 samples on 2 processes


@pytest.mark.processes
def test_data_parallel_accumulates_like_one_process(user, single):
    options = ["optim_wrapper.accumulative_counts=2", "train_dataloader.batch_size=1", "param_scheduler=null"]
    train(user, *QUIET, *options, "run_dir=double_accumulated", torchrun=2)
    train(user, *QUIET, "param_scheduler=null", "run_dir=single_plain", "train_dataloader.batch_size=4")
    first, second = (model_state(find_checkpoint(user / r)) for r in ("single_plain", "double_accumulated"))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)


@pytest.mark.processes
def test_sharded_run_gives_the_same_and_reloads_on_one_process(user, single, monkeypatch):
    sharded = ["runtime=fsdp", "runtime.device=cpu", "run_dir=sharded", "train_dataloader.batch_size=2"]
    train(user, *QUIET, *sharded, "ema={decay: 0.9}", torchrun=2)
    raw = model_state(find_checkpoint(user / "sharded"), averaged=False)
    plain = model_state(find_checkpoint(single))
    for key in plain:
        torch.testing.assert_close(plain[key], raw[key], rtol=1e-4, atol=1e-6)
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    cfg = compose(["experiment=mine/tiny", "runtime=cpu", "run_dir=reloaded"], config_dir=user / "configs")
    assert evaluate(cfg, find_checkpoint(user / "sharded"))["seen"] == 21


@pytest.mark.processes
def test_sharded_run_resumes_exactly_and_on_one_process(user):
    sharded = ["runtime=fsdp", "runtime.device=cpu", "train_dataloader.batch_size=2", "param_scheduler=null"]
    whole = [*QUIET, *sharded, "train_cfg.max_epochs=2", "ema={decay: 0.9}"]
    train(user, *whole, "run_dir=sharded_whole", torchrun=2)
    train(user, *whole, "run_dir=sharded_half", "train_cfg.max_epochs=1", torchrun=2)
    half = find_checkpoint(user / "sharded_half")
    (user / "sharded_half" / "result.json").unlink()
    train(user, *whole, "run_dir=sharded_half", f"resume={half}", torchrun=2)
    first, second = (model_state(find_checkpoint(user / r)) for r in ("sharded_whole", "sharded_half"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    alone = [
        "run_dir=alone",
        f"resume={half}",
        "train_dataloader.batch_size=4",
        "param_scheduler=null",
        "ema={decay: 0.9}",
    ]
    train(user, *QUIET, *alone)
    third = model_state(find_checkpoint(user / "alone"))
    for key in first:
        torch.testing.assert_close(first[key], third[key], rtol=1e-4, atol=1e-6)
