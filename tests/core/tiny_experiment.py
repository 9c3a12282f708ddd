"""A user's own package outside the repository: a tiny model, data with random augmentation, an experiment file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = '''
import random
import time

import numpy as np
import torch
from torch import nn

from core.trainer import Trainer


class Points(torch.utils.data.Dataset):
    """Noisy points of two classes; the augmentation draws from all three generators."""

    def __init__(self, count=40, seed=0, augment=True, slow=0.0, bad=(), nan=()):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % 2
        self.points = torch.randn(count, 8, generator=generator) + self.label[:, None]
        self.augment, self.slow, self.bad, self.nan = augment, slow, set(bad), set(nan)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        time.sleep(self.slow)
        if int(index) in self.bad:
            raise OSError(f"cannot read point {int(index)}")
        x = self.points[index].clone()
        if self.augment:
            x += 0.1 * torch.randn(8) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        if int(index) in self.nan:
            x[0] = float("nan")
        return {"image": x, "label": int(self.label[index]), "sample_id": f"point{int(index)}"}


class Net(nn.Module):
    def __init__(self, width=16, dropout=0.0, depth=2):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width) if dropout else nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.dropout(self.norm(x)))


class Classify(Trainer):
    input_shape = (8,)

    def __init__(self, network, frozen=()):
        super().__init__(frozen)
        self.network = network

    def losses(self, batch):
        logits = self.network(batch["image"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return {"loss_ce": loss, "accuracy": (logits.argmax(-1) == batch["label"]).float().mean()}

    def predict(self, batch):
        return {"logits": self.network(batch["image"]), "label": batch["label"]}


class Accuracy:
    """The smallest thing that an evaluator accepts; counts what it sees."""

    def __init__(self):
        self.hits = self.seen = 0
        self.dataset_meta = None

    def process(self, data_batch, data_samples):
        self.hits += int((data_samples["logits"].argmax(-1) == data_samples["label"]).sum())
        self.seen += len(data_samples["label"])

    def evaluate(self, size):
        counts = torch.tensor([self.hits, self.seen])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.hits = self.seen = 0
        return {"accuracy": float(counts[0] / counts[1]), "seen": int(counts[1])}


class Duel(Trainer):
    """Two networks with an optimizer each, in turn."""

    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def train_step(self, data, optim_wrapper):
        first = self.phase("generator_losses", data, optim_wrapper["generator"])
        optim_wrapper["discriminator"].zero_grad()
        second = self.phase("discriminator_losses", data, optim_wrapper["discriminator"])
        optim_wrapper["generator"].zero_grad()
        return {"loss": first["loss"] + second["loss"], "loss_g": first["loss"], "loss_d": second["loss"]}

    def generator_losses(self, batch):
        made = self.generator(batch["image"])
        return {"loss_g": nn.functional.softplus(-self.discriminator(made)).mean()}

    def discriminator_losses(self, batch):
        with torch.no_grad():
            made = self.generator(batch["image"])
        real = nn.functional.softplus(-self.discriminator(batch["image"])).mean()
        return {"loss_d": real + nn.functional.softplus(self.discriminator(made)).mean()}

    def predict(self, batch):
        return {"logits": self.discriminator(batch["image"]).expand(-1, 2), "label": batch["label"]}
'''

EXPERIMENT = """# @package _global_
# A tiny classifier of points.
name: mine/tiny
log_every: 3
model:
  type: mypoints.Classify
  network: {type: mypoints.Net, width: 16, dropout: 0.0, depth: 2}
  frozen: []
train_dataloader:
  batch_size: 4
  num_workers: 0
  on_error: raise
  dataset: {type: mypoints.Points, count: 40, slow: 0.0, augment: true, bad: [], nan: []}
val_dataloader:
  batch_size: 8
  dataset: {type: mypoints.Points, count: 21, seed: 1, augment: false}
val_evaluator: {type: mypoints.Accuracy}
train_cfg: {max_epochs: 3, val_every_epochs: 1, val_every_steps: null}
optim_wrapper:
  type: core.OptimWrapper
  optimizer: {type: torch.optim.AdamW, lr: 0.01, weight_decay: 0.05}
  accumulative_counts: 1
param_scheduler: {type: core.Schedule, kind: warmup_cosine, by_epoch: false, warmup: 3, min_lr: 0.0001}
"""


def train(folder, *overrides, torchrun=0, check=True, tool="train.py"):
    """Runs tools/train.py in `folder`; returns the finished process. `torchrun`: how many processes at once."""
    done = begin(folder, *overrides, torchrun=torchrun, tool=tool).done()
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def begin(folder, *overrides, torchrun=0, tool="train.py", largest=None):
    """As `train`, without waiting for it. `largest`: bytes of a file that may be written."""
    return forked.begin(command_line(*overrides, tool=tool)[1:], folder, environment(), torchrun, largest)


def command_line(*overrides, torchrun=0, tool="train.py"):
    """The command of a run of the tiny experiment."""
    start = [sys.executable]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    return [
        *start,
        str(ROOT / "tools" / tool),
        "--config-dir",
        "configs",
        "experiment=mine/tiny",
        "runtime=cpu",
        *overrides,
    ]


def environment():
    """One thread per process, and no colours in the output."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}


def losses(run):
    """{step: loss} of a run's log."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
