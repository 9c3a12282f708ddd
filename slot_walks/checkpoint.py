"""State dicts of others to ours and back.

Layouts that are read, recognised by their keys, with or without the prefix `module.` of DataParallel:

- the released model: `vit_encoder.*` and `slot_attn.*`;
- its slot encoder or slot attention alone;
- BO-QSA's and SPOT's slot encoder: `layer_norm`, `mlp`, `slot_attention`, and `slots_init.weight` or `slot_mu` and
  `slot_log_sigma` (whole checkpoints of theirs: `prefix=slot_attn.` picks it);
- DINO's ViT files and timm's of the same ViT;
- DINOSAUR's MLP decoder as in SPOT: `pos_embed`, `decoder.N`.

Every function is strict: what is left over, missing or of another shape raises `CheckpointMismatch` with all names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch, fit, report
from slot_walks.models import DinoViT, MLPDecoder, SlotAttention, SlotEncoder, SlotWalker

State = dict[str, Tensor]

TARGETS = ("model", "encoder", "backbone")

# Entries of published files that have no place in some targets, with the reason (for `tools/convert.py`).
DROPPED = {
    "vit_encoder.*": "frozen backbone; target=encoder leaves it to the backbone's own file",
    "module.vit_encoder.*": "frozen backbone; target=encoder leaves it to the backbone's own file",
    "slot_attn.*": "slot encoder; target=backbone has none",
    "module.slot_attn.*": "slot encoder; target=backbone has none",
    "head.*": "projection head or classifier of the backbone's training",
    "backbone.head.*": "projection head or classifier of the backbone's training",
    "module.head.*": "projection head or classifier of the backbone's training",
}

# Official prefix of a part -> ours.
_PARTS = {"vit_encoder.": "backbone.", "slot_attn.": "encoder."}
# Projection of the slot encoder: ours -> released, and BO-QSA's.
_RELEASED = {"project.0.": "mlp.0.", "project.1.": "mlp.1.", "project.3.": "mlp.3."}
_BOQSA = {"project.0.": "layer_norm.", "project.1.": "mlp.0.", "project.3.": "mlp.2."}
_INIT = {"init.mu": "slot_mu", "init.log_sigma": "slot_log_sigma", "init.slots": "slots_init.weight"}
_DINO_PREFIXES = ("module.backbone.", "backbone.", "vit_encoder.")


def convert(state: Mapping[str, Tensor], target: nn.Module | str | None = None) -> State:
    """Translate a state dict to our names.

    Args:
        state: name to tensor.
        target: the module that is to be loaded (`SlotWalker` or one of its pieces), or which part of a released model
            is wanted: `model`, `encoder` (the slot encoder, under its own names) or `backbone`. None: all there is.

    Returns:
        A new dict that the target's `load_state_dict` takes with `strict=True`; keys and values of the slot attention
        are joined, other tensors are the same.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
        ValueError: unknown target.
    """
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: use {', '.join(TARGETS)} or pass the module to be loaded")
    state = _bare(state)
    part = _part(target)
    whole = any(name.startswith(tuple(_PARTS)) for name in state)
    if whole:
        ours: State = {}
        for name, value in _convert_parts(state).items():
            if part == "model":
                ours[name] = value
            elif name.startswith(f"{part}."):
                ours[name.removeprefix(f"{part}.")] = value
    else:
        ours = _convert_piece(state)
    module = target if isinstance(target, nn.Module) else infer(ours)
    return fit(ours, module)


def revert(state: Mapping[str, Tensor], *, layout: str = "official") -> State:
    """Translate our state dict (of a model or one of its pieces) back.

    Args:
        state: name to tensor.
        layout: `official`: the released code's names; `boqsa`: those of BO-QSA's and SPOT's slot encoder.

    Raises:
        CheckpointMismatch: parts that the layout has no place for.
        ValueError: unknown layout.
    """
    if layout not in ("official", "boqsa"):
        raise ValueError(f"unknown layout {layout!r}: use official or boqsa")
    foreign = [name for name in state if name.startswith(("decoder.", "to_feature."))]
    if foreign:
        raise CheckpointMismatch(report("the released layout has no place for these", unexpected=foreign))
    theirs: State = {}
    for name, value in state.items():
        prefix = ""
        for official, own in _PARTS.items():
            if name.startswith(own):
                prefix, name = official, name.removeprefix(own)
        theirs |= {prefix + key: part for key, part in _revert_entry(name, value, layout).items()}
    return theirs


# ------------------------------------------------------------------ others' to ours


def _bare(state: Mapping[str, Tensor]) -> State:
    """Without the prefixes that wrappers put in front of everything, and without the heads of a backbone's training."""
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("slot_attn.") for name in state):
        return dict(state)
    for prefix in _DINO_PREFIXES:
        if any(name.startswith(f"{prefix}blocks.") for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if any(name.startswith("blocks.") for name in state):
        return {name: value for name, value in state.items() if not name.startswith("head.")}
    return dict(state)


def _part(target: nn.Module | str | None) -> str:
    if isinstance(target, SlotEncoder):
        return "encoder"
    if isinstance(target, DinoViT):
        return "backbone"
    return target if isinstance(target, str) else "model"


def _convert_parts(state: Mapping[str, Tensor]) -> State:
    ours: State = {}
    for theirs, own in _PARTS.items():
        piece = {name.removeprefix(theirs): value for name, value in state.items() if name.startswith(theirs)}
        ours |= {own + name: value for name, value in _convert_piece(piece).items()}
    # Whatever has none of the prefixes passes unchanged and is found by `fit`.
    return ours | {name: value for name, value in state.items() if not name.startswith(tuple(_PARTS))}


def _convert_piece(state: Mapping[str, Tensor]) -> State:
    """Names of a slot encoder, slot attention, decoder or backbone that stands alone."""
    if any(name.startswith("slot_attention.") for name in state):
        table = _BOQSA if any(name.startswith("layer_norm.") for name in state) else _RELEASED
        renamed: State = {}
        for name, value in state.items():
            for own, theirs in table.items():
                if name.startswith(theirs):
                    name = own + name.removeprefix(theirs)
                    break
            name = re.sub(r"^slot_attention\.", "attention.", name)
            renamed[{theirs: own for own, theirs in _INIT.items()}.get(name, name)] = value
        state = renamed
    return _join_keys_and_values({re.sub(r"^decoder\.(\d+)\.", r"layers.\1.", name): v for name, v in state.items()})


def _join_keys_and_values(state: Mapping[str, Tensor]) -> State:
    joined: State = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(|.*\.)project_k\.weight", name):
            values = state.get(f"{match[1]}project_v.weight")
            if values is None:
                raise CheckpointMismatch(report("the state dict lacks", missing=[f"{match[1]}project_v.weight"]))
            joined[f"{match[1]}to_kv.weight"] = torch.cat([value, values])
        elif match := re.fullmatch(r"(|.*\.)project_([qv])\.weight", name):
            if match[2] == "q":
                joined[f"{match[1]}to_q.weight"] = value
            elif f"{match[1]}project_k.weight" not in state:
                raise CheckpointMismatch(report("the state dict lacks", missing=[f"{match[1]}project_k.weight"]))
        else:
            joined[name] = value
    return joined


# ------------------------------------------------------------------ ours to others'


def _revert_entry(name: str, value: Tensor, layout: str) -> State:
    if match := re.fullmatch(r"(attention\.|)to_kv\.weight", name):
        prefix = "slot_attention." if match[1] else ""
        half = value.shape[0] // 2
        return {f"{prefix}project_k.weight": value[:half], f"{prefix}project_v.weight": value[half:]}
    name = re.sub(r"^(attention\.|)to_q\.", r"\1project_q.", name)
    name = re.sub(r"^attention\.", "slot_attention.", name)
    name = re.sub(r"^layers\.(\d+)\.", r"decoder.\1.", name)
    for own, theirs in (_RELEASED if layout == "official" else _BOQSA).items():
        if name.startswith(own):
            name = theirs + name.removeprefix(own)
            break
    return {_INIT.get(name, name): value}


# ------------------------------------------------------------------ what a state dict belongs to


def infer(state: Mapping[str, Tensor]) -> nn.Module:
    """The module, on the meta device, that a state dict in our names belongs to; sizes are read off the shapes.

    Raises:
        CheckpointMismatch: the names are of nothing that is known, or what tells the sizes is missing.
    """
    kinds: tuple[tuple[str, Callable[[Mapping[str, Tensor]], nn.Module]], ...] = (
        ("encoder.", _infer_model),
        ("attention.", _infer_encoder),
        ("blocks.", _infer_backbone),
        ("to_q.", _infer_attention),
        ("layers.", _infer_decoder),
    )
    for prefix, build in kinds:
        if any(name.startswith(prefix) for name in state):
            try:
                with torch.device("meta"):
                    return build(state)
            except KeyError as error:
                raise CheckpointMismatch(report("sizes cannot be told without", missing=[str(error.args[0])])) from None
    raise CheckpointMismatch(report("these names belong to no model of slot_walks", unexpected=state))


def _infer_model(state: Mapping[str, Tensor]) -> SlotWalker:
    def inside(prefix: str) -> State:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    return SlotWalker(_infer_backbone(inside("backbone.")), _infer_encoder(inside("encoder.")))


def _infer_backbone(state: Mapping[str, Tensor]) -> DinoViT:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    return DinoViT(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=1,  # heads leave no trace in shapes
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )


def _infer_encoder(state: Mapping[str, Tensor]) -> SlotEncoder:
    width, in_dim = state["project.1.weight"].shape
    hidden, dim = state["attention.mlp.0.weight"].shape
    reads = state["attention.to_kv.weight"].shape[1]
    free = state.get("init.slots")
    init = "gaussian" if free is None else "gaussian_mean" if "init.mu" in state else "learned"
    feature = width == reads == in_dim and not (reads == dim and width == hidden)
    return SlotEncoder(
        in_dim,
        dim,
        num_slots=1 if free is None else free.shape[0],
        hidden=hidden,
        init=init,
        projection="feature" if feature else "slot",
    )


def _infer_attention(state: Mapping[str, Tensor]) -> SlotAttention:
    hidden, dim = state["mlp.0.weight"].shape
    return SlotAttention(dim, in_dim=state["to_kv.weight"].shape[1], mlp_hidden=hidden)


def _infer_decoder(state: Mapping[str, Tensor]) -> MLPDecoder:
    width = state["layers.0.weight"].shape[0]
    last = max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    places, dim = state["pos_embed"].shape[1:]
    return MLPDecoder(dim, state[f"layers.{last}.weight"].shape[0] - 1, (1, places), width, depth=last // 2)
