"""Layouts of VQGAN's authors: tokenizers and GPT."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from seqgan.checkpoint.state import (
    CheckpointMismatch,
    State,
    count,
    join_qkv,
    listed,
    mapped,
    rename,
    split_qkv,
    swapped,
)

# What tokenizers, or an encoder or decoder alone, consist of.
_KNOWN = re.compile(
    r"(encoder\.|decoder\.|)"
    r"((conv_in|norm_out|conv_out)"
    r"|(mid\.(block_[12]|attn_1)|(down|up)\.\d+\.(block|attn)\.\d+)"
    r"\.(norm[12]?|conv[12]|nin_shortcut|q|k|v|proj_out)"
    r"|down\.\d+\.downsample\.conv|up\.\d+\.upsample\.conv)"
    r"\.(weight|bias)"
    r"|quantize\.embedding\.weight|(post_)?quant_conv\.(weight|bias)"
)
_OURS = (
    (r"\bnin_shortcut\.", "shortcut."),
    (r"\bproj_out\.", "proj."),
    (r"\b(down|up)sample\.conv\.", "resample.conv."),
    (r"^quantize\.", "quantizer."),
)
_THEIRS = (
    (r"\bshortcut\.", "nin_shortcut."),
    (r"\bproj\.", "proj_out."),
    (r"\b(down|up)(\.\d+\.)resample\.conv\.", r"\1\2\1sample.conv."),
    (r"^quantizer\.", "quantize."),
)
_PROJECTIONS = re.compile(r"(.*\.|)(q|k|v|proj|proj_out)\.weight")


def is_vqgan(state: Mapping[str, Tensor]) -> bool:
    """Whether it is a tokenizer of theirs, or its encoder or decoder."""
    return any(name.removeprefix("encoder.").removeprefix("decoder.") == "conv_in.weight" for name in state)


def convert_vqgan(state: Mapping[str, Tensor]) -> State:
    """A tokenizer, encoder or decoder into ours; losses that lie beside the tokenizer are left out.

    Raises:
        CheckpointMismatch: entries of another design, e.g. of a Gumbel quantiser.
    """
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    return _vqgan(state)


def convert_attention(state: Mapping[str, Tensor]) -> State:
    """An attention block alone."""
    return join_qkv(mapped(_substituted(state, _OURS), _as_linear))


def _vqgan(state: Mapping[str, Tensor]) -> State:
    unknown = [name for name in state if not _KNOWN.fullmatch(name)]
    if unknown:
        raise CheckpointMismatch(
            f"no place in a VQGAN with a plain codebook for {listed(unknown)}: only that kind is converted. "
            "drop=[PATTERN] leaves out what is not of the network, e.g. model_ema.*, quantize.used or colorize"
        )
    return convert_attention(state)


def revert_vqgan(state: Mapping[str, Tensor]) -> State:
    """The way back."""
    return _substituted(mapped(split_qkv(state), _as_convolution), _THEIRS)


def _substituted(state: Mapping[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> State:
    result = {}
    for name, value in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def _as_linear(name: str, value: Tensor) -> Tensor:
    return value.flatten(1) if _PROJECTIONS.fullmatch(name) else value


def _as_convolution(name: str, value: Tensor) -> Tensor:
    return value[..., None, None] if _PROJECTIONS.fullmatch(name) else value


# ------------------------------------------------------------------ GPT


def is_gpt(state: Mapping[str, Tensor]) -> bool:
    """Whether it is a transformer of theirs."""
    return any(name.endswith("tok_emb.weight") for name in state)


def convert_gpt(state: Mapping[str, Tensor]) -> State:
    """A GPT into an `ARTransformer`; beside it, a file of theirs holds its tokenizers, which are left out.

    Raises:
        CheckpointMismatch: entries that a GPT does not have, or attention that is not causal throughout.
    """
    if "tok_emb.weight" not in state:
        inside = {name.removeprefix("transformer."): v for name, v in state.items() if name.startswith("transformer.")}
        state = inside
    for name, mask in state.items():
        if name.endswith("attn.mask") and not mask.is_meta:
            _check_causal(name, mask)
    state = {name: value for name, value in state.items() if not name.endswith("attn.mask")}
    return join_qkv(rename(state, _gpt_names(count(state, r"blocks\.(\d+)\.")), "a GPT"))


def _check_causal(name: str, mask: Tensor) -> None:
    """Their option `n_unmasked` lets a prefix of conditions see itself whole, which shows in the mask `(1, 1, T, T)`.

    Raises:
        CheckpointMismatch: a position sees later ones.
    """
    later = mask[0, 0].float().triu(1)
    if later.any():
        prefix = int(later[0].ne(0).sum()) + 1
        raise CheckpointMismatch(
            f"{name}: the first {prefix} positions see each other (n_unmasked={prefix}): a GPT on a prefix of "
            "conditions, for which ARTransformer, causal throughout after one class token, has no place"
        )


def revert_gpt(state: Mapping[str, Tensor]) -> State:
    """The way back; masks are left out, which their code computes."""
    names = swapped(_gpt_names(count(state, r"blocks\.(\d+)\.")))
    return rename(split_qkv(state), names, "their GPT")


def _gpt_names(depth: int) -> dict[str, str]:
    names = {"tok_emb": "tokens", "pos_emb": "positions", "ln_f": "norm", "head": "head"}
    for i in range(depth):
        parts = {"ln1": "norm1", "ln2": "norm2", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
        parts |= {f"attn.{long}": f"attn.{long[0]}" for long in ("query", "key", "value")}
        parts["attn.proj"] = "attn.proj"
        names |= {f"blocks.{i}.{old}": f"blocks.{i}.{new}" for old, new in parts.items()}
    return names
