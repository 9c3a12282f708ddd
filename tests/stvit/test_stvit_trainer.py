"""Training steps, pictures, inference on a user's files, and whole runs of the experiments at reduced size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose
from core.data import EvalTransform, Mix
from core.engine.commands.inference import write_picture
from core.engine.launch import build_trainer, run
from core.optim.groups import OptimConstructor
from stvit import ClassificationTrainer, Digits, SmallSemanticTokenViT, label_smoothing_cross_entropy
from stvit.inference.visualize import assignment, token_colours, token_picture
from stvit.losses import soft_target_cross_entropy
from stvit.models.reducers import count_macs
from tests.gradients import unreached

TINY = dict(embed_dim=16, depth=4, num_heads=2)


def tiny(**options: object) -> ClassificationTrainer:
    network = {key: options.pop(key) for key in ("tokens", "token_grid", "token_options", "macs") if key in options}
    return ClassificationTrainer(SmallSemanticTokenViT(**TINY, **network), input_shape=(1, 28, 28), **options)


def digits(count: int) -> dict:
    samples = [Digits("test")[i] for i in range(count)]
    return {
        "image": torch.stack([s["image"] for s in samples]),
        "label": torch.tensor([s["label"] for s in samples]),
        "sample_id": [s["sample_id"] for s in samples],
    }


@pytest.mark.long
@pytest.mark.parametrize("tokens", ["semantic", "all", "pooled", "random", "dynamicvit"])
def test_steps_reduce_the_loss(tokens: str) -> None:
    trainer, batch = tiny(tokens=tokens), digits(20)
    optimizer = {"optimizer": {"type": "torch.optim.AdamW", "lr": 3e-3}, "clip_grad": {"max_norm": 5.0}}
    wrapper = OptimConstructor(optimizer)(trainer)
    terms = [trainer.train_step(batch, wrapper) for _ in range(20)]
    assert terms[-1]["loss"] < terms[0]["loss"] - 0.15
    assert set(terms[0]) >= {"loss", "loss_cls", "accuracy"}


def test_loss_is_label_smoothing_or_soft_targets() -> None:
    batch = digits(8)
    plain = tiny(smoothing=0.2).eval()
    logits = plain.network(batch["image"])
    expected = label_smoothing_cross_entropy(logits, batch["label"], 0.2)
    assert torch.allclose(plain.losses(batch)["loss_cls"], expected)

    plain.mix = Mix(mixup=0.8, cutmix=0.0, num_classes=10)
    np.random.seed(0)
    terms = plain.losses(batch)
    np.random.seed(0)
    mixed = Mix(mixup=0.8, cutmix=0.0, num_classes=10)(batch)
    assert torch.allclose(terms["loss_cls"], soft_target_cross_entropy(plain.network(mixed["image"]), mixed["target"]))
    assert "accuracy" not in terms, "a mixed image has no one right answer"


def test_the_networks_own_terms_are_part_of_the_loss() -> None:
    trainer, batch = (
        tiny(tokens="dynamicvit", token_options={"keep_ratio": 0.3, "ratio_weight": 7.0}).train(),
        digits(8),
    )
    torch.manual_seed(3)
    terms = trainer.losses(batch)
    assert set(terms) == {"loss_cls", "loss_keep_ratio", "accuracy"}
    torch.manual_seed(3)
    trainer.network(batch["image"])
    torch.testing.assert_close(terms["loss_keep_ratio"], trainer.network.auxiliary_losses()["loss_keep_ratio"])
    assert terms["loss_keep_ratio"] > 0
    total, logged = trainer.parse_losses(terms)
    torch.testing.assert_close(total, terms["loss_cls"] + terms["loss_keep_ratio"])
    assert "loss_keep_ratio" in logged
    # Without the classifier's term the decisions still learn how many tokens they are to keep.
    terms["loss_keep_ratio"].backward()
    assert unreached(trainer.network.reduction) == []
    assert trainer.network.head.weight.grad is None
    for tokens in ("semantic", "tome"):
        assert set(tiny(tokens=tokens).train().losses(batch)) == {"loss_cls", "accuracy"}


def test_prediction_has_what_metrics_read() -> None:
    trainer, batch = tiny().eval(), digits(4)
    predicted = trainer.val_step(batch)
    assert predicted["logits"].shape == (4, 10)
    assert torch.equal(predicted["label"], batch["label"])
    assert predicted["sample_id"] == batch["sample_id"]
    assert not predicted["logits"].requires_grad


def test_table_figures_count_tokens() -> None:
    assert tiny().table_figures({})["tokens"] == 16
    assert tiny(token_grid=3).table_figures({})["tokens"] == 9
    assert tiny(tokens="random").table_figures({})["tokens"] == 16
    assert tiny(tokens="all").table_figures({})["tokens"] == 196
    assert tiny(tokens="pooled", token_grid=5).table_figures({})["tokens"] == 25


@pytest.mark.parametrize(
    ("tokens", "options", "left"),
    [
        ("tome", {"r": 10}, 196 - 4 * 10),
        ("tome", {"r": 90}, 14),  # half of the tokens at most: 106, 53, 27, 14
        # Decisions at layers 1, 2 and 3 of 4.
        ("evit", {"keep_rate": 0.5, "score": "norm"}, 27),  # 196 to 98 + 1, 50 + 1, 26 + 1, with the fused token
        ("topk", {"keep_rate": 0.5}, 25),  # 98, 49, 25
        ("dynamicvit", {"keep_ratio": 0.5}, 24),  # an eighth of 196, rounded down
    ],
)
def test_methods_along_the_way_count_the_tokens_that_are_left(tokens: str, options: dict, left: int) -> None:
    trainer = tiny(tokens=tokens, token_options=options).train()
    assert trainer.table_figures({}) == {"tokens": left}
    # As many as really come out of the last layer.
    seen = []
    network = trainer.eval().network
    network.tail[-1].register_forward_hook(lambda layer, given, tokens: seen.append(tokens.shape[1]))
    network(torch.randn(1, 1, 28, 28))
    assert seen == [left] and trainer.train().network.training


@pytest.mark.long
def test_matched_costs_change_the_tokens_that_are_counted() -> None:
    full = count_macs(tiny(tokens="all").network, (28, 28), 1)
    counted = {t: tiny(tokens=t, macs=0.7 * full).table_figures({})["tokens"] for t in ("random", "pooled", "topk")}
    for tokens, left in counted.items():
        assert 16 < left < 196, tokens


def test_media_shows_semantic_tokens_and_nothing_else() -> None:
    picture = tiny().eval().media(digits(3))["tokens"]
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.std() > 20
    assert tiny(tokens="all").eval().media(digits(3)) == {}


def test_picture_shows_each_token_where_it_looks() -> None:
    # Token t of four looks at one quarter of the image alone.
    maps = torch.zeros(1, 4, 4, 4)
    for token in range(4):
        row, column = divmod(token, 2)
        maps[0, token, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 0.25
    owner, total = assignment(maps)
    assert owner[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert torch.allclose(total, torch.ones(1, 4, 4))
    assert len({tuple(c) for c in token_colours(49).round(3)}) == 49
    picture = token_picture(torch.rand(1, 1, 32, 32), maps, captions=["seven"], title="tokens")
    # Another map gives another picture: the maps are really drawn.
    other = token_picture(torch.zeros(1, 1, 32, 32), maps.flip(1), captions=["seven"], title="tokens")
    assert picture.shape == other.shape
    assert np.abs(picture.astype(int) - other.astype(int)).mean() > 2


def test_infer_answers_for_a_file_with_a_picture(tmp_path: Path) -> None:
    transform = EvalTransform(size=28, resize=28, interpolation="bilinear", mean=(0.1307,), std=(0.3081,))
    trainer = tiny(transform=transform, classes=[f"digit {i}" for i in range(10)]).eval()
    sample = Digits("test")[4]
    grey = ((sample["image"][0] * 0.3081 + 0.1307) * 255).round().clamp(0, 255).to(torch.uint8)
    file = tmp_path / "four.png"
    Image.fromarray(grey.numpy()).convert("RGB").save(file)
    result = trainer.infer(file)
    expected = trainer.network(sample["image"][None]).softmax(1)[0]
    assert result.record["index"] == int(expected.argmax())
    assert result.record["class"] == f"digit {result.record['index']}"
    assert result.record["probability"] == pytest.approx(float(expected.max()), abs=0.01)
    assert [entry["probability"] for entry in result.record["top"]] == sorted(
        (entry["probability"] for entry in result.record["top"]), reverse=True
    )
    json.dumps(result.record)
    assert write_picture(result.pictures["tokens"], tmp_path / "tokens").stat().st_size > 1000


def test_infer_without_a_transform_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.transform"):
        tiny().infer(tmp_path / "any.png")


REDUCED = [
    "runtime=cpu",
    "train_cfg.max_epochs=null",
    "+train_cfg.max_steps=2",
    "train_dataloader.batch_size=4",
    "model.network.embed_dim=16",
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["stvit/digits", "stvit/digits_full"])
def test_digit_experiments_run_whole(name: str, tmp_path: Path) -> None:
    result = run(compose([f"experiment={name}", f"runs_dir={tmp_path}", *REDUCED]))
    assert result["status"] == "finished"
    assert result["steps"] == 2
    assert 0 <= result["metrics"]["top1"] <= 1
    pictures = list(Path(result["run_dir"]).glob("media/test_tokens_*.png"))
    assert len(pictures) == (name == "stvit/digits")


@pytest.mark.parametrize("tokens", ["semantic", "all", "pooled", "random"])
def test_glyph_experiment_runs_with_every_row_of_the_claim(tokens: str, tmp_path: Path) -> None:
    few = ["train_dataloader.dataset.count=16", "test_dataloader.dataset.count=16"]
    words = ["experiment=stvit/glyphs", f"runs_dir={tmp_path}", *REDUCED, *few, f"model.network.tokens={tokens}"]
    result = run(compose(words))
    assert result["steps"] == 2
    assert 0 <= result["metrics"]["top1"] <= 1


# Parameters in millions and GMACs. Full models are DeiT without class token and its position: 2C parameters fewer.
TABLE_1 = {
    "deit_tiny_full": (5.717, 1.258),
    "deit_tiny": (5.762, 0.527),
    "deit_small_full": (22.0499, 4.608),
    "deit_small": (22.213, 1.917),
    "deit_base_full": (86.5661, 17.583),
    "deit_base": (87.187, 7.288),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_imagenet_models_have_the_tables_size_and_cost(name: str) -> None:
    from core.profile.figures import Figures

    figures, cfg = Figures(build_trainer), compose([f"experiment=stvit/{name}"])
    assert figures.of(cfg, "parameters") / 1e6 == pytest.approx(TABLE_1[name][0], abs=5.5e-4)
    assert figures.of(cfg, "macs") / 1e9 == pytest.approx(TABLE_1[name][1], rel=0.01)
