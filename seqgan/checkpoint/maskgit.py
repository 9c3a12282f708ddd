"""Layouts of MaskGIT's authors: tokenizer, transformer and discriminator, with Flax's kernels or torch's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from seqgan.checkpoint.state import CheckpointMismatch, State, count, join_qkv, rename, split_qkv, swapped

# Flax's names of a parameter within its module; torch calls each of them a weight.
_LEAVES = ("kernel", "scale", "embedding")
_BLOCK = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2", "Conv_2": "shortcut"}


def is_maskgit(state: Mapping[str, Tensor]) -> bool:
    """Whether it is one of their networks."""
    return any(part.startswith(("ResBlock_", "TransformerLayer_")) for name in state for part in name.split("."))


def convert_maskgit(state: Mapping[str, Tensor]) -> State:
    """One of their networks into ours.

    Raises:
        CheckpointMismatch: entries that it does not have.
    """
    state = _without_flax(state)
    if any(name.startswith("TransformerLayer_") for name in state):
        return join_qkv(rename(state, _transformer_names(count(state, r"TransformerLayer_(\d+)\.")), "MaskGIT"))
    if "Conv_0.weight" in state:
        names = _discriminator_names(count(state, r"ResBlock_(\d+)\."))
        return rename(state, names, "MaskGIT's discriminator")
    upsamplings = count(state, r"decoder\.Conv_(\d+)\.") - 2
    blocks = count(state, r"encoder\.ResBlock_(\d+)\.")
    levels = upsamplings + 1
    if levels < 1 or blocks % (levels + 1):
        raise CheckpointMismatch(
            f"{blocks} residual blocks in the encoder and {levels} levels in the decoder belong to no MaskGIT tokenizer"
        )
    return rename(state, _tokenizer_names(levels, blocks // (levels + 1)), "MaskGIT's tokenizer")


def revert_transformer(state: Mapping[str, Tensor]) -> State:
    """A `MaskedTransformer` back."""
    names = swapped(_transformer_names(count(state, r"blocks\.(\d+)\.")))
    return rename(split_qkv(state), names, "MaskGIT's transformer")


def revert_discriminator(state: Mapping[str, Tensor]) -> State:
    """A `StyleDiscriminator` back."""
    return rename(state, swapped(_discriminator_names(count(state, r"blocks\.(\d+)\."))), "MaskGIT's discriminator")


def revert_tokenizer(state: Mapping[str, Tensor]) -> State:
    """A tokenizer of `conv_tokenizer` back.

    Raises:
        CheckpointMismatch: its decoder is enhanced, for which theirs has no place.
    """
    if any(".extra." in name for name in state):
        raise CheckpointMismatch("MaskGIT's tokenizer has no place for an enhanced decoder: revert the first phase's")
    levels, blocks = count(state, r"encoder\.levels\.(\d+)\."), count(state, r"encoder\.levels\.0\.(\d+)\.")
    return rename(state, swapped(_tokenizer_names(levels, blocks)), "MaskGIT's tokenizer")


def _transformer_names(depth: int) -> dict[str, str]:
    names = {
        "Embed_0.word_embeddings": "tokens",
        "Embed_0.position_embeddings": "positions",
        "Embed_0.embeddings_ln": "norm",
        "MlmLayer_0.mlm_dense": "head",
        "MlmLayer_0.mlm_ln": "head_norm",
        "MlmLayer_0.mlm_bias.bias": "head_bias",
    }
    for i in range(depth):
        attention = {long: long[0] for long in ("query", "key", "value")} | {"out": "proj"}
        parts = {f"Attention_0.self_attention.{old}": f"0.{new}" for old, new in attention.items()}
        parts |= {
            "Attention_0.attention_output_ln": "0.norm",
            "Mlp_0.intermediate_output": "1.fc1",
            "Mlp_0.layer_output": "1.fc2",
            "Mlp_0.layer_output_ln": "1.norm",
        }
        names |= {f"TransformerLayer_{i}.{old}": f"blocks.{i}.{new}" for old, new in parts.items()}
    return names


def _discriminator_names(depth: int) -> dict[str, str]:
    names = {"Conv_0": "stem", "Conv_1": "conv_out", "Dense_0": "hidden", "Dense_1": "head"}
    for i in range(depth):
        parts = {"Conv_0": "conv1", "Conv_1": "shortcut", "Conv_2": "conv2"}
        names |= {f"ResBlock_{i}.{old}": f"blocks.{i}.{new}" for old, new in parts.items()}
    return names


def _tokenizer_names(levels: int, blocks: int) -> dict[str, str]:
    """Theirs are numbered through in the order in which they run: the encoder's middle last, the decoder's first."""
    names = {"quantizer.codebook": "quantizer.embedding.weight"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.Conv_0": f"{side}.stem", f"{side}.GroupNorm_0": f"{side}.norm_out"}
    names["encoder.Conv_1"] = "encoder.conv_out"
    names[f"decoder.Conv_{levels}"] = "decoder.conv_out"
    names |= {f"decoder.Conv_{i + 1}": f"decoder.levels.{i}.up.conv" for i in range(levels - 1)}
    own = [[f"levels.{i}.{b}" for b in range(blocks)] for i in range(levels)]
    middle = [f"mid.{b}" for b in range(blocks)]
    encoder = [name for level in own for name in level] + middle
    decoder = middle + [
        name.replace(f"levels.{i}.", f"levels.{i}.blocks.") for i, level in enumerate(own) for name in level
    ]
    for side, order in (("encoder", encoder), ("decoder", decoder)):
        for i, name in enumerate(order):
            names |= {f"{side}.ResBlock_{i}.{old}": f"{side}.{name}.{new}" for old, new in _BLOCK.items()}
    return names


def _without_flax(state: Mapping[str, Tensor]) -> State:
    """Torch's leaf names and axes; states that have them already are returned as they are."""
    result = {}
    for name, value in state.items():
        name = name.removeprefix("params.")
        module, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            value = _kernel(module, value)
        elif leaf == "bias":
            value = value.flatten()
        result[f"{module}.weight" if leaf in _LEAVES else name] = value
    return result


def _kernel(module: str, value: Tensor) -> Tensor:
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    if value.ndim == 3:  # heads and their channels lie apart
        value = value.flatten(0, 1) if module.endswith(".out") else value.flatten(1)
    return value.t()


def with_flax(state: Mapping[str, Tensor], num_heads: int) -> State:
    """Names and axes of Flax, from their names with torch's leaves and axes."""
    result = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        attention = ".self_attention." in name
        if attention and not module.endswith(".out"):
            value = value.unflatten(0, (num_heads, -1))  # (heads, d[, C])
            value = value.permute(2, 0, 1) if leaf == "weight" else value
        elif attention and leaf == "weight":
            value = value.t().unflatten(0, (num_heads, -1))
        elif leaf == "weight" and value.ndim == 4:
            value = value.permute(2, 3, 1, 0)
        elif leaf == "weight" and value.ndim == 2 and not module.endswith("_embeddings"):
            value = value.t()
        if leaf == "weight":
            leaf = "embedding" if module.endswith("_embeddings") else "scale" if value.ndim == 1 else "kernel"
        result[f"{module}.{leaf}"] = value
    return result
