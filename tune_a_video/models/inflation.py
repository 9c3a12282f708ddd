"""Image networks of diffusers become video networks: three kinds of modules are exchanged, all weights stay.

1. every transformer block gets a temporal attention behind it;
2. the first attention of a block attends to tokens of other frames;
3. group norms of residual blocks, and the network's last one, see all frames of a video at once.

An option of other work adds a convolution over frames behind every residual block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tune_a_video.models.frame_attention import (
    FrameAttention,
    FrameSpec,
    SpatioTemporalAttnProcessor,
    TextAttnProcessor,
)
from tune_a_video.models.frame_conv import FrameConvResnetBlock
from tune_a_video.models.frames import FrameCount
from tune_a_video.models.group_norm import GROUP_NORMS, FrameGroupNorm
from tune_a_video.models.temporal import TemporalConfig, TemporalTransformerBlock

#: What an inflated network has beside the image model's tensors: parts of their names.
TEMPORAL_NAMES = ("attn_temp", "norm_temp", "conv_temp")


def inflate(
    module: nn.Module,
    count: FrameCount,
    attention: FrameSpec = "first_prev",
    group_norm: str = "joint",
    temporal: TemporalConfig | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Exchanges the modules below `module` in place; the result takes rows `(b f, ...)`.

    Args:
        module: a network of diffusers, or one of its blocks (a transformer block itself is returned exchanged).
        count: how many frames make a video.
        attention: which frames a frame attends to, see `key_frames`.
        group_norm: `joint` or `per_frame`.
        temporal: see `TemporalConfig`.

    Returns:
        The module, or what has taken its place.

    Raises:
        ValueError: an argument that means nothing.
    """
    temporal = TemporalConfig.of(temporal)
    if group_norm not in GROUP_NORMS:
        raise ValueError(f"no group_norm {group_norm!r}: use {', '.join(GROUP_NORMS)}")
    for parent in list(module.modules()):
        if group_norm == "joint":
            _join_norms(parent, count)
        if temporal.enabled:
            for name, child in list(parent.named_children()):
                if type(child) is BasicTransformerBlock:
                    setattr(parent, name, TemporalTransformerBlock.around(child, count, temporal))
        if temporal.conv != "none":
            for name, child in list(parent.named_children()):
                if type(child) is ResnetBlock2D:
                    setattr(parent, name, FrameConvResnetBlock.around(child, count, temporal.conv))
    if temporal.enabled and type(module) is BasicTransformerBlock:
        module = TemporalTransformerBlock.around(module, count, temporal)
    set_frame_attention(module, count, attention)
    return module


def _join_norms(module: nn.Module, count: FrameCount) -> None:
    names = ("norm1", "norm2") if isinstance(module, ResnetBlock2D) else ("conv_norm_out",)
    for name in names:
        norm = module._modules.get(name)
        if type(norm) is nn.GroupNorm:
            setattr(module, name, FrameGroupNorm.around(norm, count))


def transformer_blocks(module: nn.Module) -> Iterator[BasicTransformerBlock]:
    """All transformer blocks in a network, in order."""
    return (part for part in module.modules() if isinstance(part, BasicTransformerBlock))


def set_frame_attention(module: nn.Module, count: FrameCount, spec: FrameSpec) -> None:
    """Says which frames the first attention of every block attends to; plain text attention becomes one per video.

    Raises:
        ValueError: an unknown specification.
    """
    for block in transformer_blocks(module):
        if type(block.attn1) is Attention:
            block.attn1 = FrameAttention.around(block.attn1)
        if type(getattr(block.attn2, "processor", None)) is AttnProcessor2_0:
            block.attn2.set_processor(TextAttnProcessor(count))
        fused = getattr(block.attn1.processor, "fused", False)
        block.attn1.set_processor(SpatioTemporalAttnProcessor(count, spec, fused))
