"""Plain ViTs: the layouts of the reference and of DeiT, and ours.

- `reference`: flat `blocks.N` with separate `attn.q` / `attn.kv`, `layer_scale_1/2`, `pool.mask|offset.{0,1,3}`,
  `global_center`, `patch_embed.{weight,bias}` or the convolutional stem `patch_embed.proj.{0,2,...}.{c,bn}`;
- LV-ViT's: as DeiT's, with the stem `patch_embed.{conv,bn}{1,2,3}` and a classifier of tokens `aux_head`;
- `deit`: timm's and DeiT's own, with packed `attn.qkv` (rows: q, k, v), `ls1|ls2.gamma`, `patch_embed.proj` and
  `cls_token`.

Ours: `stem`, `base.N`, `reducer.{layers.N, pool, global_centres}`, `tail.N`, `norm`, `head`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch, fit, report
from stvit.checkpoint.state import State, count, pack_qkv, split_qkv, unwrap
from stvit.models import SemanticTokenViT

_POOL_PARTS = {"0": "conv", "1": "norm", "3": "proj"}
_STEM_PARTS = {"c": "conv", "conv": "conv", "bn": "norm"}
_HEADS = r"(head|head_dist|aux_head)\."
# What a layout cannot hold, as it is called there.
_FOREIGN = {
    "deit": r"global_center|pool\.|reducer\.|.*relative_position_bias_table|patch_embed\.proj\.\d",
    "reference": r"reducer\.(position|conv_pos)",
}


def convert_vit(state: State, target: nn.Module | str, *, base_depth: int = 4, stgm_depth: int = 2) -> State:
    """Names of the reference or of DeiT to ours, for `target`: a module, or `vit` or `semantic`.

    See `stvit.checkpoint.convert`.
    """
    if isinstance(target, str):
        if target == "semantic":
            state = without_class_token(state)
        target = infer_model(state, base_depth, stgm_depth)
    depths = (base_depth, stgm_depth)
    if isinstance(target, SemanticTokenViT):
        depths = (len(target.base), len(target.reducer.layers))
    return fit(rename(_distilled(state), *depths), target)


def revert_vit(state: Mapping[str, Tensor], layout: str) -> State:
    """Our names to those of `layout`, `reference` or `deit`.

    See `stvit.checkpoint.revert`.
    """
    base = count(state, r"^base\.(\d+)\.")
    generated = base + count(state, r"^reducer\.layers\.(\d+)\.")
    theirs: State = {}
    for name, value in state.items():
        name = re.sub(r"^base\.(\d+)\.", r"blocks.\1.", name)
        name = re.sub(r"^reducer\.layers\.(\d+)\.", lambda m: f"blocks.{base + int(m[1])}.", name)
        name = re.sub(r"^tail\.(\d+)\.", lambda m: f"blocks.{generated + int(m[1])}.", name)
        name = re.sub(r"^reducer\.global_centres$", "global_center", name)
        name = re.sub(r"^reducer\.pool\.", "pool.", name)
        if match := re.fullmatch(r"((?:pool\.)?(?:mask|offset)\.)(conv|norm|proj)(\..+)", name):
            index = next(i for i, part in _POOL_PARTS.items() if part == match[2])
            name, value = match[1] + index + match[3], value[..., None, None] if match[2] == "proj" else value
        if match := re.fullmatch(r"(stem\.)?stages\.(\d+)\.(conv|norm)(\..+)", name):
            part = "c" if match[3] == "conv" else "bn"
            name = f"{'patch_embed.' if match[1] else ''}proj.{2 * int(match[2])}.{part}{match[4]}"
        name = re.sub(r"^stem\.proj\.", "patch_embed.proj." if layout == "deit" else "patch_embed.", name)
        if layout == "reference":
            name = re.sub(r"(^|\.)ls([12])\.gamma$", r"\1layer_scale_\2", name)
        theirs["dist_token" if name == "reg_token" and "head_dist.weight" in state else name] = value
    foreign = [name for name in theirs if re.match(_FOREIGN[layout], name)]
    if foreign:
        raise CheckpointMismatch(report(f"the {layout} layout has no place for", unexpected=foreign))
    return pack_qkv(theirs) if layout == "deit" else theirs


# What no ViT has: pooling, global centres and positions of semantic tokens, methods of reduction.
_FRESH = r"reducer\.(pool\.|global_centres$|position$|conv_pos\.)|tail\..*relative_position_bias_table$|reduction\."


def from_deit(state: Mapping[str, Tensor], model: SemanticTokenViT, *, load_head: bool = True) -> State:
    """Weights for `model` from a DeiT (or timm ViT) checkpoint.

    The class token and a distillation token, with their positions, are dropped unless the model has them; of two
    classifiers the mean stays then. The position embedding is resampled to the model's grid, packed `qkv` are split.
    Pooling, global centres and positions of semantic tokens stay as the model has them. Of LV-ViT's two classifiers,
    that of single tokens is dropped where the model has none.

    Args:
        state: DeiT's state dict, or a `{"model": state}` file content.
        model: gives names, shapes and whatever DeiT has not.
        load_head: False keeps the model's own classifier (another number of classes).

    Returns:
        A dict that `model.load_state_dict` takes with `strict=True`.

    Raises:
        CheckpointMismatch: entries are missing, left over or of another shape.
    """
    state = unwrap(state)
    if model.cls_token is None or (model.head_dist is None and "dist_token" in state):
        state = without_class_token(state, keep=model.cls_token is not None, tokens=model.grid[0] * model.grid[1])
    ours = rename(_distilled(state), len(model.base), len(model.reducer.layers))
    if "pos_embed" in ours:
        ours["pos_embed"] = _fit_position(ours["pos_embed"], model)
    own = model.state_dict()
    fresh = re.compile(_FRESH + ("" if load_head else rf"|{_HEADS}"))
    if not load_head:
        ours = {name: value for name, value in ours.items() if not re.match(_HEADS, name)}
    if not any(name.startswith("aux_head.") for name in own):  # semantic tokens are not classified one by one
        ours = {name: value for name, value in ours.items() if not name.startswith("aux_head.")}
    ours |= {name: value for name, value in own.items() if fresh.match(name) and name not in ours}
    return fit(ours, model, hint="" if not load_head else "load_head=False keeps the model's own classifier")


def rename(state: Mapping[str, Tensor], base_depth: int, stgm_depth: int) -> State:
    """Names of either foreign layout to ours; unknown names pass unchanged and are found by `_fit`."""
    ours: State = {}
    for name, value in split_qkv(state).items():
        name = re.sub(r"^blocks\.(\d+)\.", lambda m: _place(int(m[1]), base_depth, stgm_depth), name)
        name = re.sub(r"(^|\.)layer_scale_([12])$", r"\1ls\2.gamma", name)
        name = re.sub(r"^global_center$", "reducer.global_centres", name)
        name = re.sub(r"^pool\.", "reducer.pool.", name)
        if match := re.fullmatch(r"((?:reducer\.pool\.)?(?:mask|offset)\.)([013])(\..+)", name):
            name = match[1] + _POOL_PARTS[match[2]] + match[3]
            value = value.flatten(1) if match[2] == "3" else value
        if match := re.fullmatch(r"(patch_embed\.)?proj\.(\d+)\.(c|bn)(\..+)", name):
            prefix = "stem." if match[1] else ""
            name = f"{prefix}stages.{int(match[2]) // 2}.{_STEM_PARTS[match[3]]}{match[4]}"
        if match := re.fullmatch(r"patch_embed\.(conv|bn)([123])(\..+)", name):
            name = f"stem.stages.{int(match[2]) - 1}.{_STEM_PARTS[match[1]]}{match[3]}"
        name = re.sub(r"^patch_embed\.(?:proj\.)?", "stem.proj.", name)
        ours[name] = value
    return ours


def _place(index: int, base_depth: int, stgm_depth: int) -> str:
    if index < base_depth:
        return f"base.{index}."
    if index < base_depth + stgm_depth:
        return f"reducer.layers.{index - base_depth}."
    return f"tail.{index - base_depth - stgm_depth}."


def without_class_token(state: Mapping[str, Tensor], *, keep: bool = False, tokens: int | None = None) -> State:
    """A state without class token and distillation token, their positions, and with the mean of two classifiers.

    `keep` keeps the class token; `tokens` is how many image tokens there are, None: a square number.
    """
    ours = dict(state)
    first = [ours.pop(name, None) is not None for name in ("cls_token", "dist_token")]
    if keep and first[0]:
        first[0], ours["cls_token"] = False, state["cls_token"]
    position, extra = ours.get("pos_embed"), ours.get("reg_token")
    if position is not None and any(first):
        front, count = sum(first) + keep + (0 if extra is None else extra.shape[1]), position.shape[1]
        # Whether tokens in front have positions shows in the number that remains: it is a grid's.
        bare = count == tokens or (count - front != tokens and _square(count) and not _square(count - front))
        if not bare:
            kept = [position[:, :1]] if keep else []
            ours["pos_embed"] = torch.cat([*kept, position[:, sum(first) + keep :]], dim=1)
    for part in ("weight", "bias"):
        if f"head_dist.{part}" in ours:
            ours[f"head.{part}"] = (ours[f"head.{part}"] + ours.pop(f"head_dist.{part}")) / 2
    return ours


def _square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


def _distilled(state: Mapping[str, Tensor]) -> State:
    """Our name of the distillation token: it is the first of the tokens behind the class token."""
    return {"reg_token" if name == "dist_token" else name: value for name, value in state.items()}


def _fit_position(position: Tensor, model: SemanticTokenViT) -> Tensor:
    """Positions for the model's grid: as they are where their number fits, else resampled from a square grid."""
    prefix, count = model.position_prefix, position.shape[1]
    if count == model.pos_embed.shape[1] or not _square(count - prefix):
        return position  # of another number of tokens in front: the difference is listed
    side = math.isqrt(count - prefix)
    return resample_abs_pos_embed(position, list(model.grid), [side, side], num_prefix_tokens=prefix)


