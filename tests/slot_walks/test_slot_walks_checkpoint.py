"""Released models, BO-QSA's slots, DINO's and timm's files into ours and back; the command that converts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from core.engine.commands.convert import Options, convert_file
from slot_walks.checkpoint import CheckpointMismatch, convert, fit, infer, revert
from slot_walks.models import DinoViT, MLPDecoder, SlotAttention, SlotEncoder, SlotWalker

INVENTORY = Path(__file__).parents[1] / "parity" / "cases" / "slot_walks" / "keys_sacrw_vits8.json"


def small(init: str = "gaussian", projection: str = "slot") -> SlotWalker:
    backbone = DinoViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    return SlotWalker(backbone, SlotEncoder(24, 24, 4, hidden=32, init=init, projection=projection))


def official() -> dict[str, Tensor]:
    return revert(small().state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_released_inventory_is_used_up() -> None:
    content = json.loads(INVENTORY.read_text())
    state = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(content["keys"])}
    model = infer(convert(state))
    assert isinstance(model, SlotWalker) and model.backbone.patch_size == 8 and len(model.backbone.blocks) == 12
    assert sum(p.numel() for p in model.parameters()) == content["total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == content["trainable"]
    wrapped = {f"module.{key}": value for key, value in state.items()}
    assert len(wrapped) == 175 and same(convert(wrapped), convert(state))
    assert same(revert(convert(state)), state)


def test_keys_and_values_are_joined_in_that_order() -> None:
    state = official()
    k, v = (state[f"slot_attn.slot_attention.project_{x}.weight"] for x in "kv")
    assert torch.equal(convert(state)["encoder.attention.to_kv.weight"], torch.cat([k, v]))


def test_parts_of_a_released_model() -> None:
    model = small()
    state = revert(model.state_dict())
    assert same(convert(state, "encoder"), model.encoder.state_dict())
    assert same(convert(state, "backbone"), model.backbone.state_dict())
    assert same(convert(state, model.encoder), model.encoder.state_dict())
    assert same(convert(state, model.backbone), model.backbone.state_dict())
    slots = {name.removeprefix("slot_attn."): value for name, value in state.items() if name.startswith("slot_attn.")}
    assert same(convert(slots), model.encoder.state_dict())
    inner = {n.removeprefix("slot_attention."): v for n, v in slots.items() if n.startswith("slot_attention.")}
    assert isinstance(infer(convert(inner)), SlotAttention)
    assert same(convert(inner), model.encoder.attention.state_dict())


@pytest.mark.parametrize("init", ["gaussian", "learned"])
def test_boqsas_slots(init: str) -> None:
    encoder = SlotEncoder(20, 24, 5, hidden=32, init=init, projection="feature")
    state = revert(encoder.state_dict(), layout="boqsa")
    names = {"slots_init.weight"} if init == "learned" else {"slot_mu", "slot_log_sigma"}
    assert names | {"layer_norm.weight", "mlp.0.weight", "mlp.2.bias"} <= state.keys() and "mlp.3.weight" not in state
    assert state["mlp.0.weight"].shape == (20, 20)
    assert same(convert(state), encoder.state_dict()) and same(convert(state, encoder), encoder.state_dict())
    assert infer(convert(state)).num_slots == (5 if init == "learned" else 1)


def test_dinos_and_timms_backbones_are_one_mapping() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch8_224", num_classes=0)
    ours = convert({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc_norm")})
    model = infer(ours)
    assert isinstance(model, DinoViT) and model.pos_embed.shape == (1, 785, 384)
    backbone = small().backbone
    bare = backbone.state_dict()
    for prefix in ("", "module.", "backbone.", "module.backbone."):
        file = {prefix + name: value for name, value in bare.items()}
        file[f"{prefix.replace('backbone.', '')}head.mlp.0.weight"] = torch.zeros(3)
        assert same(convert(file), bare), prefix


def test_the_mlp_decoder_round_trips() -> None:
    decoder = MLPDecoder(12, 24, (1, 25), 16, 2)
    state = revert(decoder.state_dict())
    assert "decoder.0.weight" in state and same(convert(state), decoder.state_dict())


def test_every_difference_is_listed() -> None:
    state = official()
    del state["slot_attn.slot_mu"], state["vit_encoder.blocks.1.mlp.fc2.bias"]
    state["slot_attn.slot_attention.gru.bias_hh"] = torch.zeros(5)
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointMismatch) as caught:
        convert(state)
    for line in ("encoder.init.mu", "backbone.blocks.1.mlp.fc2.bias", "extra", "gru.bias_hh: (5,)"):
        assert line in str(caught.value)
    half = official()
    del half["slot_attn.slot_attention.project_k.weight"]
    with pytest.raises(CheckpointMismatch, match=r"project_k\.weight"):
        convert(half)
    with pytest.raises(CheckpointMismatch, match="no model of slot_walks"):
        convert({"conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match="no place for these"):
        revert(SlotWalker(None, SlotEncoder(8, 8), "mlp", feature_grid=2).state_dict())
    with pytest.raises(ValueError, match="unknown target"):
        convert(official(), "slots")
    with pytest.raises(ValueError, match="unknown layout"):
        revert({}, layout="timm")
    with pytest.raises(CheckpointMismatch, match="other shape"):
        fit(small().state_dict(), SlotWalker(None, SlotEncoder(24, 24, hidden=16)))


def test_the_command_accounts_for_every_tensor(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in official().items()}
    torch.save(state, tmp_path / "best_model.pt")
    options = dict(paper="slot_walks", src=str(tmp_path / "best_model.pt"))
    report = convert_file(Options(dst=str(tmp_path / "ours.safetensors"), **options))
    assert not report.dropped and not report.fresh
    kv = report.mapped["encoder.attention.to_kv.weight"]
    assert len(kv) == 2 and all(name.startswith("module.slot_attn.slot_attention.project_") for name in kv)
    encoder = convert_file(Options(dst=str(tmp_path / "slots.pt"), target="encoder", **options))
    assert all("vit_encoder" in name for name in encoder.dropped) and len(encoder.dropped) == 30
    back = Options("slot_walks", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pt"), reverse=True)
    convert_file(back)
    assert same(torch.load(tmp_path / "back.pt"), official_of(state))


def official_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): value for name, value in state.items()}
