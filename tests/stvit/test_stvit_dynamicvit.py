"""DynamicViT on the plain ViT: masks in training, numbers of tokens, losses."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_reducers import build, lively, tiny, token_counts, with_and_without_class_token
from torch import Tensor

from stvit.models import SemanticTokenViT
from stvit.models.block import Block
from stvit.models.reducers import DynamicViT
from stvit.models.reducers.dynamicvit import keep_mask, keep_ratio_loss, kept_token_loss
from stvit.models.reducers.layerwise import State


@with_and_without_class_token
def test_masked_attention_equals_attention_on_the_kept_tokens(class_token: bool) -> None:
    prefix = int(class_token)
    block = lively(Block(16, 2)).eval()
    x = torch.randn(2, prefix + 12, 16)
    kept = torch.zeros(2, 12)
    for b in range(2):
        kept[b, torch.randperm(12)[:5]] = 1.0
    masked = block(x, mask=keep_mask(kept, prefix))
    for b in range(2):
        places = [*range(prefix), *(kept[b].nonzero().flatten() + prefix).tolist()]
        torch.testing.assert_close(masked[b, places], block(x[b : b + 1, places])[0], rtol=1e-4, atol=1e-4)


def test_decisions_have_the_gradient_of_a_weight_on_the_key() -> None:
    """d out / d kept as for `sum kept_j exp(s_j) v_j / sum kept_j exp(s_j)`, also where a decision is 0."""
    block = lively(Block(8, 1)).double().eval()
    x = torch.randn(1, 6, 8, dtype=torch.double)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.double, requires_grad=True)
    block(x, mask=keep_mask(kept, 0).double()).square().sum().backward()
    own, again = kept.grad.clone(), kept.detach().requires_grad_()
    q, k, v = block.attn.queries(block.norm1(x)), *block.attn.keys_values(block.norm1(x))
    weight = torch.where(torch.eye(6, dtype=torch.bool), 1.0, again[:, None, :])[:, None]
    weight = weight * (q @ k.transpose(-2, -1) / 8**0.5).exp()
    attended = (weight / weight.sum(-1, keepdim=True)) @ v
    half = x + block.attn.proj(attended[:, 0])
    (half + block.mlp(block.norm2(half))).square().sum().backward()
    assert own[0, 1].abs() > 1e-6 and own[0, 4].abs() > 1e-6
    torch.testing.assert_close(own, again.grad, rtol=1e-3, atol=1e-5)


@with_and_without_class_token
def test_training_and_evaluation_agree_when_they_decide_alike(
    class_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training masks what evaluation takes out: with the same decisions, the same logits."""
    model = lively(build("dynamicvit", class_token))
    images = torch.randn(2, 3, 32, 32)

    def best(logits: Tensor, hard: bool) -> Tensor:
        """The decisions of evaluation in place of drawn ones: the share that stays, of those still there."""
        assert hard
        alive = model_state["kept"]
        count = model_state["counts"].pop(0)
        chosen = logits[..., 0].masked_fill(alive == 0, float("-inf")).topk(count, dim=1).indices
        model_state["kept"] = torch.zeros_like(alive).scatter(1, chosen, 1.0)
        return torch.stack([model_state["kept"], 1 - model_state["kept"]], dim=-1)

    model_state = {"kept": torch.ones(2, 64), "counts": [int(64 * 0.6**i) for i in (1, 2, 3)]}
    monkeypatch.setattr("torch.nn.functional.gumbel_softmax", best)
    model.train()
    masked = model(images)
    torch.testing.assert_close(masked, model.eval()(images), rtol=1e-3, atol=1e-3)
    assert model_state["counts"] == []


def test_dynamicvit_keeps_the_published_numbers_of_tokens() -> None:
    model = SemanticTokenViT(
        img_size=224, embed_dim=8, num_heads=1, tokens="dynamicvit", class_token=True, num_classes=2
    ).eval()
    sizes = token_counts(model, torch.randn(1, 3, 224, 224))
    assert sizes == [197] * 3 + [1 + 137] * 3 + [1 + 96] * 3 + [1 + 67] * 3  # int(196 * .7**i)


