"""EViT and top-k on the plain ViT against a plain-loop reading of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_reducers import lively, token_counts
from torch import nn

from stvit.models import SemanticTokenViT
from stvit.models.block import Block
from stvit.models.reducers import EViT, TopK


@pytest.mark.parametrize(("keep_rate", "fuse"), [(0.5, True), (0.3, True), (0.7, False)])
def test_evit_equals_a_loop(keep_rate: float, fuse: bool) -> None:
    method = EViT(8, depth=1, class_token=True, keep_rate=keep_rate, places=[0], fuse=fuse)
    block = lively(Block(8, 2)).eval()
    x = torch.randn(2, 11, 8)
    out, state = method.layer(0, block, x, method.begin(x))
    count = math.ceil(keep_rate * 10)
    for b in range(2):
        weights = block.attention_weights(x[b : b + 1], x[b : b + 1])[0]  # (heads, T, T)
        attention = sum(weights[head][0] for head in range(2)) / 2
        half = x[b] + block.attn(block.norm1(x[b : b + 1]))[0]
        ranked = sorted(range(1, 11), key=lambda i: -attention[i].item())
        kept, rest = sorted(ranked[:count]), ranked[count:]
        tokens = [half[0], *(half[i] for i in kept)]
        if fuse:
            tokens.append(sum(attention[i] * half[i] for i in rest))
        expected = torch.stack(tokens)
        torch.testing.assert_close(out[b], expected + block.mlp(block.norm2(expected)), rtol=1e-4, atol=1e-5)
        places = {i: kept.index(i) if i in kept else (count if fuse else -1) for i in range(1, 11)}
        assert state.source[b].tolist() == [places[i] for i in range(1, 11)]


def test_evit_keeps_the_published_numbers_of_tokens() -> None:
    model = SemanticTokenViT(
        img_size=224, embed_dim=8, num_heads=1, tokens="evit", class_token=True, num_classes=2
    ).eval()
    sizes = token_counts(model, torch.randn(1, 3, 224, 224))
    # 196 -> 138 + fused -> 98 + fused -> 70 + fused, after the class token
    assert sizes == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3


@pytest.mark.parametrize("score", ["norm", "attention"])
def test_scores_without_class_token(score: str) -> None:
    method = TopK(8, depth=1, class_token=False, keep_rate=0.4, places=[0], score=score)
    block = lively(Block(8, 2)).eval()
    x = torch.randn(1, 10, 8)
    _, state = method.layer(0, block, x, method.begin(x))
    half = x + block.attn(block.norm1(x))
    value = half[0].norm(dim=-1) if score == "norm" else block.attention_weights(x, x)[0].sum(dim=(0, 1))
    best = sorted(range(10), key=lambda i: -value[i].item())[:4]
    assert {i for i in range(10) if state.source[0, i] >= 0} == set(best)
    assert TopK(8, depth=4, class_token=False).score == "norm" and TopK(8, depth=4, class_token=True).score == "class"


def test_a_fused_token_without_class_token_is_a_weighted_mean() -> None:
    method = EViT(8, depth=1, class_token=False, keep_rate=0.5, places=[0], score="norm")
    block = Block(8, 2).eval()
    nn.init.zeros_(block.mlp.fc2.weight)
    x = torch.randn(1, 10, 8)
    out, state = method.layer(0, block, x, method.begin(x))
    half = (x + block.attn(block.norm1(x)))[0]
    rest = [i for i in range(10) if state.source[0, i] == 5]
    lengths = half[rest].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out[0, 5], (half[rest] * lengths).sum(0) / lengths.sum() + block.mlp.fc2.bias)
