"""Controls of semantic tokens in models with windows: pooled centres and random tokens on the same grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stvit.models import STViTRSwin, STViTSwin
from stvit.models.reducers.windowed import PooledWindowTokens, RandomWindowTokens
from stvit.models.windows import into_windows
from tests.gradients import unreached

TINY = dict(num_classes=5, embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 1, 2, 2), window_size=4, per_window=2)


def swin(tokens: str, **options: object) -> STViTSwin:
    return STViTSwin(128, **(TINY | options), tokens=tokens, key_windows=(6, 6))


def recovered(tokens: str, **options: object) -> STViTRSwin:
    return STViTRSwin(128, **(TINY | dict(layer_scale=0.5) | options), tokens=tokens, key_windows=(6, None, None))


each_control = pytest.mark.parametrize("tokens", ["pooled", "random"])


@each_control
@pytest.mark.parametrize("build", [swin, recovered])
def test_controls_take_the_place_of_semantic_tokens(build: object, tokens: str) -> None:
    model = build(tokens)
    semantic = build("semantic")
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in semantic.named_parameters()}
    model.load_state_dict(semantic.state_dict())
    images = torch.randn(2, 3, 128, 128)
    assert (model.eval()(images) - semantic.eval()(images)).abs().max() > 1e-5
    for height, width in ((128, 128), (96, 160), (75, 133)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, 5)
    model.train()(images).square().sum().backward()
    assert unreached(model) == []


@each_control
def test_dense_backbones_have_controls(tokens: str) -> None:
    model = STViTRSwin(128, **TINY, tokens=tokens, features_only=True).eval()
    maps = model(torch.randn(1, 3, 75, 133))
    assert [m.shape[1] for m in maps] == [16, 32, 64, 128]
    with pytest.raises(ValueError, match="tokens='semantic'"):
        model.token_maps(torch.randn(1, 3, 64, 64))


def test_pooled_tokens_are_self_attention_of_centres() -> None:
    control = PooledWindowTokens(8, 2, window=4, per_window=2, pool="avg").eval()
    x = torch.randn(2, 64, 8)
    centres = nn.functional.avg_pool2d(x.transpose(1, 2).reshape(2, 8, 8, 8), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(control.centres(x, (8, 8)), centres)
    local = control.layers[0](centres, grid=(4, 4))
    torch.testing.assert_close(control(x, (8, 8)), control.layers[1](local))
    started = torch.randn(2, 16, 8)
    torch.testing.assert_close(control(x, (8, 8), started), control.layers(started, control.tokens_of((8, 8))))


def cells_of(x: Tensor, hw: tuple[int, int], window: int, per_window: int) -> list[tuple[int, int, list[int]]]:
    """Row and column on the token grid, and the raster places of the real positions of every cell."""
    cells = []
    rows, columns = -(-hw[0] // window), -(-hw[1] // window)
    edges = [i * window // per_window for i in range(per_window + 1)]
    for i in range(rows * per_window):
        for j in range(columns * per_window):
            inside = [
                [w * window + p for p in range(edges[c], edges[c + 1])]
                for w, c in (divmod(i, per_window), divmod(j, per_window))
            ]
            places = [r * hw[1] + c for r in inside[0] for c in inside[1] if r < hw[0] and c < hw[1]]
            cells.append((i, j, places))
    return cells


@pytest.mark.parametrize(
    ("hw", "window", "per_window"), [((8, 8), 4, 2), ((14, 14), 7, 3), ((9, 6), 4, 3), ((7, 11), 4, 2)]
)
@pytest.mark.parametrize("training", [False, True])
def test_random_tokens_are_one_of_every_cell(hw: tuple[int, int], window: int, per_window: int, training: bool) -> None:
    control = RandomWindowTokens(4, 1, window=window, per_window=per_window).train(training)
    x = torch.randn(3, hw[0] * hw[1], 4)
    kept = control.centres(x, hw)
    grid = control.token_grid(hw)
    assert kept.shape == (3, grid[0] * grid[1], 4)
    for i, j, places in cells_of(x, hw, window, per_window):
        for b in range(3):
            token = kept[b, i * grid[1] + j]
            if places:
                assert (x[b, places] == token).all(dim=1).any(), (i, j)
            else:
                assert token.abs().sum() == 0


def test_random_tokens_repeat_in_evaluation_and_vary_in_training() -> None:
    control = RandomWindowTokens(4, 1, window=4, per_window=2)
    x = torch.randn(1, 16 * 16, 4).repeat(2, 1, 1)
    drawn = control.train().centres(x, (16, 16))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, control.centres(x, (16, 16)))
    kept = control.eval().centres(x, (16, 16))
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept, control.centres(x, (16, 16)))
    other = RandomWindowTokens(4, 1, window=4, per_window=2, seed=1).eval().centres(x, (16, 16))
    assert not torch.equal(kept, other)
    # Not the same place in every window: windows have choices of their own.
    places = [(into_windows(x[:1], (16, 16), 4)[w] == kept[0, t]).all(1).nonzero()[0, 0].item()
              for w, t in ((0, 0), (1, 2), (2, 4), (3, 6), (5, 18), (6, 20))]  # fmt: skip
    assert len(set(places)) > 1


@pytest.mark.parametrize("tokens", ["tome", "evit", "topk", "dynamicvit"])
@pytest.mark.parametrize("build", [swin, recovered])
def test_methods_that_break_the_grid_say_why(build: object, tokens: str) -> None:
    with pytest.raises(ValueError, match=rf"tokens='{tokens}' does not go with windows: .*regular grid.*pooled"):
        build(tokens)
    with pytest.raises(ValueError, match="SwinTransformer"):
        build("all")
    with pytest.raises(ValueError, match="no such method"):
        build("luck")


@pytest.mark.compile
def test_random_tokens_compile_without_graph_breaks() -> None:
    control = RandomWindowTokens(8, 2, window=4, per_window=2, depth=1).eval()
    x = torch.randn(2, 72, 8)
    torch._dynamo.reset()
    compiled = torch.compile(control, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, (12, 6)), control(x, (12, 6)))
