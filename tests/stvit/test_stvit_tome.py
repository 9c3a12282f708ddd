"""ToMe on the plain ViT against a plain-loop reading of its paper."""

from __future__ import annotations

import pytest
import torch
from tiny_reducers import lively, tiny, with_and_without_class_token
from torch import Tensor, nn

from stvit.interop.token_reduction import sparsify
from stvit.models.reducers.tome import bipartite_places, merge_schedule, merge_tokens


def loop_merge(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching of one sequence with lists: tokens `(T, C)`, sizes `(T,)`, metric `(T, d)`."""
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in first:
        if i < prefix:
            continue
        cosine = {j: float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in second}
        partner = max(cosine, key=cosine.get)
        edges.append((cosine[partner], i, partner))
    edges = sorted(edges, reverse=True)[:r]
    groups = {j: [j] for j in second}
    for _, i, j in edges:
        groups[j].append(i)
    gone = {i for _, i, _ in edges}
    members = [[i] for i in first if i not in gone] + [groups[j] for j in second]
    means = [sum(x[i] * size[i] for i in group) / sum(size[i] for i in group) for group in members]
    return torch.stack(means), torch.stack([sum(size[i] for i in group) for group in members])


@pytest.mark.parametrize(("tokens", "r", "prefix"), [(10, 3, 0), (11, 5, 0), (11, 5, 1), (12, 5, 1), (2, 1, 0)])
def test_merging_equals_a_loop(tokens: int, r: int, prefix: int) -> None:
    x, metric = torch.randn(3, tokens, 6), torch.randn(3, tokens, 4)
    size = torch.randint(1, 5, (3, tokens)).float()
    merged, sizes = merge_tokens(x, size, bipartite_places(metric, r, prefix), r)
    assert merged.shape == (3, tokens - r, 6)
    for b in range(3):
        expected, counts = loop_merge(x[b], size[b], metric[b], r, prefix)
        torch.testing.assert_close(merged[b], expected)
        assert torch.equal(sizes[b], counts)
    if prefix:
        torch.testing.assert_close(merged[:, 0], x[:, 0])


@with_and_without_class_token
@pytest.mark.parametrize("proportional", [True, False])
def test_tome_equals_a_loop_over_layers(class_token: bool, proportional: bool) -> None:
    """Half layers by hand, merging by the loop above, sizes as repeated keys."""
    model = lively(tiny("tome", class_token, dict(r=[9, 0, 12, 40], proportional=proportional))).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        x, _ = model.forward_stem(image)
        x, size, prefix = x[0], torch.ones(x.shape[1]), int(class_token)
        for layer, r in zip([*model.base, *model.reducer.layers, *model.tail], model.reduction.merges, strict=True):
            normed = layer.norm1(x)
            q, k, v = (
                part.reshape(len(x), 2, 16).transpose(0, 1)
                for part in (layer.attn.q(normed), *layer.attn.kv(normed).chunk(2, dim=-1))
            )
            times = size.long() if proportional else torch.ones(len(x), dtype=torch.long)
            keys, values = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
            attended = (q @ keys.transpose(1, 2) / 4).softmax(-1) @ values
            x = x + layer.attn.proj(attended.transpose(0, 1).reshape(len(x), 32))
            r = min(r, (len(x) - prefix) // 2)
            x, size = loop_merge(x, size, k.mean(0), r, prefix) if r else (x, size)
            x = x + layer.mlp(layer.norm2(x))
        x = model.norm(x)
        pooled = x[0] if class_token else (x * size[:, None]).sum(0) / size.sum()
        assert size.sum() == 64 + prefix
        assert len(x) == 64 + prefix - 9 - 12 - 21
        torch.testing.assert_close(model(image)[0], model.head(pooled), rtol=1e-4, atol=1e-4)


def test_merging_twins_changes_nothing() -> None:
    """Where neighbours are equal, a merged token of size two is both of them: the full model's logits."""
    full = lively(tiny("all"))
    nn.init.zeros_(full.pos_embed)
    merging = sparsify(full, "tome", r=[32, 0, 0, 0]).eval()
    careless = sparsify(full, "tome", r=[32, 0, 0, 0], proportional=False).eval()
    patches = torch.randn(2, 3, 8, 4, 4, 4)  # rows and columns of patches, pixels of a patch
    images = patches.repeat_interleave(2, dim=3).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    logits = full.eval()(images)
    torch.testing.assert_close(merging(images), logits, rtol=1e-4, atol=1e-4)
    # Of equal twins each counts alike, so only sizes that differ need proportional attention.
    torch.testing.assert_close(careless(images), logits, rtol=1e-4, atol=1e-4)
    some = sparsify(full, "tome", r=[9, 0, 0, 0]).eval()
    torch.testing.assert_close(some(images), logits, rtol=1e-4, atol=1e-4)
    some.reduction.proportional = False
    assert (some(images) - logits).abs().max() > 1e-3


def test_no_merging_is_the_full_model() -> None:
    full = lively(tiny("all", True)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(sparsify(full, "tome", r=0)(images), full(images))


def test_merge_schedules() -> None:
    assert merge_schedule(13, 12) == [13] * 12
    assert merge_schedule(1.5, 4) == [2, 1, 2, 1]
    assert sum(merge_schedule(7.25, 12)) == 87
    down, up = merge_schedule(8, 12, -1.0), merge_schedule(8, 12, 1.0)
    assert down == up[::-1] or sum(down) == sum(up) == 96
    assert down[0] == 16 and down[-1] == 0 and sorted(down, reverse=True) == down
    assert up[0] == 0 and up[-1] == 16 and sorted(up) == up
