"""Folders of text-to-image pipelines on local disk, part by part.

diffusers refuses released Tune-A-Video folders (their index names a library `models`), so the index is read here and
every part is loaded by its class. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from core.checkpoint import load, load_official
from core.config.files import read_json
from core.errors import VitrineError
from core.layers import weight_files
from tune_a_video.models.weights import read_config

weight_files.read_file = load  # models import nothing of the engine

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_WEIGHTED = ("unet", "vae", "text_encoder")
_LAYOUT = "model_index.json, vae/, text_encoder/, tokenizer/, unet/, scheduler/"
_FLOW = ("FlowMatch", "FlowMap", "PiFlow", "Helios")
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


def check_tuned(folder: Path, variant: str | None = None) -> None:
    """A local folder that is to be read as a tuned pipeline holds one; what is not local passes.

    Raises:
        NotAPipeline: it is an image pipeline's, or one of the released code; the message names what reads it.
    """
    if not (folder / "unet").is_dir():
        return
    config = read_config(folder / "unet")
    if "temporal" in config:
        return
    if "3D" in str(config.get("_class_name", "")) or "3D" in str(config.get("down_block_types", "")):
        raise NotAPipeline(
            f"{folder} is a folder of the released code: read it with TuneAVideoPipeline.from_official({str(folder)!r})"
        )
    raise NotAPipeline(
        f"{folder} is an image pipeline, whose network knows no frames: inflate it with "
        f"TuneAVideoPipeline.from_base({str(folder)!r}{f', variant={variant!r}' if variant else ''})"
    )


def pickled_shards(folder: Path) -> dict[str, bool]:
    """What diffusers has to be told to find `.bin` files in shards, where there are no safetensors."""
    pickled = any(".bin." in file.name for file in folder.glob("*.json")) and not any(folder.glob("*.safetensors"))
    return {"use_safetensors": False} if pickled else {}


def own_variant(folder: Path, part: str, variant: str | None) -> str | None:
    """The variant, if that part of a pipeline has files of it.

    Raises:
        ValueError: no part has.
    """
    if variant is None:
        return None

    def named(name: str) -> bool:
        return any(f".{variant}." in file.name for file in (folder / name).iterdir())

    if not any(map(named, _WEIGHTED)):
        raise ValueError(f"{folder} has no weights of the variant {variant!r}: leave variant out, or correct it")
    return variant if named(part) else None


def read_parts(folder: Path, *, variant: str | None = None, torch_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """All parts but the network: `vae`, `text_encoder`, `tokenizer` and a DDIM `scheduler`.

    Args:
        folder: see `check_folder`.
        variant: of the files of weights, such as `fp16`; parts that lack it are read without.
        torch_dtype: of the parameters; None: float32.

    Raises:
        ValueError: no part has that variant.
        SchedulerMismatch: its sampler is one of flow matching.
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
        options = {"variant": found} if (found := own_variant(folder, part, variant)) else {}
        name = "torch_dtype" if library is diffusers else "dtype"
        options |= pickled_shards(folder / part) if library is diffusers else {}
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

    Raises:
        SchedulerMismatch: the folder's sampler is one of flow matching.
    """
    check_scheduler(config)
    fixed = {"clip_sample": False, "thresholding": False}
    defaults = {"set_alpha_to_one": False, "steps_offset": 1}
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    return DDIMScheduler.from_config({**defaults, **known, **fixed})


class SchedulerMismatch(VitrineError, ValueError):
    """A scheduler that says nothing about the noise levels of a diffusion model."""


def check_scheduler(scheduler: Any) -> None:
    """Refuses samplers of flow matching: their levels mix data and noise in other shares than a Stable Diffusion's.

    Args:
        scheduler: one of diffusers, or its configuration.

    Raises:
        SchedulerMismatch: it is one; the message names it.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", {})
    name = str(config.get("_class_name")) if config is scheduler else type(scheduler).__name__
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or name.startswith(_FLOW):
        raise SchedulerMismatch(
            f"{name}{' with flow sigmas' * bool(flow)} samples models of flow matching, and this network is trained on "
            "the noise levels of DDPM: use DDIMScheduler or another sampler of diffusion models"
        )


def _index(folder: Path) -> dict[str, str]:
    """Class names of the parts."""
    path = folder / "model_index.json"
    if not path.is_file():
        return {}
    index = read_json(path)
    named = {part: value for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {part: value[1] for part, value in named.items() if value[1] is not None}