def infer_model(state: Mapping[str, Tensor], base_depth: int, stgm_depth: int) -> SemanticTokenViT:
    """The model that a complete state dict belongs to, on the meta device (head count shows in tables alone)."""
    ours = rename(_distilled(state), base_depth, stgm_depth)
    needed = ["pos_embed"]
    conv_stem = any(name.startswith("stem.stages.") for name in ours)
    if conv_stem and "stem.proj.weight" in ours:
        raise CheckpointMismatch("these are weights of LV-ViT, which do not tell its number of heads: pass the module")
    needed += ["stem.stages.0.conv.weight" if conv_stem else "stem.proj.weight"]
    missing = [name for name in needed if name not in ours]
    if missing:
        raise CheckpointMismatch(report("this is not the state of a ViT", missing=missing))
    dim = ours["pos_embed"].shape[2]
    if conv_stem:
        patch, chans = 2 ** count(ours, r"stem\.stages\.(\d+)\."), ours["stem.stages.0.conv.weight"].shape[1]
    else:
        chans, patch = ours["stem.proj.weight"].shape[1:3]
    class_token = "cls_token" in ours
    registers = ours["reg_token"].shape[1] if "reg_token" in ours else 0
    positions, prefix = ours["pos_embed"].shape[1], class_token + registers
    bare = prefix > 0 and not _square(positions - prefix) and _square(positions)
    side = math.isqrt(positions - (0 if bare else prefix))
    table = next((v for n, v in ours.items() if re.fullmatch(r"tail\..*relative_position_bias_table", n)), None)
    semantic = table is not None or any(n.startswith(("reducer.pool.", "reducer.global_centres")) for n in ours)
    centres = ours.get("reducer.global_centres")
    pool = "max" if centres is None else "none"  # neither has parameters
    if any(name.startswith("reducer.pool.mask") for name in ours):
        pool = "weighted"
    if any(name.startswith("reducer.pool.offset") for name in ours):
        pool = "weighted_offset"
    grid = 4 if table is None else (math.isqrt(len(table)) + 1) // 2
    grid = grid if centres is None else math.isqrt(centres.shape[1])
    mlp = next((value.shape[0] for name, value in ours.items() if name.endswith("mlp.fc1.weight")), 4 * dim)
    with torch.device("meta"):
        return SemanticTokenViT(
            img_size=side * patch,
            patch_size=patch,
            in_chans=chans,
            num_classes=ours["head.weight"].shape[0] if "head.weight" in ours else 0,
            embed_dim=dim,
            depth=count(state, r"blocks\.(\d+)\."),
            num_heads=1 if table is None else table.shape[1],
            base_depth=base_depth,
            stgm_depth=stgm_depth,
            token_grid=grid,
            tokens="semantic" if semantic else "all",
            token_position="none" if table is None else "relative",
            pool=pool,
            use_global=centres is not None,
            mlp_ratio=mlp / dim,
            qkv_bias=any(name.endswith("attn.q.bias") for name in ours),
            layer_scale=1e-5 if any(name.endswith("ls1.gamma") for name in ours) else None,
            class_token=class_token,
            reg_tokens=registers,
            distilled="head_dist.weight" in ours,
            no_embed_class=bare,
            pre_norm="norm_pre.weight" in ours,
            final_norm="norm.weight" in ours or "fc_norm.weight" in ours,
            fc_norm="fc_norm.weight" in ours,
            global_pool="map" if "attn_pool.latent" in ours else None,
            stem="conv" if conv_stem else "patch",
        )
