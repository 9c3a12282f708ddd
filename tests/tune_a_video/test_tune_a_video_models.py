"""The video network: an image network whose frames know each other, with the image network's files and habits."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, CustomDiffusionAttnProcessor
from einops import rearrange, repeat

from tune_a_video.models import (
    FrameAxisAttnProcessor,
    FrameGroupNorm,
    TemporalConfig,
    TuneAVideoUNet,
    frame_attention,
    key_frames,
)
from tune_a_video.models.frame_attention import attend
from tune_a_video.models.frames import FrameCount

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def image_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


def video_unet(image, **options):
    torch.manual_seed(1)
    return TuneAVideoUNet.from_unet2d(copy.deepcopy(image), **options).eval()


def stir(unet):
    """Temporal attention that does something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn_temp" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return unet


def clip(frames=4, videos=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(videos, 4, frames, 8, 8, generator=generator), torch.randn(videos, 5, 12, generator=generator)


# ------------------------------------------------------------------ what a frame attends to


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("first_prev", [(0,), (0,), (0, 1), (0, 2)]),
        ("self", [(0,), (1,), (2,), (3,)]),
        ("first", [(0,), (0,), (0,), (0,)]),
        ("prev", [(0,), (0,), (1,), (2,)]),
        ("full", [(0, 1, 2, 3)] * 4),
        ("causal", [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]),
        ("window:1", [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)]),
        (("first", -1, "+1", "last"), [(0, 0, 1, 3), (0, 0, 2, 3), (0, 1, 3, 3), (0, 2, 3, 3)]),
    ],
)
def test_key_frames(spec, rows):
    assert list(key_frames(spec, 4)) == rows


@pytest.mark.parametrize("spec", ["previous", "window:", (), ("next",)])
def test_unknown_frame_attention_names_what_there_is(spec):
    with pytest.raises(ValueError, match=r"first|at least one frame"):
        key_frames(spec, 4)


def straightforward(q, k, v, rows, heads):
    """Every frame by itself over concatenated keys, scores written out."""
    outs = []
    for i, keys in enumerate(rows):
        qi = rearrange(q[:, i], "b n (h d) -> b h n d", h=heads)
        ki, vi = (rearrange(torch.cat([x[:, j] for j in keys], 1), "b n (h d) -> b h n d", h=heads) for x in (k, v))
        scores = (qi @ ki.transpose(-1, -2)) * qi.shape[-1] ** -0.5
        outs.append(rearrange(scores.softmax(-1) @ vi, "b h n d -> b n (h d)"))
    return torch.stack(outs, 1)


