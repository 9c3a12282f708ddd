"""Original single files of Stable Diffusion (`.safetensors`, `.ckpt`) as a base. Nothing is downloaded.

Such a file holds weights alone. What the networks, the tokenizer and the noise levels are is said by the small files of
a pipeline's folder of the same kind; diffusers would fetch them from the hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from core.checkpoint import load_official
from tune_a_video.interop.folders import NotAPipeline, check_folder

_FILES = ("*.json", "*.txt", "**/*.json", "**/*.txt")


def read_single_file(
    path: str | os.PathLike[str],
    config: str | os.PathLike[str] | None = None,
    torch_dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """The image pipeline of a file.

    Args:
        path: the file, in the layout of the original Stable Diffusion 1.x or 2.x.
        config: local folder of a pipeline of the same kind, of which only configurations and tokenizer are read. None:
            the one in the cache of huggingface_hub, where diffusers has put it before.
        torch_dtype: of the parameters; None: float32.

    Raises:
        tune_a_video.interop.folders.NotAPipeline: there is no such folder, or none in the cache.
        ValueError: the file holds no such model, or another one than the folder says.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        load_official(path)  # before a library does: with our errors and bounds
    folder = check_folder(config) if config is not None else _cached_folder(path)
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "local_files_only": True}
    try:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(folder), torch_dtype=torch_dtype or torch.float32, **options
        )
    except (SingleFileComponentError, OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as the model whose configuration is in {folder}: {str(error)[:500]}"
        ) from error


def _cached_folder(path: Path) -> Path:
    try:
        state = load_single_file_checkpoint(str(path), local_files_only=True)
    except Exception as error:  # of as many kinds as there are formats
        raise ValueError(f"{path} holds no tensors by name: {str(error)[:500]}") from error
    name = fetch_diffusers_config(state)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=list(_FILES)))
    except LocalEntryNotFoundError as error:
        raise NotAPipeline(
            f"{path} holds weights alone, and the configuration of {name} is not in the cache: give config= (of a "
            "trainer model.base_config=) the local folder of a pipeline of the same kind; its weights are not read"
        ) from error
