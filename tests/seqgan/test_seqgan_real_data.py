"""Every experiment on real data takes two steps on small files in its own formats.

ImageNet: folders, zip archives, tar shards; FFHQ: folders of a thousand; LSUN: the published LMDB files, and folders of
images. Readers, transforms and everything else that is not made smaller are the experiment's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose, experiments, to_dict
from core.data.prepare import run_task
from core.engine.launch import build_trainer, run
from seqgan.data import LSUN
from seqgan.models import conv_tokenizer

pytestmark = pytest.mark.long

LMDB = Path(__file__).parent / "files" / "church_outdoor_val_lmdb"
WNIDS = ("n01440764", "n01443537")
QUALITY = {"psnr", "ssim", "l1", "usage", "perplexity", "dead_codes", "codes_per_image"}
REAL = sorted(name for name in experiments() if name.startswith("seqgan/") and ("256" in name or "lsun" in name))
TOKENIZERS = [name for name in REAL if name.endswith("_tokenizer")]
TRANSFORMERS = [name for name in REAL if name.endswith(("_ar", "_nar", "_l"))]
# The storages that are not the configs' own, beside one experiment of each reader's users.
STORED = {"seqgan/imagenet256_tokenizer": "shards", "seqgan/imagenet256_nar": "zip", "seqgan/imagenet256_ar": "shards"}
STORED |= {name: "folder" for name in REAL if name.endswith(("bedroom_tokenizer", "cat_nar", "church_ar"))}

TOKENIZER = {"filters": 32, "multipliers": "[1,1]", "num_res_blocks": 1, "codebook_size": 16, "z_dim": 8}
TRANSFORMER = {"dim": 16, "depth": 1, "num_heads": 2}
STYLEGAN = ["model.discriminator.image_size=32", "+model.discriminator.channels={4: 8, 8: 8, 16: 4, 32: 4}"]
# A small classifier of timm in VGG's place, by keys alone.
RESNET = [
    "model.perceptual.network.type=seqgan.classifier",
    "+model.perceptual.network.library=timm",
    "+model.perceptual.network.name=resnet10t",
    "model.perceptual.network.weights=null",
    "+model.perceptual.network.taps={relu5_3: layer4, logit: ''}",
    "model.perceptual.low=[relu5_3]",
]


def image(number: int) -> Image.Image:
    cells = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(cells, np.ones((8, 8, 1), np.uint8)))


def imagenet(root: Path, storage: str) -> list[str]:
    """Two classes of two images in either split, in one of the reader's storages."""
    places = [(split, wnid, i) for split in ("train", "val") for wnid in WNIDS for i in range(2)]
    for number, (split, wnid, i) in enumerate(places):
        (root / split / wnid).mkdir(parents=True, exist_ok=True)
        image(number).save(root / split / wnid / f"{wnid}_{i}.JPEG")
    for split in ("train", "val"):
        if storage == "zip":
            run_task(None, "image_zip", [f"root={root}", f"output={root}", f"splits=[{split}]"])
        if storage == "shards":
            run_task(None, "image_shards", [f"root={root}", f"output={root}", f"split={split}"])
        if storage != "folder":
            shutil.rmtree(root / split)
    return ["train_dataloader.dataset.num_classes=2", f"train_dataloader.dataset.storage={storage}"]


def ffhq(root: Path) -> list[str]:
    """Folders of a thousand, with what macOS leaves in them."""
    (root / "00000").mkdir(parents=True)
    for number in range(4):
        image(number).save(root / "00000" / f"{number:05d}.png")
        (root / "00000" / f"._{number:05d}.png").write_bytes(b"left by macOS")
    return ["train_dataloader.dataset.count=null", "train_dataloader.dataset.val_count=2"]


def lsun(root: Path, category: str, storage: str) -> list[str]:
    """Five images of a category: a published LMDB file, or the same five as files below the folder of that name."""
    ending = "_lmdb" if storage == "lmdb" else ""
    stem = {"church": "church_outdoor"}.get(category, category)
    places = [f"cat{ending}"] if category == "cat" else [f"{stem}_{split}{ending}" for split in ("train", "val")]
    for place in places:  # objects such as cats have one file without splits
        if storage == "lmdb":
            shutil.copytree(LMDB, root / place)
            continue
        for number in range(5):
            (root / place / "a").mkdir(parents=True, exist_ok=True)
            image(number).save(root / place / "a" / f"{number}.webp")
    words = ["train_dataloader.dataset.val_count=2"] if category == "cat" else []
    return [*words, f"train_dataloader.dataset.storage={storage}"]


def files(name: str, storage: str | None, root: Path) -> list[str]:
    """Writes the files of an experiment's data set; returns the overrides that say where and how many they are."""
    dataset = to_dict(compose([f"experiment={name}"]))["train_dataloader"]["dataset"]
    storage = storage or dataset.get("storage")
    if dataset["type"] == "seqgan.LSUN":
        words = lsun(root, dataset["category"], storage)
    else:
        words = imagenet(root, storage) if "storage" in dataset else ffhq(root)
    return [*words, f"train_dataloader.dataset.root={root}"]


def keys(place: str, values: dict) -> list[str]:
    return [f"++{place}.{key}={value}" for key, value in values.items()]


