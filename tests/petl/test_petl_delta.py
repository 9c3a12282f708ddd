"""Delta files, merged networks, and weights of others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petl
from petl.checkpoint import CheckpointMismatch, convert, from_flax, resize_positions
from petl.models.merge import merge
from tests.petl.backbones import BACKBONES, METHODS, PAIRS, disturbed, tiny_vit, tuned

FOLDED = {"linear", "full", "partial", "bitfit", "ln", "ln_shift", "lora", "lora_packed", "lora_all", "ssf"}
FOLDED |= {"fact_tt", "fact_tk", "repadapter", "sct_mlp", "sct_qv"}


def plain(family: str) -> nn.Module:
    """The backbone of `tuned`, as it was before."""
    torch.manual_seed(0)
    return BACKBONES[family]()


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_round_trip(family: str, name: str, images: torch.Tensor, tmp_path) -> None:
    """A tuned network comes back from its file and the plain backbone; what was trained can be trained again."""
    model = tuned(family, name)
    model.chosen = True  # of SCT and TTC the first channels, which is a choice as good as any here
    for module in _channel_methods(model.method):
        module.channels = _placeholder(model)
    model = disturbed(model).eval()
    path = petl.save_delta(model, tmp_path / "delta.safetensors", task="test")
    again = petl.load_delta(plain(family), path).eval()
    assert torch.equal(again(images), model(images))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    frozen = petl.load_delta(plain(family), path, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert petl.read_delta(path)[1]["origin"] == {"task": "test"}


def _channel_methods(method: petl.models.methods.Method) -> list:
    inner = getattr(method, "methods", [method])
    return [m for m in inner if isinstance(m, petl.SCT)]


def _placeholder(model: petl.PetlModel) -> list:
    found = []
    for module in model.tuning.values():
        if hasattr(module, "tuning"):
            found.append(module.tuning.channels.tolist())
        elif hasattr(module, "query"):
            found.append({"q": module.query.channels.tolist(), "v": module.value.channels.tolist()})
    return found


def test_size_of_a_file(tmp_path) -> None:
    """Within 2 % of four bytes a value."""
    for method in (petl.LNTune(), petl.TTC([list(range(24))] * 12)):
        model = petl.inject(VisionTransformer(embed_dim=192, depth=12, num_heads=3, num_classes=10), method)
        size = petl.save_delta(model, tmp_path / "d.safetensors").stat().st_size
        values = petl.delta_parameters(model, head=True) + (12 * 24 if isinstance(method, petl.TTC) else 0)
        assert size == pytest.approx(4 * values, rel=0.02)


def test_another_backbone_is_refused(tmp_path) -> None:
    path = petl.save_delta(tuned("vit", "lora"), tmp_path / "delta.safetensors")
    with pytest.raises(petl.DeltaError, match="belongs to a VisionTransformer"):
        petl.load_delta(tiny_vit(depth=3), path)
    torch.manual_seed(9)
    with pytest.raises(petl.DeltaError, match="trained on other weights"):
        petl.load_delta(tiny_vit(), path)
    with pytest.raises(petl.DeltaError, match="the model has"):
        petl.load_delta(tuned("vit", "ssf"), path)
    with pytest.raises((petl.DeltaError, petl.NoSite)):
        petl.load_delta(plain("swin"), path)


def test_wrong_files(tmp_path) -> None:
    with pytest.raises(petl.DeltaError, match="no file"):
        petl.read_delta(tmp_path / "absent.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(petl.DeltaError, match="not written by petl"):
        petl.read_delta(tmp_path / "other.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "broken.safetensors", metadata={"petl": "rubbish"})
    with pytest.raises(petl.DeltaError, match="damaged"):
        petl.read_delta(tmp_path / "broken.safetensors")
    with pytest.raises(petl.DeltaError, match="suffix"):
        petl.save_delta(tuned("vit", "lora"), tmp_path / "delta.pt")
    with pytest.raises(petl.DeltaError, match="never chosen"):
        petl.save_delta(tuned("vit", "ttc"), tmp_path / "delta.safetensors")


def test_buffers_that_training_changes_are_kept(images: torch.Tensor, tmp_path) -> None:
    """Running statistics of a batch norm in the backbone travel with the delta."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        vit = tiny_vit()
        vit.norm_pre = nn.Sequential(_Swapped(nn.BatchNorm1d(24)))
        return vit

    model = petl.inject(network(), petl.LNTune())
    model.train()(images)
    model.eval()
    path = petl.save_delta(model, tmp_path / "delta.safetensors")
    assert any("running_mean" in name for name in petl.read_delta(path)[0])
    assert torch.equal(petl.load_delta(network(), path).eval()(images), model(images))


class _Swapped(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


# ------------------------------------------------------------------ merging
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_merge(family: str, name: str, images: torch.Tensor) -> None:
    """What can be folded leaves a plain network of the same outputs; what cannot is named, and is still there."""
    model = disturbed(tuned(family, name)).eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    report = merge(model, images)
    assert report.difference < 2e-5
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in report.model.modules())
    if name in FOLDED and (family, name) != ("swin", "ssf"):  # a layer of Swin has no bias to take the shift
        assert not report.left and not hooks
    else:
        assert report.left and all(report.left.values()) and hooks