SPECS = ["first_prev", "self", "first", "prev", "full", "causal", "window:2", ("first", -1, 1, "last")]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["gathered again", "kept"])
def test_attention_over_frames_and_its_gradients_equal_the_written_out_form(spec, limit, monkeypatch):
    monkeypatch.setattr(frame_attention, "GATHER_BYTES", limit)
    monkeypatch.setattr(frame_attention, "KEEP_BYTES", limit)
    torch.manual_seed(0)
    tensors = [torch.randn(2, 6, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    rows, cotangent = key_frames(spec, 6), torch.randn(2, 6, 5, 8, dtype=torch.float64)
    want = straightforward(*tensors, rows, 2)
    got = attend(*tensors, rows, 2)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(attend(*tensors, rows, 2), want)
    gradients = [torch.autograd.grad(out, tensors, cotangent) for out in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_over_frames_gives_no_gradients_to_frozen_keys(monkeypatch):
    monkeypatch.setattr(frame_attention, "KEEP_BYTES", 1)
    q = torch.randn(1, 4, 3, 4, requires_grad=True)
    k, v = torch.randn(1, 4, 3, 4), torch.randn(1, 4, 3, 4, requires_grad=True)
    attend(q, k, v, key_frames("first_prev", 4), 2).sum().backward()
    assert k.grad is None
    assert v.grad.abs().sum() > 0


# ------------------------------------------------------------------ norms and temporal attention


def test_joint_norm_sees_all_frames_and_per_frame_norm_one():
    norm = torch.nn.GroupNorm(2, 4)
    video = torch.randn(2, 4, 3, 5, 5)
    rows = rearrange(video, "b c f h w -> (b f) c h w")
    joint = FrameGroupNorm.around(norm, FrameCount(3))(rows)
    torch.testing.assert_close(rearrange(joint, "(b f) c h w -> b c f h w", f=3), F.group_norm(video, 2))
    alone = FrameGroupNorm.around(norm, FrameCount(1))(rows)
    torch.testing.assert_close(alone, F.group_norm(rows, 2))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_norm_from_the_statistics_of_frames_is_the_joint_one(offset):
    """Without gradients no copy in another order is made; frames here differ in mean and spread."""
    norm = torch.nn.GroupNorm(2, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    video = torch.randn(2, 6, 3, 5, 4) * torch.tensor([0.1, 1.0, 3.0]).view(1, 1, 3, 1, 1)
    video += torch.tensor([-1.0, 0.0, 2.0]).view(1, 1, 3, 1, 1) + offset
    rows = rearrange(video, "b c f h w -> (b f) c h w")
    joint = FrameGroupNorm.around(norm, FrameCount(3))
    want = rearrange(
        F.group_norm(video.double(), 2, norm.weight.double(), norm.bias.double()), "b c f h w -> (b f) c h w"
    )
    with torch.no_grad():
        out = joint(rows)
        assert (out - want).abs().max() < (1e-6 if not offset else 1e-4) * want.abs().max()
        assert out.is_contiguous() and out.dtype == torch.float32
        half = joint(rows.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert joint(rows.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(joint(rows), want.float(), atol=1e-4, rtol=1e-4)  # with gradients
    assert half.dtype == torch.bfloat16
    if not offset:
        assert (half.double() - want).abs().max() < 0.02 * want.abs().max()
    constant = torch.full((3, 6, 4, 4), 2.0)
    with torch.no_grad():
        torch.testing.assert_close(joint(constant), norm.bias.view(1, 6, 1, 1).expand(3, 6, 4, 4), atol=1e-4, rtol=0)


def test_temporal_attention_joins_the_frames_of_a_place(image_unet):
    unet = stir(video_unet(image_unet))
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    unet.frame_count.frames = 3
    hidden = torch.randn(6, 5, 8)
    ours = block.attn_temp(hidden)
    regrouped = rearrange(hidden, "(b f) n c -> (b n) f c", f=3)
    plain = copy.deepcopy(block.attn_temp)
    plain.set_processor(AttnProcessor2_0())
    torch.testing.assert_close(ours, rearrange(plain(regrouped), "(b n) f c -> (b f) n c", b=2))


@pytest.mark.parametrize("position", ["sinusoidal", "rotary"])
def test_with_a_position_code_the_order_of_frames_matters(image_unet, position):
    sample, text = clip()
    turned = sample[:, :, [0, 3, 2, 1]]
    for code, differs in ((position, True), ("none", False)):
        unet = stir(video_unet(image_unet, attention="self", temporal={"position": code}))
        back = unet(turned, 7, text).sample[:, :, [0, 3, 2, 1]]
        assert (back - unet(sample, 7, text).sample).abs().max().gt(1e-4) == differs


@pytest.mark.parametrize(
    ("zero_init", "weight", "bias"), [("weight_and_bias", 0, 0), ("weight_only", 0, 1), ("none", 1, 1)]
)
def test_what_starts_at_zero(image_unet, zero_init, weight, bias):
    inflated = video_unet(image_unet, temporal={"zero_init": zero_init})
    built = TuneAVideoUNet(**TINY, temporal=TemporalConfig(zero_init=zero_init))
    for unet in (inflated, built):
        output = unet.mid_block.attentions[0].transformer_blocks[0].attn_temp.to_out[0]
        assert bool(output.weight.abs().sum() > 0) == bool(weight)
        assert bool(output.bias.abs().sum() > 0) == bool(bias)
        assert (unet.mid_block.attentions[0].transformer_blocks[0].norm_temp.weight == 1).all()


@pytest.mark.parametrize("kind", ["conv3", "lora"])
def test_convolution_over_frames_starts_as_identity_and_then_sees_neighbours(image_unet, kind):
    sample, text = clip(5)
    options = {"attention": "self", "group_norm": "per_frame"}
    plain = video_unet(image_unet, **options)
    made = video_unet(image_unet, temporal={"conv": kind}, **options)
    torch.testing.assert_close(made(sample, 7, text).sample, plain(sample, 7, text).sample)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "conv_temp.outer" in name:
                parameter.normal_(std=0.1)
    one = made.down_blocks[0].resnets[0]
    made.frame_count.frames = 5
    rows = torch.randn(5, 8, 4, 4)
    moved = rows.clone()
    moved[0] += 1
    temb = torch.zeros(5, 32)
    difference = (one(moved, temb) - one(rows, temb)).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert difference.tolist() == [True, True, False, False, False]
    assert len(made.trainable_parameters(["conv_temp"])) == (4 if kind == "lora" else 2) * 8


@pytest.mark.parametrize(
    "option",
    [{"temporal": {"position": "learned"}}, {"temporal": {"heads": 3}}, {"temporal": {"conv": 5}}, {"group_norm": "x"}],
)
def test_unknown_options_are_errors(option):
    with pytest.raises(ValueError, match=r"use|keys are"):
        TuneAVideoUNet(**TINY, **option)


# ------------------------------------------------------------------ the network


def test_one_frame_and_a_still_video_are_the_image_network(image_unet):
    unet = video_unet(image_unet)
    sample, text = clip(1)
    want = image_unet(sample[:, :, 0], 7, text).sample
    torch.testing.assert_close(unet(sample, 7, text).sample[:, :, 0], want)
    still = unet(repeat(sample, "b c 1 h w -> b c f h w", f=5), 7, text).sample
    torch.testing.assert_close(still, repeat(want, "b c h w -> b c f h w", f=5), atol=2e-5, rtol=1e-4)


def test_motion_couples_the_frames(image_unet):
    sample, text = clip()
    alone = torch.stack([image_unet(frame, 7, text).sample for frame in sample.unbind(2)], 2)
    assert (video_unet(image_unet)(sample, 7, text).sample - alone).abs().max() > 1e-2
    uncoupled = video_unet(image_unet, attention="self", group_norm="per_frame")
    torch.testing.assert_close(uncoupled(sample, 7, text).sample, alone, atol=1e-5, rtol=1e-4)


def test_a_frame_reaches_later_frames_only_through_first_and_previous(image_unet):
    unet = video_unet(image_unet, group_norm="per_frame", temporal={"enabled": False})
    sample, text = clip(5)
    changed = sample.clone()
    changed[:, :, 2] += 1
    moved = (unet(changed, 7, text).sample - unet(sample, 7, text).sample).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
    assert moved[:2].tolist() == [False, False]
    assert moved[2:4].all()


def test_videos_of_a_batch_have_their_own_times_and_texts(image_unet):
    unet = stir(video_unet(image_unet))
    sample, text = clip(3, videos=2)
    times = torch.tensor([10, 900])
    both = unet(sample, times, text).sample
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], unet(sample[i : i + 1], times[i], text[i : i + 1]).sample)
    per_frame = unet(sample, times, text.repeat_interleave(3, 0)).sample
    torch.testing.assert_close(per_frame, both)


def test_wrong_shapes_say_what_is_expected(image_unet):
    unet = video_unet(image_unet)
    sample, text = clip(3, videos=2)
    with pytest.raises(ValueError, match=r"\(b, c, f, h, w\)"):
        unet(sample[0], 7, text)
    with pytest.raises(ValueError, match="one per video or frame"):
        unet(sample, 7, text[:1])


def test_odd_sizes(image_unet):
    sample = torch.randn(1, 4, 3, 7, 5)
    assert video_unet(image_unet)(sample, 7, clip()[1]).sample.shape == sample.shape


def test_gradient_checkpointing_changes_no_gradient(image_unet):
    sample, text = clip()
    gradients = []
    for checkpointing in (False, True):
        unet = stir(video_unet(image_unet)).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        names = unet.set_trainable()
        unet(sample, 7, text).sample.square().mean().backward()
        gradients.append({name: unet.get_parameter(name).grad for name in names})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_residuals_of_a_control_network_are_added(image_unet):
    unet = video_unet(image_unet)
    sample, text = clip(3)
    shapes = [(3, 8, 8, 8), (3, 8, 8, 8), (3, 8, 4, 4), (3, 16, 4, 4)]
    residuals = {
        "down_block_additional_residuals": tuple(torch.ones(shape) for shape in shapes),
        "mid_block_additional_residual": torch.ones(3, 16, 4, 4),
    }
    assert (unet(sample, 7, text, **residuals).sample - unet(sample, 7, text).sample).abs().max() > 1e-3


def test_stock_processors_leave_the_frames_coupled(image_unet):
    unet = stir(video_unet(image_unet))
    sample, text = clip(3)
    want = unet(sample, 7, text).sample
    unet.set_attention_slice("max")
    unet.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(unet(sample, 7, text).sample, want)
    unet.set_frame_attention("self")
    assert (unet(sample, 7, text).sample - want).abs().max() > 1e-3
    assert unet.config.attention == "self"


@pytest.mark.parametrize("attention", ["first_prev", "full"])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_fused_projections_leave_the_frames_coupled(image_unet, attention, position):
    unet = stir(video_unet(image_unet, attention=attention, temporal={"position": position}))
    sample, text = clip(3)
    with torch.no_grad():
        want = unet(sample, 7, text).sample
        unet.fuse_qkv_projections()
        calls = []
        hooks = [part.to_qkv.register_forward_hook(lambda *_: calls.append(1)) for part in attentions(unet)]
        torch.testing.assert_close(unet(sample, 7, text).sample, want, atol=1e-5, rtol=1e-4)
        assert len(hooks) == len(calls) > 0, "the fused projections are those that are used"
        unet.set_frame_attention("self")
        alone = unet(sample, 7, text).sample
        assert (alone - want).abs().max() > 1e-3 and len(calls) == 2 * len(hooks)
        unet.set_frame_attention(attention)
        unet.unfuse_qkv_projections()
        torch.testing.assert_close(unet(sample, 7, text).sample, want)
        assert len(calls) == 2 * len(hooks)


def attentions(unet):
    return [part for name, part in unet.named_modules() if name.endswith(("attn1", "attn_temp"))]


def test_switches_of_kernels_leave_the_frames_coupled(image_unet):
    """diffusers goes through all modules and exchanges the processor of each attention by itself."""
    unet = stir(video_unet(image_unet))
    own = [part.processor for part in attentions(unet)]
    for part in attentions(unet):
        part.set_use_memory_efficient_attention_xformers(True)
        part.set_use_npu_flash_attention(True)
        part.set_use_xla_flash_attention(True)
        part.set_attention_slice(1)
    unet.set_default_attn_processor()
    assert [type(part.processor) for part in attentions(unet)] == [type(one) for one in own]
    with pytest.raises(ValueError, match=r"attn1\.processor: CustomDiffusionAttnProcessor knows no frames"):
        unet.set_attn_processor(CustomDiffusionAttnProcessor(hidden_size=8, cross_attention_dim=16))

    class Mine:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    unet.set_attn_processor(Mine())  # a user's own is what the user wants
    assert all(isinstance(part.processor, Mine) for part in attentions(unet))


@pytest.mark.parametrize("kind", ["folder", "memory", "official"])
def test_a_tuned_network_goes_on_as_it_was_tuned(image_unet, tmp_path, kind):
    own = {} if kind == "official" else {"attention": "full", "group_norm": "per_frame"}
    temporal = {} if kind == "official" else {"position": "sinusoidal", "zero_init": "none"}
    tuned = stir(video_unet(image_unet, **own, temporal=temporal))
    tuned.save_pretrained(tmp_path)
    if kind == "official":
        config = json.loads((tmp_path / "config.json").read_text())
        kept = {name: value for name, value in config.items() if name not in ("attention", "group_norm", "temporal")}
        (tmp_path / "config.json").write_text(json.dumps(kept))

    def load(**options):
        if kind == "memory":
            return TuneAVideoUNet.from_unet2d(tuned, **options)
        return TuneAVideoUNet.from_pretrained_2d(tmp_path, **options)

    sample, text = clip(3)
    want = tuned(sample, 7, text).sample
    torch.testing.assert_close(load()(sample, 7, text).sample, want)
    torch.testing.assert_close(load(**own, temporal={**temporal, "zero_init": "none"})(sample, 7, text).sample, want)
    for name, value in (("attention", "self"), ("temporal", {"position": "rotary"}), ("temporal", {"enabled": False})):
        with pytest.raises(ValueError, match=rf"was tuned with {name}="):
            load(**{name: value})
    with pytest.raises(ValueError, match=r"was tuned with group_norm="):
        load(group_norm="joint" if own else "per_frame")
    changed = load()
    changed.set_frame_attention("self")  # what is said is done
    assert (changed(sample, 7, text).sample - want).abs().max() > 1e-3


# ------------------------------------------------------------------ files


def test_saved_folder_looks_as_released_and_reads_back(image_unet, tmp_path, caplog):
    unet = stir(
        video_unet(image_unet, attention=["first", -1], group_norm="per_frame", temporal={"position": "rotary"})
    )
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["down_block_types"] == ["CrossAttnDownBlock3D", "DownBlock3D"]
    assert config["mid_block_type"] == "UNetMidBlock3DCrossAttn"
    back = TuneAVideoUNet.from_pretrained(tmp_path)
    assert not [record for record in caplog.records if "not expected" in record.message or "ignored" in record.message]
    sample, text = clip(3)
    torch.testing.assert_close(back(sample, 7, text).sample, unet(sample, 7, text).sample)


@pytest.mark.parametrize("load", [TuneAVideoUNet.from_pretrained_2d, TuneAVideoUNet.from_pretrained])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_image_folder_is_inflated(image_unet, tmp_path, load, variant):
    image_unet.save_pretrained(tmp_path / "unet", variant=variant)
    unet = load(tmp_path, subfolder="unet", variant=variant, attention="full", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert unet.config.attention == "full"
    sample, text = clip(1)
    torch.testing.assert_close(
        unet.float()(sample, 7, text).sample[:, :, 0], image_unet(sample[:, :, 0], 7, text).sample, atol=0.03, rtol=0.1
    )


def test_released_folder_with_pickled_weights(image_unet, tmp_path):
    unet = stir(video_unet(image_unet))
    config = {"_class_name": "UNet3DConditionModel", "_diffusers_version": "0.11.1", **TINY}
    config |= {
        name: [part.replace("2D", "3D") for part in TINY[name]] for name in ("down_block_types", "up_block_types")
    }
    config["mid_block_type"] = "UNetMidBlock3DCrossAttn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    sample, text = clip(3)
    for load in (TuneAVideoUNet.from_official, TuneAVideoUNet.from_pretrained):
        torch.testing.assert_close(load(tmp_path)(sample, 7, text).sample, unet(sample, 7, text).sample)


def test_wrong_folders_say_so(image_unet, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        TuneAVideoUNet.from_pretrained_2d(tmp_path)
    image_unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained_2d"):
        TuneAVideoUNet.from_official(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="looked for"):
        TuneAVideoUNet.from_pretrained_2d(tmp_path)
    state = image_unet.state_dict()
    state["more.weight"] = state.pop("conv_in.weight")
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing \['conv_in.weight'\], unexpected \['more.weight'\]"):
        TuneAVideoUNet.from_pretrained_2d(tmp_path)


def test_delta_holds_what_tuning_changes_and_nothing_else(image_unet, tmp_path):
    tuned = video_unet(image_unet)
    names = tuned.set_trainable(["attn1.to_q", "attn_temp"])
    assert names and all("attn1.to_q" in name or "attn_temp" in name for name in names)
    with torch.no_grad():
        for name in names:
            tuned.get_parameter(name).add_(0.1)
    path = tuned.save_delta(tmp_path / "step.500", caption="a man is skiing", frames=24)
    fresh = video_unet(image_unet)
    about = fresh.load_delta(path)
    assert (about["caption"], about["frames"], about["attention"]) == ("a man is skiing", 24, "first_prev")
    sample, text = clip(3)
    torch.testing.assert_close(fresh(sample, 7, text).sample, tuned(sample, 7, text).sample)
    size = sum(value.numel() for value in tuned.delta_state_dict().values())
    assert size < sum(parameter.numel() for parameter in tuned.parameters()) / 4


def test_delta_of_another_network_is_refused(image_unet, tmp_path):
    path = video_unet(image_unet).save_delta(tmp_path / "delta")
    with pytest.raises(ValueError, match="attention='first_prev'"):
        video_unet(image_unet, attention="self").load_delta(path)
    torch.save({"down.attn_temp.to_q.weight": torch.zeros(2, 2)}, tmp_path / "tuneavideo-5.pth")
    with pytest.raises(ValueError, match=r"down\.attn_temp"):
        video_unet(image_unet).load_delta(tmp_path / "tuneavideo-5.pth")


def test_trainable_sets(image_unet):
    unet = video_unet(image_unet)
    official = unet.trainable_parameters()
    assert not any("norm_temp" in name or ("to_k" in name and "attn_temp" not in name) for name in official)
    assert unet.trainable_parameters("all").keys() == dict(unet.named_parameters()).keys()
    assert len(unet.trainable_parameters(["norm_temp"])) == 2 * 4
    with pytest.raises(ValueError, match="attn3"):
        unet.trainable_parameters(["attn3"])


def test_rotary_positions_turn_queries_and_keys():
    """By hand, in complex numbers: pair j of a head at frame i is turned by i * 10000^(-2 j / d); values are not."""
    torch.manual_seed(0)
    frames, places, heads, width = 5, 3, 2, 6
    attn = Attention(query_dim=heads * width, heads=heads, dim_head=width)
    processor = FrameAxisAttnProcessor(FrameCount(frames), position="rotary")
    rows = torch.randn(2 * frames, places, heads * width)

    def turned(x):
        rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.arange(frames)[:, None] * rates
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    q, k, v = (
        part(rows).view(2, frames, places, heads, width).permute(0, 2, 3, 1, 4).contiguous()
        for part in (attn.to_q, attn.to_k, attn.to_v)
    )
    weights = (turned(q) @ turned(k).transpose(-1, -2) / width**0.5).softmax(dim=-1)
    want = (weights @ v).permute(0, 3, 1, 2, 4).reshape(2 * frames, places, heads * width)
    want = attn.to_out[0](want)
    torch.testing.assert_close(processor(attn, rows), want)
    keys_alone = ((q @ turned(k).transpose(-1, -2)) / width**0.5).softmax(dim=-1)
    queries_alone = ((turned(q) @ k.transpose(-1, -2)) / width**0.5).softmax(dim=-1)
    assert (weights - keys_alone).abs().max() > 0.01 and (weights - queries_alone).abs().max() > 0.01


@pytest.mark.parametrize("trains", [False, True])
def test_keys_and_values_of_the_text_are_computed_once_per_video(image_unet, trains):
    """The same output and gradients as once per frame, with a f-th of the rows and of the operations."""
    from torch.utils.flop_counter import FlopCounterMode

    frames, videos = 4, 2
    sample = torch.randn(videos, 4, frames, 8, 8)
    text = torch.randn(videos, 5, 12)
    made = {}
    for name in ("once", "per_frame"):
        unet = stir(video_unet(image_unet)).train(trains)
        if name == "per_frame":
            unet.set_attn_processor(AttnProcessor2_0())  # of attn2 alone: the others keep their frames
        rows = []
        layers = [part.attn2 for part in unet.modules() if hasattr(part, "attn2")]
        for layer in layers:
            layer.to_k.register_forward_hook(lambda module, given, out, rows=rows: rows.append(len(out)))
        with FlopCounterMode(display=False) as counter:
            out = unet(sample, 7, text).sample
        out.square().mean().backward()
        gradients = [p.grad for layer in layers for p in layer.parameters()]
        made[name] = out.detach(), gradients, rows, counter.get_total_flops()
    once, per_frame = made["once"], made["per_frame"]
    torch.testing.assert_close(once[0], per_frame[0], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(once[1], per_frame[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    assert set(once[2]) == {videos} and set(per_frame[2]) == {videos * frames}
    saved = 2 * 2 * videos * (frames - 1) * 5 * 12 * sum(layer.to_k.out_features for layer in layers)
    assert per_frame[3] - once[3] == saved


def test_frames_with_texts_of_their_own_read_them(image_unet):
    unet = stir(video_unet(image_unet, attention="self", group_norm="per_frame", temporal={"enabled": False}))
    sample, texts = torch.randn(1, 4, 3, 8, 8), torch.randn(3, 5, 12)
    shared = unet(sample, 7, texts[:1]).sample
    own = unet(sample, 7, texts).sample
    torch.testing.assert_close(own[:, :, 0], shared[:, :, 0], atol=1e-5, rtol=1e-4)
    alone = unet(sample[:, :, 2:], 7, texts[2:]).sample
    torch.testing.assert_close(own[:, :, 2:], alone, atol=1e-5, rtol=1e-4)
    assert (own[:, :, 2] - shared[:, :, 2]).abs().max() > 1e-3
