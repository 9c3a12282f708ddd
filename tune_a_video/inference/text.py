"""Prompts become text states, and parts that do not belong together are found before they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, logging, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from core.errors import VitrineError

logger = logging.get_logger(__name__)


class PartsMismatch(VitrineError, ValueError):
    """Parts of a pipeline that do not belong together."""


def check_parts(tokenizer: Any, text_encoder: Any, unet: Any) -> None:
    """Tokenizer, text encoder and network speak of the same words and widths, and the network is one of videos.

    Raises:
        PartsMismatch: saying which two differ in what.
    """
    if not hasattr(unet, "frame_count"):
        raise PartsMismatch(
            f"unet is a {type(unet).__name__}, which knows no frames: TuneAVideoPipeline.from_base(pipeline) makes a "
            "video network of it"
        )
    if tokenizer is None or text_encoder is None:
        return
    words, rows = len(tokenizer), text_encoder.get_input_embeddings().num_embeddings
    if words > rows:
        raise PartsMismatch(
            f"the tokenizer knows {words} tokens, the text encoder has embeddings for {rows}: "
            "take both from the same pipeline"
        )
    width, wanted = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if isinstance(wanted, int) and width != wanted:
        raise PartsMismatch(
            f"the text encoder gives {width} channels, the network takes {wanted}: take both from the same pipeline "
            "(Stable Diffusion 1.x has 768, 2.x has 1024)"
        )


def as_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """One or several prompts as a list.

    Raises:
        ValueError: no prompt, or something that is no text.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name} is a text or a list of texts, not {prompt!r}")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one text")
    return list(prompts)


@contextlib.contextmanager
def adapters_scaled(text_encoder: Any, scale: float | None) -> Iterator[None]:
    """The text encoder with its adapters (LoRA by PEFT) at a strength; None: as they are set."""
    if scale is None or not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)


def text_states(tokenizer: Any, text_encoder: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """The text encoder's last hidden states `(b, L, d)`, padded or cut to the longest prompt it can read."""
    longest = text_encoder.config.max_position_embeddings
    longest = min(tokenizer.model_max_length, longest)
    options = {"padding": "max_length", "max_length": longest, "return_tensors": "pt"}
    tokens = tokenizer(list(prompts), truncation=True, **options)
    for prompt in prompts:
        count = len(tokenizer(prompt, truncation=False).input_ids)
        if count > longest:
            logger.warning(f"only {longest} of {count} tokens are read of the prompt {prompt!r}")
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(device)
    return text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
