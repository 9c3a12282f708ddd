"""ATS on the plain ViT against a plain-loop reading of the paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_reducers import lively, tiny, token_counts
from torch import Tensor

from stvit.models.block import Block
from stvit.models.reducers import ATS, State
from stvit.models.reducers.ats import inverse_samples


def loop(block: Block, x: Tensor, count: int, kind: str = "class") -> tuple[Tensor, list[int]]:
    """One image `(T, C)` (after a class token, with `class`) through a layer, by equations 3 and 4; and who stays."""
    front = int(kind == "class")
    normed, heads = block.norm1(x), block.attn.num_heads
    q, (k, v) = block.attn.queries(normed[None])[0], (part[0] for part in block.attn.keys_values(normed[None]))
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    score = torch.zeros(len(x) - front)
    for h in range(heads):
        row = attention[h, 0] if kind == "class" else attention[h].sum(0)
        taken = torch.stack([row[j] * v[h, j].norm() for j in range(front, len(x))])
        score += taken / taken.sum() / heads
    total, cumulative = 0.0, []
    for share in score.tolist():
        total += share
        cumulative.append(total)
    kept: list[int] = []
    for step in range(count):
        at = (2 * step + 1) / (2 * count)
        nearest = min(range(len(cumulative)), key=lambda j: abs(cumulative[j] - at))
        if nearest not in kept:
            kept.append(nearest)
    rows = [0] * front + [front + j for j in kept]
    out = torch.cat([attention[h][rows] @ v[h] for h in range(heads)], dim=-1)  # A^s V
    half = x[rows] + block.attn.proj(out)
    return half + block.mlp(block.norm2(half)), kept


@pytest.mark.parametrize("kind", ["class", "attention"])
@pytest.mark.parametrize("keep_rate", [0.3, 0.8, 1.0])
def test_ats_equals_a_loop(kind: str, keep_rate: float) -> None:
    front = int(kind == "class")
    method = ATS(8, depth=2, class_token=bool(front), keep_rate=keep_rate, places=[0, 1])
    blocks = [lively(Block(8, 2)).eval() for _ in range(2)]
    with torch.no_grad():
        for block in blocks:
            block.attn.q.weight *= 4  # sharp attention: tokens are hit several times
    x = torch.randn(3, front + 12, 8)
    out, state = x, method.begin(x)
    for index, block in enumerate(blocks):
        out, state = method.layer(index, block, out, state)
    count = math.ceil(keep_rate * 12)
    assert out.shape[1] == front + count
    for b in range(3):
        first, kept = loop(blocks[0], x[b], count, kind)
        expected, again = loop(blocks[1], first, count, kind)
        real = state.size[b] > 0
        torch.testing.assert_close(out[b][real], expected, rtol=1e-4, atol=1e-5)
        stays = [kept[j] for j in again]
        assert [state.source[b, j].item() for j in stays] == list(range(len(stays)))
        assert (state.source[b] >= 0).sum() == len(stays) < 12


def test_samples_stand_at_even_steps_of_the_cumulative_share() -> None:
    share = torch.tensor([[0.05, 0.9, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]])
    places, filled = inverse_samples(share, 4, torch.tensor([3, 4]))
    # Steps .125 .375 .625 .875. First: sums .05 .95 1; second: .25 .5 .75 1, halfway the later token is taken.
    assert places[0][filled[0]].tolist() == [0, 1]
    assert places[1][filled[1]].tolist() == [0, 1, 2, 3]


def test_empty_slots_change_nothing() -> None:
    model = lively(tiny("ats", True, dict(keep_rate=0.8, places=[1, 2]))).eval()
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.1, 1.0, 5.0])[:, None, None, None]
    whole = model(images)
    model.reduction.trim = True
    torch.testing.assert_close(model(images), whole, rtol=1e-4, atol=1e-5)
    assert token_counts(model, images)[-1] < 1 + math.ceil(0.8 * 64)
    maps = model.token_maps(images).sum((2, 3))
    assert set(maps.round(decimals=4).unique().tolist()) <= {0.0, 1.0}
    mean = lively(tiny("ats", False, dict(keep_rate=0.8, places=[1, 2]))).eval()
    whole = mean(images)
    mean.reduction.trim = True
    torch.testing.assert_close(mean(images), whole, rtol=1e-4, atol=1e-5)


def test_defaults_and_refusals() -> None:
    assert ATS(8, depth=12, class_token=True).places == tuple(range(3, 12))
    assert ATS(8, depth=4, class_token=False).score == "attention"
    with pytest.raises(ValueError, match="class_token=True"):
        ATS(8, depth=4, class_token=False, score="class")
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        ATS(8, depth=4, class_token=True, keep_rate=0.0)
    state = State(torch.zeros(1, 4, dtype=torch.long))
    tokens = torch.randn(1, 5, 8)
    assert ATS(8, depth=4, class_token=True).finish(tokens, state) is tokens
