"""Drawn scenes: what depends on the seed, what is in a scene, and which digits it is made of."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from core.data import build_loader
from slot_walks.standin import digit_scenes
from slot_walks.standin.blobworld import Blobworld, draw_scene
from slot_walks.standin.digit_scenes import DigitScenes


def test_scenes_depend_on_seed_split_and_number_alone():
    few, many = Blobworld("val", count=2), Blobworld("val", count=4)
    assert torch.equal(few[1]["image"], many[1]["image"]) and few[1]["sample_id"] == many[1]["sample_id"]
    for other in (Blobworld("val", count=2, seed=1), Blobworld("test", count=2), Blobworld("train", count=2)):
        assert not torch.equal(few[0]["image"], other[0]["image"])
    before = few[0]["image"].clone()
    few[0]["image"].zero_()
    assert torch.equal(Blobworld("val", count=2)[0]["image"], before)
    assert [len(Blobworld(split, size=8)) for split in ("train", "val", "test")] == [500, 80, 80]


def test_scenes_have_two_to_four_objects_of_different_categories():
    numbers, kinds = set(), set()
    for index in range(60):
        scene = draw_scene(index)
        assert scene.image.shape == (64, 64, 3) and scene.image.min() >= 0 and scene.image.max() <= 1
        assert ((scene.instances > 0) == (scene.categories > 0)).all()
        of = {int(i): set(scene.categories[scene.instances == i].tolist()) for i in np.unique(scene.instances) if i}
        assert all(len(kind) == 1 for kind in of.values())
        assert len(set.union(*of.values())) == len(of)  # no category twice
        numbers.add(int(scene.instances.max()))
        kinds |= set.union(*of.values())
    assert numbers == {2, 3, 4} and kinds == set(range(1, 7))


def test_colours_of_scenes_are_those_of_their_categories():
    for index in range(30):
        scene = draw_scene(index)
        grey = scene.image[scene.instances == 0].mean(axis=0)
        assert colorsys.rgb_to_hsv(*grey)[1] < 0.25
        for kind in np.unique(scene.categories)[1:]:
            pixels = scene.image[scene.categories == kind]
            if len(pixels) > 30:
                hue, saturation, _ = colorsys.rgb_to_hsv(*pixels.mean(axis=0))
                assert abs((hue - (kind - 1) / 6 + 0.5) % 1 - 0.5) < 0.06 and saturation > 0.6


def test_shapes_have_their_area_and_later_objects_lie_on_top():
    area = {"ellipse": np.pi * 0.8, "rectangle": 1.8 * 1.4, "triangle": 1.6**2 / 1.8, "petals": np.pi * (0.49 + 0.045)}
    rng_radius = []
    for shape, factor in area.items():
        shares = []
        for seed in range(40):
            scene = draw_scene(seed, 128, foreground=True, shape=shape)
            shares.append((scene.instances > 0).mean() / factor)
        rng_radius.append(np.sqrt(np.mean(shares)))
    # Radii of the foreground are uniform between .22 and .34; the same seeds draw the same radii for every shape.
    assert np.allclose(rng_radius, 0.282, atol=0.015) and np.ptp(rng_radius) < 0.012


def test_foreground_scenes_and_harder_options():
    sample = Blobworld("val", foreground=True, count=3)[2]
    assert set(sample) == {"image", "mask", "sample_id"} and sample["mask"].unique().tolist() == [0, 1]
    assert 0.05 < sample["mask"].float().mean() < 0.5
    repeated = [draw_scene(i, objects=(6, 6), repeat=True) for i in range(10)]
    assert any(len(np.unique(s.categories)) < len(np.unique(s.instances)) for s in repeated)
    plain, cluttered = draw_scene(3), draw_scene(3, clutter=5)
    assert plain.image.shape == cluttered.image.shape and np.abs(plain.image - cluttered.image).max() > 0.3
    for wrong in (dict(objects=(2, 7)), dict(objects=(3, 2)), dict(shape="star")):
        with pytest.raises(ValueError, match="Blobworld"):
            draw_scene(0, **wrong)
    with pytest.raises(ValueError, match="no split"):
        Blobworld("all")


def test_digits_of_test_scenes_are_in_no_training_scene():
    few, many = DigitScenes("val", count=2), DigitScenes("val", count=4)
    assert torch.equal(few[1]["image"], many[1]["image"]) and few[1]["sample_id"] == "digits-val-0-1"
    assert not torch.equal(few[0]["image"], DigitScenes("val", count=2, seed=1)[0]["image"])
    rows = [set(digit_scenes._digits(split)[1].ravel().tolist()) for split in ("train", "val", "test")]
    assert [len(each) for each in rows] == [4000, 500, 500] and not rows[0] & (rows[1] | rows[2]) | (rows[1] & rows[2])
    numbers = set()
    for sample in (many[i] for i in range(4)):
        mask, classes = sample["mask"], sample["classes"]
        assert sample["image"].shape == (3, 64, 64) and sample["image"].min() >= 0 and sample["image"].max() <= 1
        assert torch.equal(mask > 0, classes > 0) and 0.02 < (mask > 0).float().mean() < 0.35
        kinds = [classes[mask == number].unique() for number in mask.unique() if number]
        assert all(len(kind) == 1 for kind in kinds) and len({int(kind) for kind in kinds}) == len(kinds)
        numbers.add(int(mask.max()))
        # A mask is where its colour is: saturated inside, greyish outside.
        spread = sample["image"].amax(dim=0) - sample["image"].amin(dim=0)
        assert spread[mask > 0].mean() > 0.4 > 0.25 > spread[mask == 0].mean()
    assert numbers <= {2, 3, 4} and len(DigitScenes("train", size=32)) == 500
    for wrong in (dict(objects=(2, 11)), dict(objects=(3, 2)), dict(size=16)):
        with pytest.raises(ValueError, match="DigitScenes"):
            DigitScenes("val", count=1, **wrong)
    for wrong in (dict(split="all"), dict(count=0)):
        with pytest.raises(ValueError, match=r"DigitScenes (has no split|: count)|DigitScenes: count"):
            DigitScenes(**wrong)


def test_samples_stack_into_batches():
    config = {"dataset": Blobworld("val", count=3), "batch_size": 3, "num_workers": 0}
    (batch,) = build_loader(config, seed=0, training=False)
    assert batch.data["image"].shape == (3, 3, 64, 64) and batch.data["classes"].dtype == torch.int64
