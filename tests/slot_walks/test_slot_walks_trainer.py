"""Steps on drawn scenes, repeatable evaluation with several draws, mask sources, cached features, diagnostics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from core.errors import ConfigError
from core.metrics.grouping import GroupingScores
from core.optim.groups import OptimConstructor
from core.optim.schedules import Schedule
from slot_walks import (
    Blobworld,
    FeatureCache,
    FilterBank,
    PatchClusters,
    SlotEncoder,
    SlotTrainer,
    SlotWalker,
    WalkLoss,
    affinity_gap,
    area_histogram,
    effective_slots,
    pair_shares,
    sample_noise,
    slot_usage,
    token_labels,
    usage_entropy,
)

RECIPE = {
    "optimizer": {"type": "torch.optim.Adam", "lr": 2e-3},
    "clip_grad": {"max_norm": 1.0, "norm_type": float("inf")},
}


def trainer(
    signal: str = "walk", init: str = "gaussian", loss: WalkLoss | None = None, **options: object
) -> SlotTrainer:
    torch.manual_seed(0)
    decoder = {} if signal == "walk" else dict(decoder_width=16, decoder_depth=1)
    network = SlotWalker(FilterBank(), SlotEncoder(32, 32, 4, init=init), signal, feature_grid=16, **decoder)
    return SlotTrainer(network, loss, **options)


def scenes(first: int, last: int, **options: object) -> dict:
    data = Blobworld("train", count=24, **options)
    return default_collate([data[i] for i in range(first, last)])


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("signal", ["walk", "mlp", "broadcast", "transformer", "walk+mlp"])
def test_steps_reduce_the_loss(signal: str) -> None:
    model, batch = trainer(signal, "learned").train(), scenes(0, 8)
    wrapper = OptimConstructor(RECIPE)(model)
    totals = [model.train_step(batch, wrapper)["loss"].item() for _ in range(15)]
    assert totals[-1] < 0.95 * totals[0]


@pytest.mark.long
def test_walks_find_the_objects_of_drawn_scenes() -> None:
    model = trainer(init="learned", loss=WalkLoss(1, 100)).train()
    wrapper = OptimConstructor(RECIPE)(model)
    schedule = Schedule(wrapper, "exponential", by_epoch=False, period=50000, warmup=30)
    schedule.resolve(100, None)

    def overlap() -> float:
        score, batch = GroupingScores(["mbo"]), scenes(12, 24)
        score.update(model.eval().val_step(batch)["segments"], batch["mask"])
        model.train()
        return score.compute()["mbo"].item()

    before = overlap()
    for step in range(100):
        start = step % 3 * 4
        model.train_step(scenes(start, start + 4), wrapper)
        schedule.step()
    assert overlap() > before + 0.05


def test_terms_of_the_loss_are_weighted_and_logged() -> None:
    batch = scenes(0, 4) | {"noise": torch.randn(4, 4, 32)}
    model = trainer("walk+mlp", loss=WalkLoss(3.0, 50.0), decoder_weight=0.5).train()
    terms = model.losses(batch)
    output = model.network(batch["image"], noise=batch["noise"])
    walks = model.loss(output.features, output.whole, output.grid)
    assert torch.allclose(terms["loss_wpw"], 3 * walks["wpw"]) and torch.allclose(terms["loss_pwp"], 50 * walks["pwp"])
    error = (output.reconstruction - output.features).square().mean()
    assert torch.allclose(terms["loss_reconstruction"], 0.5 * error)
    assert torch.allclose(terms["pwp_kl"], walks["pwp_kl"])
    assert torch.allclose(terms["effective_slots"], effective_slots(walks["to_slot"]).mean())
    assert not any(terms[name].requires_grad for name in ("pwp_kl", "effective_slots", "usage_entropy"))
    total, _ = model.parse_losses(terms)
    assert torch.allclose(total, terms["loss_wpw"] + terms["loss_pwp"] + terms["loss_reconstruction"])


def test_the_papers_step_zero_changes_nothing_but_the_moments() -> None:
    model, batch = trainer().train(), scenes(0, 4) | {"noise": torch.randn(4, 4, 32)}
    total, _ = model.parse_losses(model.losses(batch))
    gradients = torch.autograd.grad(total, list(model.network.encoder.parameters()))
    wrapper = OptimConstructor(RECIPE)(model)
    schedule = Schedule(wrapper, "exponential", by_epoch=False, period=50000, warmup=5000)
    schedule.resolve(250_000, None)
    before = [p.clone() for p in model.parameters()]
    model.train_step(batch, wrapper)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert any(state["exp_avg"].abs().sum() > 0 for state in wrapper.optimizer.state.values())
    assert torch.allclose(wrapper.grad_norm, torch.stack([g.abs().max() for g in gradients]).max()), "infinity norm"
    schedule.step()
    model.train_step(batch, wrapper)
    assert wrapper.param_groups[0]["lr"] == pytest.approx(2e-3 / 5000, rel=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_optimizer_holds_what_is_trained_and_nothing_else() -> None:
    model = trainer()
    held = {id(p) for group in OptimConstructor(RECIPE)(model).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.network.encoder.parameters()}


@pytest.mark.parametrize("kept", [False, True])
def test_processes_draw_the_noise_that_one_with_all_rows_draws(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = trainer().train(), scenes(0, 6)
    if kept:
        maps = model.network.backbone(batch.pop("image")).unflatten(1, (16, 16))
        batch = {"features": maps, "sample_id": batch["sample_id"]}

    def starts(rank: int, processes: int) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr("core.engine.state.randomness.get_dist_info", lambda: (rank, processes))
        found: list[Tensor] = []
        hook = model.network.encoder.register_forward_hook(lambda module, inputs, output: found.append(output.init))
        torch.manual_seed(1)
        total, _ = model.parse_losses(model.losses({key: value[rank::processes] for key, value in batch.items()}))
        hook.remove()
        return found[0], total

    whole, loss = starts(0, 1)
    torch.manual_seed(1)
    assert torch.equal(whole, model.network.encoder.init(6)), "one process draws as the network does"
    parts = [starts(rank, 2) for rank in (0, 1)]
    assert all(torch.equal(part[0], whole[rank::2]) for rank, part in enumerate(parts))
    assert torch.allclose((parts[0][1] + parts[1][1]) / 2, loss, rtol=1e-5), "and a step is that of the joint batch"


# ------------------------------------------------------------------ evaluation


def test_noise_belongs_to_the_sample_not_to_the_batch() -> None:
    noise = sample_noise(["a", "b", "c"], 4, 8, seed=1)
    assert torch.equal(sample_noise(["c", "a"], 4, 8, seed=1), noise[[2, 0]])
    assert torch.equal(sample_noise(["a"], 6, 8, seed=1)[:, :4], noise[:1]), "more slots keep the first ones"
    assert not torch.equal(sample_noise(["a"], 4, 8, seed=2), noise[:1])
    assert not torch.equal(sample_noise(["a"], 4, 8, seed=1, draw=1), noise[:1])
    many = sample_noise(range(200), 4, 8)
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_evaluation_repeats_in_any_batch_and_leaves_random_states_alone() -> None:
    model, state = trainer(noise_seed=3).eval(), torch.get_rng_state()
    whole = model.val_step(scenes(0, 6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    parts = [model.val_step(scenes(a, a + 2)) for a in (0, 2, 4)]
    assert torch.equal(whole["segments"], torch.cat([p["segments"] for p in parts]))
    assert torch.allclose(whole["regions"], torch.cat([p["regions"] for p in parts]), atol=1e-6)
    other = trainer(noise_seed=4).eval().val_step(scenes(0, 6))
    assert not torch.equal(whole["slots"], other["slots"])


def test_several_draws_give_mean_and_spread() -> None:
    batch = scenes(0, 6)
    model, single = trainer(draws=3).eval(), trainer().eval()
    drawn = model.val_step(batch)["segments"]
    assert drawn.shape == (6, 3, 64, 64) and drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, 0], single.val_step(batch)["segments"])
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    scores = GroupingScores(["fg_ari"], draws=3)
    scores.update(drawn, batch["mask"])
    figures = scores.compute()
    assert figures["fg_ari_std"] > 0 and math.isfinite(figures["fg_ari"])
    learned, runs = trainer(init="learned", draws=3).eval(), []
    learned.network.register_forward_hook(lambda *_: runs.append(1))
    same = learned.val_step(batch)["segments"]
    assert same.shape == (6, 3, 64, 64) and torch.equal(same[:, 0], same[:, 2]) and len(runs) == 1


def test_features_are_computed_once_for_all_draws() -> None:
    model, calls = trainer(draws=4).eval(), []
    model.network.backbone.register_forward_hook(lambda *_: calls.append(1))
    model.val_step(scenes(0, 2))
    assert len(calls) == 1


@pytest.mark.parametrize("source", ["walk", "attention", "product", "decoder"])
def test_masks_come_from_where_they_should(source: str) -> None:
    model, batch = trainer("walk+mlp", mask_source=source).eval(), scenes(0, 2)
    predicted = model.val_step(batch)
    assert torch.allclose(predicted["assignment"].sum(dim=2), torch.ones(2, 256), atol=1e-5)
    with torch.no_grad():
        output = model.network(batch["image"], noise=sample_noise(batch["sample_id"], 4, 32))
        cosine = torch.cosine_similarity(output.features[:, :, None], output.whole[:, None], dim=-1)
    walk = (cosine / 0.1).softmax(dim=2)
    joint = walk * output.assignment
    wanted = {
        "walk": walk,
        "attention": output.assignment,
        "product": joint / joint.sum(dim=2, keepdim=True),
        "decoder": output.decoder_masks.transpose(1, 2),
    }
    assert torch.allclose(predicted["assignment"], wanted[source], atol=1e-5)
    maps = wanted[source].transpose(1, 2).reshape(2, 4, 16, 16)
    full = torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear", align_corners=False)
    assert (predicted["segments"].long() == full.argmax(dim=1)).float().mean() > 0.999


def test_impossible_choices_are_refused() -> None:
    for options, message in (
        (dict(mask_source="slots"), "unknown mask_source"),
        (dict(mask_source="decoder"), "needs a decoder"),
        (dict(draws=0), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**options)
    narrow = SlotWalker(FilterBank(), SlotEncoder(32, 16), "mlp", feature_grid=16, decoder_width=16)
    with pytest.raises(ValueError, match="different widths"):
        SlotTrainer(narrow, mask_source="walk")
    assert SlotTrainer(narrow).mask_source == "decoder"
    assert "regions" not in SlotTrainer(narrow).eval().val_step(scenes(0, 2))


def test_cached_features_train_and_predict_as_pictures_do() -> None:
    live, noise = scenes(0, 4), torch.randn(4, 4, 32)
    model = trainer("walk+mlp")
    maps = model.network.backbone(live["image"]).reshape(4, 16, 16, 32)
    cached = {key: value for key, value in live.items() if key != "image"} | {"features": maps}
    model.train()
    a, b = (model.losses(batch | {"noise": noise}) for batch in (live, cached))
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    model.eval()
    flat = {"features": maps.flatten(1, 2)}
    for change in ({"features": maps}, flat, flat | {"grid": [(16, 16)] * 4}):
        predicted = model.val_step(cached | change)
        assert torch.equal(predicted["segments"], model.val_step(live)["segments"])
    wide = {"features": torch.randn(2, 24, 32), "grid": torch.tensor([[4, 6], [4, 6]]), "sample_id": ["a", "b"]}
    assert model.val_step(wide)["segments"].shape == (2, 4, 6), "without picture or mask, on the grid"


def test_other_sizes_shapes_and_numbers_of_slots_in_evaluation() -> None:
    model = trainer(num_slots=7).eval()
    batch = {"image": torch.rand(2, 3, 48, 80), "sample_id": ["a", "b"], "mask": torch.zeros(2, 96, 160).long()}
    predicted = model.val_step(batch)
    assert predicted["segments"].shape == (2, 96, 160) and predicted["slots"].shape == (2, 7, 32)
    assert predicted["segments"].max() > 3
    assert predicted["regions"].shape == (2, 7, 32) and predicted["pairs_same"].shape == (2,)


def test_bf16_steps_stay_finite() -> None:
    model = trainer("walk+mlp").train()
    wrapper = OptimConstructor(RECIPE | {"precision": "bf16"})(model)
    for _ in range(3):
        terms = model.train_step(scenes(0, 4), wrapper)
        assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.compile
def test_a_training_step_compiles_without_graph_breaks() -> None:
    model, batch = trainer("walk").train(), {"image": torch.rand(2, 3, 64, 64), "noise": torch.randn(2, 4, 32)}
    torch._dynamo.reset()
    compiled = torch.compile(model.losses, fullgraph=True, backend="eager")(batch)
    plain = model.losses(batch)
    assert all(torch.allclose(compiled[name], plain[name], atol=1e-5) for name in plain)


# ------------------------------------------------------------------ diagnostics


def one_hot(labels: list[list[int]], slots: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), slots).float()


def test_usage_counts_slots() -> None:
    even, single = one_hot([[0, 1, 2, 3]], 4), one_hot([[2, 2, 2, 2]], 4)
    assert torch.equal(slot_usage(single), torch.tensor([[0.0, 0, 1, 0]]))
    both = torch.cat([even, single])
    assert torch.allclose(effective_slots(both), torch.tensor([4.0, 1.0]))
    assert torch.allclose(usage_entropy(both), torch.tensor([1.0, 0.0]), atol=1e-6)
    assert torch.allclose(effective_slots(one_hot([[0, 0, 3, 3]], 4)), torch.tensor([2.0]))
    assert area_histogram(both, 4).tolist() == [3, 4, 0, 1]
    assert area_histogram(both, 4).sum() == 8


def test_token_labels_are_majorities() -> None:
    mask = torch.tensor([[[0, 0, 5, 5], [0, 5, 5, 5], [7, 7, 0, 0], [0, 0, 7, 7]]])
    assert token_labels(mask, (2, 2)).tolist() == [[0, 5, 0, 0]]
    assert token_labels(mask, (4, 2)).tolist() == [[0, 5, 0, 5, 7, 0, 0, 7]]
    with pytest.raises(ValueError, match="equal patches"):
        token_labels(mask, (3, 2))


def test_pair_shares_tell_whether_the_threshold_suits() -> None:
    features = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0]]])
    labels = torch.tensor([[0, 0, 1, 1, 1]])
    same, other = pair_shares(features, labels)
    # within: 0-1 and 2-3 of 4 unordered pairs; between: 0-4 and 1-4 of 6
    assert same.item() == pytest.approx(2 / 4) and other.item() == pytest.approx(2 / 6)
    assert affinity_gap(features, labels).item() == pytest.approx(1 / 2 - 1 / 3)
    assert affinity_gap(features[:, :4], labels[:, :4]).item() == 1
    data = scenes(0, 12)
    features = FilterBank()(data["image"])
    same, other = pair_shares(features, token_labels(data["mask"], (16, 16)))
    assert same.mean() > 0.9 and other.mean() < 0.2, "the stand-in's features suit the threshold"


def test_profiles_of_training_from_kept_features_leave_out_the_backbone(tmp_path) -> None:
    model = trainer(init="learned", cache=FeatureCache(tmp_path))
    batch = model.example_batch(2, "cpu")
    assert batch["features"].shape == (2, 16, 16, 32) and "image" not in batch
    model.network.backbone = None
    assert torch.isfinite(model.losses(batch)["loss_pwp"])
    assert "image" in trainer().example_batch(2, "cpu")


def test_features_in_memory_are_those_of_the_scenes() -> None:
    model, data = trainer(init="learned", cache=FeatureCache(None, "float32")).train(), Blobworld("train", count=4)
    kept = model.training_data(data)
    assert len(kept) == 4 and set(kept[1]) == {"features", "sample_id"} and kept[1]["features"].shape == (16, 16, 32)
    assert [kept[i]["sample_id"] for i in range(4)] == [data[i]["sample_id"] for i in range(4)]
    live, cached = (default_collate([each[i] for i in range(4)]) for each in (data, kept))
    for name, value in model.losses(live).items():
        assert torch.allclose(model.losses(cached)[name], value, atol=1e-6)
    with pytest.raises(ConfigError, match=r"cache\.folder=null keeps features of drawn scenes"):
        model.training_data([{"image": torch.zeros(3, 8, 8)}])


def test_the_cosine_of_both_walks_gradients_is_that_of_their_steps() -> None:
    batch = scenes(0, 4)
    gradients = []
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        model = trainer(init="learned", loss=WalkLoss(alpha, beta))
        total, _ = model.parse_losses(model.losses(batch))
        found = torch.autograd.grad(total, list(model.network.encoder.parameters()), materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    model = trainer(init="learned", loss=WalkLoss(0.0, 7.0), diagnose=True).eval()
    cosine = model.val_step(batch)["gradient_cosine"]
    assert cosine.shape == (4,) and not cosine.requires_grad
    wanted = torch.cosine_similarity(*gradients, dim=0)
    assert torch.allclose(cosine, wanted.expand(4), atol=1e-4) and wanted.abs() > 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "gradient_cosine" not in trainer().eval().val_step(batch)
    assert trainer("mlp", diagnose=True).eval().val_step(batch)["gradient_cosine"].isfinite().all(), "of the same slots"
    narrow = SlotWalker(FilterBank(), SlotEncoder(32, 16), "mlp", feature_grid=16, decoder_width=16)
    with pytest.raises(ValueError, match="diagnose=true needs"):
        SlotTrainer(narrow, diagnose=True)


def test_clusters_of_patches_separate_what_differs_and_are_not_trained() -> None:
    image = torch.full((2, 3, 32, 48), 0.2)
    image[0, 0, :, 24:] = 1.0
    image[1, 2, 16:] = 1.0
    found = PatchClusters(FilterBank(), num_clusters=2).val_step({"image": image, "sample_id": ["a", "b"]})
    segments = found["segments"]
    assert segments.shape == (2, 32, 48) and list(found["sample_id"]) == ["a", "b"]
    for each, halves in ((segments[0], (np.s_[:, :16], np.s_[:, 32:])), (segments[1], (np.s_[:10], np.s_[22:]))):
        first, second = (each[half].unique().tolist() for half in halves)
        assert len(first) == len(second) == 1 and first != second
    with pytest.raises(ConfigError, match="train_dataloader=null"):
        PatchClusters(FilterBank()).losses({"image": image})
