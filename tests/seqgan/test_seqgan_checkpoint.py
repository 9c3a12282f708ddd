"""Published weights into ours and back; the command that converts."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.engine.commands.convert import ConversionError, Options, convert_file
from core.errors import ConfigError
from seqgan.checkpoint import CheckpointMismatch, convert, revert
from seqgan.checkpoint.msgpack import FlaxFileError, read_flax
from seqgan.checkpoint.shapes import check_whole
from seqgan.data.prepare import flax_weights
from seqgan.models import (
    ARTransformer,
    MaskedTransformer,
    PatchDiscriminator,
    StyleDiscriminator,
    conv_tokenizer,
    vqgan_tokenizer,
)

HEADS = 2


def vqgan() -> nn.Module:
    return vqgan_tokenizer(32, (1, 2), 1, (8,), 16, 16, codebook_size=16, embed_dim=8)


def maskgit(**options) -> nn.Module:
    return conv_tokenizer(32, (1, 2, 2), 2, codebook_size=16, z_dim=8, **options)


def gpt(depth: int = 2) -> nn.Module:
    return ARTransformer(10, 10, 6, 8, depth, HEADS, class_rows="shared")


def masked() -> nn.Module:
    return MaskedTransformer(10, 3, 6, 8, 11, HEADS)


def style() -> nn.Module:
    return StyleDiscriminator(16, channels={4: 8, 8: 6, 16: 4})


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [vqgan, maskgit, gpt, masked, style, PatchDiscriminator])
@pytest.mark.parametrize("layout", ["reference", "flax"])
def test_there_and_back(build, layout: str) -> None:
    module = randomised(build(n_layers=1) if build is PatchDiscriminator else build())
    if layout == "flax" and build in (vqgan, gpt, PatchDiscriminator):
        with pytest.raises(ValueError, match="layout='reference'"):
            revert(module.state_dict(), layout=layout)
        return
    theirs = revert(module.state_dict(), layout=layout, num_heads=HEADS)
    assert same(convert(theirs), module.state_dict()) and same(convert(theirs, module), module.state_dict())
    assert (theirs.keys() == module.state_dict().keys()) == (build is PatchDiscriminator)


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    sides = {f"{side} alone": getattr(module, side) for side in ("encoder", "decoder") if hasattr(module, side)}
    return {"whole": module, **sides}


@pytest.mark.parametrize("build", [vqgan, maskgit, gpt, masked, style, PatchDiscriminator])
def test_an_entry_too_few_or_too_many_is_never_written(build, tmp_path: Path) -> None:
    """Without an experiment, too: each kind of entry of every network, and of its halves alone."""
    for part, module in parts_of(build()).items():
        ours = module.state_dict()
        check_whole(ours)
        kinds = {re.sub(r"\d+", "#", name): name for name in ours if not name.endswith("num_batches_tracked")}
        for name in list(kinds.values())[:: 3 if part == "whole" else 9]:
            with pytest.raises(CheckpointMismatch, match="missing"):
                check_whole({key: value for key, value in ours.items() if key != name})
        with pytest.raises(CheckpointMismatch, match=r"(?s)unexpected.*surplus"):
            check_whole({**ours, "surplus.weight": torch.ones(1)})
    theirs = revert(build().state_dict())
    src, dst = tmp_path / "theirs.pt", tmp_path / "ours.pt"
    least = min((name for name in theirs if name.endswith("bias")), key=lambda name: theirs[name].numel())
    few = {name: value for name, value in theirs.items() if name != least}
    for state in (few, {**theirs, "surplus.weight": torch.ones(2)}):
        torch.save(state, src)
        with pytest.raises((ConversionError, CheckpointMismatch), match=r"missing|surplus"):
            convert_file(Options("seqgan", str(src), str(dst)))
        assert not dst.exists()


@pytest.mark.parametrize("extra", ["none", "conv2", "attn1", "attn2"])
def test_enhanced_decoders_are_whole_networks(extra: str) -> None:
    state = maskgit(extra=extra, head_dim=8).state_dict()
    check_whole(state)
    gone = next(
        name for name in state if name.startswith("decoder.levels.1.") and (extra == "none") != (".extra." in name)
    )
    with pytest.raises(CheckpointMismatch, match=gone.replace(".", r"\.")):
        check_whole({name: value for name, value in state.items() if name != gone})


def test_axes_of_flax() -> None:
    model = randomised(masked())
    theirs = revert(model.state_dict(), layout="flax", num_heads=HEADS)
    layer, x = model.blocks[1][0], torch.randn(3, 8)
    names = [f"TransformerLayer_1.Attention_0.self_attention.{part}" for part in ("query", "key", "value", "out")]
    for part, name in zip(layer.qkv(x).chunk(3, dim=-1), names, strict=False):
        heads = torch.einsum("tc,chd->thd", x, theirs[f"{name}.kernel"]) + theirs[f"{name}.bias"]
        assert torch.allclose(heads.flatten(1), part, atol=1e-5)
    out = torch.einsum("thd,hdc->tc", x.view(3, HEADS, 4), theirs[f"{names[3]}.kernel"]) + theirs[f"{names[3]}.bias"]
    assert torch.allclose(out, layer.proj(x), atol=1e-5)
    conv = revert(maskgit().state_dict(), layout="flax")["encoder.Conv_0.kernel"]
    assert conv.shape == (3, 3, 3, 32)


def test_blocks_are_numbered_as_they_run() -> None:
    model = maskgit()
    theirs = revert(model.state_dict())
    places = {
        "encoder.ResBlock_0": model.encoder.levels[0][0],
        "encoder.ResBlock_7": model.encoder.mid[1],
        "decoder.ResBlock_1": model.decoder.mid[1],
        "decoder.ResBlock_2": model.decoder.levels[0].blocks[0],
    }
    for name, block in places.items():
        assert torch.equal(theirs[f"{name}.Conv_0.weight"], block.conv1.weight)


def test_files_of_vqgan_convert_by_command(tmp_path: Path) -> None:
    model, critic = randomised(vqgan()), PatchDiscriminator(ndf=8, n_layers=1)
    theirs = revert(model.state_dict())
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    beside = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 64, 1, 1)}
    beside |= {f"loss.discriminator.{name}": value for name, value in critic.state_dict().items()}
    torch.save({"state_dict": theirs | beside, "epoch": 3}, tmp_path / "vqgan.ckpt")
    report = convert_file(Options("seqgan", str(tmp_path / "vqgan.ckpt"), str(tmp_path / "ours.pt")))
    assert same(torch.load(tmp_path / "ours.pt"), model.state_dict())
    assert len(report.dropped) == len(beside) and not report.fresh
    # What training left in the file goes only when it is asked to.
    extras = {"model_ema.decay": torch.ones(()), "model_ema.encoderconv_inweight": torch.ones(2)}
    extras |= {"quantize.used": torch.arange(4), "colorize": torch.ones(3, 1, 1, 1)}
    torch.save({"state_dict": theirs | beside | extras}, tmp_path / "more.ckpt")
    asked = Options("seqgan", str(tmp_path / "more.ckpt"), str(tmp_path / "again.pt"))
    with pytest.raises(CheckpointMismatch, match=r"no place in a VQGAN .*model_ema\.decay.*drop=\[PATTERN\]"):
        convert_file(asked)
    report = convert_file(dataclasses.replace(asked, drop=["model_ema.*", "quantize.used", "colorize"]))
    assert same(torch.load(tmp_path / "again.pt"), model.state_dict())
    assert {name for name, why in report.dropped.items() if why == "left out on request"} == extras.keys()
    options = Options("seqgan", str(tmp_path / "vqgan.ckpt"), str(tmp_path / "critic.pt"), prefix="loss.discriminator.")
    convert_file(options)
    assert critic.state_dict().keys() - torch.load(tmp_path / "critic.pt").keys() == set()


def test_transformers_of_vqgan_lie_beside_tokenizers(tmp_path: Path) -> None:
    model = randomised(gpt())
    state = {f"transformer.{name}": value for name, value in revert(model.state_dict()).items()}
    state |= {f"transformer.blocks.{i}.attn.mask": torch.ones(6, 6).tril()[None, None] for i in range(2)}
    state |= {f"first_stage_model.{name}": value for name, value in revert(vqgan().state_dict()).items()}
    torch.save({"state_dict": state}, tmp_path / "net2net.ckpt")
    convert_file(Options("seqgan", str(tmp_path / "net2net.ckpt"), str(tmp_path / "gpt.pt")))
    assert same(torch.load(tmp_path / "gpt.pt"), model.state_dict())
    prefix = "first_stage_model."
    convert_file(Options("seqgan", str(tmp_path / "net2net.ckpt"), str(tmp_path / "vqgan.pt"), prefix=prefix))
    assert torch.load(tmp_path / "vqgan.pt").keys() == vqgan().state_dict().keys()
    torch.save({"state_dict": state | {"transformer.extra.weight": torch.ones(2)}}, tmp_path / "net2net.ckpt")
    with pytest.raises((ConversionError, CheckpointMismatch), match="extra"):
        convert_file(Options("seqgan", str(tmp_path / "net2net.ckpt"), str(tmp_path / "gpt.pt")))


def test_what_does_not_fit_is_named() -> None:
    theirs = revert(vqgan().state_dict())
    with pytest.raises(CheckpointMismatch, match=r"plain codebook for quantize\.proj"):
        convert({**theirs, "quantize.proj.weight": torch.ones(1)})
    lacking = {name: value for name, value in theirs.items() if name != "encoder.mid.attn_1.k.weight"}
    with pytest.raises(CheckpointMismatch, match=r"attn_1\.k\.weight is missing"):
        convert(lacking)
    with pytest.raises(CheckpointMismatch, match=r"other shape:\n    quantizer\.embedding"):
        convert(theirs, vqgan_tokenizer(32, (1, 2), 1, (8,), 16, 16, codebook_size=8, embed_dim=8))
    with pytest.raises(CheckpointMismatch, match="unknown network"):
        convert({"fc.weight": torch.ones(1)})
    with pytest.raises(CheckpointMismatch, match="enhanced decoder"):
        revert(maskgit(extra="attn1").state_dict())
    with pytest.raises(CheckpointMismatch, match="no place in a GPT for ln_x"):
        convert({**revert(gpt().state_dict()), "ln_x.weight": torch.ones(1)})
    prefix = torch.ones(1, 1, 6, 6).tril()
    convert({**revert(gpt().state_dict()), "blocks.0.attn.mask": prefix})
    prefix[:, :, :3, :3] = 1  # as n_unmasked=3 makes it
    with pytest.raises(CheckpointMismatch, match="n_unmasked=3"):
        convert({**revert(gpt().state_dict()), "blocks.0.attn.mask": prefix})


# ------------------------------------------------------------------ Flax's files


def packed(value: object) -> bytes:
    """MessagePack as Flax writes it, long forms only."""
    if isinstance(value, dict):
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, tuple):
        return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
    if isinstance(value, str):
        return b"\xd9" + struct.pack(">B", len(value)) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, Tensor):
        inner = packed((tuple(value.shape), str(value.dtype).removeprefix("torch."), raw(value)))
        return b"\xc9" + struct.pack(">Ib", len(inner), 1) + inner
    return b"\xce" + struct.pack(">I", value)


def raw(value: Tensor) -> bytes:
    return value.flatten().contiguous().view(torch.uint8).numpy().tobytes()


def nested(state: dict[str, Tensor]) -> dict:
    tree: dict = {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return tree


def test_files_of_maskgit_convert_by_command(tmp_path: Path) -> None:
    for name, model in (("tokenizer", maskgit()), ("transformer", masked()), ("critic", style())):
        randomised(model)
        tree = nested(revert(model.state_dict(), layout="flax", num_heads=HEADS))
        (tmp_path / name).write_bytes(packed({"step": 7, "params": tree}))
        message = flax_weights(tmp_path / name, tmp_path / f"{name}.safetensors")
        assert message.endswith(f"{len(revert(model.state_dict()))} of {len(revert(model.state_dict()))} arrays")
        convert_file(Options("seqgan", str(tmp_path / f"{name}.safetensors"), str(tmp_path / f"{name}.pt")))
        assert same(torch.load(tmp_path / f"{name}.pt"), model.state_dict())


def test_short_forms_halves_and_chunks_of_flax(tmp_path: Path) -> None:
    half = torch.tensor([1.5, -2.0])
    inner = b"\x93\x91\x02" + b"\xa8bfloat16" + b"\xc4\x04" + raw(half.bfloat16())
    chunks = {"0": torch.arange(3.0), "1": torch.arange(3.0, 6.0)}
    large = {"__msgpack_chunked_array__": 1, "shape": {"0": 2, "1": 3}, "chunks": chunks}
    content = b"\x83\xa1h\xc7" + struct.pack(">Bb", len(inner), 1) + inner
    content += b"\xa1l" + packed(large) + b"\xa1n\x93\xff\xc0\xc3"
    (tmp_path / "file").write_bytes(content)
    found = read_flax(tmp_path / "file")
    assert torch.equal(found["h"], half) and torch.equal(found["l"], torch.arange(6.0).view(2, 3))
    assert found.keys() == {"h", "l"}


def test_damaged_files_of_flax_are_refused(tmp_path: Path) -> None:
    whole = packed({"params": {"w": torch.ones(2)}})
    for content in (whole[:-3], whole + b"\x00", b"\xc1", b"\x05"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FlaxFileError, match="no"):
            read_flax(tmp_path / "file")
    (tmp_path / "file").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"there are params\.w"):
        flax_weights(tmp_path / "file", tmp_path / "out.pt", prefix="ema.")
    with pytest.raises(ConfigError, match="safetensors"):
        flax_weights(tmp_path / "file", tmp_path / "out.bin")
