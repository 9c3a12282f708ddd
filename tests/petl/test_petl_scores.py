"""Scores of channels against finite differences and by hand; choices, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import petl
from petl.models.channels import REDUCTIONS
from petl.models.importance import SELECTORS
from petl.models.sites import Backbone
from petl.trainer.choose import ChooseChannels, chosen_share
from tests.petl.backbones import BACKBONES, tiny_vit


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator))] * 2


def aligned(**options: object) -> petl.PetlModel:
    torch.manual_seed(0)
    return petl.inject(tiny_vit(**options), petl.LNTune(), num_classes=5)


@pytest.mark.parametrize("site", ["attn", "mlp", "block"])
def test_scores_are_the_change_of_the_loss(site: str, batches: list) -> None:
    """A channel multiplied by (1 - e) changes an image's loss by -e a, to first order (double precision)."""
    model = aligned().double().eval()
    image, label = batches[0][0][:1].double(), batches[0][1][:1]
    scores = petl.all_channel_scores(model, [(image, label)], site=site)
    backbone, e = Backbone.of(model.backbone), 1e-5

    def loss(block: int, channel: int) -> float:
        def scaled(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[..., channel] *= 1 - e
            return x

        sites = backbone.blocks[block]
        if site == "attn":  # the stream behind the attention: what the branch adds makes up for the change
            stream: list[torch.Tensor] = []
            handles = [
                sites.norm1.module.register_forward_pre_hook(lambda m, a: stream.append(a[0])),
                sites.end1.module.register_forward_hook(lambda m, a, y: scaled(stream[0] + y) - stream[0]),
            ]
        else:
            place = sites.mlp if site == "mlp" else sites.block
            handles = [place.module.register_forward_hook(lambda m, a, y: scaled(y))]
        with torch.no_grad():
            value = float(nn.functional.cross_entropy(model(image), label))
        for handle in handles:
            handle.remove()
        return value

    base = float(nn.functional.cross_entropy(model(image), label))
    for block in (0, 1):
        for channel in (0, 5, 17):
            change = loss(block, channel) - base
            assert abs(change) / e == pytest.approx(float(scores["abs_of_sum"].values[""][block][channel]), rel=2e-3)


@pytest.mark.parametrize("site", ["attn", "qv"])
def test_batches_and_order_do_not_matter(site: str) -> None:
    model = aligned()
    generator = torch.Generator().manual_seed(5)
    image, label = torch.randn(6, 3, 32, 32, generator=generator), torch.randint(5, (6,), generator=generator)
    whole = petl.all_channel_scores(model, [(image, label)], site=site)
    pieces = [(image[i : i + 1], label[i : i + 1]) for i in (5, 0, 3, 1, 2, 4)]
    single = petl.all_channel_scores(model, pieces, site=site)
    for reduction in REDUCTIONS:
        for part, values in whole[reduction].values.items():
            for one, other in zip(values, single[reduction].values[part], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_reductions_by_hand() -> None:
    from petl.models.channels import ScoreSum, channel_products

    h = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    g = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[2.0, 5.0], [7.0, 1.0]]])
    total = ScoreSum()
    total.add(*channel_products(h, g))
    # a = [[1 - 3, -2 - 1], [2, 2]]
    assert total.score("abs_of_sum").tolist() == [2.0, 2.5]
    assert total.score("sum_of_abs").tolist() == [3.0, 2.5]
    assert total.score("squared").tolist() == [4.0, 6.5]
    assert total.score("signed").tolist() == [0.0, 0.5]


def test_the_model_is_as_before(batches: list) -> None:
    model = aligned().train()
    model.backbone.blocks[0].eval()
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    petl.channel_scores(model, batches)
    assert before == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(p.grad is None for p in model.parameters())
    assert not model.backbone.blocks[0]._forward_pre_hooks


def test_a_zero_head_is_an_error(batches: list) -> None:
    model = petl.inject(tiny_vit(), petl.LNTune(), num_classes=5, head_init="zero")
    with pytest.raises(petl.ZeroScores, match="head's weights are all zero"):
        petl.channel_scores(model, batches)


