"""Features that are kept train as the pictures do, are computed once, and are never read as others."""

import json
import os
import shutil
from collections import namedtuple
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from scipy.io import savemat

from core.config import compose
from core.data import build_loader
from core.engine.launch import run
from core.errors import ConfigError, VitrineError
from slot_walks import DinoViT, FeatureCache, SlotEncoder, SlotTrainer, SlotWalker
from slot_walks.data import CropTrain, Flowers, Square
from tests import forked
from tests.killing import assert_same_run, killed_in_phase

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> Path:
    """Six training pictures, two for validation, in the layout of Flowers."""
    root = tmp_path_factory.mktemp("Flowers")
    generator = torch.Generator().manual_seed(0)
    for folder, name in (("jpg", "image"), ("segmim", "segmim")):
        (root / folder).mkdir()
        for i in range(1, 9):
            pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / folder / f"{name}_{i:05d}.jpg")
    savemat(root / "setid.mat", {"trnid": [[7]], "valid": [[7, 8]], "tstid": [list(range(1, 7))]})
    return root


def vit(seed: int = 0, **options: object) -> DinoViT:
    torch.manual_seed(seed)
    return DinoViT(**(dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2) | options))


class Counting(DinoViT):
    """Counts the pictures that it sees."""

    seen: ClassVar[list[int]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(image))
        return super().forward(image)


def batches(dataset: object, epochs: int = 1) -> list[dict]:
    loader = build_loader({"dataset": dataset, "batch_size": 3}, seed=5, training=True)
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found += [fetched.data for fetched in loader]
    return found


@pytest.mark.parametrize("transform", [Square(32), CropTrain(short=32, size=32, crop="center", flip=0.5)])
def test_exact_features_give_the_same_epochs_and_losses_as_pictures(flowers, tmp_path, transform) -> None:
    data, backbone = Flowers(flowers, "train", transform=transform, masks=False), vit()
    torch.manual_seed(1)
    trainer = SlotTrainer(
        SlotWalker(backbone, SlotEncoder(in_dim=16, dim=16, num_slots=3), feature_grid=4),
        cache=FeatureCache(tmp_path, dtype="float32"),
    )
    live, kept = batches(data, epochs=3), batches(trainer.training_data(data), epochs=3)
    assert len(live) == len(kept) == 6
    for pictures, features in zip(live, kept, strict=True):
        assert "image" not in features and list(pictures["sample_id"]) == list(features["sample_id"])
        torch.testing.assert_close(trainer.network.features(pictures["image"])[0], features["features"].flatten(1, 2))
        noise = torch.randn(3, 3, 16)
        one, other = (trainer.losses({**batch, "noise": noise}) for batch in (pictures, features))
        for name in ("loss_wpw", "loss_pwp"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


def test_flips_are_kept_and_vary_from_epoch_to_epoch(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=CropTrain(32, 32, "center", 0.5), masks=False)
    kept = FeatureCache(tmp_path, "float32").fill(data, vit())
    assert len(kept) == 6 and len(kept.cache) == 12
    seen = {}
    for batch in batches(kept, epochs=6):
        for name, features in zip(batch["sample_id"], batch["features"], strict=True):
            seen.setdefault(name, set()).add(round(float(features[0, 0].sum()), 3))
    assert {len(views) for views in seen.values()} == {2}


def test_filling_and_finding_leave_random_numbers_as_they_were(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=CropTrain(32, 32, "center", 0.5), masks=False)
    for _ in ("fills it", "finds it"):
        backbone = vit()
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        FeatureCache(tmp_path).fill(data, backbone)
        assert torch.equal(torch.rand(4), expected)


def test_half_precision_is_close_and_half_the_size(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=Square(32), masks=False)
    exact, half = (FeatureCache(tmp_path / dtype, dtype).fill(data, vit()) for dtype in ("float32", "float16"))
    a, b = exact[0]["features"], half[0]["features"]
    assert b.dtype == torch.float16 and b.shape == (4, 4, 16)
    torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-4)
    assert not torch.equal(a, b.float())


