"""tools/infer.py on pictures of any size and kind, media of an evaluation, and backbones without weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from core.config import compose
from core.engine.commands.inference import infer
from core.engine.launch import build_trainer, run
from slot_walks import Blobworld, DinoViT, FilterBank, SlotEncoder, SlotTrainer, SlotWalker, WholePicture, segments
from slot_walks.models.weights import untrained
from slot_walks.trainer import slots as trainer_module

SHAPES = {"wide.png": (97, 33), "tall.jpg": (31, 90), "tiny.png": (9, 7), "ribbon.png": (300, 20)}


def scene_picture(width: int, height: int) -> Image.Image:
    scene = Blobworld("val", count=1)[0]["image"]
    pixels = (255 * scene.permute(1, 2, 0).numpy()).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def tiny(signal: str = "walk", init: str = "gaussian", **options: object) -> SlotTrainer:
    torch.manual_seed(0)
    decoder = {} if signal == "walk" else dict(decoder_width=16, decoder_depth=1)
    network = SlotWalker(FilterBank(), SlotEncoder(32, 32, 4, init=init), signal, feature_grid=16, **decoder)
    options = dict(transform=WholePicture(64, 4, "none")) | options
    return SlotTrainer(network, **options).eval()


def vit(**options: object) -> DinoViT:
    return DinoViT(**(dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2) | options))


# ---------------------------------------------------------------------- the transform of files
@pytest.mark.parametrize("normalize", ["none", "pm1", "imagenet"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pictures_come_back_from_their_normalised_form(normalize: str, order: str) -> None:
    transform = WholePicture(32, 8, normalize, order)
    picture = scene_picture(48, 32)
    pixels = transform(picture)
    assert pixels.shape == (3, 32, 48)
    assert np.abs(transform.undo(pixels).astype(int) - np.asarray(picture)).max() <= 1
    red = transform(Image.new("RGB", (32, 32), (255, 0, 0)))
    assert red[0 if order == "rgb" else 2].mean() > red[1].mean() and red.argmax(dim=0).unique().numel() == 1


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (33, 500), (5, 3)])
def test_sides_are_whole_patches_near_the_aspect(size: tuple[int, int]) -> None:
    _, height, width = WholePicture(64, 8)(Image.new("RGB", size)).shape
    assert height % 8 == 0 and width % 8 == 0 and min(height, width) == 64
    ratio = min(max(size) / min(size), 4)
    assert max(height, width) == pytest.approx(64 * ratio, abs=4.01)


def test_transforms_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="rgb or bgr"):
        WholePicture(channel_order="gbr")
    with pytest.raises(ValueError, match="normalize"):
        WholePicture(normalize="minmax")
    with pytest.raises(ValueError, match="no patch"):
        WholePicture(size=4, patch_size=8)


# ---------------------------------------------------------------------- one file
@pytest.mark.parametrize(
    "signal,source", [("walk", None), ("walk", "attention"), ("mlp", None), ("walk+mlp", "product")]
)
def test_record_and_pictures_agree(tmp_path: Path, signal: str, source: str | None) -> None:
    scene_picture(90, 61).save(tmp_path / "a.png")
    model = tiny(signal, mask_source=source)
    first, second = model.infer(tmp_path / "a.png"), model.infer(tmp_path / "a.png")
    record, pictures = first.record, first.pictures
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(second.record)), "noise belongs to the file"
    assert (record["width"], record["height"], record["slots"]) == (90, 61, 4)
    assert record["grid"] == [16, 24]
    labels = pictures["labels"]
    assert labels.shape == (61, 90) and labels.dtype == np.uint8
    assert record["used_slots"] == len(np.unique(labels))
    assert record["areas"] == pytest.approx([(labels == k).mean() for k in range(4)], abs=1e-4)
    assert sum(record["usage"]) == pytest.approx(1, abs=1e-3) and 1 <= record["effective_slots"] <= 4
    assert len(record["stay"]) == 4 and all(0 < value <= 1 for value in record["stay"])
    row, column = record["patch"]
    centre = labels[int((row + 0.5) * 61 / 16), int((column + 0.5) * 90 / 24)]
    assert record["slot"] == centre, "the patch's slot is the one painted there"
    assert set(pictures) == {"labels", "segments", "masks", "walk"}
    assert all(p.dtype == np.uint8 and p.shape[-1] == 3 for name, p in pictures.items() if name != "labels")
    output = model.network(
        model.transform(scene_picture(90, 61))[None], noise=model._noise({"sample_id": ["a.png"]}, 0)
    )
    assert np.array_equal(segments(model.assign(output)[0], output.grid, (61, 90))[0].numpy(), labels)


def test_the_patch_can_be_chosen(tmp_path: Path) -> None:
    scene_picture(64, 64).save(tmp_path / "a.png")
    corner, other = (tiny(patch=patch).infer(tmp_path / "a.png") for patch in ([0.0, 0.99], [0.5, 0.5]))
    assert corner.record["patch"] == [0, 15] and other.record["patch"] == [8, 8]
    assert not np.array_equal(corner.pictures["walk"], other.pictures["walk"])
    for wrong in ([0.5], [7, 2], [-0.1, 0]):
        with pytest.raises(ValueError, match="two shares"):
            tiny(patch=wrong)


def test_another_number_of_slots_and_slots_of_another_width(tmp_path: Path) -> None:
    scene_picture(64, 64).save(tmp_path / "a.png")
    assert len(tiny(num_slots=9).infer(tmp_path / "a.png").record["areas"]) == 9
    network = SlotWalker(FilterBank(), SlotEncoder(32, 16, 3), "mlp", feature_grid=16, decoder_width=8, decoder_depth=1)
    result = SlotTrainer(network, transform=WholePicture(64, 4, "none")).eval().infer(tmp_path / "a.png")
    assert "walk" not in result.pictures and "stay" not in result.record and "segments" in result.pictures


def test_without_a_transform_it_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.transform"):
        tiny(transform=None).infer(tmp_path / "any.png")


# ---------------------------------------------------------------------- tools/infer.py
def test_a_folder_of_odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in SHAPES.items():
        scene_picture(*size).save(folder / name)
    scene_picture(40, 50).convert("L").save(folder / "grey.png")
    scene_picture(50, 40).convert("RGBA").save(folder / "alpha.png")
    (folder / "broken.jpg").write_bytes((folder / "tall.jpg").read_bytes()[:60])
    words = ["experiment=slot_walks/blobworld", "model.network.encoder.num_slots=3"]
    torch.save({"model": build_trainer(compose(words)).state_dict()}, tmp_path / "weights.pt")
    options = dict(checkpoint="weights.pt", input=str(folder), output="out", device="cpu", config_dir=None)
    records = {Path(record["file"]).name: record for record in infer(words, SimpleNamespace(**options))}
    assert set(records) == {*SHAPES, "grey.png", "alpha.png", "broken.jpg"}
    assert "broken.jpg" in records.pop("broken.jpg")["error"]
    for name, record in records.items():
        with Image.open(folder / name) as picture, Image.open(record["pictures"]["labels"]) as labels:
            assert picture.size == labels.size == (record["width"], record["height"])
            assert set(np.unique(labels)) <= {0, 1, 2}
        assert all(Path(path).stat().st_size > 0 for path in record["pictures"].values())
        assert set(record["pictures"]) == {"labels", "segments", "masks", "walk"}
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 7


def test_real_data_experiments_read_files_as_they_were_trained() -> None:
    for name, size, normalize, order in (
        ("birds", 128, "pm1", "rgb"),
        ("cars", 128, "pm1", "bgr"),
        ("dogs", 128, "pm1", "bgr"),
        ("voc", 320, "imagenet", "rgb"),
        ("movi_e", 320, "imagenet", "rgb"),
    ):
        transform = build_trainer(compose([f"experiment=slot_walks/{name}"]), "meta").transform
        assert transform == WholePicture(size, 8, normalize, order), name


# ---------------------------------------------------------------------- media
def batch(count: int = 3) -> dict:
    data = Blobworld("train", count=count)
    return default_collate([data[i] for i in range(count)])


def test_media_shows_scenes_slots_and_truth() -> None:
    model = tiny()
    with torch.no_grad():
        picture = model.media(batch())["slots"]
        again = model.media(batch())["slots"]
        fewer = model.media(batch(2))["slots"]
    assert picture.dtype == np.uint8 and np.array_equal(picture, again)
    assert fewer.shape[0] == picture.shape[0] and fewer.shape[1] < picture.shape[1]
    assert model.media({"features": torch.randn(1, 16, 16, 32), "sample_id": ["a"]}) == {}


def test_a_run_leaves_its_picture(tmp_path: Path) -> None:
    words = ["runtime=cpu", f"runs_dir={tmp_path}", "train_cfg.max_steps=1", "train_dataloader.dataset.count=16"]
    result = run(compose(["experiment=slot_walks/blobworld", *words, "test_dataloader.dataset.count=2"]))
    (picture,) = Path(result["run_dir"]).glob("media/test_slots_*.png")
    with Image.open(picture) as shown:
        assert shown.size[1] > 5 * 192


# ---------------------------------------------------------------------- backbones without weights
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    def note(message: str, logger: str, level: int) -> None:
        assert logger == "current" and level == logging.WARNING
        said.append(message)

    monkeypatch.setattr(trainer_module, "print_log", note)
    return said


def dino_trainer(backbone: DinoViT) -> SlotTrainer:
    return SlotTrainer(SlotWalker(backbone, SlotEncoder(16, 16, 2), feature_grid=4))


def picture() -> dict[str, Tensor | list[str]]:
    return {"image": torch.rand(1, 3, 32, 32), "sample_id": ["a"]}


def test_a_random_backbone_is_named_once_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    said = warnings_of(monkeypatch)
    model = dino_trainer(vit())
    assert not said, "not when it is built: weights may be loaded later"
    for _ in range(2):
        model.losses(picture())
    model.eval().predict(picture())
    assert len(said) == 1 and "backbone.weights" in said[0] and "dino_deitsmall8_pretrain.pth" in said[0]


def test_loaded_and_learned_weights_are_not_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = warnings_of(monkeypatch)
    source = vit()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(source.state_dict(), tmp_path / "dino.pth")
    dino_trainer(vit(weights=tmp_path / "dino.pth")).losses(picture())
    later = dino_trainer(vit())
    later.network.backbone.load_state_dict(source.state_dict())
    later.losses(picture())
    tiny().losses(batch(1))
    assert not said
    assert untrained(vit()) and not untrained(source) and not untrained(FilterBank())
    with torch.device("meta"):
        assert not untrained(vit())
