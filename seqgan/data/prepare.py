"""Preparation tasks of seqgan: MaskGIT's files into ones that `tools/convert.py` reads; networks of the stand-in."""

from __future__ import annotations

from pathlib import Path

from core.checkpoint import save_atomic
from core.data.prepare import preparer
from core.errors import ConfigError
from seqgan.checkpoint.msgpack import read_flax
from seqgan.standin.judges import ROOT, prepare_networks
from seqgan.standin.shape_glyphs import ShapeGlyphs

__all__ = ["flax_weights", "shape_glyphs"]


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


@preparer("shape_glyphs")
def shape_glyphs(output: Path = Path(ROOT), seed: int = 0) -> str:
    """Trains the loss network and the judge of ShapeGlyphs; its experiments otherwise do so when they first need them.

    Args:
        output: folder of them, by seed.
        seed: of the images and of both networks.
    """
    right = prepare_networks(ShapeGlyphs("train", seed), output)
    return f"{output}/{seed}: " + ", ".join(f"{kind} network right on {share:.1%}" for kind, share in right.items())
