"""The trainer on small data: what is cached, what is refused, what a result says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

import petl
from core.errors import ConfigError
from core.optim.schedules import value as scheduled
from petl.models.prefix import FrozenPrefix
from tests.petl.backbones import tiny_convnext, tiny_vit


class Drawn(Dataset):
    """Eight images of a generator's, the same whenever they are read."""

    fixed = True

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.randn(3, 32, 32, generator=generator), "label": index % 5, "sample_id": str(index)}


def trainer(method: petl.models.methods.Method, network: torch.nn.Module | None = None, **options: object):
    torch.manual_seed(0)
    model = petl.inject(network or tiny_vit(), method, num_classes=5, frozen_mode="eval")
    return petl.TransferTrainer(model, input_shape=(3, 32, 32), **options)


def batch_of(dataset: Dataset) -> dict:
    return torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize(
    ("method", "network", "shape"),
    [
        (petl.Linear(), tiny_vit, (24,)),
        (petl.Linear(), tiny_convnext, (24,)),
        (petl.Partial(1), tiny_vit, (17, 24)),
        (petl.LoRA(2, layers="last_half"), tiny_vit, (17, 24)),
        (petl.SCT([[0, 1]] * 2, layers=[1]), tiny_vit, (17, 24)),
    ],
)
def test_cached_features_are_the_live_network(method, network, shape, tmp_path: Path) -> None:
    """Losses and gradients from features are those from images; the images are not read again."""
    made = trainer(method, network(), cache=petl.PrefixFeatures(tmp_path))
    kept = made.training_data(Drawn())
    assert kept[0]["features"].shape == shape and "image" not in kept[0]
    grads = []
    for dataset in (Drawn(), kept):
        made.zero_grad()
        loss = made.train().losses(batch_of(dataset))["loss_cls"]
        loss.backward()
        grads.append([loss.detach(), *[p.grad for p in made.parameters() if p.requires_grad]])
    for live, cached in zip(*grads, strict=True):
        torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-6)
    shown = made.evaluation_data(Drawn())
    torch.testing.assert_close(
        made.eval().predict(batch_of(shown))["logits"], made.predict(batch_of(Drawn()))["logits"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("method", [petl.LNTune(), petl.SSF(), petl.LoRA(2), petl.VPT(2), petl.BitFit()])
def test_no_frozen_prefix(method: petl.models.methods.Method, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is frozen throughout"):
        trainer(method, cache=petl.PrefixFeatures(tmp_path)).training_data(Drawn())


def test_stochastic_depth_ends_the_prefix() -> None:
    """timm's rates rise from zero in the first block, which is frozen throughout; the second draws."""
    prefix = FrozenPrefix(petl.inject(tiny_vit(drop_path_rate=0.2), petl.Linear(), num_classes=5))
    assert not prefix.pooled and prefix.depth == 1
    with pytest.raises(petl.NoSite, match="frozen_mode=eval"):
        FrozenPrefix(petl.inject(tiny_vit(pos_drop_rate=0.1), petl.Linear(), num_classes=5))
    assert FrozenPrefix(petl.inject(tiny_vit(drop_path_rate=0.2), petl.Linear(), frozen_mode="eval")).pooled


def test_features_of_other_weights_are_not_read(tmp_path: Path) -> None:
    """The folder of features is named by the frozen weights; the head's are not among them."""
    first = trainer(petl.Linear(), cache=petl.PrefixFeatures(tmp_path))
    first.training_data(Drawn())
    with torch.no_grad():
        first.network.backbone.head.weight.add_(1)
    first.training_data(Drawn())
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        first.network.backbone.blocks[0].mlp.fc1.weight.add_(1)
    changed = first.training_data(Drawn())
    assert len(list(tmp_path.iterdir())) == 2
    torch.testing.assert_close(changed[0]["features"], first.prefix.features(Drawn()[0]["image"][None])[0])


def test_unchosen_channels_and_missing_weights_are_refused() -> None:
    batch = batch_of(Drawn())
    with pytest.raises(ConfigError, match="never chosen"):
        trainer(petl.TTC(k=4)).losses(batch)
    with pytest.raises(ConfigError, match=r"model\.network\.weights"):
        trainer(petl.LNTune(), pretrained="required").losses(batch)
    with pytest.raises(ConfigError, match="neither required nor optional"):
        trainer(petl.LNTune(), pretrained="yes")


def test_classes_that_are_no_answers() -> None:
    made, batch = trainer(petl.Linear()).eval(), batch_of(Drawn())
    batch["allowed"] = torch.zeros(8, 5, dtype=torch.bool)
    batch["allowed"][:, [1, 3]] = True
    assert set(made.predict(batch)["logits"].argmax(1).tolist()) <= {1, 3}


def test_smoothing_is_timms_form() -> None:
    from timm.loss import LabelSmoothingCrossEntropy

    made, batch = trainer(petl.Linear(), smoothing=0.1).eval(), batch_of(Drawn())
    expected = LabelSmoothingCrossEntropy(0.1)(made.network(batch["image"]), batch["label"])
    torch.testing.assert_close(made.losses(batch)["loss_cls"], expected)


def test_facts_and_figures() -> None:
    made = trainer(petl.TTC([[0, 1, 2]] * 2))
    cfg = {"train_dataloader": {"dataset": {"task": "cifar", "source": "png", "norm": "imagenet"}}, "evaluate": "last"}
    facts = made.facts(cfg)
    assert facts["data"] == {"task": "cifar", "source": "png", "norm": "imagenet"}
    assert facts["method"] == "TTC" and facts["select"] == "last" and facts["trained"] == 2 * 12
    assert facts["delta"] == 2 * 12 + 5 * 48 and facts["head"] == 5 * 25
    assert made.table_figures({**cfg, "evaluate": "best", "select_on_test": True})["select"] == "test_best"


def test_schedule_of_the_community() -> None:
    """Warm-up in epochs from 1e-6, floor 1e-5; with lag 1 the first two epochs have one rate (section 4)."""
    options = dict(lr=1e-3, total=100, warmup=10, warmup_lr=1e-6, min_lr=1e-5)
    assert scheduled("warmup_cosine", 0, lag=1, **options) == scheduled("warmup_cosine", 1, lag=1, **options) == 1e-6
    assert scheduled("warmup_cosine", 1, **options) == pytest.approx(1e-6 + 0.1 * (1e-3 - 1e-6))


def test_inference(tmp_path: Path) -> None:
    from PIL import Image

    from petl.data import TransferTransform

    made = trainer(petl.Linear(), transform=TransferTransform(size=32), classes=list("abcde")).eval()
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    record = made.infer(tmp_path / "red.png").record
    assert [c["class"] in "abcde" for c in record["classes"]] == [True] * 5
    assert sum(c["probability"] for c in record["classes"]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ConfigError, match="transform"):
        trainer(petl.Linear()).infer(tmp_path / "red.png")