def small(judged: str) -> list[str]:
    """What every experiment gets; `judged` is the split that it evaluates, `val` or `test`."""
    words = ["train_dataloader.dataset.transform.size=32", "runtime=cpu", "log_every=1"]
    for loader in ("train_dataloader", f"{judged}_dataloader"):
        words += [f"{loader}.batch_size=2", f"{loader}.num_workers=0"]
    return words


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def cases(names: list[str]) -> list[tuple[str, str | None]]:
    """Every experiment with its config's own storage, some with another one, too."""
    return [(name, None) for name in names] + [(name, STORED[name]) for name in names if name in STORED]


@pytest.mark.parametrize(("name", "storage"), cases(TOKENIZERS))
def test_two_steps_of_both_phases_of_tokenizers(name: str, storage: str | None, tmp_path: Path) -> None:
    words = [f"experiment={name}", *small("val"), *files(name, storage, tmp_path / "data")]
    words += [*keys("model.network", TOKENIZER), *STYLEGAN, *RESNET]
    if "lsun" in name:  # its first phase takes one epoch, from ImageNet's tokenizer
        torch.save(build_trainer(compose(words)).state_dict(), tmp_path / "start.pt")
        words += [f"stages.0.load_from.path={tmp_path}/start.pt", "stages.0.train_cfg.max_epochs=null"]
        words += ["stages.0.train_cfg.max_steps=2"]
    run(compose([*words, "train_cfg.max_steps=2", "stages.1.train_cfg.max_steps=2", f"run_dir={tmp_path}/run"]))
    for stage in ("stage_0_tokenizer1", "stage_1_tokenizer2"):
        result = json.loads((tmp_path / "run" / stage / "result.json").read_text())
        assert result["steps"] == 2 and result["metrics"].keys() == QUALITY and result["metrics"]["psnr"] > 0
        terms = losses(tmp_path / "run" / stage)
        assert len(terms) == 2 and all(np.isfinite(terms)) and terms[0] != terms[1]


@pytest.mark.parametrize(("name", "storage"), cases(TRANSFORMERS))
def test_two_steps_of_transformers(name: str, storage: str | None, tmp_path: Path) -> None:
    made = conv_tokenizer(**{**TOKENIZER, "multipliers": [1, 1]})
    torch.save({f"network.{key}": value for key, value in made.state_dict().items()}, tmp_path / "tokenizer.pt")
    words = [
        f"experiment={name}",
        *small("test"),
        *files(name, storage, tmp_path / "data"),
        *keys("model.tokenizer", TOKENIZER),
        *keys("model.network", TRANSFORMER),
        *(["model.network.num_classes=2"] if "imagenet" in name else []),
        "model.cache.num_workers=0",
        f"model.cache.folder={tmp_path}/codes",
        f"load_from.path={tmp_path}/tokenizer.pt",
        "train_cfg.max_steps=2",
        "++train_cfg.max_epochs=null",
        f"run_dir={tmp_path}/run",
    ]
    run(compose(words))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2 and 0 < result["metrics"]["bits_per_code"] < 20
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("name", [name for name in REAL if name.endswith("_vqgan")])
def test_two_steps_of_vqgan(name: str, vgg16_file: Path, lpips_file: Path, tmp_path: Path) -> None:
    """Attention, PatchGAN with the adaptive weight, LPIPS and VGG16 from their files."""
    words = [
        f"experiment={name}",
        *small("val"),
        *files(name, None, tmp_path / "data"),
        *keys("model.network", {"ch": 32, "ch_mult": "[1,2]", "num_res_blocks": 1, "attn_resolutions": "[16]"}),
        *keys("model.network", {"resolution": 32, "z_channels": 8, "embed_dim": 8, "codebook_size": 16}),
        "model.discriminator.ndf=4",
        "model.discriminator.n_layers=1",
        f"model.perceptual.network.weights={vgg16_file}",
        f"model.perceptual.low_loss.weights={vgg16_file}",
        f"model.perceptual.low_loss.linear={lpips_file}",
        "model.adversarial_ramp=1",
        "train_cfg.max_steps=2",
        f"run_dir={tmp_path}/run",
    ]
    run(compose(words))
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # VGG16 is among its weights
    _, log, judged = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert log["step"] == 2 and 0 < log["layer_low"] == log["loss_perceptual"], "alpha 0: LPIPS alone"
    assert log["adversarial_weight"] > 0 and log["loss_adversarial"] != 0 and "loss_penalty" not in log
    # Hinge losses of logits near zero: half of 1 + 1.
    assert log["loss_discriminator"] == pytest.approx(1, abs=0.1)
    assert log["loss_commit"] * 4 == pytest.approx(log["loss_codebook"])
    assert {name.removeprefix("val/") for name in judged} >= QUALITY
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"].keys() == QUALITY


@pytest.mark.parametrize("category", ["church", "bedroom", "cat"])
def test_folders_of_lsun_hold_what_was_put_there(category: str, tmp_path: Path) -> None:
    lsun(tmp_path, category, "folder")
    parts = [LSUN(tmp_path, category, split, storage="folder", val_count=2) for split in ("train", "val")]
    assert [len(part) for part in parts] == ([3, 2] if category == "cat" else [5, 5])
    assert parts[0][1]["sample_id"] == "a/1.webp" and parts[1][0]["image"].shape == (3, 256, 256)
    assert parts[0].source_files()[0].endswith("a/0.webp") and len(parts[0].source_files()) == len(parts[0])


def test_one_file_of_lsun_is_what_its_samples_are_read_from(tmp_path: Path) -> None:
    lsun(tmp_path, "church", "lmdb")
    assert LSUN(tmp_path, "church", "val").source_files() == [f"{tmp_path}/church_outdoor_val_lmdb/data.mdb"]
