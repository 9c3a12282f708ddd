"""Every experiment on users' data takes two steps on small files in its data's own format, and is tested on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.config import compose, experiments
from core.engine.launch import run
from petl.data import TASKS
from tests.petl import data_files as files

# A ViT of 12 narrow blocks on four patches.
SMALL = [
    "runtime=cpu",
    "media=null",
    "seed=3",
    "model.pretrained=optional",
    "model.input_shape=[3,32,32]",
    "++model.network.backbone.img_size=32",
    "++model.network.backbone.embed_dim=16",
    "++model.network.backbone.num_heads=2",
    "train_dataloader.batch_size=3",
    "train_dataloader.dataset.size=32",
    "train_dataloader.dataset.sizes=report",
    "train_cfg.max_steps=2",
    "param_scheduler.warmup=0",
]
# Sizes that 16 channels hold.
OWN = {
    "vtab_fact": ["model.network.method.rank=4"],
    "vtab_sct": ["vars.k=4"],
    "vtab_ttc": ["vars.k=4"],
    "fgvc_ttc": ["vars.k=4"],
}
NAMES = sorted(name.removeprefix("petl/") for name in experiments() if name.startswith("petl/"))
FROM_FILES = [name for name in NAMES if name.split("_")[0] in ("vtab", "fgvc", "few", "domain")]


def on_disk(name: str, root: Path) -> list[str]:
    """Writes the files of an experiment's data, and gives the words that point to them."""
    kind = name.split("_")[0]
    words = [f"train_dataloader.dataset.root={root}"]
    if name == "vtab_sweep":
        for task in TASKS:
            two = {split: [label % 2 for label in labels] for split, labels in files.SPLITS.items()}
            files.vtab(root, task, splits=two)  # one of the tasks has two classes
        return [f"vars.root={root}"]
    if kind == "vtab":
        files.vtab(root, "cifar")
    elif kind == "fgvc":
        files.fgvc(root)
    elif kind == "few":
        files.few_shot(root)
        words.append("vars.shots=2")
    else:
        files.domain(root)
        words.append("vars.shots=1")
    return words


@pytest.mark.parametrize("name", FROM_FILES)
def test_two_steps_on_small_files(tmp_path, name):
    small = SMALL
    if name == "vtab_sweep":  # whose tasks have one place for their common settings
        small = [word.replace("train_dataloader.dataset", "vars") for word in SMALL]
    words = [*small, *OWN.get(name, []), *on_disk(name, tmp_path / "data")]
    cfg = compose([f"experiment=petl/{name}", *words, f"run_dir={tmp_path / 'run'}"])
    for stage in cfg.stages:  # a stage's own length, if it has one
        if "max_epochs" in stage.get("train_cfg", {}):
            stage.train_cfg = {"max_steps": 2}
    result = run(cfg)
    assert result["status"] == "finished" and result["steps"] == 2
    figures = [value for key, value in result["metrics"].items() if key.endswith("top1")]
    sets = {"domain_lora": 5, "vtab_sweep": len(TASKS)}.get(name, 1)
    assert len(figures) == sets and all(0 <= value <= 1 for value in figures)
    assert json.loads((tmp_path / "run/result.json").read_text())["metrics"] == result["metrics"]


def test_there_are_experiments_of_every_kind_of_data():
    assert {name.split("_")[0] for name in FROM_FILES} == {"vtab", "fgvc", "few", "domain"}
