"""Video Swin and its semantic tokens: costs, windows, masks, pooling per frame, weights from images."""

import itertools
import math
import re

import pytest
import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from torchvision.models.video import swin3d_s, swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformer3d

from core.profile.measure import count_macs
from stvit.checkpoint.state import CheckpointMismatch
from stvit.checkpoint.video import VIDEO_TARGETS, video_weights
from stvit.models.clip_block import ClipBlock
from stvit.models.clip_tokens import ClipTokenGenerator
from stvit.models.clip_windows import ClipWindows, pad_clip, relative_position_index
from stvit.models.stvit_video import STViTVideoSwin, stvit_video_swin_small, stvit_video_swin_tiny
from stvit.models.video_swin import VideoSwin, video_swin_small, video_swin_tiny
from tests.gradients import unreached

SMALL = dict(clip_size=(8, 56, 56), num_classes=5, embed_dim=16, num_heads=(2, 4), depths=(2, 2), window=(4, 7, 7))
SEMANTIC = dict(SMALL, depths=(2, 4, 2), num_heads=(2, 2, 4), base_depth=1, drop_path_rate=0.0)


def lively(model):
    """Weights that make every part count: positions, norms and biases are not at their neutral start."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return model.eval()


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------- size and cost


@pytest.mark.parametrize(
    ("build", "reference", "published", "gmacs"),
    [(video_swin_tiny, swin3d_t, 28.2e6, 87.9e9), (video_swin_small, swin3d_s, 49.8e6, 165.9e9)],
)
def test_video_swin_has_the_published_size_and_cost(build, reference, published, gmacs):
    model = on_meta(build)
    assert parameters(model) == parameters(on_meta(reference))
    assert parameters(model) == pytest.approx(published, rel=2e-3)
    counted = count_macs(model, (torch.zeros(1, 3, 32, 224, 224, device="meta"),))
    assert counted.total == pytest.approx(gmacs, rel=2e-3) and not counted.uncounted


def test_multiply_accumulates_by_hand():
    total, tokens = 0, 16 * 56 * 56
    total += tokens * 96 * 3 * 2 * 4 * 4
    for stage, depth in enumerate((2, 2, 6, 2)):
        dim = 96 << stage
        if stage:
            tokens //= 4
            total += tokens * 2 * dim * dim  # 4 * (dim / 2) channels in, dim out
        total += depth * tokens * (12 * dim**2 + 2 * 8 * 7 * 7 * dim)
    total += 768 * 400
    counted = count_macs(on_meta(video_swin_tiny), (torch.zeros(1, 3, 32, 224, 224, device="meta"),))
    assert counted.total == total


@pytest.mark.parametrize(
    ("plain", "semantic", "layers"),
    [(video_swin_tiny, stvit_video_swin_tiny, 3), (video_swin_small, stvit_video_swin_small, 7)],
)
def test_semantic_tokens_save_what_the_paper_says(plain, semantic, layers):
    clip = (torch.zeros(1, 3, 32, 224, 224, device="meta"),)
    base, ours = on_meta(plain), on_meta(semantic)
    change = count_macs(ours, clip).total / count_macs(base, clip).total - 1
    assert -0.28 < change <= -0.27
    # Nothing but the position tables of layers on semantic tokens is gone.
    tables = 15 * 13 * 13 * (layers * 12 + 2 * 24)
    assert parameters(ours) == parameters(base) - tables
    assert base.token_grid() == (16, 14, 14) and ours.token_grid() == (16, 6, 6)


def test_costs_fall_with_the_tokens_and_with_single_slices():
    clip = (torch.zeros(1, 3, 32, 224, 224, device="meta"),)
    costs = [count_macs(on_meta(stvit_video_swin_tiny, per_window=s), clip).total for s in (2, 3, 4)]
    assert costs == sorted(costs)
    assert count_macs(on_meta(stvit_video_swin_tiny, key_frames=1), clip).total < costs[1]


# ---------------------------------------------------------------------------- windows


def test_video_swin_is_torchvisions():
    theirs = lively(SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [4, 7, 7], num_classes=5))
    ours = VideoSwin(**SMALL).eval()
    ours.load_state_dict(video_weights(theirs.state_dict(), ours))
    for size in ((16, 56, 56), (4, 56, 112)):  # whole windows; the second is shorter than a window
        clip = torch.randn(2, 3, *size)
        assert torch.allclose(ours(clip), theirs(clip), atol=1e-5)
    padded = torch.randn(1, 3, 13, 58, 66)
    assert not torch.allclose(ours(padded), theirs(padded), atol=1e-4), "theirs attends padding"
    for block in itertools.chain(*(stage.blocks for stage in ours.stages)):
        block.mask_padding = False
    assert torch.allclose(ours(padded), theirs(padded), atol=1e-5)


def brute_force(block, x):
    """The block's attention from the definition: every token on every token, those of another window hidden."""
    size, window, shift = x.shape[1:4], block.window, block.shift
    windows = ClipWindows.fit(tuple(size), window, shift)
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")).flatten(1)
    group = torch.stack(
        [(p - s).div(w, rounding_mode="floor") for p, w, s in zip(place, windows.window, windows.shift, strict=True)]
    )
    allowed = (group[:, :, None] == group[:, None, :]).all(dim=0)
    offset = (place[:, :, None] - place[:, None, :]).clamp(*[torch.tensor(v)[:, None, None] for v in bounds(window)])
    index = torch.zeros_like(offset[0])
    for axis, side in zip(offset, window, strict=True):
        index = index * (2 * side - 1) + axis + side - 1
    attn = block.attn
    q, k, v = rearrange(attn.qkv(x.flatten(1, 3)), "b n (z h d) -> z b h n d", z=3, h=attn.num_heads)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if attn.relative_position_bias_table is not None:
        scores = scores + attn.relative_position_bias_table[index].permute(2, 0, 1)
    out = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
    return attn.proj(rearrange(out, "b h n d -> b n (h d)")).reshape(x.shape)


