"""The digits' split is fixed and fair; glyph fields are what the description says, sample by sample."""

import math

import cv2
import numpy as np
import pytest
import torch

from core.data import Draw, SeededDataset, derive_seed
from stvit import Digits, GlyphField
from stvit.data.digits import DIGITS_MEAN, DIGITS_STD
from stvit.standin.glyphs import GLYPHS


def test_digits_splits_are_disjoint_and_stratified() -> None:
    rows = {split: set(Digits(split).rows.tolist()) for split in ("train", "test", "fit", "val")}
    assert not rows["train"] & rows["test"]
    assert rows["train"] | rows["test"] == set(range(5000))
    assert not rows["fit"] & rows["val"]
    assert rows["fit"] | rows["val"] == rows["train"]
    for split, per_class in (("train", 400), ("test", 100), ("fit", 300), ("val", 100)):
        assert np.bincount(Digits(split).labels).tolist() == [per_class] * 10


def test_digits_split_never_changes() -> None:
    # Published results depend on these rows; the file is sorted by class, 500 each.
    test = Digits("test")
    assert test.labels[:20].tolist() == [*range(10), *range(10)]
    assert sorted(test.rows.tolist())[:5] == [3, 7, 21, 22, 24]
    assert int(test.rows.sum()) == 2495151
    assert (test.rows // 500 == test.labels).all()


def test_digits_samples_are_normalised_images() -> None:
    data = Digits("test")
    sample = data[0]
    assert sample["image"].shape == (1, 28, 28)
    assert sample["image"].dtype == torch.float32
    assert sample["label"] == 0
    assert sample["sample_id"] == f"digit-{data.rows[0]:04d}"
    grey = torch.stack([data[i]["image"] for i in range(len(data))]) * DIGITS_STD + DIGITS_MEAN
    assert grey.min() == pytest.approx(0, abs=1e-6)
    assert grey.max() == pytest.approx(1, abs=1e-6)
    assert grey.mean() == pytest.approx(DIGITS_MEAN, abs=0.01)
    colour = Digits("test", channels=3)[0]["image"]
    assert torch.equal(colour, sample["image"].expand(3, -1, -1))


def test_digits_are_enlarged_about_their_middle() -> None:
    small, large = Digits("test")[7]["image"][0].numpy(), Digits("test", size=56)[7]["image"][0].numpy()
    expected = cv2.resize(small * DIGITS_STD + DIGITS_MEAN, (56, 56), interpolation=cv2.INTER_LINEAR)
    # Warping rounds positions to 1/32 pixel.
    assert np.abs(large * DIGITS_STD + DIGITS_MEAN - expected)[1:-1, 1:-1].max() < 0.05


def test_digits_augmentation_is_small_and_follows_the_draws_seed() -> None:
    data = SeededDataset(Digits("train", augment=True))
    first, again, other = data[Draw(3, derive_seed(1))], data[Draw(3, derive_seed(1))], data[Draw(3, derive_seed(2))]
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])
    plain = Digits("train")[3]["image"]
    overlap = torch.cosine_similarity(first["image"].flatten(), plain.flatten(), dim=0)
    assert 0.3 < overlap < 0.999


def test_digits_augmentation_shifts_and_turns_as_asked() -> None:
    still = Digits("train", augment=True, rotate=0, scale=0, shift=0)
    assert torch.allclose(still[5]["image"], Digits("train")[5]["image"], atol=1e-5)
    shifted = Digits("train", augment=True, rotate=0, scale=0, shift=0.1)
    np.random.seed(0)
    moves = [_centroid(shifted[5]["image"]) - _centroid(still[5]["image"]) for _ in range(200)]
    assert np.abs(moves).max() <= 2.8 + 0.1
    assert np.abs(moves).max() > 2.0


def _centroid(image: torch.Tensor) -> np.ndarray:
    weight = (image[0] * DIGITS_STD + DIGITS_MEAN).clamp_min(0).numpy()
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def test_digits_refuse_what_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="train, test, fit, val"):
        Digits("validation")
    with pytest.raises(ValueError, match="channels 1 or 3"):
        Digits(channels=2)


