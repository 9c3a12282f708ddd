"""Every experiment on real data takes two steps on small files in its data's own format, and evaluates them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import CONFIGS, compose
from core.engine.launch import run
from tests.slot_walks import test_slot_walks_data as files

# A tiny backbone; sizes of pictures and crops that the files of 60 x 40 pixels (MOVi: 32 x 32) hold.
SMALL = [
    "runtime=cpu",
    "log_every=1",
    "media=null",
    "seed=3",
    "model.network.backbone.depth=1",
    "vars.backbones.{backbone}.embed_dim=16",
    "vars.backbones.{backbone}.num_heads=2",
    "model.draws=1",
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.batch_size=2",
    "val_dataloader.num_workers=0",
    "train_cfg.max_steps=2",
    "param_scheduler.warmup=1",
]
SQUARE = ["train_dataloader.dataset.transform.size=32", "val_dataloader.dataset.transform.size=32"]
CROP = ["train_dataloader.dataset.transform.short=40", "train_dataloader.dataset.transform.size=32"]
EVAL = ["val_dataloader.dataset.transform={type: slot_walks.data.StandardEval, size: 32}"]
FRAMES = ["train_dataloader.dataset.transform.size=32", "val_dataloader.dataset.transform.size=32"]


def birds(root: Path) -> Path:
    files.birds(root)
    (root / "train_val_test_split.txt").write_text("1 0\n2 0\n3 1\n")  # two to train on
    return root


def flowers(root: Path) -> Path:
    files.flowers(root)
    files.savemat(root / "setid.mat", {"trnid": [[3]], "valid": [[3]], "tstid": [[1, 2]]})
    return root


def voc(root: Path) -> Path:
    files.voc(root)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").write_text("2007_000001\n2007_000002\n")
    return root / "VOCdevkit" / "VOC2012"


def cocostuff(root: Path) -> Path:
    for split in ("train", "val"):
        for i, name in enumerate(("000000000009", "000000000025")):
            files.save(files.picture(seed=i), root / f"images/{split}2017/{name}.jpg")
            files.save(files.labels([0, 105, 255, 153]), root / f"annotations/{split}2017/{name}.png")
        curated = root / f"curated/{split}2017/Coco164kFull_Stuff_Coarse_7.txt"
        curated.parent.mkdir(parents=True)
        curated.write_text("000000000009\n000000000025\n")
    return root


def movi(root: Path, level: str = "C") -> Path:
    files.movi(root, clips=2, frames=3)
    (root / "C").rename(root / level)
    return root


def dogs(root: Path) -> Path:
    return files.selected(root, ("data_tr_sel.npy", "data_te_sel.npy"), trained=2)


def cars(root: Path) -> Path:
    return files.selected(root, ("data_mrcnn_train_select.npy", "data_mrcnn_test_select.npy"), trained=2)


SEMANTIC = ["val_evaluator.seeds=1", "val_evaluator.restarts=1"]
EXPERIMENTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "birds": (birds, SQUARE),
    "dogs": (dogs, SQUARE),
    "cars": (cars, SQUARE),
    "flowers": (flowers, SQUARE),
    "voc": (voc, CROP + EVAL),
    "voc_semseg": (voc, CROP + EVAL + SEMANTIC + ["val_evaluator.num_clusters=4"]),
    "coco": (files.coco, CROP + EVAL),
    "cocostuff27": (
        cocostuff,
        [*CROP, "val_dataloader.dataset.transform.size=32", *SEMANTIC, "val_evaluator.num_clusters=4"],
    ),
    "movi_c": (movi, FRAMES),
    "movi_e": (lambda root: movi(root, "E"), FRAMES),
    **{
        f"dinosaur_{name}{kind}": (make, words)
        for kind in ("", "_transformer")
        for name, make, words in (
            ("voc", voc, CROP),
            ("coco", files.coco, CROP),
            ("movi_c", movi, ["train_dataloader.dataset.transform.short=32"]),
            ("movi_e", lambda root: movi(root, "E"), ["train_dataloader.dataset.transform.short=32"]),
        )
    },
}
DINOSAUR = [
    "vars.slots=8",
    "model.network.encoder.hidden=16",
    "train_dataloader.dataset.transform.size=32",
    "val_dataloader.dataset.transform.size=32",
    "val_dataloader.dataset.transform.mask_size=32",
]


def words(name: str, root: Path, folder: Path) -> list[str]:
    """Overrides that make an experiment small."""
    make, own = EXPERIMENTS[name]
    base = compose([f"experiment=slot_walks/{name}"])
    small = [word.format(backbone=base.vars.backbone) for word in SMALL]
    if name.startswith("dinosaur"):
        own = [*own, *DINOSAUR]
        small.append("model.network.decoder_width=16")
    if base.model.cache is not None:
        small += [f"model.cache.folder={folder / 'features'}", "model.cache.num_workers=0"]
    places = [f"train_dataloader.dataset.root={make(root)}", f"run_dir={folder / 'run'}"]
    return [f"experiment=slot_walks/{name}", *small, *own, *places]


@pytest.mark.long
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_steps_on_files_of_the_datas_own_format(name: str, tmp_path: Path) -> None:
    result = run(compose(words(name, tmp_path / "data", tmp_path)))
    assert result["steps"] == 2 and result["skipped_samples"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 1e3 for loss in losses)
    metric = compose([f"experiment=slot_walks/{name}"]).checkpoint.metric
    assert 0 <= result["val_metrics"][metric] <= 1


def test_no_experiment_on_real_data_is_left_out() -> None:
    folder = CONFIGS / "experiment" / "slot_walks"
    assert {path.stem for path in folder.glob("*.yaml") if "root: null" in path.read_text()} <= set(EXPERIMENTS)
