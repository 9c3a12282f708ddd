"""CLIP for evaluation: transformers' from a local folder, or the stand-in's tiny one, behind the same two calls.

An embedder has `encode_frames((f, 3, H, W) in [0, 1]) -> (f, d)`, `encode_text([n prompts]) -> (n, d)`, and
`logit_scale`, the logarithm of what cosines are multiplied with. It is an `nn.Module`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from core.data import MissingDataError

_NEEDED = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"


class TransformersCLIP(nn.Module):
    """A CLIP of transformers: openai/clip-vit-large-patch14 (the benchmark's), PickScore_v1, any other.

    Args:
        folder: a local copy of the model.
        size: frames are resized to this square before the model's own preparation, as the benchmark's script does with
            480; None: they are not.
        chunk: frames in one forward pass.

    Raises:
        MissingDataError: no such folder, or it holds no CLIP.
    """

    def __init__(self, folder: str | os.PathLike, size: int | None = None, chunk: int = 32) -> None:
        super().__init__()
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise MissingDataError(f"there is no CLIP in {str(path)!r}: expected a folder with {_NEEDED}")
        try:
            self.model = CLIPModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False)
            self.processor = CLIPImageProcessor.from_pretrained(path, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise MissingDataError(f"{path} cannot be read as a CLIP ({error}): expected {_NEEDED}") from error
        self.size, self.chunk = size, chunk

    @property
    def logit_scale(self) -> Tensor:
        """ln 100 in OpenAI's models."""
        return self.model.logit_scale

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """(f, 3, H, W) in [0, 1] to (f, d); colours are rounded to 256 steps, as files hold them."""
        pixels = (255 * frames.detach().float().clamp(0, 1)).round().to(torch.uint8)
        if self.size is not None:
            pixels = F.resize(pixels, [self.size, self.size], F.InterpolationMode.BICUBIC, antialias=True)
        parts = []
        for part in pixels.split(self.chunk):
            values = self.processor(images=list(part.cpu()), return_tensors="pt").pixel_values
            parts.append(_vectors(self.model.get_image_features(pixel_values=values.to(self.logit_scale.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts to (n, d), padded and cut to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        words = self.tokenizer(list(prompts), **options).to(self.logit_scale.device)
        features = self.model.get_text_features(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return _vectors(features)


def _vectors(output: Any) -> Tensor:
    """Projected vectors: later releases of transformers 5 wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_clip(folder: str | os.PathLike) -> nn.Module:
    """An embedder from a folder: transformers' CLIP, or the stand-in's where the folder is (or holds) one.

    Raises:
        MissingDataError: neither is there.
    """
    path = Path(folder).expanduser()
    if (path / "tiny_clip").is_dir() or (path / "pictures.pt").is_file():
        from tune_a_video.standin.folder import load_tiny_clip

        return load_tiny_clip(path)
    return TransformersCLIP(path)
