"""Several processes and the running statistics of batch norms: what is evaluated is what the checkpoint holds."""

import json

import pytest
import torch
from tiny_experiment import train
from torch import nn

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose
from core.engine.commands.evaluation import evaluate
from core.optim.buffers import place_batch_norms

PACKAGE = """
import torch
from mmengine.hooks import Hook
import mypoints


class Score:
    \"\"\"The mean logit: another number for every other set of statistics.\"\"\"

    def __init__(self):
        self.dataset_meta, self.sums = None, torch.zeros(2, dtype=torch.float64)

    def process(self, data_batch, data_samples):
        logits = data_samples["logits"][:, 1].double()
        self.sums += torch.tensor([logits.sum(), len(logits)], dtype=torch.float64)

    def evaluate(self, size):
        sums, self.sums = self.sums, torch.zeros(2, dtype=torch.float64)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return {"mean": float(sums[0] / sums[1])}


class Net(mypoints.Net):
    def __init__(self, width=16, dropout=0.0, depth=2):
        super().__init__(width, dropout, depth)
        self.norm = torch.nn.SyncBatchNorm(width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += int(x[:, 0].abs().sum() * 1000)  # another number on every process
        return super().forward(x)


class Dump(Hook):
    priority = "LOWEST"

    def after_train(self, runner):
        model = getattr(runner.model, "module", runner.model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.save(buffers, f"{runner.work_dir}/buffers_{runner.rank}.pt")
"""

OPTIONS = [
    "model.network.type=mynorms.Net",
    "val_evaluator={type: mynorms.Score}",
    "custom_hooks=[{type: mynorms.Dump}]",
    "train_dataloader.batch_size=5",
    "train_cfg.max_epochs=1",
    "param_scheduler=null",
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("plain", []),
        ("averaged", ["ema={decay: 0.9, buffers: average}"]),
        ("sharded", ["runtime=fsdp", "runtime.device=cpu"]),
    ],
)
def test_two_processes_evaluate_what_the_checkpoint_holds(user, monkeypatch, name, extra):
    (user / "mynorms.py").write_text(PACKAGE)
    train(user, *OPTIONS, *extra, f"run_dir=norms_{name}", torchrun=2)
    folder = user / f"norms_{name}"
    result = json.loads((folder / "result.json").read_text())
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    alone = evaluate(
        compose(["experiment=mine/tiny", "runtime=cpu", *OPTIONS[:2]], config_dir=user / "configs"),
        find_checkpoint(folder),
        split="val",
    )
    assert result["metrics"]["mean"] == pytest.approx(alone["mean"], abs=1e-7)
    kept = model_state(find_checkpoint(folder), averaged=False)
    for rank in (0, 1):
        buffers = torch.load(folder / f"buffers_{rank}.pt", weights_only=True)
        assert buffers and all(torch.equal(kept[key], buffers[key]) for key in buffers)


def test_batch_norms_fit_the_device(monkeypatch):
    def kinds(model):
        return [type(m) for m in model]

    def made():
        return nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3))

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert nn.SyncBatchNorm not in kinds(place_batch_norms(made(), cuda, synchronised=True))  # one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert nn.SyncBatchNorm not in kinds(place_batch_norms(made(), cpu, synchronised=True))
    assert kinds(place_batch_norms(made(), cuda, synchronised=True)) == [nn.SyncBatchNorm] * 2
    assert kinds(place_batch_norms(made(), cuda, synchronised=False)) == [nn.SyncBatchNorm, nn.BatchNorm2d]
