"""Walks and their losses: by hand on small matrices, streaming against plain, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slot_walks import WalkLoss, affinity_target, masks, region_vectors, segments, transitions
from slot_walks.losses.streaming import streamed_cross_entropy
from slot_walks.losses.targets import KINDS, POSITIONS, target_rows, unit_places
from slot_walks.losses.walk_loss import reconstruction_loss
from slot_walks.losses.walks import unit
from slot_walks.models import position_affinity, position_table

GRID = (5, 7)


def scene(batch: int = 2, slots: int = 4, width: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Features of a few kinds on GRID, slots near them, and attention of some slot attention."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = GRID[0] * GRID[1]
    kinds = normal(3, width)[torch.randint(3, (batch, parts), generator=generator)]
    assignment = normal(batch, parts, slots).softmax(dim=2)
    tensors = (kinds + 0.3 * normal(batch, parts, width), normal(batch, slots, width), assignment)
    attention = assignment / assignment.sum(dim=1, keepdim=True)
    return tuple(t.to(dtype) for t in (*tensors, attention.transpose(1, 2)))


# ------------------------------------------------------------------ transitions and masks


def test_transitions_are_softmaxes_of_the_cosine() -> None:
    features, slots, *_ = scene()
    to_slot, to_part = transitions(features, 5 * slots, 0.2)
    cosine = F.cosine_similarity(features[:, :, None], slots[:, None], dim=-1)
    assert torch.allclose(to_slot, (cosine / 0.2).softmax(dim=2))
    assert torch.allclose(to_part, (cosine / 0.2).softmax(dim=1).transpose(1, 2))
    with pytest.raises(ValueError, match="slot_to_feature='linear'"):
        transitions(features, slots[..., :8])


def test_masks_are_upsampled_assignments_of_any_shape() -> None:
    features, slots, *_ = scene()
    to_slot, to_part = transitions(features, slots)
    soft = masks(to_slot, GRID, (40, 70))
    assert soft.shape == (2, 4, 1, 40, 70) and torch.allclose(soft.sum(dim=1), torch.ones(2, 1, 40, 70).double())
    maps = to_slot.transpose(1, 2).reshape(2, 4, *GRID)
    assert torch.equal(masks(to_slot, GRID, GRID).squeeze(2), maps), "rows of the grid come first"
    hard = segments(to_slot, GRID, (40, 70))
    assert hard.dtype == torch.uint8 and torch.equal(hard.long(), soft.squeeze(2).argmax(dim=1))
    regions = region_vectors(to_part, features)
    assert torch.allclose(regions, torch.einsum("bkn,bnc->bkc", to_part, F.normalize(features, dim=-1)))


# ------------------------------------------------------------------ values


def by_hand(features: Tensor, slots: Tensor, alpha: float, beta: float) -> tuple[float, float, float]:
    """wpw, pwp and KL of one picture with explicit loops over the definition."""
    f, s = F.normalize(features, dim=-1), F.normalize(slots, dim=-1)
    p, q = (f @ s.T / 0.1).softmax(dim=1), (s @ f.T / 0.1).softmax(dim=1)
    there, back = q @ p, p @ q
    k, n = len(s), len(f)
    wpw = -sum(math.log(there[i, i] + 1e-4) for i in range(k)) / k**2
    affinity = f @ f.T
    cross = entropy = 0.0
    for i in range(n):
        row = torch.where(affinity[i] >= 0.7, affinity[i] / 0.1, torch.tensor(-1e5).double()).softmax(dim=0)
        cross -= float((row * (back[i] + 1e-4).log()).sum())
        entropy -= sum(x * math.log(x) for x in row.tolist() if x > 0)
    return wpw, cross / n**2, (cross - entropy) / n


@pytest.mark.parametrize("impl", ["stream", "plain"])
def test_the_loss_is_its_definition(impl: str) -> None:
    features, slots, *_ = scene()
    each = [by_hand(f, s, 2.0, 30.0) for f, s in zip(features, slots, strict=True)]
    wpw, pwp, kl = (sum(values) / 2 for values in zip(*each, strict=True))
    terms = WalkLoss(2.0, 30.0, impl=impl)(features, slots)
    assert terms["wpw"].item() == pytest.approx(wpw, rel=1e-9)
    assert terms["pwp"].item() == pytest.approx(pwp, rel=1e-9)
    assert terms["pwp_kl"].item() == pytest.approx(kl, rel=1e-9) and not terms["pwp_kl"].requires_grad
    assert terms["loss"].item() == pytest.approx(2 * wpw + 30 * pwp, rel=1e-9)
    rows = WalkLoss(2.0 / 4, 30.0 / 35, reduction="rows", impl=impl)(features, slots)
    assert rows["loss"].item() == pytest.approx(terms["loss"].item(), rel=1e-9)
    assert rows["pwp"].item() == pytest.approx(35 * pwp, rel=1e-9)


def test_the_kl_falls_to_its_bound_where_walks_match_the_target() -> None:
    kinds = F.normalize(torch.eye(3, 12, dtype=torch.float64), dim=-1)
    features = kinds.repeat_interleave(10, dim=0)[None]
    matched = WalkLoss(temperature=0.01, target_temperature=0.1)(features, kinds[None])
    assert -math.log(1 + 30 * 1e-4) - 1e-6 <= matched["pwp_kl"].item() < 0
    assert matched["wpw"].item() == pytest.approx(-math.log(1.0001) / 3, abs=1e-6)
    mixed = WalkLoss(temperature=0.01, target_temperature=0.1)(features, kinds[None, [0, 0, 1]])
    assert mixed["pwp_kl"] > 0.3


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_row_stochastic_and_whole_in_blocks(kind: str, position: str) -> None:
    features, _, assignment, attention = scene()
    parts = unit(features)
    arguments = (kind, 0.7, 0.1, 0.5, position, unit_places(parts, GRID), assignment, attention)
    whole = target_rows(parts, 0, 35, *arguments)
    assert torch.allclose(whole.sum(dim=2), torch.ones(2, 35).double())
    blocks = [target_rows(parts, a, min(a + 8, 35), *arguments) for a in range(0, 35, 8)]
    assert torch.allclose(torch.cat(blocks, dim=1), whole)


def test_what_each_target_joins() -> None:
    features, _, assignment, attention = scene(1)
    parts = unit(features)
    cosine = parts @ parts.transpose(1, 2)

    def rows(kind: str, **options: object) -> Tensor:
        return target_rows(parts, 0, 35, kind, **options)

    thresholded = rows("thresholded", threshold=0.8)
    assert torch.equal(thresholded > 0, cosine >= 0.8), "what lies below the threshold has no share at all"
    assert torch.allclose(rows("dense"), (cosine / 0.1).softmax(dim=2))
    assert torch.allclose(rows("thresholded", threshold=-2.0), rows("dense"))
    kept = rows("topk", ratio=0.2)
    assert ((kept > 0).sum(dim=2) == 7).all()
    assert (cosine[kept > 0].min() >= -1) and (kept.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(rows("identity"), torch.eye(35).double()[None])
    walk = rows("attention", assignment=assignment, attention=attention)
    assert torch.allclose(walk, assignment @ attention)
    near = position_affinity(16, GRID, 0.1).double()
    assert torch.allclose(affinity_target(features, grid=GRID, position="average"), (rows("thresholded") + near) / 2)
    product = rows("thresholded") * near
    wanted = product / product.sum(dim=2, keepdim=True)
    assert torch.allclose(affinity_target(features, grid=GRID, position="product"), wanted)


def by_loops(cosine: Tensor, temperature: float, threshold: float = -2.0) -> Tensor:
    """A target's rows in words: exp(cosine / temperature) over those of the row that reach the threshold."""
    rows = [[math.exp(float(c) / temperature) if c >= threshold else 0.0 for c in row] for row in cosine]
    return torch.tensor([[value / sum(row) for value in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.4])
def test_the_temperature_is_that_of_features_and_of_places(temperature: float) -> None:
    features = scene(1)[0]
    parts = unit(features)[0]
    places = torch.nn.functional.normalize(position_table(16, *GRID).flatten(1).T.double(), dim=-1)
    alike, near = by_loops(parts @ parts.T, temperature, 0.7), by_loops(places @ places.T, temperature)
    assert torch.allclose(affinity_target(features, temperature), alike[None])
    average = affinity_target(features, temperature, grid=GRID, position="average")
    assert torch.allclose(average, (alike + near)[None] / 2, atol=1e-6)
    product = affinity_target(features, temperature, grid=GRID, position="product")
    assert torch.allclose(product, (alike * near / (alike * near).sum(dim=1, keepdim=True))[None], atol=1e-6)


def test_the_target_has_the_walks_temperature_unless_it_is_given_its_own() -> None:
    features, slots, *_ = scene()
    rows = {t: affinity_target(features, t) for t in (0.05, 0.1, 0.3)}
    for options, wanted in (
        ({}, 0.1),
        ({"temperature": 0.05}, 0.05),
        ({"temperature": 0.05, "target_temperature": None}, 0.05),
        ({"temperature": 0.05, "target_temperature": 0.3}, 0.3),
    ):
        loss = WalkLoss(alpha=0.0, beta=1.0, **options)
        assert torch.allclose(loss.rows_of_target(features, 0, 35), rows[wanted])
        to_slot, to_part = transitions(features, slots, options.get("temperature", 0.1))
        value = -(rows[wanted] * (to_slot @ to_part + 1e-4).log()).mean()
        assert torch.allclose(loss(features, slots)["loss"], value, rtol=1e-5)


def test_a_row_weighs_less_with_more_slots_and_parts() -> None:
    assert WalkLoss(1, 100).row_weights(5, 256) == (0.2, 100 / 256)
    assert WalkLoss(1, 100, reduction="rows").row_weights(5, 256) == (1, 100)
    features, slots, *_ = scene()
    (weight, other), terms = WalkLoss(3, 50).row_weights(4, 35), WalkLoss(3, 50)(features, slots)
    rows = WalkLoss(1, 1, reduction="rows")(features, slots)
    assert torch.allclose(terms["loss"], weight * rows["wpw"] + other * rows["pwp"])


# ------------------------------------------------------------------ streaming


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_plain(kind: str, position: str) -> None:
    features, slots, assignment, attention = scene()
    found = []
    for impl in ("plain", "stream"):
        start = slots.clone().requires_grad_()
        loss = WalkLoss(1.5, 40.0, target=kind, target_position=position, impl=impl, block=8)
        terms = loss(features, start, GRID, assignment, attention)
        terms["loss"].backward()
        found.append([terms[name].detach() for name in ("loss", "wpw", "pwp", "pwp_kl")] + [start.grad])
    for plain, stream in zip(*found, strict=True):
        assert torch.allclose(plain, stream, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("block", [1, 8, 35, 100])
def test_the_closed_gradient_is_the_derivative(block: int) -> None:
    features, slots, *_ = scene(1, 3, 8)
    parts = unit(features)
    start = [t.requires_grad_() for t in transitions(features, slots)]

    def cross(to_slot: Tensor, to_part: Tensor) -> Tensor:
        return streamed_cross_entropy(to_slot, to_part, parts, 1e-4, block, "thresholded", 0.7)[0]

    assert torch.autograd.gradcheck(cross, start)


def test_streaming_keeps_nothing_of_the_size_of_the_target() -> None:
    features, slots = torch.randn(2, 600, 8), torch.randn(2, 3, 8, requires_grad=True)

    def largest(impl: str) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            WalkLoss(impl=impl, block=64)(features, slots)
        return max(sizes)

    assert largest("stream") <= 2 * 600 * 8
    assert largest("plain") >= 2 * 600 * 600


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    features, slots, *_ = scene()
    products = []
    original = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a: products.append(a) or original(*a))
    loss = WalkLoss(block=35)
    with torch.no_grad():
        loss(features, slots.requires_grad_())
    assert len(products) == 1
    loss(features, slots)
    assert len(products) == 4


# ------------------------------------------------------------------ gradients, extremes, options


@pytest.mark.parametrize("impl", ["stream", "plain"])
def test_gradients_reach_slots_alone(impl: str) -> None:
    features, slots, assignment, attention = (t.requires_grad_() for t in scene())
    for target in ("thresholded", "attention"):
        loss = WalkLoss(target=target, target_position="average", impl=impl)
        loss(features, slots, GRID, assignment, attention)["loss"].backward()
        assert features.grad is None and assignment.grad is None and attention.grad is None
        assert slots.grad.abs().sum() > 0


def test_both_walks_reach_the_slots_through_both_transitions() -> None:
    features, slots, *_ = scene()
    for weights in (dict(alpha=1, beta=0), dict(alpha=0, beta=1)):
        to_slot, to_part = (t.detach().requires_grad_() for t in transitions(features, slots))
        loss = WalkLoss(**weights)
        cross, _ = loss.cross_entropy(to_slot, to_part, unit(features))
        (weights["alpha"] * loss.whole_part_whole(to_slot, to_part) + weights["beta"] * cross).backward()
        assert to_slot.grad.abs().sum() > 0 and to_part.grad.abs().sum() > 0


@pytest.mark.parametrize("impl", ["stream", "plain"])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4])
def test_half_precision_and_extreme_inputs_stay_finite(impl: str, scale: float) -> None:
    features, slots, assignment, attention = scene(dtype=torch.bfloat16)
    slots.requires_grad_()
    for target in KINDS:
        loss = WalkLoss(target=target, impl=impl, target_position="product")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = loss(scale * features, scale * slots, GRID, assignment, attention)
        terms["loss"].backward()
        assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in terms.values()), target
        assert torch.isfinite(slots.grad).all(), target


