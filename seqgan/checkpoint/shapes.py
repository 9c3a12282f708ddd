"""Which network a state is of, by its names and shapes: what it lacks or has too much shows without a config."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seqgan.checkpoint.state import CheckpointMismatch, count, listed
from seqgan.models.autoregressive import ARTransformer
from seqgan.models.discriminators import PatchDiscriminator, StyleDiscriminator
from seqgan.models.masked import MaskedTransformer
from seqgan.models.tokenizer import conv_tokenizer, vqgan_tokenizer


def check_whole(state: Mapping[str, Tensor]) -> None:
    """A network in our names has every entry that one of its sizes has, and no other.

    Args:
        state: of a tokenizer, its encoder or its decoder, of a transformer or a discriminator. Of another module, such
            as an attention block, nothing is said.

    Raises:
        CheckpointMismatch: entries are missing or left over; all are named.
    """
    try:
        with torch.device("meta"):
            wanted = _wanted(state)
    except (KeyError, IndexError) as error:
        raise CheckpointMismatch(f"{error} is missing: the file is incomplete") from None
    except ValueError as error:
        raise CheckpointMismatch(f"the sizes of the file are of no network: {error}") from None
    if wanted is None:
        return
    wanted = {name for name in wanted if not name.endswith("num_batches_tracked")}
    have = {name for name in state if not name.endswith("num_batches_tracked")}
    if wanted != have:
        raise CheckpointMismatch(
            f"the file is not one whole network: missing {listed(sorted(wanted - have))}; "
            f"unexpected {listed(sorted(have - wanted))}"
        )


def _wanted(state: Mapping[str, Tensor]) -> set[str] | None:
    kinds = {
        r"main\.\d+\.": _patch,
        r"blocks\.\d+\.shortcut\.": _style,
        r"blocks\.\d+\.0\.qkv\.": _masked,
        r"blocks\.\d+\.attn\.qkv\.": _causal,
    }
    for pattern, names in kinds.items():
        if any(re.match(pattern, name) for name in state):
            return set(names(state).state_dict())
    for side, lead in (("encoder", "encoder."), ("decoder", "decoder."), ("encoder", ""), ("decoder", "")):
        inside = {name[len(lead) :]: value for name, value in state.items() if name.startswith(lead)}
        for first, build in (("levels.", _conv), ("down." if side == "encoder" else "up.", _vqgan)):
            if not any(name.startswith(first) for name in inside):
                continue
            if not lead and first == "levels." and ("levels.0.0.conv1.weight" in inside) != (side == "encoder"):
                continue
            built = build(inside, side, _extra(state))
            both = lead and any(name.startswith("decoder." if side == "encoder" else "encoder.") for name in state)
            names = built if both else getattr(built, side)
            return {("" if both else lead) + name for name in names.state_dict()}
    return None


def _patch(state: Mapping[str, Tensor]) -> nn.Module:
    last = max(int(found[1]) for name in state if (found := re.match(r"main\.(\d+)\.", name)))
    if last < 5 or (last - 2) % 3:
        raise ValueError(f"the last layer of a PatchGAN is not its number {last}")
    width, channels = state["main.0.weight"].shape[:2]
    return PatchDiscriminator(channels, width, (last - 2) // 3)


def _style(state: Mapping[str, Tensor]) -> nn.Module:
    depth = count(state, r"blocks\.(\d+)\.")
    return StyleDiscriminator(4 << depth, channels={4 << i: 1 for i in range(depth + 1)})


def _masked(state: Mapping[str, Tensor]) -> nn.Module:
    return MaskedTransformer(4, 1, 4, 4, count(state, r"blocks\.(\d+)\."), 1)


def _causal(state: Mapping[str, Tensor]) -> nn.Module:
    return ARTransformer(4, 1, 4, 4, count(state, r"blocks\.(\d+)\."), 1)


def _conv(state: Mapping[str, Tensor], side: str, extra: str) -> nn.Module:
    """A tokenizer of MaskGIT's design with the encoder or decoder that the state holds."""
    inner = "" if side == "encoder" else "blocks."
    levels = count(state, r"levels\.(\d+)\.")
    widths = [state[f"levels.{i}.{inner}0.conv2.weight"].shape[0] for i in range(levels)]
    widths = widths if side == "encoder" else widths[::-1]
    blocks = max(count(state, rf"levels\.{i}\.{inner}(\d+)\.") for i in range(levels))
    return conv_tokenizer(widths[0], _multiples(widths, widths[0]), blocks, extra=extra, head_dim=1)


def _extra(state: Mapping[str, Tensor]) -> str:
    if not any(".extra." in name for name in state):
        return "none"
    kinds = {2: "conv2"} if any(".extra.0.conv1." in name for name in state) else {1: "attn1", 2: "attn2"}
    number = count(state, r"(?:decoder\.)?levels\.0\.extra\.(\d+)\.")
    if number not in kinds:
        raise ValueError(f"{number} further parts in the first level of a decoder")
    return kinds[number]


def _vqgan(state: Mapping[str, Tensor], side: str, extra: str) -> nn.Module:
    """A tokenizer of VQGAN's design with the encoder or decoder that the state holds."""
    way = "down" if side == "encoder" else "up"
    levels = count(state, rf"{way}\.(\d+)\.")
    widths = [state[f"{way}.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    ends = "conv_in.weight" if side == "encoder" else "norm_out.weight"
    first = state[ends].shape[0]
    blocks = max(count(state, rf"{way}\.{i}\.block\.(\d+)\.") for i in range(levels))
    attended = [2 ** (levels - i) for i in range(levels) if count(state, rf"({way}\.{i}\.attn)\.")]
    options = {"resamp_with_conv": any(".resample." in name for name in state)}
    sizes = (first, _multiples(widths, first), blocks - (side == "decoder"), attended, 2**levels)
    return vqgan_tokenizer(*sizes, **options)


def _multiples(widths: list[int], first: int) -> list[int]:
    if any(width % first for width in widths):
        raise ValueError(f"levels of {widths} channels are no multiples of {first}")
    return [width // first for width in widths]
