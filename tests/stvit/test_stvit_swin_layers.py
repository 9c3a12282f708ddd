"""Layers of Swin and STViT-R-Swin: held against timm and against the released layers written out window by window."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor, nn

from stvit.checkpoint import convert
from stvit.models import Attention, Block, SwinBlock, SwinTransformer, WindowTokenGenerator, WindowTokenRecovery
from stvit.models.attention import relative_bias, relative_position_index
from stvit.models.derived import derived
from stvit.models.dumbbell import SemanticLayers
from stvit.models.key_windows import KeyWindows, WindowKeys
from stvit.models.window_attention import METHODS, choose, window_attention
from stvit.models.window_tokens import TokenGrid
from stvit.models.windows import crop_grid, into_windows, out_of_windows
from tests.gradients import unreached

# Maps of image tokens: whole windows, padding at the bottom, at the right, at both, less than one window.
MAPS = [(14, 14), (10, 14), (14, 10), (10, 12), (15, 15), (8, 23), (3, 5), (21, 9)]
each_map = pytest.mark.parametrize("hw", MAPS, ids=str)


# ------------------------------------------------------------------------------------ Swin


@pytest.mark.parametrize("size", [(128, 128), (128, 192)])  # timm pads shifted maps after rolling them, others before
def test_swin_equals_timm(size: tuple[int, int]) -> None:
    sizes = dict(embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4), num_classes=3)
    theirs = TimmSwin(img_size=size, window_size=4, **sizes).eval()
    ours = SwinTransformer(img_size=size, window_size=4, **sizes).eval()
    ours.load_state_dict(convert(theirs.state_dict(), ours))
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    maps = theirs.forward_intermediates(images, intermediates_only=True)
    for got, expected in zip(ours.forward_intermediates(images, intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def randomised(module: nn.Module) -> nn.Module:
    """Nothing at its neutral value: norms have biases, scales differ."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    return module.double().eval()


def reachable(block: SwinBlock, hw: tuple[int, int], token: int) -> list[int]:
    """Tokens that change when one does."""
    block = randomised(block)
    x = torch.randn(1, hw[0] * hw[1], 8).double()
    changed = x.clone()
    changed[:, token] += torch.randn(8)
    moved = (block(changed, hw) - block(x, hw)).abs().sum(-1)[0] > 1e-12
    return moved.nonzero().flatten().tolist()


def test_plain_windows_mix_inside_themselves() -> None:
    block = SwinBlock(8, 2, window=3)
    assert reachable(block, (6, 6), 0) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert reachable(block, (4, 5), 19) == [18, 19]  # a window cut off by the map's edge


def test_shifted_windows_never_wrap_around() -> None:
    block = SwinBlock(8, 2, window=4, shift=2)
    assert reachable(block, (8, 8), 0) == [0, 1, 8, 9]  # the corner piece of the rolled map
    inside = [8 * r + c for r in range(2, 6) for c in range(2, 6)]
    assert reachable(block, (8, 8), 27) == inside


def test_small_maps_are_one_window_without_shift() -> None:
    block = SwinBlock(8, 2, window=4, shift=2)
    assert reachable(block, (3, 4), 0) == list(range(12))
    # As in the detection code: a window of its own, shifted, so that the map falls into pieces.
    fixed = SwinBlock(8, 2, window=4, shift=2, fixed_window=True)
    assert reachable(fixed, (4, 4), 0) == [0, 1, 4, 5]


def test_small_windows_use_the_offsets_that_occur() -> None:
    table = torch.randn(7 * 7, 2)
    assert torch.equal(relative_bias(table, (4, 4), (4, 4)), table[relative_position_index(4, 4)].permute(2, 0, 1))
    big, small = relative_bias(table, (4, 4), (4, 4)), relative_bias(table, (4, 4), (2, 3))
    # Two tokens one step apart have the same bias in either raster.
    torch.testing.assert_close(small[:, 0, 1], big[:, 0, 1])
    torch.testing.assert_close(small[:, 0, 3], big[:, 0, 4])
    # A larger raster resamples the table; the centre keeps its value.
    torch.testing.assert_close(relative_bias(table, (4, 4), (5, 6))[:, 0, 0], table[24], rtol=0, atol=1e-5)


