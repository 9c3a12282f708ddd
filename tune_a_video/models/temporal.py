"""Temporal attention: the tokens of one place attend to each other over the frames (paper, section 4.1, T-Attn)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from tune_a_video.models.frame_attention import FrameAttention, projected
from tune_a_video.models.frame_conv import CONVS
from tune_a_video.models.frames import FrameCount, recorded

POSITIONS = ("none", "sinusoidal", "rotary")
ZERO_INITS = ("weight_and_bias", "weight_only", "none")

# Fused kernels put rows into a dimension of CUDA's grid, which ends here.
_GRID = 65_535


@dataclass(frozen=True)
class TemporalConfig:
    """What the temporal attention is.

    enabled: whether blocks have one.
    position: code of a token's frame: `none` as in the paper, `sinusoidal` (added to the input of the attention),
        `rotary` (turns queries and keys).
    zero_init: what of the output projection starts at zero: `weight_and_bias`, so that the network starts as the image
        model; `weight_only` as in the released code, where a random constant per channel remains; `none`.
    conv: convolution over frames behind every residual block: `none` as in the paper, `conv3`, or `lora`, a narrow one;
        see `tune_a_video.models.frame_conv`. It does not depend on `enabled`.

    Raises:
        ValueError: a value that is none of these.
    """

    enabled: bool = True
    position: str = "none"
    zero_init: str = "weight_and_bias"
    conv: str = "none"

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            raise ValueError(f"no temporal position code {self.position!r}: use {', '.join(POSITIONS)}")
        if self.zero_init not in ZERO_INITS:
            raise ValueError(f"no temporal zero_init {self.zero_init!r}: use {', '.join(ZERO_INITS)}")
        if self.conv not in CONVS:
            raise ValueError(f"no temporal conv {self.conv!r}: use {', '.join(CONVS)}")

    @classmethod
    def of(cls, value: TemporalConfig | Mapping[str, Any] | None) -> TemporalConfig:
        """From a mapping of the fields.

        Raises:
            ValueError: an unknown field or value.
        """
        if isinstance(value, TemporalConfig):
            return value
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(value or {}) - fields)
        if unknown:
            raise ValueError(f"temporal has no {', '.join(unknown)}: its keys are {', '.join(sorted(fields))}")
        return cls(**(value or {}))


def frame_angles(frames: int, width: int, device: torch.device | None = None) -> Tensor:
    """Angles `(f, width / 2)` of frame numbers at wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017)."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    return torch.arange(frames, dtype=torch.float32, device=device)[:, None] * rates


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs of channels of `(..., f, d)` by the frame's angles `(f, d / 2)` (RoFormer, Su et al. 2021)."""
    pairs = rearrange(x.float(), "... (d two) -> ... d two", two=2)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class FrameAxisAttnProcessor:
    """The processor of `attn_temp`: attention over the frames of every place, without regrouping the rows.

    Projections run on rows `(b f, n, C)`; queries, keys and values are then only looked at as `(b, n heads, f, d)`.

    Args:
        count: how many frames make a video; shared with the network.
        position: see `TemporalConfig`.
        fused: whether projections are one, see `tune_a_video.models.frame_attention.projected`.
    """

    def __init__(self, count: FrameCount, position: str = "none", fused: bool = False) -> None:
        self.count = count
        self.position = position
        self.fused = fused

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows `(b f, n, C)` to the same."""
        frames, places = self.count.frames, hidden_states.shape[1]
        self.count.videos(hidden_states.shape[0])
        if self.position == "sinusoidal":
            angles = frame_angles(frames, hidden_states.shape[2], hidden_states.device)
            code = torch.cat((angles.sin(), angles.cos()), dim=1)[:, : hidden_states.shape[2]]
            code = code[None, :, None].to(hidden_states.dtype)
            hidden_states = (hidden_states.unflatten(0, (-1, frames)) + code).flatten(0, 1)
        q, k, v = (
            rows.unflatten(0, (-1, frames)).unflatten(-1, (attn.heads, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)
            for rows in projected(attn, hidden_states, self.fused)
        )
        if self.position == "rotary":
            angles = frame_angles(frames, q.shape[-1], q.device)
            q, k = _rotate(q, angles), _rotate(k, angles)
        out = _chunked_attention(q, k, v)
        out = out.unflatten(1, (places, -1)).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        return attn.to_out[1](attn.to_out[0](out))


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if recorded() or q.shape[1] <= _GRID:
        return F.scaled_dot_product_attention(q, k, v)
    chunks = zip(*(x.split(_GRID, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*chunk) for chunk in chunks], dim=1)


class TemporalTransformerBlock(BasicTransformerBlock):
    """A transformer block of diffusers that closes with temporal attention: `h + attn_temp(norm_temp(h))`.

    It takes the place of a block whose tensors it goes on using; see `tune_a_video.models.inflation.inflate`.
    """

    attn_temp: Attention
    norm_temp: nn.LayerNorm

    @classmethod
    def around(
        cls, block: BasicTransformerBlock, count: FrameCount, config: TemporalConfig
    ) -> TemporalTransformerBlock:
        """The same block (same parameters, same keys) with a temporal attention behind it.

        Args:
            block: of any 2-D network; it must not be used on its own afterwards.
            count: how many frames make a video.
            config: of the temporal attention.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update(block.__dict__)
        made._modules = dict(block._modules)
        source = block.attn1
        # Attention keeps the width of its heads nowhere else.
        width = source.inner_dim // source.heads
        like = {"device": source.to_q.weight.device, "dtype": source.to_q.weight.dtype}
        heads = {"heads": source.heads, "dim_head": width}
        made.attn_temp = FrameAttention(query_dim=block.dim, **heads, bias=False, out_bias=True)
        made.norm_temp = nn.LayerNorm(block.dim)
        made.attn_temp.set_processor(FrameAxisAttnProcessor(count, config.position))
        output = made.attn_temp.to_out[0]
        if config.zero_init != "none":
            nn.init.zeros_(output.weight)
        if config.zero_init == "weight_and_bias":
            nn.init.zeros_(output.bias)
        made.attn_temp.to(**like)
        made.norm_temp.to(**like)
        return made.train(block.training)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows `(b f, n, C)` to the same; other arguments are the parent's."""
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states + self.attn_temp(self.norm_temp(hidden_states))