def bounds(window):
    return [1 - side for side in window], [side - 1 for side in window]


@pytest.mark.parametrize("relative_pos", [True, False])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2), (1, 0, 0)])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9), (2, 8, 3), (3, 2, 5)])
def test_attention_against_the_definition(size, shift, relative_pos):
    block = lively(ClipBlock(8, 2, window=(2, 3, 4), shift=shift, relative_pos=relative_pos))
    x = torch.randn(2, *size, 8)
    windows = ClipWindows.fit(size, block.window, block.shift)
    assert torch.allclose(block.attn(x, windows), brute_force(block, x), atol=1e-5)


def test_windows_shrink_to_short_axes_and_are_not_shifted_there():
    assert ClipWindows.fit((2, 9, 7), (4, 7, 7), (2, 3, 3)) == ClipWindows((2, 9, 7), (2, 7, 7), (0, 3, 0))
    # The offsets of a small window keep their place in the table of the large one: 0 is always in the middle.
    index = relative_position_index((1, 2, 2), (3, 4, 5), device=torch.device("cpu"))
    assert (index.diagonal() == (5 * 7 * 9) // 2).all() and index[0, 1] == index[0, 0] - 1
    with pytest.raises(ValueError, match="below window"):
        ClipBlock(8, 2, window=(2, 3, 4), shift=(2, 0, 0))


def test_split_and_merge_are_inverse():
    x = torch.randn(2, 5, 7, 9, 3)
    for shift in ((0, 0, 0), (1, 2, 3)):
        windows = ClipWindows.fit((5, 7, 9), (2, 3, 4), shift)
        assert windows.split(x).shape == (2, windows.count, 24, 3)
        assert torch.equal(windows.merge(windows.split(x)), x)


def noisy_padding(x, to):
    missing = [wanted - length for wanted, length in zip(to, x.shape[1:4], strict=True)]
    padded = pad_clip(torch.ones_like(x), to)
    return torch.where(padded != 0, pad_clip(x, to), 50 * torch.randn_like(padded)) if any(missing) else x


@pytest.mark.parametrize("size", [(10, 44, 52), (3, 30, 20), (18, 61, 33)])
def test_padding_cannot_matter(monkeypatch, size):
    """Frames, rows and columns behind the clip: whatever they hold, the tokens are the same."""
    clip = torch.randn(1, 3, *size)
    model = lively(STViTVideoSwin(**SEMANTIC))
    before, maps = model(clip), model.token_maps(clip)
    with monkeypatch.context() as patch:
        patch.setattr("stvit.models.clip_windows.pad_clip", noisy_padding)
        patch.setattr("stvit.models.clip_tokens.pad_clip", noisy_padding)
        patch.setattr(
            "stvit.models.windows.pad_grid",
            lambda x, grid, to: noisy_padding(rearrange(x, "b (h w) c -> b 1 h w c", h=grid[0]), (1, *to)).flatten(
                1, 3
            ),
        )
        assert torch.allclose(model(clip), before, atol=1e-5)
        assert torch.allclose(model.token_maps(clip), maps, atol=1e-5)
        careless = lively(VideoSwin(**dict(SMALL, mask_padding=False)))
        noisy = careless(clip)
    assert not torch.allclose(noisy, careless(clip), atol=1e-4), "the noise is there to be seen"


# ---------------------------------------------------------------------------- semantic tokens


def generator(**options):
    return lively(ClipTokenGenerator(8, 2, **(dict(window=7, per_window=3, frames=4, key_windows=(10, 14)) | options)))


@pytest.mark.parametrize("pool", ["max", "avg", "weighted_offset"])
def test_centres_are_pooled_in_every_slice_by_itself(pool):
    module, x = generator(pool=pool), torch.randn(2, 6, 14, 21, 8)
    before = module.centres(x)
    assert before.shape == (2, 6, 6, 9, 8)
    x[0, 4, 3, 3] += 10
    changed = (module.centres(x) != before).any(dim=-1)
    assert changed[0, 4, :3, :3].any()
    changed[0, 4, :3, :3] = False
    assert not changed.any(), "other slices, windows and clips"


def test_centres_are_those_of_the_slice_alone():
    module, x = generator(), torch.randn(1, 5, 10, 12, 8)
    assert torch.equal(module.centres(x)[:, 2], module.centres(x[:, 2:3])[:, 0])
    # 10 rows are a window and 3 rows of another, whose cells begin at 0, 2 and 4; 12 columns reach all six cells.
    assert module.token_grid((10, 12)) == (5, 6) == tuple(module.centres(x).shape[2:4])


@pytest.mark.parametrize(("frames", "reached"), [(4, [4, 5, 6]), (1, [5]), (8, [0, 1, 2, 3, 4, 5, 6])])
def test_generation_shares_a_window_in_time(frames, reached):
    module, x = generator(frames=frames), torch.randn(1, 7, 14, 14, 8)
    before = module(x)
    x[0, 5] += torch.randn(14, 14, 8)
    changed = (module(x) != before).flatten(2).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("size", [(4, 14, 14), (6, 21, 16), (3, 7, 24)])
def test_generation_against_the_definition(size, concat):
    """Both layers as one dense attention with a mask: who may read whom, written down token by token."""
    module, x = generator(concat=concat), torch.randn(1, *size, 8)
    frames, height, width = size
    tokens = module.centres(x)
    rows, columns = tokens.shape[2:4]
    for layer, side, span in zip(module.layers, (1, 2), (10, 14), strict=True):

        def key_start(window, length, side=side, span=span):
            begin = window * 7 * side - (span - 7 * side) // 2
            return max(0, min(begin, length - span))

        allowed = torch.zeros(frames * rows * columns, frames * (rows * columns * concat + height * width))
        for n, (t, i, j) in enumerate(itertools.product(range(frames), range(rows), range(columns))):
            same = torch.zeros(frames, rows, columns)
            a, b = i // (3 * side), j // (3 * side)
            same[:, a * 3 * side : (a + 1) * 3 * side, b * 3 * side : (b + 1) * 3 * side] = 1
            image = torch.zeros(frames, height, width)
            top, left = key_start(a, height), key_start(b, width)
            image[:, top : top + span, left : left + span] = 1
            for part in (same, image):
                part[: t // 4 * 4] = 0
                part[t // 4 * 4 + 4 :] = 0
            allowed[n] = torch.cat([same.flatten()] * concat + [image.flatten()])
        sources = [tokens.flatten(1, 3)] * concat + [x.flatten(1, 3)]
        normed = layer.norm1(sources[0] if concat else tokens.flatten(1, 3))
        pairs = layer.attn.keys_values(*(layer.norm1(source) for source in sources))
        update = layer.attn.attend(layer.attn.queries(normed), *pairs, mask=allowed.bool())
        expected = tokens.flatten(1, 3) + update
        expected = (expected + layer.mlp(layer.norm2(expected))).reshape(tokens.shape)
        assert torch.allclose(layer(tokens, x), expected, atol=1e-5)
        tokens = expected
    assert torch.allclose(module(x), tokens, atol=1e-5)


def test_residual_of_the_first_layer_can_be_left_out():
    x = torch.randn(1, 2, 14, 14, 8)
    module = generator(shortcut=False)
    for layer in module.layers:  # nothing but residuals is left
        torch.nn.init.zeros_(layer.attn.proj.weight), torch.nn.init.zeros_(layer.attn.proj.bias)
        torch.nn.init.zeros_(layer.mlp.fc2.weight), torch.nn.init.zeros_(layer.mlp.fc2.bias)
    assert not module(x).any()
    module.layers[0].shortcut = True
    assert torch.equal(module(x), module.centres(x))


@pytest.mark.parametrize("concat", [True, False])
def test_token_maps_say_where_a_token_looks(concat):
    module = generator(concat=concat)
    x = torch.randn(1, 6, 17, 14, 8)
    maps = module.token_maps(x)
    assert maps.shape == (1, 6, math.prod(module.token_grid((17, 14))), 17, 14)
    assert torch.allclose(maps.sum(dim=(-2, -1)), torch.ones(1, 6, 48), atol=1e-5)
    # By hand for one token: attention of the second layer on its own slice.
    layer, tokens = module.layers[1], module.layers[0](module.centres(x), x)
    q = layer.attn.queries(layer.norm1(tokens[:, 4, 1, 2])[:, None])
    sources = [tokens[:, 4:, :6, :6].flatten(1, 3)] * concat + [x[:, 4:, :14].flatten(1, 3)]
    k, _ = layer.attn.keys_values(layer.norm1(torch.cat(sources, dim=1)))
    share = (q @ k.transpose(-2, -1) / 2).softmax(-1)[..., 2 * 36 * concat :][..., :196]  # 4 channels a head
    expected = share.mean(1)[0, 0] / share.mean(1).sum()
    assert torch.allclose(maps[0, 4, 1 * 6 + 2, :14].flatten(), expected, atol=1e-6)
    assert not maps[0, 4, 8, 14:].any()


def test_layers_on_semantic_tokens_alternate_and_shift_in_time():
    model = on_meta(stvit_video_swin_small, base_depth=9)
    stage, tail = model.stages[2], model.stages[3]
    assert [b.window for b in stage.semantic[:4]] == [(8, 3, 3), (8, 6, 6)] * 2
    assert [b.shift for b in stage.semantic[:4]] == [(0, 0, 0), (4, 0, 0)] * 2
    assert [b.shift for b in stage.base[:2]] == [(0, 0, 0), (4, 3, 3)] and len(stage.base) == 9
    assert [b.window for b in tail.blocks] == [(8, 3, 3)] * 2 and tail.blocks[1].shift == (4, 0, 0)
    assert all(b.shift == (0, 0, 0) for b in on_meta(stvit_video_swin_small, time_shift=False).stages[2].semantic)


def test_every_parameter_learns_and_checkpointing_changes_nothing():
    options = dict(SEMANTIC, pool="weighted_offset", layer_scale=0.1, semantic_relative_pos=True)
    model, clip = STViTVideoSwin(**options), torch.randn(1, 3, 10, 60, 44)
    model(clip).square().sum().backward()
    assert unreached(model) == []
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(clip).square().sum().backward()
    assert all(torch.allclose(p.grad, expected[name], atol=1e-6) for name, p in model.named_parameters())


def test_half_precision_is_finite_and_near():
    model, clip = lively(STViTVideoSwin(**SEMANTIC)), torch.randn(1, 3, 10, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(clip)
    assert torch.isfinite(half).all() and torch.allclose(half.float(), model(clip), atol=0.1, rtol=0.1)


def test_given_sizes_win_over_the_arch():
    for cls in (VideoSwin, STViTVideoSwin):
        model = on_meta(cls, arch="base", embed_dim=32, depths=(4, 1), num_heads=(2, 4))
        assert model.num_features == 64 and len(model.stages) == 2
        assert on_meta(cls, arch="base").num_features == 1024 and on_meta(cls).num_features == 768
    with pytest.raises(ValueError, match="there are four in arch='base'"):
        on_meta(VideoSwin, arch="base", depths=(4, 1))


def test_impossible_models_are_refused():
    for options, message in (
        (dict(depths=(2, 2), num_heads=(2,)), "each stage"),
        (dict(window=(8, 7)), "three positive numbers"),
        (dict(clip_size=(0, 56, 56)), "three positive numbers"),
        (dict(arch="huge"), "unknown arch"),
    ):
        with pytest.raises(ValueError, match=message):
            on_meta(VideoSwin, **options)
    for options, message in (
        (dict(depths=(2,), num_heads=(2,)), "last two stages"),
        (dict(window=(8, 7, 8)), "as many rows as columns"),
        (dict(base_depth=5), "do not fit"),
        (dict(key_windows=()), "at least one generation layer"),
        (dict(pool="median"), "unknown pool"),
    ):
        with pytest.raises(ValueError, match=message):
            on_meta(STViTVideoSwin, **options)


# ---------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def image_model():
    sizes = dict(img_size=56, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=7)
    return lively(SwinTransformer(num_classes=5, drop_path_rate=0.0, **sizes))


@pytest.mark.parametrize("frames", [2, 16, 7])
def test_a_video_of_one_picture_has_the_pictures_features(image_model, frames):
    """Also with shifts in time and, at 7 frames, padding: attention to copies of a token is attention to the token."""
    model = VideoSwin(**SMALL).eval()
    model.load_state_dict(video_weights(image_model.state_dict(), model))
    picture = torch.randn(2, 3, 56, 56)
    expected = image_model.forward_features(picture)
    features = model.forward_features(picture[:, :, None].expand(-1, -1, frames, -1, -1))
    features = features[:, : frames // 2]  # the last patch of 7 frames is filled up with black
    if frames % 2 == 0:
        assert torch.allclose(features, expected[:, None].expand_as(features), atol=1e-4)
    assert features.shape[1:] == (frames // 2, 7, 7, 32)


def test_centre_inflation_looks_at_one_frame(image_model):
    model = VideoSwin(**SMALL).eval()
    model.load_state_dict(video_weights(image_model.state_dict(), model, inflation="centre"))
    picture = torch.randn(1, 3, 56, 56)
    clip = torch.stack([torch.randn(1, 3, 56, 56), picture], dim=2)
    assert torch.allclose(model.forward_features(clip)[:, 0], image_model.forward_features(picture), atol=1e-4)
    with pytest.raises(ValueError, match="unknown inflation"):
        video_weights(image_model.state_dict(), model, inflation="middle")


def test_layouts_of_swins_authors(image_model):
    """Merging is numbered with the stage before it; index buffers are in the file; video files have prefixes."""
    model = VideoSwin(**SMALL)
    expected = video_weights(image_model.state_dict(), model)
    official = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for name, value in image_model.state_dict().items():
        name = name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        official[name] = value
    found = video_weights({"model": official}, model)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)

    names = {name: re.sub(r"^stem\.", "patch_embed.", name) for name in model.state_dict()}
    names = {k: re.sub(r"^stages\.1\.downsample", "layers.0.downsample", v) for k, v in names.items()}
    names = {k: re.sub(r"^stages\.", "layers.", v) for k, v in names.items()}
    video = {
        v.replace("head.", "cls_head.fc_cls.") if v.startswith("head.") else f"backbone.{v}": model.state_dict()[k]
        for k, v in names.items()
    }
    found = video_weights({"state_dict": video}, VideoSwin(**SMALL))
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items()), "the head, too: as many classes"


def test_semantic_layers_take_the_layers_in_their_place():
    plain = VideoSwin(**dict(SEMANTIC_SIZES, num_classes=5))
    model = STViTVideoSwin(**SEMANTIC, pool="weighted", layer_scale=1e-5)
    weights = video_weights(theirs_of(plain), model)
    model.load_state_dict(weights)
    third = plain.stages[1].blocks
    assert torch.equal(weights["stages.1.base.0.attn.qkv.weight"], third[0].attn.qkv.weight)
    assert torch.equal(weights["stages.1.generator.layers.0.attn.q.weight"], third[1].attn.qkv.weight[:32])
    assert torch.equal(weights["stages.1.generator.layers.1.attn.kv.bias"], third[2].attn.qkv.bias[32:])
    assert torch.equal(weights["stages.1.semantic.0.mlp.fc1.weight"], third[3].mlp.fc1.weight)
    assert torch.equal(weights["stages.2.blocks.1.attn.qkv.weight"], plain.stages[2].blocks[1].attn.qkv.weight)
    assert (weights["stages.1.generator.layers.0.ls1.gamma"] == 1).all(), "Swin has no scales"
    pooling = "stages.1.generator.pool.mask.proj.weight"
    assert torch.equal(weights[pooling], model.state_dict()[pooling])


SEMANTIC_SIZES = {k: v for k, v in SEMANTIC.items() if k != "base_depth"}


def theirs_of(model):
    """A plain model's weights in torchvision's layout."""
    names = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1])}.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1]) - 1}.", name)
        names[name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")] = value
    return names


def test_weights_that_do_not_fit_are_listed(image_model):
    state = dict(image_model.state_dict())
    state["layers.0.blocks.0.extra.weight"] = state.pop("layers.1.blocks.1.mlp.fc2.bias")
    state["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointMismatch) as error:
        video_weights(state, VideoSwin(**SMALL))
    text = str(error.value)
    assert re.search(r"missing:\s+stages\.1\.blocks\.1\.mlp\.fc2\.bias", text)
    assert re.search(r"unexpected:\s+stages\.0\.blocks\.0\.extra\.weight", text)
    assert "norm.weight: (3,) in the checkpoint, (32,) in the model" in text
    with pytest.raises(ValueError, match="unknown target"):
        video_weights(state, "video_swin_huge")


@pytest.mark.parametrize("target", ["video_swin_tiny", "stvit_video_swin_tiny"])
def test_named_targets_leave_out_the_classifier_of_images(target):
    state = {n: torch.zeros(s.shape) for n, s in on_meta(SwinTransformer).state_dict().items()}
    weights = video_weights(state, target)
    own = on_meta(VIDEO_TARGETS[target]).state_dict()
    assert own.keys() - weights.keys() == {"head.weight", "head.bias"} and weights.keys() <= own.keys()
