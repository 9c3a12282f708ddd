"""Every experiment on real data takes two steps on small files in its own format: ImageNet's, lists of videos."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import compose
from core.data.prepare import run_task
from core.engine.launch import run

DEIT = [f"model.network.{word}" for word in ("embed_dim=16", "num_heads=2", "depth=7", "patch_size=8")]
SWIN = ["+model.network.embed_dim=8", "+model.network.depths=[1,1,6,1]", "+model.network.num_heads=[1,1,1,1]"]
CLIP = ["+model.network.embed_dim=8", "+model.network.depths=[1,1,5,1]", "+model.network.num_heads=[1,1,1,1]"]
# Experiment -> how its images are stored; every storage serves every kind of model.
IMAGENET = {
    f"{kind}_{size}{rest}": ("folder", "zip", "shards")[(i + j) % 3]
    for i, (kind, rest) in enumerate(
        [("deit", ""), ("deit", "_full"), ("swin", ""), ("stvit_swin", ""), ("r_swin", "")]
    )
    for j, size in enumerate(("tiny", "small", "base"))
}
IMAGENET |= {"lvvit_small": "folder", "stvit_lvvit_small": "shards"}
KINETICS = [f"kinetics_{kind}video_swin_{size}" for kind in ("", "stvit_") for size in ("tiny", "small")]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four images in either split: as folders, as a zip archive with its list, and as shards."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split in ("train", "val"):
        files: dict[str, bytes] = {}
        for index in range(8):
            pixels, data = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG")
            files[f"n0{index % 2}/{index}.JPEG"] = data.getvalue()
        for name, content in files.items():
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(content)
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        labels = {name: int(name[2]) for name in files}
        (root / f"{split}_map.txt").write_text("".join(f"{name}\t{label}\n" for name, label in labels.items()))
        with tarfile.open(root / f"{split}-000000.tar", "w") as shard:
            for key, (name, content) in enumerate(files.items()):
                for suffix, part in (("jpg", content), ("cls", str(labels[name]).encode())):
                    info = tarfile.TarInfo(f"{key:06d}.{suffix}")
                    info.size = len(part)
                    shard.addfile(info, io.BytesIO(part))
    return root


@pytest.mark.long
@pytest.mark.parametrize("name", IMAGENET)
def test_two_steps_on_images(name: str, imagenet: Path, tmp_path: Path) -> None:
    storage = IMAGENET[name]
    words = [
        f"experiment=stvit/{name}", f"runs_dir={tmp_path}", "runtime=cpu", "runtime.fast_dev_run=2",
        *(SWIN if "swin" in name else DEIT), "model.network.num_classes=2", "model.mix.num_classes=2",
        "model.network.img_size=56", f"train_dataloader.dataset.root={imagenet}", "train_dataloader.batch_size=2",
        "val_evaluator.metrics.top5.top_k=2",
    ]  # fmt: skip
    words += (
        ["~custom_hooks.media"] if name in ("deit_tiny", "deit_small", "deit_base", "stvit_lvvit_small") else []
    )  # its pictures are slow
    for part in ("train", "val"):
        words += [f"{part}_dataloader.num_workers=0", f"+{part}_dataloader.dataset.num_classes=2"]
        words += [f"{part}_dataloader.dataset.transform.size=56", f"+{part}_dataloader.dataset.storage={storage}"]
    words += [f"val_evaluator.metrics.{key}.num_classes=2" for key in ("top1", "top5")]
    result = run(compose(words))
    assert result["status"] == "trial" and result["steps"] == 2
    assert result["metrics"]["top5"] == 1 and 0 <= result["metrics"]["top1"] <= 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinetics") / "videos"
    run_task("stvit", "moving_glyphs", [f"root={root}", "train=4", "val=2", "frames=6", "size=56"])
    return root


@pytest.mark.parametrize("name", KINETICS)
def test_two_steps_on_lists_of_videos(name: str, videos: Path, tmp_path: Path) -> None:
    words = [
        f"experiment=stvit/{name}", f"runs_dir={tmp_path}", "runtime=cpu", "runtime.fast_dev_run=2", "media=null",
        *CLIP, *(["model.network.base_depth=1"] if "stvit" in name else []), "model.network.clip_size=[4,32,32]",
        "model.views.frames=4", "model.views.clips=2", "model.views.size=32", "train_dataloader.batch_size=2",
        f"train_dataloader.dataset.list_file={videos / 'train.txt'}",
        f"val_dataloader.dataset.list_file={videos / 'val.txt'}", "test_dataloader.num_workers=0",
    ]  # fmt: skip
    for part in ("train", "val"):
        words += [f"{part}_dataloader.num_workers=0", f"{part}_dataloader.dataset.frames=4"]
        words += [f"{part}_dataloader.dataset.short_side=32", f"{part}_dataloader.dataset.transform.size=32"]
    result = run(compose(words))
    assert result["status"] == "trial" and result["steps"] == 2
    assert result["metrics"]["top1"] in (0.0, 0.5, 1.0), "two videos of twelve views"