def test_patch_tokens_of_the_last_block_are_an_error(batches: list) -> None:
    with pytest.raises(petl.ZeroScores, match=r"last block .1. only the class token"):
        petl.channel_scores(aligned(), batches, site="block", tokens="patch")
    scores = petl.channel_scores(aligned(global_pool="avg"), batches, site="block", tokens="patch")
    assert all(value.any() for value in scores.values[""])


@pytest.mark.parametrize("family", list(BACKBONES))
def test_families(family: str, batches: list) -> None:
    """Swin's blocks differ in width: K is a share there."""
    torch.manual_seed(0)
    model = petl.inject(BACKBONES[family](), petl.LNTune(), num_classes=5)
    site = "mlp" if family == "convnext" else "attn"
    chosen = petl.channel_scores(model, batches, site=site).select(0.25)
    dims = [block.dim for block in Backbone.of(model.backbone).blocks]
    assert [len(c) for c in chosen] == [d // 4 for d in dims]
    torch.manual_seed(0)
    petl.inject(BACKBONES[family](), petl.TTC(chosen, site=site), num_classes=5)


@pytest.mark.parametrize("score", SELECTORS)
@pytest.mark.parametrize("site", ["attn", "qv"])
def test_every_selector(score: str, site: str, batches: list, tmp_path) -> None:
    model = aligned()
    choose = ChooseChannels(score, k=5, site=site)
    trainer, loader = type("T", (), {"network": model}), type("L", (list,), {"dataset": []})(batches)
    figures = choose(trainer, loader, tmp_path)
    channels, scores = petl.load_choice(tmp_path / "channels.safetensors")
    assert scores.site == site and scores.origin["score"] == score
    parts = [c if isinstance(c, list) else c["v"] for c in channels]
    assert all(p == sorted(set(p)) and len(p) == 5 for p in parts)
    assert (tmp_path / "importance.png").stat().st_size > 1000
    assert 0 < figures["chosen_share"] < 1
    petl.inject(tiny_vit(), petl.SCT(channels, site=site))


def test_bottom_takes_the_smallest(batches: list) -> None:
    scores = petl.channel_scores(aligned(), batches)
    least, most = scores.select(5, smallest=True), scores.select(5)
    for value, low, high in zip(scores.values[""], least, most, strict=True):
        assert value[low].max() <= value[high].min()
        assert set(low) == set(value.argsort()[:5].tolist())
    assert chosen_share(scores, least) < 5 / 24 < chosen_share(scores, most)


def test_ties_go_to_the_lower_index() -> None:
    chosen = petl.select_channels([torch.tensor([1.0, 2.0, 1.0, 1.0])], 2)
    assert chosen[0].tolist() == [0, 1]


def test_global_allocation_compares_normalised_scores() -> None:
    """Block 0 has the larger numbers, block 1 the more uneven ones."""
    scores = [torch.tensor([100.0, 100.0, 100.0, 100.0]), torch.tensor([9.0, 8.0, 0.1, 0.1])]
    chosen = petl.select_channels(scores, 1, allocation="global")
    assert [c.tolist() for c in chosen] == [[], [0, 1]]


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        ([torch.ones(4)], {"k": 5}),
        ([torch.ones(4)], {"k": 0}),
        ([torch.ones(4)], {"k": 2, "allocation": "local"}),
        ([torch.tensor([1.0, float("nan")])], {"k": 1}),
    ],
)
def test_wrong_choices(scores: list, options: dict) -> None:
    with pytest.raises(ValueError, match=r"channels|allocation|finite"):
        petl.select_channels(scores, options.pop("k"), **options)


def test_no_weight_gradient_is_built(batches: list) -> None:
    """The graph begins behind the embedding and asks for activations alone."""
    model = aligned()
    seen: list[bool] = []
    model.backbone.patch_embed.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    model.backbone.blocks[0].attn.qkv.weight.register_hook(lambda g: seen.append(True)) if (
        model.backbone.blocks[0].attn.qkv.weight.requires_grad
    ) else None
    petl.channel_scores(model, batches)
    assert seen == [False, False]
