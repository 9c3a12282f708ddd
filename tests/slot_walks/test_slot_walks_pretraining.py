"""Learned features of digit scenes: the masked autoencoder, its training, and the folder that an experiment loads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from core.config import compose
from core.data.prepare import run_task
from core.engine.launch import build_trainer
from core.errors import ConfigError
from slot_walks.models import DinoViT, MaskedAutoencoder
from slot_walks.models.weights import untrained
from slot_walks.standin.digit_scenes import DigitScenes
from slot_walks.standin.pretraining import ARCHITECTURE, check, pair_cosines, train

WORDS = ["steps=3", "scenes=4", "batch=2"]


def tiny(**options):
    torch.manual_seed(0)
    backbone = DinoViT(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    return MaskedAutoencoder(backbone, num_heads=2, **options)


def loss(model, image, seed=3):
    with torch.no_grad():
        return model.double()(image.double(), torch.Generator().manual_seed(seed)).item()


# ---------------------------------------------------------------------- the network
def hidden_pixels(model, image):
    """Which pixels of a single image `loss` hides, drawn anew from the generator's seed."""
    order = torch.rand(1, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    kept = order[0, : round(16 * (1 - model.mask_ratio))]
    seen = torch.zeros(16).index_fill_(0, kept, 1).reshape(4, 4)
    return (seen == 0).repeat_interleave(4, 0).repeat_interleave(4, 1).expand_as(image)


def test_nothing_of_a_masked_patch_reaches_the_reconstruction():
    """With a reconstruction that stays, the error of the mean of two targets is that of a parabola."""
    model, image = tiny(mask_ratio=0.5), torch.rand(1, 3, 16, 16)
    hidden = hidden_pixels(model, image)
    other = torch.where(hidden, torch.rand_like(image), image)
    gap = (image - other)[hidden].double().square().mean().item()
    middle = (loss(model, image) + loss(model, other)) / 2 - gap / 4
    assert gap > 0.05
    assert loss(model, torch.lerp(image, other, 0.5)) == pytest.approx(middle, abs=1e-9)


def test_seen_patches_count_and_are_not_scored():
    model, image = tiny(mask_ratio=0.5), torch.rand(1, 3, 16, 16)
    torch.nn.init.normal_(model.head.weight)
    hidden = hidden_pixels(model, image)
    seen_changed = torch.where(hidden, image, torch.rand_like(image))
    assert abs(loss(model, seen_changed) - loss(model, image)) > 1e-4  # the reconstruction reads them
    torch.nn.init.zeros_(model.head.weight)  # now it is grey whatever is seen
    assert loss(model, seen_changed) == loss(model, image)
    assert loss(model, image) == pytest.approx((image[hidden].double() - 0.5).square().mean().item(), abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        tiny(mask_ratio=share)


def test_a_share_that_leaves_nothing_of_so_few_patches_is_refused():
    with pytest.raises(ValueError, match="of 16 patches leaves 0 and masks 16"):
        tiny(mask_ratio=0.99)(torch.rand(1, 3, 16, 16))


# ---------------------------------------------------------------------- the training
@pytest.mark.long
def test_training_repeats_disturbs_nothing_and_lowers_the_error():
    state = torch.get_rng_state()
    first, again = (train(steps=12, scenes=8, batch=4, mask_ratio=0.6, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = first.encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.encoder.state_dict().items())
    other = train(steps=12, scenes=8, batch=4, mask_ratio=0.6, seed=6)
    assert not torch.equal(other.encoder.cls_token, first.encoder.cls_token)
    start = train(steps=1, scenes=8, batch=4, mask_ratio=0.6, seed=5)
    assert check(first, seed=7, count=4)["error"] < check(start, seed=7, count=4)["error"]


def test_cosines_of_pairs_by_hand():
    """Four patches: two of ground, two of object 1. One pair of one object, four of two, ground with ground in none."""
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0]]])
    alike, unlike = pair_cosines(features, torch.tensor([[0, 0, 1, 1]]))
    half = 0.5**0.5
    assert alike.tolist() == pytest.approx([half])
    assert sorted(unlike.tolist()) == pytest.approx([0.0, half, half, 1.0])


# ---------------------------------------------------------------------- the folder
def test_the_task_writes_what_the_experiments_load(tmp_path):
    folder = tmp_path / "vit"
    said = run_task("slot_walks", "digit_vit", [f"output={folder}", *WORDS])
    assert str(folder / "vit.pt") in said and "alike_p10" in said
    image = DigitScenes("test", count=1, seed=1)[0]["image"][None]
    features = DinoViT(**ARCHITECTURE, weights=folder / "vit.pt")(image)
    for name, key in (("digits_vit", "model.network.backbone"), ("digits_vit_kmeans", "model.backbone")):
        cfg = compose([f"experiment=slot_walks/{name}", f"{key}.weights={folder / 'vit.pt'}"])
        trainer = build_trainer(cfg)
        backbone = trainer.network.backbone if hasattr(trainer, "network") else trainer.backbone
        assert not untrained(backbone)
        with torch.no_grad():
            assert torch.equal(backbone(image), features.detach())
    assert normalize(features, dim=2).std(dim=1).max() > 0.01  # patches differ


def test_what_is_there_is_left_alone_and_nothing_else_is_written_over(tmp_path):
    folder = tmp_path / "vit"
    words = [f"output={folder}", *WORDS]
    first = run_task("slot_walks", "digit_vit", words)
    written = (folder / "vit.pt").stat().st_mtime_ns
    assert run_task("slot_walks", "digit_vit", words) == first
    assert (folder / "vit.pt").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="was made with"):
        run_task("slot_walks", "digit_vit", [*words, "seed=1"])
    with pytest.raises(ConfigError, match="holds other files"):
        run_task("slot_walks", "digit_vit", [f"output={tmp_path}", *WORDS])
    with pytest.raises(ConfigError, match="at least one step"):
        run_task("slot_walks", "digit_vit", [f"output={tmp_path / 'new'}", "steps=0"])
    assert not (tmp_path / "new").exists()
