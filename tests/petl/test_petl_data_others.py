"""Fine-grained, few-shot and domain-generalisation data in their published layouts; transforms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from core.data import DataFileError, MissingDataError, seed_sample
from core.errors import ConfigError
from petl.data import FGVC, DomainGeneralisation, FewShot, TransferTransform
from petl.data.domain import VARIANTS, subset_classes, synsets
from petl.data.fgvc import FGVC_TASKS
from tests.petl import data_files as files

SMALL = {"size": 8, "sizes": "report"}


# ---------------------------------------------------------------------- fine-grained
@pytest.mark.parametrize(
    "task, images", [("cub", "images"), ("nabirds", "images"), ("dogs", "Images"), ("cars", ""), ("flowers", "")]
)
def test_fgvc_reads_the_lists_of_vpt(tmp_path, task, images):
    files.fgvc(tmp_path, task, images)
    sizes = {split: len(FGVC(tmp_path, task, split, **SMALL)) for split in ("train", "val", "trainval", "test")}
    assert sizes == {"train": 10, "val": 2, "trainval": 12, "test": 3}
    data = FGVC(tmp_path, task, "test", **SMALL)
    assert data.labels.tolist() == [2, 1, 0] and data.num_classes == FGVC_TASKS[task].classes
    assert data[0]["sample_id"] == "003.Bird/test_0.jpg" and data[0]["label"] == 2  # classes counted from 1
    assert data[0]["image"].shape == (3, 8, 8) and data.origin["lossy"] == 1.0


def test_fgvc_names_of_classes_and_of_folders(tmp_path):
    folder = files.fgvc(tmp_path, "CUB_200_2011") / "CUB_200_2011"
    for split in ("train", "val", "test"):
        listed = json.loads((folder / f"{split}.json").read_text())
        (folder / f"{split}.json").write_text(json.dumps({name: f"bird {3 - label}" for name, label in listed.items()}))
    assert FGVC(tmp_path, "cub", "test", **SMALL).labels.tolist() == [0, 1, 2]


def test_fgvc_holds_a_tenth_out_where_there_is_no_validation_list(tmp_path):
    files.fgvc(tmp_path, val=False)
    parts = {split: FGVC(tmp_path, "cub", split, **SMALL) for split in ("train", "val", "trainval")}
    assert {split: len(data) for split, data in parts.items()} == {"train": 9, "val": 1, "trainval": 10}
    assert set(parts["train"].names) | set(parts["val"].names) == set(parts["trainval"].names)
    assert parts["val"].origin["held_out"] == {"share": 0.1, "seed": 0}
    again = FGVC(tmp_path, "cub", "val", **SMALL)
    others = {FGVC(tmp_path, "cub", "val", seed=seed, **SMALL).names[0] for seed in range(8)}
    assert list(again.names) == list(parts["val"].names) and len(others) > 2
    # The order of the file changes nothing.
    path = tmp_path / "cub/train.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert list(FGVC(tmp_path, "cub", "val", **SMALL).names) == list(again.names)
    assert "held_out" not in FGVC(files.fgvc(tmp_path / "own"), "cub", "val", **SMALL).origin


def test_fgvc_sizes_classes_and_broken_lists(tmp_path, monkeypatch):
    files.fgvc(tmp_path)
    with pytest.raises(DataFileError, match="expected 200 classes, found 3"):
        FGVC(tmp_path, "cub", "test")
    monkeypatch.setitem(FGVC_TASKS, "cub", type(FGVC_TASKS["cub"])(3, 5994, 5794, images="images"))
    with pytest.raises(DataFileError, match="FGVC cub, train and val: expected 5994 images, found 12"):
        FGVC(tmp_path, "cub", "test")
    monkeypatch.setitem(FGVC_TASKS, "cub", type(FGVC_TASKS["cub"])(3, 12, 5794, images="images"))
    with pytest.raises(DataFileError, match="FGVC cub, test: expected 5794 images, found 3"):
        FGVC(tmp_path, "cub", "train")
    monkeypatch.setitem(FGVC_TASKS, "cub", type(FGVC_TASKS["cub"])(3, 12, 3, images="images"))
    assert FGVC(tmp_path, "cub", "test").origin["whole"] is True
    train = json.loads((tmp_path / "cub/train.json").read_text())
    for content, reason in (
        ('{"a.jpg": ', r"test\.json' cannot be read"),
        ("[]", "holds a list"),
        ("{}", "it is empty"),
        ('{"a.jpg": [1]}', r"the class of 'a\.jpg' is \[1\]"),
        ('{"a.jpg": "one"}', "mix numbers and names"),
        (json.dumps(dict(list(train.items())[:1])), r"1 images are in train\.json and test\.json"),
    ):
        (tmp_path / "cub/test.json").write_text(content)
        with pytest.raises(DataFileError, match=reason):
            FGVC(tmp_path, "cub", "train", **SMALL)
    (tmp_path / "cub/test.json").unlink()
    with pytest.raises(MissingDataError, match=r"test\.json"):
        FGVC(tmp_path, "cub", "train", **SMALL)
    with pytest.raises(ConfigError, match="no task 'cubs': did you mean 'cub'"):
        FGVC(tmp_path, "cubs")
    with pytest.raises(ConfigError, match="aug=simple on test"):
        FGVC(tmp_path, "cub", "test", aug="simple")
    with pytest.raises(MissingDataError, match=r"task=fgvc_lists"):
        FGVC(None, "cub")


def test_fgvc_tells_test_images_of_classes_without_a_training_image(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("petl.data.listed.tell", told.append)
    monkeypatch.setitem(FGVC_TASKS, "cub", type(FGVC_TASKS["cub"])(4, 12, 4, images="images"))
    files.fgvc(tmp_path)
    path = tmp_path / "cub/test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "004.Bird/x.jpg": 4}))
    assert FGVC(tmp_path, "cub", "test").report["uncovered"] == 1 and "1 of 4 images" in told[-1]


# ---------------------------------------------------------------------- few-shot
@pytest.mark.parametrize("task, images", [("food101", "images"), ("fgvc-aircraft", "images"), ("standford-cars", "")])
def test_few_shot_reads_the_lists_of_noah(tmp_path, task, images):
    files.few_shot(tmp_path, task, images)
    data = FewShot(tmp_path, task, "train", shots=2, **SMALL)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.names[1] == "apple pie 0/train 1.jpg"  # the last blank
    assert data[1]["image"].shape == (3, 8, 8) and data.origin["shots"] == 2 and data.origin["seed"] == 0
    assert [len(FewShot(tmp_path, task, split, shots=2, **SMALL)) for split in ("val", "test")] == [6, 6]


def test_few_shot_sizes_count_images_once(tmp_path, monkeypatch):
    from petl.data import few_shot as module

    monkeypatch.setitem(module.FEW_SHOT_TASKS, "food101", module.Shots(3, 6, 7))
    files.few_shot(tmp_path)
    path = tmp_path / "food101/annotations/train_meta.list.num_shot_2.seed_0"
    path.write_text(path.read_text() * 2)  # as the one-shot lists of Pets are published
    data = FewShot(tmp_path, "food101", shots=2)
    assert len(data) == 12 and data.report["repeated"] == 6 and data.report["whole"] is True
    with pytest.raises(DataFileError, match=r"food101, 2 shots, seed 0, test: expected 7 images, found 6"):
        FewShot(tmp_path, "food101", "test", shots=2)
    path = tmp_path / "food101/annotations/val_meta.list"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataFileError, match="count twice"):
        FewShot(tmp_path, "food101", "val", shots=2)


def test_few_shot_missing_lists_and_words(tmp_path):
    files.few_shot(tmp_path)
    with pytest.raises(MissingDataError, match=r"train_meta\.list\.num_shot_4\.seed_1"):
        FewShot(tmp_path, "food101", shots=4, seed=1, **SMALL)
    with pytest.raises(ConfigError, match="no task 'food': did you mean"):
        FewShot(tmp_path, "food")
    with pytest.raises(ConfigError, match="shots=0"):
        FewShot(tmp_path, "food101", shots=0)
    with pytest.raises(ConfigError, match="aug=rand on val"):
        FewShot(tmp_path, "food101", "val", aug="rand")
    (tmp_path / "food101/images/apple pie 0/test 0.jpg").unlink()
    with pytest.raises(MissingDataError, match=r"there is no image .*test 0\.jpg"):
        FewShot(tmp_path, "food101", "test", shots=2, **SMALL)


# ---------------------------------------------------------------------- domain generalisation
def test_imagenets_subsets():
    assert len(synsets()) == 1000
    for name, entry in VARIANTS.items():
        classes = subset_classes(name)
        assert (classes is None) == (entry.subset is None)
        if classes is not None:
            assert len(set(classes)) == 200 and {6, 11} <= set(classes) and max(classes) < 1000


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_imagenet_from_lists_and_from_folders(tmp_path, name, lists):
    files.domain(tmp_path, lists)
    data = DomainGeneralisation(tmp_path, name, **SMALL)
    assert data.num_classes == 1000 and data.classes == subset_classes(name)
    folders = {6: ("n01498041", "6"), 11: ("n01531178", "11")}
    for index, label in enumerate(data.labels.tolist()):
        assert data[index]["label"] == label and data.describe(index).split("/")[-2] in folders[label]
    assert sorted(data.labels.tolist()) == [6, 11]
    allowed = data[0].get("allowed")
    assert (allowed is None) == (data.classes is None)
    assert allowed is None or (allowed.dtype == torch.bool and allowed.nonzero().ravel().tolist() == data.classes)
    assert np.asarray(data.image(0)).shape == (20, 30, 3)
    assert data.origin["task"] == name and ("class folders" in data.origin["lists"]) == (not lists)


def test_imagenet_with_few_images_for_training(tmp_path):
    files.domain(tmp_path)
    data = DomainGeneralisation(tmp_path, split="train", shots=1, aug="rand", **SMALL)
    assert data.labels.tolist() == [6, 11] and data.describe(0).endswith("imagenet/train/n01498041/n01498041_1.JPEG")
    assert len(data.report["untrained_classes"]) == 998
    with pytest.raises(DataFileError, match="expected 1000 images, found 2"):
        DomainGeneralisation(tmp_path, split="train", shots=1)
    with pytest.raises(ConfigError, match="data=imagenet_a has no training split"):
        DomainGeneralisation(tmp_path, "imagenet_a", "train")
    with pytest.raises(ConfigError, match="did you mean 'imagenet_a'"):
        DomainGeneralisation(tmp_path, "imagenet-a")


def test_classes_that_a_variant_does_not_have_are_refused(tmp_path):
    files.domain(tmp_path)
    path = tmp_path / "imagenet-adversarial/annotations/val_meta.list"
    path.write_text(path.read_text().replace(" 11", " 0"))
    with pytest.raises(DataFileError, match=r"images of class 0 .* not among its 200"):
        DomainGeneralisation(tmp_path, "imagenet_a", **SMALL)
    files.domain(tmp_path / "folders", lists=False)
    (tmp_path / "folders/imagenetv2/imagenetv2-matched-frequency-format-val/dog").mkdir()
    with pytest.raises(DataFileError, match="no WordNet id"):
        DomainGeneralisation(tmp_path / "folders", "imagenetv2", **SMALL)


# ---------------------------------------------------------------------- transforms
def test_transforms_are_those_of_the_released_recipes():
    image = Image.fromarray(files.pixels(3, 40, 60))
    bicubic = transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    square = transforms.Compose([transforms.Resize((14, 14), bicubic), *end])
    centre = transforms.Compose([transforms.Resize(16, bicubic), transforms.CenterCrop(14), *end])
    for aug, expected in (("none", square), ("centre", centre)):
        assert torch.equal(TransferTransform(14, aug, norm="inception")(image), expected(image))


def test_simple_crops_at_random_places_of_the_resized_image_and_mirrors_it():
    image = Image.fromarray(files.pixels(3, 40, 60))
    transform = TransferTransform(14, "simple", norm="inception")
    whole = transforms.functional.to_tensor(transforms.Resize(16, transforms.InterpolationMode.BICUBIC)(image)) * 2 - 1
    assert whole.shape == (3, 16, 24)
    windows = {}
    for top in range(3):
        for left in range(11):
            crop = whole[:, top : top + 14, left : left + 14]
            windows |= {(top, left, False): crop, (top, left, True): crop.flip(2)}
    seen = set()
    for seed in range(60):
        seed_sample(seed)
        result = transform(image)
        seen |= {place for place, crop in windows.items() if torch.allclose(crop, result, atol=1e-6)}
    assert {top for top, _, _ in seen} == {0, 1, 2} and len({left for _, left, _ in seen}) > 6
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    seed_sample(0)
    assert not transform.random or transform(image).shape == (3, 14, 14)


def test_rand_is_timms_randaugment_on_the_whole_image():
    image = Image.fromarray(files.pixels(3, 40, 60))
    still = TransferTransform(16, "rand", flip=0.0, auto_augment="rand-m0-n0")
    assert torch.equal(still(image), TransferTransform(16)(image))  # resized in place of cropped
    mirrored = TransferTransform(16, "rand", flip=1.0, auto_augment="rand-m0-n0")
    assert torch.equal(mirrored(image), TransferTransform(16)(image).flip(2))
    transform = TransferTransform(16, "rand")
    policy = [type(step).__name__ for step in transform._then.transforms[1].transforms]
    assert policy == ["RandAugment"]  # timm leaves colour jitter out beside it
    forced = TransferTransform(16, "rand", force_color_jitter=True)
    assert [type(step).__name__ for step in forced._then.transforms[1].transforms] == ["RandAugment", "ColorJitter"]
    results = []
    for seed in (0, 0, 1):
        seed_sample(seed)
        results.append(transform(image))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("aug", ["none", "rand", "centre"])
def test_decoding_and_finishing_are_the_whole_transform(aug):
    image, transform = Image.fromarray(files.pixels(5, 40, 60)), TransferTransform(14, aug)
    pixels = transform.decoded(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 14, 14)
    for seed in range(4):
        seed_sample(seed)
        expected = transform(image)
        seed_sample(seed)
        assert torch.equal(transform.finish(pixels), expected)


def test_wrong_settings_of_transforms_are_named():
    for key, value in (("aug", "rnd"), ("norm", "half"), ("interpolation", "cubic"), ("size", 0), ("flip", 2.0)):
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            TransferTransform(**{key: value})
    with pytest.raises(ConfigError, match="aug=simple crops at random"):
        TransferTransform(aug="simple").decoded(Image.new("RGB", (9, 9)))
