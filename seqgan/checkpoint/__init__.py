"""Published weights into ours and back: VQGAN's tokenizers, discriminators and GPT, MaskGIT's networks.

    python tools/convert.py paper=seqgan src=vqgan_imagenet_f16_1024.ckpt dst=tokenizer.safetensors
    python tools/convert.py paper=seqgan src=vqgan_imagenet_f16_1024.ckpt prefix=loss.discriminator. dst=patchgan.pt

MaskGIT's files are Flax's and are unpacked first:

    python tools/prepare_data.py paper=seqgan task=flax_weights source=tokenizer_imagenet256_checkpoint output=flax.pt

SeQ-GAN itself has not published weights. Files of VQGAN's transformer hold two tokenizers besides: `prefix=` takes one
out (`first_stage_model.`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from core.checkpoint.fitting import CheckpointMismatch, fit
from seqgan.checkpoint import maskgit, taming
from seqgan.checkpoint.shapes import check_whole
from seqgan.checkpoint.state import State

__all__ = ["DROPPED", "CheckpointMismatch", "convert", "revert"]

LAYOUTS = ("reference", "flax")

# What published files hold besides the network, and why it is left out.
DROPPED = {
    "*attn.mask": "causal mask, computed by the model",
    "loss.perceptual_loss.*": "frozen LPIPS, which is loaded from its own files",
    "loss.discriminator.*": "the discriminator: convert it with prefix=loss.discriminator.",
    "first_stage_model.*": "the tokenizer of images: convert it with prefix=first_stage_model.",
    "cond_stage_model.*": "the tokenizer of conditions",
}


def convert(state: Mapping[str, Tensor], target: nn.Module | None = None) -> State:
    """Published weights into ours; which network it is shows from the names.

    Args:
        state: of a network or one of its encoders, decoders or attention blocks, perhaps under `state_dict`: VQGAN's
            tokenizer, PatchGAN or GPT; MaskGIT's tokenizer, transformer or discriminator, in Flax's layout or with
            torch's names and axes of parameters.
        target: module that is to be loaded; None: the network, of any size, that the names and shapes say.

    Returns:
        A new dict; with a target, one that `load_state_dict` takes with `strict=True`.

    Raises:
        CheckpointMismatch: the network is not known, has entries without a place, lacks some, or does not fit the
            target.
    """
    inner = state.get("state_dict")
    state = dict(inner if isinstance(inner, Mapping) else state)
    if maskgit.is_maskgit(state):
        state = maskgit.convert_maskgit(state)
    elif taming.is_gpt(state):
        state = taming.convert_gpt(state)
    elif taming.is_vqgan(state):
        state = taming.convert_vqgan(state)
    elif {"q.weight", "proj_out.weight"} <= state.keys():
        state = taming.convert_attention(state)
    elif "nin_shortcut.weight" in state:
        state = {name.replace("nin_shortcut.", "shortcut."): value for name, value in state.items()}
    elif "main.0.weight" not in state and target is None:
        raise CheckpointMismatch(f"unknown network with entries like {', '.join(list(state)[:4])}")
    if target is None:
        check_whole(state)
        return state
    return fit(state, target, hint="build it with the sizes of the file")


def revert(state: Mapping[str, Tensor], *, layout: str = "reference", num_heads: int = 16) -> State:
    """Our weights in the layout of those whose design the network is.

    Args:
        state: of a tokenizer, transformer or discriminator.
        layout: `reference`: names of the authors, with torch's names and axes of parameters; `flax`: with Flax's, for
            MaskGIT's networks.
        num_heads: of the transformer, which Flax's axes need.

    Raises:
        CheckpointMismatch: parts that the layout has no place for, e.g. an enhanced decoder.
        ValueError: unknown layout, or `flax` for a network of VQGAN.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: use {', '.join(LAYOUTS)}")
    ways = {
        "encoder.stem.weight": maskgit.revert_tokenizer,
        "blocks.0.0.qkv.weight": maskgit.revert_transformer,
        "blocks.0.shortcut.weight": maskgit.revert_discriminator,
        "encoder.conv_in.weight": taming.revert_vqgan,
        "blocks.0.attn.qkv.weight": taming.revert_gpt,
        "main.0.weight": dict,
    }
    known = next((name for name in ways if name in state), None)
    if known is None:
        raise CheckpointMismatch(f"unknown network with entries like {', '.join(list(state)[:4])}")
    reverted = ways[known](state)
    if layout == "reference":
        return reverted
    if list(ways).index(known) > 2:
        raise ValueError("layout='flax' is that of MaskGIT's networks; this one is VQGAN's: use layout='reference'")
    return maskgit.with_flax(reverted, num_heads)
