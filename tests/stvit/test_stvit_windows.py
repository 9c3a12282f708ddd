"""Windows of any map: splitting, attention inside them, tokens of windows and recovery."""

from __future__ import annotations

import itertools

import pytest
import torch

from stvit.models import Attention, TokenRecovery, WindowTokenGenerator, WindowTokenRecovery
from stvit.models.key_windows import KeyWindows, WindowKeys
from stvit.models.pooling import adaptive_cells
from stvit.models.window_attention import METHODS, window_attention
from stvit.models.windows import merge_windows, split_windows, valid_cells


def test_windows_split_and_merge_back() -> None:
    x = torch.randn(2, 24, 3)
    windows = split_windows(x, (4, 6), 2)
    assert windows.shape == (12, 4, 3)
    assert torch.equal(windows[1, 0], x[0, 2])
    assert torch.equal(merge_windows(windows, (4, 6), 2), x)


def test_valid_cells_count_cells_with_real_positions() -> None:
    for size, window, cells in itertools.product(range(1, 22), (5, 7), (2, 3, 4)):
        count = -(-size // window)
        real = sum(
            w * window + start < size for w in range(count) for start, _ in adaptive_cells(window, cells)
        )  # fmt: skip
        assert valid_cells(size, window, cells) == real


@pytest.mark.parametrize(
    ("grid", "key_grid", "windows"),
    [
        ((6, 6), (10, 12), KeyWindows(queries=3, size=14, stride=7)),
        ((6, 9), (14, 17), KeyWindows(queries=3, size=10, stride=7)),
        ((10, 17), (6, 9), KeyWindows(queries=7, size=5, stride=3)),
        ((3, 3), (4, 5), KeyWindows(queries=3, size=21, stride=7)),
        ((24, 17), (12, 9), KeyWindows(queries=7, size=6, stride=3)),
    ],
)
def test_window_attention_equals_one_query_at_a_time(
    grid: tuple[int, int], key_grid: tuple[int, int], windows: KeyWindows
) -> None:
    attention = Attention(8, 2)
    valid = (key_grid[0] - 1, key_grid[1] - 1)
    x, y = torch.randn(2, grid[0] * grid[1], 8), torch.randn(2, key_grid[0] * key_grid[1], 8)
    expected = torch.empty_like(x)
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        top, left = (place // windows.queries * windows.stride - windows.before for place in (row, column))
        seen = [
            r * key_grid[1] + c
            for r in range(max(top, 0), min(top + windows.size, valid[0]))
            for c in range(max(left, 0), min(left + windows.size, valid[1]))
        ]
        here = row * grid[1] + column
        expected[:, here : here + 1] = attention(x[:, here : here + 1], y[:, seen])
    keys = WindowKeys(windows, grid, key_grid, valid)
    for method in METHODS:
        got = window_attention(attention, x, y, keys, method=method)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gather, masked"):
        window_attention(attention, x, y, keys, method="dense")


@pytest.mark.parametrize("pool", ["max", "avg", "weighted_offset"])
@pytest.mark.parametrize("hw", [(14, 14), (10, 12), (5, 23)])
def test_window_tokens_of_any_map(hw: tuple[int, int], pool: str) -> None:
    generator = WindowTokenGenerator(8, 2, pool=pool, norm_eps=1e-5).eval()
    recovery = WindowTokenRecovery(8, 2, norm_eps=1e-5).eval()
    x = torch.randn(2, hw[0] * hw[1], 8)
    tokens = generator(x, hw)
    grid = generator.token_grid(hw)
    assert grid == (-(-hw[0] // 7) * 3, -(-hw[1] // 7) * 3)
    assert tokens.shape == (2, grid[0] * grid[1], 8)
    assert torch.allclose(generator(x[:1], hw), tokens[:1], atol=1e-5)
    back = recovery(x, hw, tokens)
    assert back.shape == x.shape and back.isfinite().all()


def test_window_tokens_read_their_key_window_only() -> None:
    generator = WindowTokenGenerator(8, 2, key_windows=(9,)).eval()
    x = torch.randn(1, 21 * 21, 8)
    changed = x.clone()
    changed[:, 0] = torch.randn(8)  # image token (0, 0)
    moved = (generator(changed, (21, 21)) - generator(x, (21, 21))).abs().sum(-1).reshape(9, 9) > 1e-6
    assert moved[:3, :3].all() and moved.sum() == 9


def test_tokens_of_padding_are_never_recovered_from() -> None:
    recovery = WindowTokenRecovery(8, 2).eval()
    x, tokens = torch.randn(1, 8 * 7, 8), torch.randn(1, 6 * 3, 8)
    junk = tokens.clone().reshape(6, 3, 8)
    junk[4:] = 1e3  # 8 rows: of the second window only the first cell holds a real position
    assert torch.equal(recovery(x, (8, 7), junk.reshape(1, 18, 8)), recovery(x, (8, 7), tokens))


def test_global_recovery_reads_all_tokens() -> None:
    recovery = TokenRecovery(8, 2).eval()
    x, tokens = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    changed = tokens.clone()
    changed[:, 2] = torch.randn(8)
    assert ((recovery(x, changed) - recovery(x, tokens)).abs().sum(-1) > 1e-5).all()
