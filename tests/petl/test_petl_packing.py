"""Several tasks in one pass against each of them alone."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import petl
from core.checkpoint import load
from core.checkpoint.run_folder import find_checkpoint
from core.errors import ConfigError
from tests.petl.backbones import METHODS, disturbed, tiny_vit

CLASSES = (5, 3, 4)
# Of every kind of place one; the others have the same hooks.
PACKED = ["linear", "ln", "bitfit", "vpt_deep", "adapter_both", "adaptformer_ln", "lora", "fact_tk", "ssf", "convpass"]
PACKED += ["repadapter", "noah", "sct_qv", "ttc", "joint"]


@pytest.fixture(autouse=True)
def _fallback() -> None:
    """torch runs attention task by task on CPUs and says so."""
    warnings.filterwarnings("ignore", message="There is a performance drop")


def tasks(name: str) -> list[petl.PetlModel]:
    torch.manual_seed(0)
    base = tiny_vit()
    found = []
    for number, classes in enumerate(CLASSES):
        model = petl.inject(copy.deepcopy(base), METHODS[name](), num_classes=classes)
        found.append(disturbed(model, seed=number))
    return found


def test_steps_are_those_of_each_task(images: torch.Tensor) -> None:
    """Five steps of AdamW together and one by one: the same losses and weights, also where a run is gone on with."""
    for name in ("ttc", "lora"):
        alone = tasks(name)
        packed = petl.PackedModel(alone).train()
        image = torch.stack([images, images.flip(0), -images])
        label = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0], [1, 1, 2, 2]])
        options = dict(lr=1e-2, weight_decay=0.1)
        together = torch.optim.AdamW(packed.parameters(), **options)
        single = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], **options) for m in alone]
        for step in range(5):
            if step == 3:  # go on from what is saved
                saved = copy.deepcopy((packed.state_dict(), together.state_dict()))
                packed = petl.PackedModel(tasks(name)).train()
                packed.load_state_dict(saved[0])
                together = torch.optim.AdamW(packed.parameters(), **options)
                together.load_state_dict(saved[1])
            losses = [nn.functional.cross_entropy(one, label[t]) for t, one in enumerate(packed(image))]
            together.zero_grad()
            torch.stack(losses).sum().backward()
            together.step()
            for t, model in enumerate(alone):
                single[t].zero_grad()
                loss = nn.functional.cross_entropy(model.train()(image[t]), label[t])
                loss.backward()
                single[t].step()
                torch.testing.assert_close(losses[t], loss, rtol=1e-5, atol=1e-5)
        unpacked = tasks(name)
        packed.unpack(unpacked)
        for own, model in zip(unpacked, alone, strict=True):
            for (key, value), other in zip(own.named_parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", PACKED)
def test_every_method_is_packed(name: str, images: torch.Tensor) -> None:
    models = tasks(name)
    packed = petl.PackedModel(models).eval()
    image = torch.stack([images, images.flip(0), -images])
    logits = packed(image)
    for task, model in enumerate(models):
        expected = model.eval()(image[task])
        torch.testing.assert_close(logits[task][:, : CLASSES[task]], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.of(task, image[task]), expected, rtol=1e-4, atol=1e-5)
    assert torch.isinf(logits[1][:, 3:]).all()
    trained = sum(p.numel() for p in packed.parameters() if p.requires_grad)
    widened = sum((max(CLASSES) - k) * (24 + 1) for k in CLASSES)
    assert trained == sum(petl.trainable_parameters(m, head=True) for m in models) + widened


def test_channels_may_differ(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    base = tiny_vit()
    models = [petl.inject(copy.deepcopy(base), petl.TTC([c, c]), num_classes=5) for c in ([0, 1, 2], [7, 11, 23])]
    packed = petl.PackedModel(models).eval()(torch.stack([images, images]))
    for task, model in enumerate(models):
        torch.testing.assert_close(packed[task], model.eval()(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed() -> None:
    torch.manual_seed(0)
    base, other = tiny_vit(), tiny_vit()
    first = petl.inject(copy.deepcopy(base), petl.LoRA(2))
    for second in (
        petl.inject(copy.deepcopy(base), petl.LoRA(3)),
        petl.inject(copy.deepcopy(base), petl.SSF()),
        petl.inject(other, petl.LoRA(2)),
    ):
        with pytest.raises(ValueError, match="network 1"):
            petl.PackedModel([first, second])
    with pytest.raises(ValueError, match="at least one"):
        petl.PackedModel([])


# ------------------------------------------------------------------ through the engine
def config(tasks: list[str], packed: bool, folder: Path) -> dict:
    """Four steps of LNTune on drawn images, of several tasks at once or of one."""
    backbone = {"type": "tests.petl.backbones.tiny_vit"}
    data = [{"type": "tests.petl.test_petl_packing.Drawn", "task": task} for task in tasks]
    classes = [len(task) for task in tasks]
    metric = {"type": "torchmetrics.classification.MulticlassAccuracy", "average": "micro"}
    judges = [{"type": "core.metrics.TorchMetrics", "metrics": {"top1": {**metric, "num_classes": k}}} for k in classes]
    if packed:
        network = {"type": "petl.build_packed", "num_classes": classes}
        model = {"type": "petl.PackedTrainer", "tasks": tasks, "network": network}
        train = {"type": "petl.SideBySide", "datasets": data}
        sets = {t: {"dataset": {"type": "petl.OfTask", "task": i, "dataset": data[i]}} for i, t in enumerate(tasks)}
        test, judge = {"batch_size": 6, "sets": sets}, {"sets": dict(zip(tasks, judges, strict=True))}
    else:
        network = {"type": "petl.build", "num_classes": classes[0], "frozen_mode": "eval"}
        model = {"type": "petl.TransferTrainer", "network": network}
        train, test, judge = data[0], {"batch_size": 6, "dataset": data[0]}, judges[0]
    network |= {"backbone": backbone, "method": {"type": "petl.LNTune"}}
    return {
        "name": "petl/packed" if packed else f"petl/{tasks[0]}",
        "model": {**model, "input_shape": [3, 32, 32]},
        "train_dataloader": {"batch_size": 4, "dataset": train},
        "test_dataloader": test,
        "test_evaluator": judge,
        "train_cfg": {"max_epochs": 2},
        "optim_wrapper": {"optimizer": {"type": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.1}},
        "param_scheduler": {"type": "core.Schedule", "kind": "warmup_cosine", "by_epoch": False},
        "run_dir": str(folder),
        "seed": 3,
    }


class Drawn(torch.utils.data.Dataset):
    """Eight images of a task, whose name has as many letters as it has classes."""

    fixed = True

    def __init__(self, task: str) -> None:
        self.task = task

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(100 * len(self.task) + index)
        return {
            "image": torch.randn(3, 32, 32, generator=generator),
            "label": index % len(self.task),
            "sample_id": f"{self.task}{index}",
        }


def trained(settings: dict) -> dict:
    """The result of a run: the root's defaults with `settings` laid over them."""
    from core.config.composition import compose, merge, to_dict
    from core.engine.launch import run

    root = to_dict(compose(["runtime=cpu"]))
    return run(merge(root, settings))


def test_a_sweep_is_each_run_alone(tmp_path: Path) -> None:
    """Two tasks in one run of the engine: weights and figures as of two runs, within 1e-5."""
    together = trained(config(["abc", "defgh"], True, tmp_path / "both"))
    packed = load(find_checkpoint(tmp_path / "both"))["model"]
    for number, task in enumerate(("abc", "defgh")):
        alone = trained(config([task], False, tmp_path / task))
        assert together["metrics"][f"{task}/top1"] == pytest.approx(alone["metrics"]["top1"])
        state = load(find_checkpoint(tmp_path / task))["model"]
        for key in ("backbone.blocks.1.norm1.weight", "backbone.norm.bias", "backbone.head.weight"):
            mine = packed[f"network.stacked.{key.replace('.', '__')}"][number]
            expected = state[f"network.{key}"]
            torch.testing.assert_close(mine[: len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_tasks_of_different_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="equally many"):
        petl.SideBySide([Drawn("abc"), [1, 2]])
