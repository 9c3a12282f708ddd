"""Image transforms and mixing of batches."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import EvalTransform, Mix, TrainTransform, seed_sample
from core.layers.statistics import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)


def by_hand(image, size, resize, filter=Image.Resampling.BICUBIC):
    """The evaluation of the field written out: shorter side in 8 bits, central crop, normalisation."""
    picture = Image.fromarray(image)
    width, height = picture.size
    scale = resize / min(width, height)
    new = (resize, int(resize * height / width)) if width < height else (int(resize * width / height), resize)
    assert scale > 0
    pixels = np.array(picture.resize(new, filter)).astype(np.float64) / 255
    top, left = round((new[1] - size) / 2), round((new[0] - size) / 2)
    cropped = pixels[top : top + size, left : left + size]
    return ((cropped - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "resize"), [(64, 73), (32, 36), (80, 91)])
def test_evaluation_is_the_recipe_of_the_field(image, size, resize):
    result = EvalTransform(size)(image)
    assert result.dtype == torch.float32 and result.shape == (3, size, size)
    np.testing.assert_allclose(result.numpy(), by_hand(image, size, resize), atol=1e-6)
    wide = image.transpose(1, 0, 2)
    np.testing.assert_allclose(EvalTransform(size)(wide).numpy(), by_hand(wide, size, resize), atol=1e-6)


def test_evaluation_options(image):
    bilinear = EvalTransform(32, resize=40, interpolation="bilinear")(Image.fromarray(image))
    np.testing.assert_allclose(bilinear.numpy(), by_hand(image, 32, 40, Image.Resampling.BILINEAR), atol=1e-6)
    grey = EvalTransform(28, resize=28, mean=[0.5], std=[0.25])(np.full((28, 28), 255, np.uint8))
    assert grey.shape == (1, 28, 28) and grey.eq(2).all()
    small = EvalTransform(40, resize=20)(image)
    assert small.shape == (3, 40, 40), "an image smaller than the crop is padded"
    with pytest.raises(ValueError, match="interpolation must be one of"):
        EvalTransform(interpolation="cubic")
    with pytest.raises(ValueError, match=r"one value .grey. or three"):
        EvalTransform(mean=(0.5, 0.5), std=(0.5, 0.5))


def test_training_augments_under_the_sample_seed(image):
    transform = TrainTransform(size=48)

    def views(seed):
        seed_sample(seed)
        return torch.stack([transform(image) for _ in range(3)])

    first = views(1)
    assert first.shape == (3, 3, 48, 48) and first.dtype == torch.float32
    assert torch.equal(first, views(1)) and not torch.equal(first, views(2))
    assert not torch.equal(first[0], first[1])


def test_every_part_of_the_recipe_can_be_switched(image):
    plain = {"auto_augment": None, "color_jitter": None, "erasing": 0, "flip": 0, "scale": (1, 1), "ratio": (1, 1)}
    square = image[:90, :90]

    def run(**options):
        seed_sample(0)
        return TrainTransform(size=90, interpolation="bilinear", **{**plain, **options})(square)

    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    base = (torch.from_numpy(square).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(run(), base, atol=1e-6), "with everything off only the normalisation is left"
    assert torch.allclose(run(flip=1.0), base.flip(-1), atol=1e-6)
    for option in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"scale": (0.1, 0.3)}):
        assert not torch.allclose(run(**option), base, atol=1e-2)
    erased = run(erasing=1.0)
    touched = (erased != base).any(0)
    assert 0.02 <= touched.float().mean() <= 1 / 3 + 0.01
    rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert touched.sum() == area, "one rectangle"
    assert erased[:, touched].std() > 0.5 and run(erasing=1.0, erasing_mode="const")[:, touched].abs().max() == 0


def test_small_images_are_cropped_from_their_padding():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    off = {"flip": 0, "auto_augment": None, "color_jitter": None, "erasing": 0}
    transform = TrainTransform(size=8, crop="padded", padding=2, mean=[0.0], std=[1 / 255], **off)
    seed_sample(3)
    views = [transform(image)[0].round().int() for _ in range(40)]
    padded = torch.nn.functional.pad(torch.from_numpy(image).int(), (2, 2, 2, 2))
    windows = {tuple(padded[y : y + 8, x : x + 8].flatten().tolist()) for y in range(5) for x in range(5)}
    seen = {tuple(view.flatten().tolist()) for view in views}
    assert seen <= windows and len(seen) > 10
    with pytest.raises(ValueError, match="'resized' or 'padded'"):
        TrainTransform(crop="center")


@pytest.mark.parametrize("transform", [EvalTransform(32), TrainTransform(32)])
def test_transforms_travel_and_say_what_they_do(transform, image):
    copy = pickle.loads(pickle.dumps(transform))
    seed_sample(1)
    expected = transform(image)
    seed_sample(1)
    assert torch.equal(copy(image), expected)
    assert "size=32" in repr(transform) and "interpolation='bicubic'" in repr(transform) and "0x" not in repr(transform)


def test_sample_seeds_reach_all_three_generators():
    def draw(seed):
        seed_sample(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(5) == draw(5)
    assert all(a != b for a, b in zip(draw(5), draw(6), strict=True))
    assert len(set(draw(5))) == 3


# ---------------------------------------------------------------------------- mixing


def batch(size=6, classes=5, shape=(3, 8, 8)):
    images = torch.arange(size).float().view(-1, *[1] * len(shape)).expand(size, *shape).clone()
    return {"image": images, "label": torch.arange(size) % classes, "sample_id": [str(i) for i in range(size)]}


@pytest.mark.parametrize("size", [1, 5, 6])
def test_mixup_mixes_images_and_targets_alike(size):
    np.random.seed(0)
    plain = batch(size)
    mixed = Mix(mixup=0.8, cutmix=0, smoothing=0, num_classes=5)(plain)
    lam = (mixed["image"][0, 0, 0, 0] - (size - 1)) / (0 - (size - 1)) if size > 1 else torch.tensor(1.0)
    assert 0 < lam <= 1
    assert torch.allclose(mixed["image"], lam * plain["image"] + (1 - lam) * plain["image"].flip(0), atol=1e-5)
    one_hot = torch.nn.functional.one_hot(plain["label"], 5).float()
    assert torch.allclose(mixed["target"], lam * one_hot + (1 - lam) * one_hot.flip(0), atol=1e-5)
    assert torch.equal(plain["image"], batch(size)["image"]), "the given batch is left alone"
    assert "target" not in plain and mixed["sample_id"] == plain["sample_id"] and mixed["label"] is plain["label"]


@pytest.mark.parametrize("key", ["image", "video"])
def test_cutmix_pastes_one_box_and_weighs_by_its_area(key):
    shape = (3, 16, 16) if key == "image" else (3, 4, 16, 16)
    plain = batch(4, 4, shape)
    plain[key] = plain.pop("image")
    np.random.seed(1)
    real_boxes = 0
    for _ in range(10):
        mixed = Mix(mixup=0, cutmix=1.0, smoothing=0, num_classes=4, key=key)(plain)
        pasted = mixed[key][0] == 3
        assert (pasted | (mixed[key][0] == 0)).all()
        flat = pasted.flatten(0, -3)
        assert (flat == flat[0]).all(), "the same box in every channel and frame"
        rows, columns = flat[0].any(1), flat[0].any(0)
        assert torch.equal(flat[0], rows[:, None] & columns), "one box"
        assert torch.allclose(mixed["target"][0, 3], pasted.float().mean(), atol=1e-6)
        assert torch.allclose(mixed["target"].sum(1), torch.ones(4))
        real_boxes += int(0 < pasted.float().mean() < 1)
    assert real_boxes >= 5


def test_smoothing_and_probabilities():
    off = Mix(prob=0, smoothing=0.1, num_classes=5)(batch())
    assert torch.equal(off["image"], batch()["image"])
    assert torch.allclose(off["target"][0], torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]))
    np.random.seed(0)
    kinds = [len(Mix(switch_prob=0.5, num_classes=5)(batch(2))["image"][0].unique()) == 1 for _ in range(100)]
    assert 30 < sum(kinds) < 70, "mixup leaves images flat, cutmix does not"


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_randomness_is_numpys_or_the_given_generator(mode):
    mix = Mix(num_classes=5, mode=mode)
    np.random.seed(3)
    first, second = mix(batch()), mix(batch())
    np.random.seed(3)
    assert torch.equal(mix(batch())["target"], first["target"])
    assert not torch.equal(first["target"], second["target"])
    np.random.seed(4)
    before = np.random.get_state()[1].copy()
    drawn = [mix(batch(), generator=np.random.default_rng(7))["target"] for _ in range(2)]
    assert torch.equal(*drawn) and (np.random.get_state()[1] == before).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"labels 0\.\.4 do not fit num_classes=3"):
        Mix(num_classes=3)(batch())
    with pytest.raises(ValueError, match="even batch, not 5"):
        Mix(num_classes=5, mode="pair")(batch(5))
    with pytest.raises(TypeError, match=r"torch.uint8: mix after the images are normalised"):
        Mix(num_classes=5)({"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "label": torch.zeros(2).long()})
    with pytest.raises(ValueError, match="both 0"):
        Mix(mixup=0, cutmix=0)
    with pytest.raises(ValueError, match="'batch', 'pair' or 'elem'"):
        Mix(mode="all")