def test_swin_blocks_refuse_impossible_shifts() -> None:
    with pytest.raises(ValueError, match="below window=4"):
        SwinBlock(8, 2, window=4, shift=4)
    with pytest.raises(ValueError, match="equal size"):
        SwinBlock(8, 3)


# ------------------------------------------------------------------------------------ geometry of key windows


def test_key_windows_are_centred_or_moved_inside() -> None:
    def starts(windows: KeyWindows, keys: int) -> list[int]:
        return windows.starts(windows.count((keys // 7 * 3,) * 2)[0], keys, torch.device("cpu")).tolist()

    assert starts(KeyWindows(3, 14, 7), 21) == [-3, 4, 11]
    assert starts(KeyWindows(3, 21, 7), 14) == [-7, 0]
    # The released classifier unfolds windows of 10 with stride 4 from its 14x14 map.
    assert starts(KeyWindows(3, 10, 7, inside=True), 14) == [0, 4] == starts(KeyWindows(3, 10, 4, lead=0), 14)
    assert starts(KeyWindows(3, 10, 7, inside=True), 28) == [0, 6, 13, 18]
    assert starts(KeyWindows(3, 10, 7, inside=True), 7) == [0]


@pytest.mark.parametrize("released", [None, "official", "none"])
@pytest.mark.parametrize("own", [False, True])
def test_all_methods_agree(released: str | None, own: bool) -> None:
    attention = Attention(8, 2).double()
    for (grid, key_grid), size in itertools.product([((9, 6), (16, 13)), ((6, 9), (14, 20))], (6, 10, 21)):
        windows = KeyWindows(3, size, 7)
        where = TokenGrid(key_grid, 7, 3)
        keys = WindowKeys(
            windows,
            grid,
            key_grid,
            (key_grid[0] - 1, key_grid[1] - 2),
            None if released is None else where.released(released, where.padded),
            (grid[0] - 1, grid[1]) if own else None,
        )
        x, y = torch.randn(2, 54, 8).double(), torch.randn(2, key_grid[0] * key_grid[1], 8).double()
        more = dict(own=x.flip(1) if own else None, padding=torch.randn(8).double())
        results = [window_attention(attention, x, y, keys, method=method, **more) for method in METHODS]
        for got in results[1:]:
            torch.testing.assert_close(got, results[0], rtol=1e-6, atol=1e-6)


def test_methods_are_chosen_by_size_and_device() -> None:
    def keys(size: int, key_grid: tuple[int, int]) -> WindowKeys:
        where = TokenGrid(key_grid, 7, 3)
        return WindowKeys(KeyWindows(3, size, 7), where.size, key_grid, key_grid)

    assert choose(keys(14, (14, 14)), "cpu") == "masked"
    assert choose(keys(14, (50, 80)), "cpu") == "banded"
    assert choose(keys(14, (50, 80)), "cuda") == "gather"
    assert choose(keys(14, (14, 14)), "cuda") == "masked"


# ------------------------------------------------------------------------------------ the released dense layers


def attend(layer: Block, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """`Attention` of normalised tokens, written out: `(n, q, C)` on `(n, k, C)` with an additive `(n, k)` mask."""
    heads = layer.attn.num_heads
    q = rearrange(layer.attn.q(layer.norm1(queries)), "n q (h d) -> n h q d", h=heads)
    k, v = rearrange(layer.attn.kv(layer.norm1(keys)), "n k (two h d) -> two n h k d", two=2, h=heads)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask[:, None, None]
    return layer.attn.proj(rearrange(scores.softmax(-1) @ v, "n h q d -> n q (h d)"))


def released_windows(keys: Tensor, size: int, stride: int, bottom: int, right: int, masked: bool) -> tuple[Tensor, ...]:
    """Windows of `(B, H, W, C)` keys as the release cuts them, and its mask with all its quirks."""
    lead, rest = (size - stride) // 2, -((stride - size) // 2)
    mask = torch.zeros(keys.shape[:3], dtype=keys.dtype)
    mask[:, -bottom:, -right:] = -1000
    mask = F.pad(mask, (lead, rest, lead, rest), value=-1000)
    keys = F.pad(keys, (0, 0, lead, rest, lead, rest))

    def cut(maps: Tensor) -> Tensor:
        return rearrange(maps.unfold(1, size, stride).unfold(2, size, stride), "b i j ... -> (b i j) ...")

    keys = rearrange(cut(keys), "n c kh kw -> n (kh kw) c")
    return keys, rearrange(cut(mask), "n kh kw -> n (kh kw)") if masked else None


def released_generation(layer: Block, x: Tensor, hw: tuple[int, int], s: int, size: int, masked: bool) -> Tensor:
    bottom, right = -hw[0] % 7, -hw[1] % 7
    x = F.pad(rearrange(x, "b (h w) c -> b h w c", h=hw[0]), (0, 0, 0, right, 0, bottom))
    nh, nw = x.shape[1] // 7, x.shape[2] // 7
    windows = rearrange(x, "b (nh wh) (nw ww) c -> (b nh nw) c wh ww", nh=nh, nw=nw)
    centres = F.adaptive_max_pool2d(windows, s).flatten(2).transpose(1, 2)
    keys, mask = released_windows(x, size, 7, bottom, right, masked)
    y = centres + layer.ls1(attend(layer, centres, keys, mask))
    y = rearrange(y, "(b nh nw) (wh ww) c -> b (nh wh nw ww) c", nh=nh, nw=nw, wh=s)
    return y + layer.ls2(layer.mlp(layer.norm2(y)))


def released_recovery(
    layer: Block, x: Tensor, hw: tuple[int, int], tokens: Tensor, s: int, size: int, masked: bool
) -> Tensor:
    bottom, right = -hw[0] % 7, -hw[1] % 7
    windows = into_windows(x, hw, 7)
    tokens = rearrange(tokens, "b (h w) c -> b h w c", h=(hw[0] + bottom) // 7 * s)
    keys, mask = released_windows(tokens, size, s, bottom, right, masked)
    y = x + layer.ls1(out_of_windows(attend(layer, windows, keys, mask), hw, 7))
    return y + layer.ls2(layer.mlp(layer.norm2(y)))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("s", "size"), [(3, 14), (2, 9), (4, 21), (3, 7)])
@each_map
def test_official_generation_is_the_released_one(hw: tuple[int, int], s: int, size: int, masked: bool) -> None:
    mode = "official" if masked else "none"
    generator = randomised(
        WindowTokenGenerator(4, 2, per_window=s, key_windows=(size,), mask_mode=mode, layer_scale=1.0, norm_eps=1e-5)
    )
    x = torch.randn(2, hw[0] * hw[1], 4).double()
    expected = released_generation(generator.layers[0], x, hw, s, size, masked)
    for method in METHODS:
        generator.layers[0].method = method
        torch.testing.assert_close(generator(x, hw), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("s", "size"), [(3, 27), (3, 9), (2, 4), (4, 11)])
@each_map
def test_official_recovery_is_the_released_one(hw: tuple[int, int], s: int, size: int, masked: bool) -> None:
    mode = "official" if masked else "none"
    recovery = randomised(
        WindowTokenRecovery(4, 2, per_window=s, key_window=size, mask_mode=mode, layer_scale=1.0, norm_eps=1e-5)
    )
    grid = TokenGrid(hw, 7, s).size
    x, tokens = torch.randn(2, hw[0] * hw[1], 4).double(), torch.randn(2, grid[0] * grid[1], 4).double()
    expected = released_recovery(recovery.layer, x, hw, tokens, s, size, masked)
    for method in METHODS:
        recovery.layer.method = method
        torch.testing.assert_close(recovery(x, hw, tokens), expected, rtol=1e-8, atol=1e-8)


def test_the_quirk_of_the_released_mask() -> None:
    windows = KeyWindows(3, 14, 7)

    def visible(hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        where = TokenGrid(hw, 7, 3)
        padding = where.released("official", where.padded)
        return padding.visible(windows, windows.count(where.size), hw, torch.device("cpu"))

    # Whole windows: `-0` selects all, so nothing is masked and zeros around the map are attended.
    seen, zeros = visible((14, 14))
    assert seen.sum() + zeros.sum() == 4 * 14 * 14 and zeros.tolist() == [[75, 86], [86, 96]]
    # Padding at the bottom alone: as intended.
    assert not visible((10, 14))[1].any()
    # At both: the corner alone is masked. The window (1, 1) sees columns and rows 4 to 13 of the padded map.
    seen, zeros = visible((10, 12))
    assert seen[1, 1].sum() == 6 * 8 and zeros[1, 1] == 10 * 10 - 6 * 8 - 4 * 2


# ------------------------------------------------------------------------------------ exact masks


def with_junk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding of maps filled with large numbers instead of zeros."""
    import stvit.models.windows as module

    plain = module.pad_grid

    def pad_grid(x: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
        padded = plain(x, grid, to)
        if x.dtype == torch.bool or grid == to:
            return padded
        real = plain(torch.ones_like(x[..., :1]), grid, to).bool()
        return torch.where(real, padded, torch.full_like(padded, 1e3))

    monkeypatch.setattr(module, "pad_grid", pad_grid)


@pytest.mark.parametrize("pool", ["max", "avg", "weighted", "weighted_offset"])
@pytest.mark.parametrize("mode", ["concat", "window"])
@pytest.mark.parametrize("hw", [(10, 12), (8, 21), (3, 5)], ids=str)
def test_exact_generation_never_reads_padding(
    hw: tuple[int, int], mode: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = (10, None) if mode == "concat" else (14, 21)
    generator = WindowTokenGenerator(8, 2, key_windows=windows, key_mode=mode, pool=pool, norm_eps=1e-5).eval()
    x = torch.randn(1, hw[0] * hw[1], 8)
    where = generator.tokens_of(hw)
    clean = crop_grid(generator(x, hw), where.size, where.valid)
    with_junk(monkeypatch)
    junk = crop_grid(generator(x, hw), where.size, where.valid)
    torch.testing.assert_close(junk, clean)


def test_official_generation_reads_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = WindowTokenGenerator(8, 2, mask_mode="official").eval()
    x = torch.randn(1, 120, 8)
    clean = generator(x, (10, 12))
    with_junk(monkeypatch)
    assert (generator(x, (10, 12)) - clean).abs().max() > 1


def test_tokens_of_padding_are_read_by_no_semantic_layer() -> None:
    where = TokenGrid((8, 12), 7, 3)  # the second row of windows has one real row, the second column five
    assert where.size == (6, 6) and where.valid == (4, 6)
    tokens = torch.randn(1, 6, 6, 8)
    junk = tokens.clone()
    junk[:, 4:] = 1e3
    for pattern, relative in itertools.product(("alternate", "local", "global"), (None, (6, 6))):
        layers = SemanticLayers(8, 2, [0.0, 0.0], local_global=pattern, relative_grid=relative, norm_eps=1e-5).eval()
        got, expected = (layers(t.flatten(1, 2), where).reshape(1, 6, 6, 8)[:, :4] for t in (junk, tokens))
        torch.testing.assert_close(got, expected)
    recovery = WindowTokenRecovery(8, 2, key_window=None, norm_eps=1e-5).eval()
    x = torch.randn(1, 96, 8)
    got, expected = (recovery(x, (8, 12), t.flatten(1, 2)) for t in (junk, tokens))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["concat", "window"])
def test_tokens_read_their_key_window_only(mode: str) -> None:
    generator = randomised(WindowTokenGenerator(8, 2, key_windows=(10, 12), key_mode=mode))
    hw = (28, 28)
    x = torch.randn(1, 784, 8).double()
    changed = x.clone()
    changed[:, 0] += torch.randn(8)
    moved = (generator(changed, hw) - generator(x, hw)).abs().sum(-1).reshape(12, 12) > 1e-12
    assert moved[:3, :3].all() and moved.sum() == 9
    # A token in the middle is read from the windows around it too, but from no farther.
    changed = x.clone()
    changed[:, 14 * 28 + 14] += torch.randn(8)
    moved = (generator(changed, hw) - generator(x, hw)).abs().sum(-1).reshape(12, 12) > 1e-12
    assert moved[3:9, 3:9].sum() == moved.sum() > 9


def test_concat_reads_the_tokens_of_the_own_window() -> None:
    generator = randomised(WindowTokenGenerator(8, 2, key_windows=(10,), key_mode="concat", shortcut=False))
    x, tokens = torch.randn(1, 196, 8).double(), torch.randn(1, 36, 8).double()
    changed = tokens.clone()
    changed[:, 35] += torch.randn(8)
    moved = (generator(x, (14, 14), changed) - generator(x, (14, 14), tokens)).abs().sum(-1).reshape(6, 6) > 1e-12
    assert moved[3:, 3:].all() and moved.sum() == 9
    window = randomised(WindowTokenGenerator(8, 2, key_windows=(10,), key_mode="window"))
    moved = (window(x, (14, 14), changed) - window(x, (14, 14), tokens)).abs().sum(-1)[0] > 1e-12
    assert moved.nonzero().flatten().tolist() == [35]


def test_position_encoding_stays_inside_windows() -> None:
    generator = randomised(WindowTokenGenerator(8, 2, key_windows=(14,), use_conv_pos=True))
    tokens = torch.randn(1, 36, 8).double()
    changed = tokens.clone()
    changed[:, 0] += torch.randn(8)
    x = torch.randn(1, 196, 8).double()
    moved = (generator(x, (14, 14), changed) - generator(x, (14, 14), tokens)).abs().sum(-1).reshape(6, 6) > 1e-12
    assert moved[:2, :2].all() and moved.sum() == 4


def test_global_centres_of_another_grid_are_resampled() -> None:
    generator = WindowTokenGenerator(8, 2, key_windows=(10, None), key_mode="concat", use_global=True).eval()
    x = torch.randn(1, 21 * 14, 8)
    assert generator(x, (21, 14)).shape == (1, 9 * 6, 8)
    nn.init.constant_(generator.global_centres, 0.5)
    plain = WindowTokenGenerator(8, 2, key_windows=(10, None), key_mode="concat").eval()
    plain.load_state_dict({n: v for n, v in generator.state_dict().items() if n != "global_centres"})
    first = plain._layer(0, plain._start(x, (21, 14), None), x, (21, 14))
    expected = plain.layers[1](first + 0.5, [first, x])
    torch.testing.assert_close(generator(x, (21, 14)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(key_mode="both"), "'window' or 'concat'"),
        (dict(mask_mode="strict"), "exact, official, none"),
        (dict(global_in="value"), "query, key, both-units"),
        (dict(key_windows=(14,), use_global=True), "two layers"),
        (dict(use_global=True, global_in="key"), "key_mode='concat'"),
        (dict(pool="median"), "weighted_offset"),
    ],
)
def test_impossible_generators_say_what_to_do(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowTokenGenerator(8, 2, **options)


# ------------------------------------------------------------------------------------ derived tables


def _numbers(count: int, *, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def test_derived_tables_are_made_once_per_size_and_mode() -> None:
    like = torch.zeros(1)
    table = derived(_numbers, like, 5)
    assert derived(_numbers, like, 5) is table and derived(_numbers, like, 6) is not table
    assert derived(_numbers, torch.zeros(1, device="meta"), 5).device.type == "meta"
    with torch.inference_mode():
        inference = derived(_numbers, like, 5)
    # A table of inference mode cannot be saved for the backward pass.
    assert inference.is_inference() and not derived(_numbers, like, 5).is_inference()


def test_masks_of_inference_serve_training_afterwards() -> None:
    block = SwinBlock(8, 2, window=4, shift=2)
    generator = WindowTokenGenerator(8, 2, key_windows=(9,), window=5, per_window=2)
    x = torch.randn(1, 11 * 13, 8)
    with torch.inference_mode():
        block(x, (11, 13)), generator(x, (11, 13))
    (block(x, (11, 13)).sum() + generator(x, (11, 13)).sum()).backward()
    assert unreached(block) == unreached(generator) == []


def test_nothing_derived_is_in_the_state() -> None:
    names = [name for name, _ in SwinTransformer(embed_dim=8, num_heads=(1, 2, 4, 8)).named_buffers()]
    assert names == []
