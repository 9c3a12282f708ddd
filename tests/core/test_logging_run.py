"""Whole runs through tools/train.py: what they say about themselves is in their folders, wandb (offline) included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_logging_backends import _events, _wandb_records
from tiny_experiment import command_line, environment, train

from tests import forked

PAINTER = """
import torch

import mypoints


class Painter(mypoints.Classify):
    def media(self, batch):
        picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
        picture[: len(batch["label"])] = 200
        return {"points": picture, "walk": torch.stack([picture, picture.flip(0)])}
"""


@pytest.mark.child
def test_a_run_with_wandb_leaves_figures_config_and_media(user):
    (user / "mypainter.py").write_text(PAINTER)
    evaluator = (
        "+val_evaluator={type: core.metrics.TorchMetrics, metrics: {top1: {type: "
        "torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: micro}}}"
    )
    words = [
        "logger=wandb",
        "run_dir=watched",
        "model.type=mypainter.Painter",
        "~val_evaluator",
        evaluator,
        "custom_hooks=[{type: core.MediaHook, max_items: 3}]",
        "ema={decay: 0.5}",
        "train_cfg.max_epochs=2",
        "checkpoint.metric=top1",
    ]
    environ = {**environment(), "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(user)}
    ran = forked.run(command_line(*words)[1:], user, environ)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    folder = user / "watched"
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["metrics"]["top1"] <= 1

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = {line["step"]: line["loss"] for line in lines if "loss" in line}
    judged = {line["step"]: line["val/top1"] for line in lines if "val/top1" in line}
    assert len(trained) >= 2 and set(judged) == {10, 20} and judged[20] == result["metrics"]["top1"]
    assert all(line["epoch"] == -(-line["step"] // 10) for line in lines)

    scalars, images, texts = _events(folder)
    assert {step: round(value, 5) for step, value in scalars["loss"]} == {s: round(v, 5) for s, v in trained.items()}
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert set(images) == {"points", "walk"} and b"mine/tiny" in next(iter(texts.values()))

    (run_file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history, config = [], {}
    for record in _wandb_records(run_file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "config":
            config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
    assert {row["step"]: row["loss"] for row in history if "loss" in row} == trained
    assert {row["step"]: row["val/top1"] for row in history if "val/top1" in row} == judged
    assert config["name"] == "mine/tiny" and config["train_cfg"]["max_epochs"] == 2
    kept = {p.suffix for p in (run_file.parent / "files" / "media").rglob("*") if p.is_file()}
    assert kept == {".png", ".gif"}
    assert sorted(p.name for p in (folder / "media").iterdir()) == [
        "points_step_00000010.png",
        "points_step_00000020.png",
        "walk_step_00000010.gif",
        "walk_step_00000020.gif",
    ]
    from PIL import Image

    shown = Image.open(folder / "media" / "points_step_00000020.png")
    assert [shown.getpixel((0, y))[0] for y in range(4)] == [200, 200, 200, 0]  # three samples


@pytest.mark.processes
def test_evaluation_metrics_on_two_processes_count_every_sample_once(user):
    evaluator = (
        "+val_evaluator={type: core.metrics.TorchMetrics, metrics: {top1: {type: "
        "torchmetrics.classification.MulticlassAccuracy, num_classes: 2, average: micro}, auc: {type: "
        "torchmetrics.classification.MulticlassAUROC, num_classes: 2, thresholds: null}}, activations: {auc: softmax}}"
    )
    figures = []
    for count, words in ((0, ["train_dataloader.batch_size=4"]), (2, ["train_dataloader.batch_size=2"])):
        words = [f"run_dir=judged_{count}", "~val_evaluator", evaluator, "train_cfg.max_epochs=1", *words]
        train(user, *words, torchrun=count)
        lines = [json.loads(x) for x in Path(user, f"judged_{count}", "log.jsonl").read_text().splitlines()]
        figures.append([line["val/top1"] for line in lines if "val/top1" in line])
        result = json.loads(Path(user, f"judged_{count}", "result.json").read_text())
        assert set(result["metrics"]) == {"top1", "auc"}
        hits = result["metrics"]["top1"] * 21
        assert hits == pytest.approx(round(hits), abs=1e-4)  # 21 samples, each once
    assert figures[0] == figures[1]
