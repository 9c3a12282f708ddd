"""Every transformer of real data takes two steps on small files in its own format: folders of pictures, and LMDB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose, experiments
from core.launch import run
from seqgan.models import conv_tokenizer

LMDB = Path(__file__).parent / "files" / "church_outdoor_val_lmdb"
NAMES = sorted(name for name in experiments() if name.startswith("seqgan/") and name.endswith(("_ar", "_nar", "_l")))
TOKENIZER = {"filters": 32, "multipliers": [1, 1], "num_res_blocks": 1, "codebook_size": 16, "z_dim": 8}


def files(name: str, root: Path) -> list[str]:
    """A few pictures as the experiment's data set has them on disk, and what has to be said of their number."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    if "imagenet" in name:
        for split in ("train", "val"):
            for wnid in ("n01440764", "n01443537"):
                (root / split / wnid).mkdir(parents=True)
                picture.save(root / split / wnid / f"{wnid}_0.JPEG")
        return ["train_dataloader.dataset.num_classes=2", "model.network.num_classes=2"]
    if "ffhq" in name:
        (root / "00000").mkdir(parents=True)
        for number in range(4):
            picture.save(root / "00000" / f"{number:05d}.png")
            (root / "00000" / f"._{number:05d}.png").write_bytes(b"left by macOS")
        return ["train_dataloader.dataset.count=null", "train_dataloader.dataset.val_count=2"]
    if "cat" in name:  # one file without splits
        shutil.copytree(LMDB, root / "cat_lmdb")
        return ["train_dataloader.dataset.val_count=2"]
    stem = "bedroom" if "bedroom" in name else "church_outdoor"
    for split in ("train", "val"):
        shutil.copytree(LMDB, root / f"{stem}_{split}_lmdb")
    return []


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_on_small_files(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = conv_tokenizer(**TOKENIZER)
    torch.save({f"network.{key}": value for key, value in made.state_dict().items()}, tmp_path / "tokenizer.pt")
    small = {**TOKENIZER, "multipliers": "[1,1]"}
    words = [
        *files(name, tmp_path / "data"),
        *(f"++model.tokenizer.{key}={value}" for key, value in small.items()),
        *(f"++model.network.{key}={value}" for key, value in {"dim": 16, "depth": 1, "num_heads": 2}.items()),
        f"train_dataloader.dataset.root={tmp_path}/data",
        "train_dataloader.dataset.transform.size=32",
        "train_dataloader.batch_size=2",
        "train_dataloader.num_workers=0",
        "test_dataloader.batch_size=2",
        "test_dataloader.num_workers=0",
        "model.cache.num_workers=0",
        f"model.cache.folder={tmp_path}/codes",
        f"load_from.path={tmp_path}/tokenizer.pt",
        "train_cfg.max_steps=2",
        "++train_cfg.max_epochs=null",
        "runtime=cpu",
        f"run_dir={tmp_path}/run",
    ]
    run(compose([f"experiment={name}", *words]))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2 and 0 < result["metrics"]["bits_per_code"] < 20