# Area of each glyph in units of its squared radius, from its definition.
AREAS = {
    "disc": math.pi,
    "ring": math.pi * (1 - 0.55**2),
    "square": 1.7**2,
    "frame": 1.8**2 - 1,
    "triangle": 1.7**2 / 1.9,
    "plus": 2 * 1.0 - 0.25,
    "saltire": None,
    "bar": 2 * 0.6,
}


def test_glyphs_have_their_shape_size_and_colour() -> None:
    data = GlyphField("test", count=256, size=56, radius=(6, 6), mask=True)
    radius = 12.0
    seen: dict[str, list[float]] = {name: [] for name in GLYPHS}
    for index in range(len(data)):
        sample = data[index]
        inside = sample["mask"] > 0
        name = GLYPHS[sample["label"]]
        assert set(sample["mask"].unique().tolist()) == {0, sample["label"] + 1}
        seen[name].append(inside.sum().item() / radius**2)
        # One colour of U(.6, 1.6) in each channel, and noise of deviation .15.
        values = sample["image"][:, inside]
        assert values.mean(dim=1).min() > 0.5 and values.mean(dim=1).max() < 1.7
        assert values.std(dim=1).mean() == pytest.approx(0.15, abs=0.03)
    for name, area in AREAS.items():
        assert len(seen[name]) > 10, "labels are uniform"
        if area is not None:
            assert np.mean(seen[name]) == pytest.approx(area, rel=0.04), name


def test_backgrounds_are_gratings_and_noise() -> None:
    data = GlyphField("train", count=256, mask=True)
    behind = torch.stack([data[i]["image"][:, data[i]["mask"] == 0].std(dim=1).square().mean() for i in range(256)])
    # Three gratings of amplitude N(0, .15^2) have variance 3 * .15^2 / 2, the noise has .15^2.
    assert behind.mean() == pytest.approx(2.5 * 0.15**2, rel=0.15)


def test_glyph_samples_do_not_depend_on_how_many_there_are() -> None:
    few, many = GlyphField("train", count=4), GlyphField("train", count=16)
    for index in range(4):
        assert torch.equal(few[index]["image"], many[index]["image"])
        assert few[index]["label"] == many[index]["label"]


def test_glyph_splits_and_seeds_differ() -> None:
    streams = [
        GlyphField(split, count=2, seed=seed)[0]["image"] for split in ("train", "test", "val") for seed in (0, 1)
    ]
    for a in range(6):
        for b in range(a):
            assert not torch.equal(streams[a], streams[b])
    assert len(GlyphField("test")) == 1024


def test_two_glyphs_are_labelled_from_left_to_right() -> None:
    data = GlyphField("test", count=64, size=56, glyphs=2, radius=(2.25, 3.5), mask=True)
    assert data.num_classes == 64
    different = 0
    for index in range(len(data)):
        sample = data[index]
        left, right = divmod(sample["label"], len(GLYPHS))
        columns = torch.arange(56.0)[None].expand(56, -1)
        if left != right:
            different += 1
            centre = [columns[sample["mask"] == shape + 1].mean() for shape in (left, right)]
            assert centre[0] + 4 < centre[1]
    assert different > 40


def test_mirroring_swaps_the_label() -> None:
    options = dict(count=32, glyphs=2, size=56, radius=(2.25, 3.5), mask=True)
    plain, mirrored = GlyphField("train", **options), GlyphField("train", flip=1.0, **options)
    for index in range(32):
        a, b = plain[index], mirrored[index]
        assert torch.equal(a["image"].flip(-1), b["image"])
        assert torch.equal(a["mask"].flip(-1), b["mask"])
        assert divmod(b["label"], 8) == divmod(a["label"], 8)[::-1]


def test_clutter_adds_bright_strokes_that_are_no_glyph() -> None:
    options = dict(count=32, size=56, radius=(2.25, 3.5), mask=True)
    clean, cluttered = GlyphField("train", **options), GlyphField("train", clutter=6, **options)
    bright = [
        np.mean([((d[i]["image"].mean(0) > 0.7) & (d[i]["mask"] == 0)).float().mean() for i in range(32)])
        for d in (clean, cluttered)
    ]
    assert bright[1] > bright[0] + 0.005


def test_glyph_field_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="find no place"):
        GlyphField(count=1, glyphs=5)
    with pytest.raises(ValueError, match="train, test, val"):
        GlyphField("fit")