def test_dropped_tokens_never_come_back_in_training() -> None:
    method = DynamicViT(16, depth=4, class_token=False, keep_ratio=0.5).train()
    x = torch.randn(2, 30, 16)
    state, kept = method.begin(x), torch.ones(2, 30)
    for index, block in enumerate(Block(16, 2) for _ in range(4)):
        x, state = method.layer(index, block, x, state)
        if state.kept is not None:
            assert ((state.kept == 0) | (state.kept == 1)).all()
            assert (state.kept <= kept).all()
            kept = state.kept.detach()
    assert x.shape == (2, 30, 16) and len(state.shares) == 3
    assert 0 < kept.sum() < 60
    torch.testing.assert_close(state.shares[-1], kept.mean(dim=1))


def test_the_predictor_sees_the_mean_of_kept_tokens_only() -> None:
    predictor = DynamicViT(16, depth=4, class_token=False).predictors[0]
    lively(predictor)
    x = torch.randn(1, 8, 16)
    kept = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(predictor(x, kept)[:, :4], predictor(x[:, :4]))
    torch.testing.assert_close(predictor(x).exp().sum(-1), torch.ones(1, 8))


def test_dynamicvit_losses() -> None:
    shares = [torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.5])]
    expected = ((0.2**2 + 0.2**2) / 2 + (0.5 - 0.49) ** 2) / 2
    torch.testing.assert_close(keep_ratio_loss(shares, [0.7, 0.49]), torch.tensor(expected))
    tokens, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    kept = torch.tensor([[1.0, 0, 1], [0, 1, 0]], requires_grad=True)
    chosen = [(0, 0), (0, 2), (1, 1)]
    loss = kept_token_loss(tokens, teacher, kept)
    torch.testing.assert_close(loss, sum((tokens[i] - teacher[i]).square().mean() for i in chosen) / 3)
    loss.backward()
    assert teacher.grad is None and kept.grad is None
    assert tokens.grad[0, 1].abs().sum() == 0 < tokens.grad[0, 0].abs().sum()
    assert kept_token_loss(tokens, teacher, torch.zeros(2, 3)) == 0


def test_auxiliary_losses_are_those_of_the_last_training_pass_once() -> None:
    model = build("dynamicvit", True).train()
    images = torch.randn(2, 3, 32, 32)
    assert model.auxiliary_losses() == {}
    model(images)
    copy.deepcopy(model)  # weight averages copy models between passes
    teacher = torch.randn(2, 65, 32)
    terms = model.auxiliary_losses(teacher, token_weight=0.25)
    assert set(terms) == {"loss_keep_ratio", "loss_tokens"}
    assert model.auxiliary_losses() == {}
    terms["loss_keep_ratio"].backward()
    assert model.reduction.predictors[0].embed[1].weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None
    model.eval()(images)
    assert model.auxiliary_losses() == {}
    assert tiny("all").auxiliary_losses() == {} == tiny("tome").auxiliary_losses(teacher)


def test_the_share_loss_drives_the_share_to_its_target() -> None:
    torch.manual_seed(0)
    model = build("dynamicvit", True, depth=4).train()
    images = torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.Adam(model.reduction.parameters(), 0.01)
    for _ in range(80):
        model(images)
        loss = model.auxiliary_losses()["loss_keep_ratio"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    passes = []
    for _ in range(8):
        model(images)
        passes.append(torch.stack(model.reduction.last_pass[1].shares))
    means = torch.stack(passes).mean(dim=(0, 2)).tolist()
    assert means == pytest.approx([0.6, 0.36, 0.216], abs=0.06)


def test_the_mean_in_training_is_over_kept_tokens() -> None:
    method = DynamicViT(4, depth=4, class_token=False).train()
    x = torch.randn(2, 5, 4)
    kept = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    mean = method.finish(x, State(torch.zeros(2, 5).long(), kept=kept)).mean(dim=1)
    torch.testing.assert_close(mean, torch.stack([(x[0, 0] + x[0, 2]) / 2, torch.zeros(4)]))