def test_autocast_changes_nothing() -> None:
    features, slots, *_ = scene(dtype=torch.float32)
    plain = WalkLoss()(features, slots)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(WalkLoss()(features, slots)["loss"], plain)


def test_without_the_second_walk_nothing_quadratic_is_made() -> None:
    features, slots, *_ = scene()
    terms = WalkLoss(alpha=2.0, beta=0.0)(features, slots)
    assert "pwp" not in terms and terms["loss"] == 2 * terms["wpw"]


def test_options_that_do_not_exist_are_refused() -> None:
    for options in (dict(target="soft"), dict(target_position="sum"), dict(reduction="mean"), dict(impl="fast")):
        with pytest.raises(ValueError, match="use "):
            WalkLoss(**options)
    with pytest.raises(ValueError, match="must be positive"):
        WalkLoss(temperature=0)
    features, slots, *_ = scene()
    with pytest.raises(ValueError, match="needs the grid"):
        WalkLoss(target_position="average")(features, slots, (5, 6))
    with pytest.raises(ValueError, match="needs the slot attention"):
        WalkLoss(target="attention")(features, slots)


@pytest.mark.compile
def test_the_loss_compiles_without_graph_breaks() -> None:
    features, slots, assignment, attention = scene(dtype=torch.float32)
    torch._dynamo.reset()
    for position in POSITIONS:
        loss = WalkLoss(target_position=position, block=16)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        found = []
        for function in (loss, compiled):
            start = slots.clone().requires_grad_()
            total = function(features, start, GRID, assignment, attention)["loss"]
            total.backward()
            found.append((total.detach(), start.grad))
        for plain, traced in zip(*found, strict=True):
            assert torch.allclose(plain, traced, atol=1e-5)


def test_reconstruction_is_a_mean_over_elements_towards_the_features() -> None:
    guess, features = torch.zeros(2, 3, 4, requires_grad=True), torch.full((2, 3, 4), 3.0, requires_grad=True)
    error = reconstruction_loss(guess, features)
    error.backward()
    assert error == 9 and features.grad is None and torch.allclose(guess.grad, torch.tensor(-6.0 / 24))
