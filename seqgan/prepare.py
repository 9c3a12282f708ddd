"""Preparation tasks of seqgan: MaskGIT's files into ones that `tools/convert.py` reads."""

from __future__ import annotations

from pathlib import Path

from core.checkpoint import save_atomic
from core.errors import ConfigError
from core.prepare import preparer
from seqgan.checkpoint.msgpack import read_flax

__all__ = ["flax_weights"]


@preparer("flax_weights")
def flax_weights(source: Path, output: Path, prefix: str = "params.") -> str:
    """A file of weights that Flax wrote (MaskGIT's tokenizer and transformer) as a flat file of tensors.

    Names and axes stay Flax's; `tools/convert.py paper=seqgan src=OUTPUT dst=...` makes our weights of it.

    Args:
        source: the published file, e.g. tokenizer_imagenet256_checkpoint.
        output: a .safetensors or .pt file.
        prefix: only arrays below it, which is cut off: averaged weights may lie beside the plain ones.

    Raises:
        ConfigError: no arrays have the prefix, or an unsuitable output.
        FileNotFoundError: no such file.
        seqgan.checkpoint.msgpack.FlaxFileError: it is damaged or something else.
    """
    if output.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"output={output}: write a .safetensors or .pt file")
    found = read_flax(source)
    state = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not state:
        raise ConfigError(f"no array of {source} begins with prefix={prefix}; there are {', '.join(list(found)[:6])}")
    save_atomic({name: value.contiguous() for name, value in state.items()}, output)
    return f"{output}: {len(state)} of {len(found)} arrays"
