"""Folders of text-to-image pipelines on local disk, part by part.

diffusers refuses released Tune-A-Video folders (their index names a library `models`), so the index is read here and
every part is loaded by its class. Nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from core.checkpoint import load, load_official
from core.data.files import read_json
from core.errors import VitrineError
from tune_a_video.models import weights as weight_files

weight_files.read_file = load  # models import nothing of the engine

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_LAYOUT = "model_index.json, vae/, text_encoder/, tokenizer/, unet/, scheduler/"
_CLASSES = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}


class NotAPipeline(VitrineError, FileNotFoundError):
    """A folder that holds no text-to-image pipeline."""


def check_folder(path: str | os.PathLike[str] | None) -> Path:
    """The folder of a pipeline.

    Raises:
        NotAPipeline: there is no such folder, or parts are missing; the message says which, and what is expected.
    """
    if path is None:
        raise NotAPipeline(
            "no base model is configured: set model.base to the local folder of a Stable Diffusion 1.x or 2.x pipeline "
            f"({_LAYOUT})"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotAPipeline(f"there is no folder {folder}: give a local folder of a diffusers pipeline ({_LAYOUT})")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise NotAPipeline(f"{folder} is no text-to-image pipeline: it lacks {', '.join(missing)} (expected {_LAYOUT})")
    return folder


def read_parts(folder: Path, *, variant: str | None = None, torch_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """All parts but the network: `vae`, `text_encoder`, `tokenizer` and a DDIM `scheduler`.

    Args:
        folder: see `check_folder`.
        variant: of the files of weights, such as `fp16`; parts that lack it are read without.
        torch_dtype: of the parameters; None: float32.
    """
    import diffusers
    import transformers

    index = _index(folder)
    for part in ("vae", "text_encoder"):
        check_pickles(folder / part)
    dtype = torch_dtype or torch.float32
    tokenizer_class = getattr(transformers, index.get("tokenizer", _CLASSES["tokenizer"]))
    parts: dict[str, Any] = {"tokenizer": tokenizer_class.from_pretrained(folder / "tokenizer", local_files_only=True)}
    for part, library in (("vae", diffusers), ("text_encoder", transformers)):
        kind = getattr(library, index.get(part, _CLASSES[part]), None) or getattr(library, _CLASSES[part])
        has_variant = variant is not None and any(f".{variant}." in file.name for file in (folder / part).iterdir())
        options = {"variant": variant} if has_variant else {}
        name = "torch_dtype" if library is diffusers else "dtype"
        parts[part] = kind.from_pretrained(folder / part, local_files_only=True, **{name: dtype}, **options).eval()
    parts["scheduler"] = ddim(read_json(folder / "scheduler" / "scheduler_config.json"))
    return parts


def check_pickles(folder: Path) -> None:
    """Reads a folder's `.bin` files, where it has no safetensors, before a library does: with our errors and bounds.

    Raises:
        core.checkpoint.CheckpointReadError: one is damaged, or asks for more than data.
    """
    if not any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("*.bin")):
            load_official(file)


def ddim(config: dict[str, Any]) -> DDIMScheduler:
    """DDIM over a folder's noise levels, whatever sampler it names; latents are never clipped.

    SD 1.x names PNDM, whose timesteps the inverted latents would not belong to.
    """
    fixed = {"clip_sample": False, "thresholding": False}
    defaults = {"set_alpha_to_one": False, "steps_offset": 1}
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return DDIMScheduler.from_config({**defaults, **known, **fixed})


def _index(folder: Path) -> dict[str, str]:
    """Class names of the parts."""
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    index = read_json(path)
    named = {part: value for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {part: value[1] for part, value in named.items() if value[1] is not None}