def test_merge_refuses_half_precision(images: torch.Tensor) -> None:
    model = disturbed(tuned("vit", "lora")).bfloat16()
    with pytest.raises(ValueError, match="half=True"):
        merge(model)
    assert merge(model, half=True).folded


def test_a_merged_network_is_loaded_as_any_other(images: torch.Tensor) -> None:
    model = disturbed(tuned("vit", "lora")).eval()
    other = tiny_vit()
    other.load_state_dict(merge(model).model.state_dict())
    torch.testing.assert_close(other.eval()(images), model(images), atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------ weights of others
def flax_state(vit: VisionTransformer) -> dict[str, np.ndarray]:
    """A ViT's weights as Google's files have them."""
    state = {n: v.detach().numpy() for n, v in vit.state_dict().items()}
    heads, dim = vit.blocks[0].attn.num_heads, vit.embed_dim
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "pre_logits/kernel": np.zeros((dim, dim), np.float32),
        "pre_logits/bias": np.zeros(dim, np.float32),
        "head/kernel": np.zeros((dim, 21), np.float32),
        "head/bias": np.zeros(21, np.float32),
    }
    for index in range(len(vit.blocks)):
        here, there = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{there}{theirs}/scale"] = state[f"{here}{ours}.weight"]
            out[f"{there}{theirs}/bias"] = state[f"{here}{ours}.bias"]
        for number, part in enumerate(("query", "key", "value")):
            rows = slice(number * dim, (number + 1) * dim)
            attention = f"{there}MultiHeadDotProductAttention_1/{part}"
            out[f"{attention}/kernel"] = state[f"{here}attn.qkv.weight"][rows].T.reshape(dim, heads, -1)
            out[f"{attention}/bias"] = state[f"{here}attn.qkv.bias"][rows].reshape(heads, -1)
        attention = f"{there}MultiHeadDotProductAttention_1/out"
        out[f"{attention}/kernel"] = state[f"{here}attn.proj.weight"].T.reshape(heads, -1, dim)
        out[f"{attention}/bias"] = state[f"{here}attn.proj.bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            out[f"{there}MlpBlock_3/Dense_{number}/kernel"] = state[f"{here}mlp.{layer}.weight"].T
            out[f"{there}MlpBlock_3/Dense_{number}/bias"] = state[f"{here}mlp.{layer}.bias"]
    return out


def test_flax_files(images: torch.Tensor, tmp_path) -> None:
    """The 2020 release's npz, pre_logits and head left out, into a backbone with another head."""
    from petl.trainer import build

    source = tiny_vit().eval()
    np.savez(tmp_path / "ViT.npz", **flax_state(source))
    model = build(tiny_vit(), petl.Linear(), num_classes=3, weights=tmp_path / "ViT.npz").eval()
    torch.testing.assert_close(model.backbone.forward_features(images), source.forward_features(images))
    state = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in flax_state(source).items()}
    with pytest.raises(CheckpointMismatch, match="Transformer/unknown"):
        from_flax({**state, "Transformer/unknown": torch.ones(1)})
    del state["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"]
    with pytest.raises(CheckpointMismatch, match="only"):
        from_flax(state)


def test_timm_reads_the_same(images: torch.Tensor, tmp_path) -> None:
    source = tiny_vit()
    np.savez(tmp_path / "ViT.npz", **flax_state(source))
    theirs = tiny_vit()
    theirs.load_pretrained(str(tmp_path / "ViT.npz"))
    ours = convert({n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in flax_state(source).items()})
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs.state_dict()[name])


def test_positions_are_resized_without_antialiasing() -> None:
    small, large = tiny_vit(), tiny_vit(img_size=64)
    resized = resize_positions(large.state_dict(), small)["pos_embed"]
    table = large.pos_embed[:, 1:].detach().reshape(1, 8, 8, 24).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(table, (4, 4), mode="bicubic", antialias=False)
    torch.testing.assert_close(resized[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(resized[:, :1], large.pos_embed[:, :1])


def test_strict_conversion() -> None:
    model = petl.inject(tiny_vit(), METHODS["sct"]())
    state = {n: v for n, v in tiny_vit().state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=r"missing: \['tuning.blocks_0_attn"):
        convert(state, model)
    with pytest.raises(CheckpointMismatch, match=r"unexpected: \['backbone.nonsense"):
        convert({**state, "nonsense": torch.ones(1)}, model)


def test_the_header_is_plain(tmp_path) -> None:
    path = petl.save_delta(tuned("vit", "lora"), tmp_path / "delta.safetensors")
    header = petl.read_delta(path)[1]
    assert json.loads(json.dumps(header)) == header
    assert header["backbone"]["class"] == "VisionTransformer" and len(header["backbone"]["hash"]) == 32