def test_what_is_there_is_not_computed_again(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=Square(32), masks=False)
    torch.manual_seed(0)
    backbone = Counting(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    first = FeatureCache(tmp_path).fill(data, backbone)
    assert sum(backbone.seen) == 6
    again = FeatureCache(tmp_path).fill(data, backbone)
    assert sum(backbone.seen) == 6
    assert torch.equal(first[3]["features"], again[3]["features"])


def test_other_weights_settings_files_and_sizes_are_kept_apart(flowers, tmp_path) -> None:
    def folder(backbone: DinoViT, root: Path = flowers, size: int = 32, **options: object) -> str:
        data = Flowers(root, "train", transform=Square(size), masks=False, **options)
        return FeatureCache(tmp_path / "cache").fill(data, backbone).cache.folder.name

    moved = Path(shutil.copytree(flowers, tmp_path / "moved"))  # copies keep the time of change
    assert folder(vit()) == folder(vit(), moved)
    Image.new("RGB", (40, 50), "red").save(moved / "jpg" / "image_00003.jpg")
    names = [folder(vit()), folder(vit(seed=1)), folder(vit(final_norm=True)), folder(vit(num_heads=4))]
    names += [folder(vit(), moved), folder(vit(), size=40), folder(vit(), flowers_mask="tolerant")]
    assert len(set(names)) == len(names)


def test_random_crops_are_refused_or_limited(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=CropTrain(32, 24), masks=False)
    with pytest.raises(ConfigError, match=r"cropped at random.*model\.cache\.crops=8.*model\.cache=null"):
        FeatureCache(tmp_path).fill(data, vit())
    kept = FeatureCache(tmp_path, "float32", crops=3).fill(data, vit())
    again = FeatureCache(tmp_path / "again", "float32", crops=3).fill(data, vit())
    views = [kept.cache[f"0-{view}"]["features"] for view in range(3)]
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    assert all(torch.equal(view, again.cache[f"0-{i}"]["features"]) for i, view in enumerate(views))
    torch.manual_seed(0)
    drawn = [kept[0]["features"] for _ in range(40)]
    assert all(any(torch.equal(view, one) for one in drawn) for view in views)


def test_data_of_unknown_augmentation_is_refused(flowers, tmp_path) -> None:
    data = Flowers(flowers, "train", transform=lambda image, maps: (image, maps), masks=False)
    with pytest.raises(ConfigError, match=r"does not say how many views.*model\.cache=null"):
        FeatureCache(tmp_path).fill(data, vit())


def test_what_does_not_fit_is_refused_before_or_while_it_is_written(flowers, tmp_path, monkeypatch) -> None:
    data, large = Flowers(flowers, "train", transform=Square(32), masks=False), vit()
    large.blocks[-1].mlp.fc2.bias.data.fill_(1e5)
    with pytest.raises(VitrineError, match=r"do(es)? not hold.*model\.cache\.dtype=float32"):
        FeatureCache(tmp_path).fill(data, large)
    FeatureCache(tmp_path, "float32").fill(data, large)
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(VitrineError, match=r"features of 6 views need .* GB.*model\.cache\.folder="):
        FeatureCache(tmp_path / "other").fill(data, vit())
    for options, message in ((dict(dtype="int8"), "use float16"), (dict(crops=0), "at least one crop")):
        with pytest.raises(ValueError, match=message):
            FeatureCache(tmp_path, **options)


class Torn(Flowers):
    """One picture of the second process cannot be read."""

    def __getitem__(self, index: int) -> dict:
        if index and dist.get_rank() == 1:
            raise OSError(f"picture {index} is torn")
        return super().__getitem__(index)


def _share(rank: int, flowers: str, folder: str) -> None:
    wait = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    try:
        FeatureCache(f"{folder}/kept").fill(Torn(flowers, "train", transform=Square(32), masks=False), vit())
    except (OSError, VitrineError) as error:
        Path(folder, str(rank)).write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


@pytest.mark.processes
def test_a_process_that_fails_leaves_none_waiting(flowers, tmp_path) -> None:
    forked.pair(_share, str(flowers), str(tmp_path))
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said[1].startswith("OSError: picture ") and said[1].endswith(" is torn")
    assert said[0] == f"VitrineError: keeping features ended because process 1 failed: {said[1]}"


# ---------------------------------------------------------------------- through the launcher
SMALL = [
    "experiment=slot_walks/flowers",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "model.cache.num_workers=0",
    "model.cache.dtype=float32",
    "model.draws=1",
    "train_dataloader.dataset.transform.size=32",
    "model.input_shape=[3,32,32]",
    "model.network.feature_grid=4",
    "model.network.backbone.img_size=32",
    "model.network.backbone.embed_dim=16",
    "model.network.backbone.depth=2",
    "model.network.backbone.num_heads=2",
    "model.network.encoder.in_dim=16",
    "model.network.encoder.dim=16",
    "train_cfg.max_steps=4",
    "param_scheduler.warmup=1",
    "log_every=1",
]


def logged(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss_pwp"] for line in lines if "loss_pwp" in line]


def overrides(flowers: Path, tmp_path: Path, name: str) -> list[str]:
    weights = tmp_path / "vit.pth"
    if not weights.is_file():
        torch.save(vit().state_dict(), weights)
    return [
        *SMALL,
        f"train_dataloader.dataset.root={flowers}",
        f"model.network.backbone.weights={weights}",
        f"model.cache.folder={tmp_path / 'features'}",
        f"run_dir={tmp_path / name}",
    ]


@pytest.mark.long
def test_an_experiment_trains_from_the_cache_by_default_as_without(flowers, tmp_path) -> None:
    for name in ("kept", "live"):
        options = [*overrides(flowers, tmp_path, name), "train_dataloader.batch_size=3"]
        if name == "live":
            options = [o for o in options if not o.startswith("model.cache.")] + ["model.cache=null"]
        run(compose(options))
    assert list((tmp_path / "features").glob("*/shard-*.json"))
    kept, live = logged(tmp_path / "kept"), logged(tmp_path / "live")
    assert len(kept) == 4 and kept == pytest.approx(live, rel=1e-5)


def test_evaluations_read_kept_features_where_they_are_asked_to(flowers, tmp_path, monkeypatch) -> None:
    """The figures are those of the images, and the backbone sees each of the two validation images once."""
    passes = []
    original = DinoViT.forward
    monkeypatch.setattr(DinoViT, "forward", lambda self, image: passes.append(len(image)) or original(self, image))
    figures, seen = {}, {}
    for name, evaluation in (("live", "false"), ("kept", "true")):
        options = [*overrides(flowers, tmp_path, name), "train_dataloader.batch_size=3", "runtime.sanity_batches=0"]
        options += [f"+model.cache.evaluation={evaluation}", "train_cfg.val_every_epochs=1", "test_dataloader=null"]
        figures[name] = run(compose([*options, "media=null"]))["metrics"]
        seen[name], passes = sum(passes), []
    assert figures["kept"] == pytest.approx(figures["live"], rel=1e-5)
    assert seen["live"] >= 6 + 2 * 2 and seen["kept"] == 2


@pytest.mark.long
@pytest.mark.parametrize("features", ["kept", "removed", "whole before"])
@pytest.mark.parametrize("source", ["weights", "load_from"])
def test_a_killed_run_goes_on_exactly(flowers, tmp_path, source, features) -> None:
    def words(name: str) -> list[str]:
        found = [*overrides(flowers, tmp_path, name), "train_dataloader.batch_size=3", "checkpoint.every_steps=1"]
        if source == "load_from":
            found = [word for word in found if not word.startswith("model.network.backbone.weights=")]
            found.append(f"load_from={{path: {tmp_path / 'vit.pth'}, into: network.backbone}}")
        return found

    run(compose(words("undisturbed")))
    names = {path.name for path in (tmp_path / "features").iterdir()}
    if features != "whole before":
        shutil.rmtree(tmp_path / "features")
    with killed_in_phase(3):
        run(compose(words("killed")))
    if features == "removed":
        shutil.rmtree(tmp_path / "features")
    run(compose([*words("killed"), "resume=auto"]))
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
    assert {path.name for path in (tmp_path / "features").iterdir()} == names
    assert logged(tmp_path / "undisturbed") == logged(tmp_path / "killed")


@pytest.mark.processes
def test_two_processes_share_the_work_and_train_as_one(flowers, tmp_path) -> None:
    start = "model.network.encoder.init=learned"  # no noise, which each process would draw for itself
    run(compose([*overrides(flowers, tmp_path, "one"), start, "train_dataloader.batch_size=4"]))
    options = [o for o in overrides(flowers, tmp_path, "two") if "cache.folder" not in o]
    options += [f"model.cache.folder={tmp_path / 'shared'}", "train_dataloader.batch_size=2", "runtime=cpu", start]
    done = forked.run([str(ROOT / "tools" / "train.py"), *options], ROOT, dict(os.environ), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name.split("-")[1] for path in (tmp_path / "shared").glob("*/shard-*.json")}
    assert names == {"r0000", "r0001"}
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-4)
