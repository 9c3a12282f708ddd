"""Spatio-temporal attention: the queries of a frame attend to the tokens of some frames (paper, section 4.1).

Which frames is said by a specification. The paper's is `first_prev`: frame i looks at frame 0 and frame i - 1. Keys and
values are projected once per frame; the concatenations `[first; previous]` exist for a few frames at a time only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from tune_a_video.models.frames import FrameCount, recorded

FrameSpec = str | Sequence[str | int]

_NAMED: dict[str, tuple[str | int, ...]] = {
    "first_prev": ("first", "prev"),
    "self": (0,),
    "first": ("first",),
    "prev": ("prev",),
}
SPECS = (*_NAMED, "full", "causal", "window:k", "a list of first, last, prev and offsets such as [first, -1, +1]")

# Bytes of gathered keys and values that exist at a time.
GATHER_BYTES = 8 << 20
# Bytes of gathered keys and values of all frames from which on gradients gather them again instead of keeping them.
KEEP_BYTES = 32 << 20


def check_spec(spec: FrameSpec) -> str | list[str | int]:
    """The specification in the form that configurations hold.

    Raises:
        ValueError: it means nothing; the message lists what there is.
    """
    plain = spec if isinstance(spec, str) else list(spec)
    key_frames(plain if isinstance(plain, str) else tuple(plain), 3)
    return plain


@lru_cache(maxsize=256)
def key_frames(spec: str | tuple[str | int, ...], frames: int) -> tuple[tuple[int, ...], ...]:
    """For each of `frames` frames, the frames whose tokens it attends to.

    Offsets and `prev` stop at the ends of the video. A frame that occurs twice counts twice in the softmax, as in a
    concatenation; where all occur equally often they are named once, which gives the same attention.

    Args:
        spec: `first_prev`, `self`, `first`, `prev`, `full`, `causal` (frames up to its own), `window:k` (frames at most
            k away), or a tuple of `first`, `last`, `prev`, `self` and offsets.
        frames: of a video.

    Raises:
        ValueError: the specification means nothing.
    """
    rows = [_row(spec, i, frames) for i in range(frames)]
    return tuple(_reduced(row) for row in rows)


def _row(spec: str | tuple[str | int, ...], i: int, frames: int) -> list[int]:
    if isinstance(spec, str):
        if spec == "full":
            return list(range(frames))
        if spec == "causal":
            return list(range(i + 1))
        window = re.fullmatch(r"window:(\d+)", spec)
        if window:
            reach = int(window[1])
            return list(range(max(i - reach, 0), min(i + reach, frames - 1) + 1))
        if spec not in _NAMED:
            raise ValueError(f"no frame attention {spec!r}: use {', '.join(SPECS)}")
        spec = _NAMED[spec]
    if not spec:
        raise ValueError("a frame has to attend to at least one frame: the list of frames is empty")
    return [_index(item, i, frames) for item in spec]


def _index(item: str | int, i: int, frames: int) -> int:
    fixed = {"first": 0, "last": frames - 1, "prev": max(i - 1, 0), "self": i}
    if item in fixed:
        return fixed[item]
    try:
        return min(max(i + int(item), 0), frames - 1)
    except ValueError:
        raise ValueError(f"no frame {item!r} in a list of frames: use first, last, prev, self or an offset") from None


def _reduced(row: list[int]) -> tuple[int, ...]:
    counts = {j: row.count(j) for j in row}
    return tuple(counts) if len(set(counts.values())) == 1 else tuple(row)


@dataclass(frozen=True)
class Run:
    """Neighbouring query frames that are attended together.

    start, stop: the query frames.
    keys: the key frames of each; one entry if all share them.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, ...], ...]

    @property
    def shared(self) -> bool:
        """Whether all query frames have the same key frames."""
        return len(self.keys) == 1

    @property
    def copied(self) -> int:
        """How many key frames have to be copied to lie together; 0 where they follow each other anyway."""
        first = self.keys[0][0]
        consecutive = (
            self.keys[0] == tuple(range(first, first + len(self.keys[0])))
            if self.shared
            else self.keys == tuple((first + i,) for i in range(len(self.keys)))
        )
        return 0 if consecutive else sum(len(row) for row in self.keys)


@lru_cache(maxsize=256)
def plan(rows: tuple[tuple[int, ...], ...], at_once: int) -> tuple[Run, ...]:
    """Runs of frames with the same key frames, and of at most `at_once` frames with equally many."""
    runs: list[Run] = []
    for i, keys in enumerate(rows):
        last = runs[-1] if runs else None
        if last is not None and last.keys == (keys,):
            runs[-1] = Run(last.start, i + 1, last.keys)
            continue
        # A run of one frame may become one of several with different keys, but never takes apart a shared one.
        grows = (
            last is not None
            and len(last.keys) == last.stop - last.start < at_once
            and len(last.keys[0]) == len(keys)
            and rows[i + 1 : i + 2] != (keys,)
        )
        if grows:
            runs[-1] = Run(last.start, i + 1, (*last.keys, keys))
        else:
            runs.append(Run(i, i + 1, (keys,)))
    return tuple(runs)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: tuple[tuple[int, ...], ...], heads: int) -> Tensor:
    """Attention of the tokens of every frame over those of its key frames.

    Args:
        q, k, v: `(b, f, n, C)`.
        rows: see `key_frames`.
        heads: C is split into so many.

    Returns:
        `(b, f, n, C)`.
    """
    if recorded():  # the sizes that a plan goes by may be other ones later: frames that share their keys at a time
        return torch.cat([_attend_run(q, k, v, run, heads) for run in plan(rows, len(rows))], dim=1)
    most = max(len(row) for row in rows)
    frame_bytes = 2 * k[:, 0].numel() * k.element_size()
    runs = plan(rows, max(1, GATHER_BYTES // (most * frame_bytes)))
    gathered = sum(run.copied for run in runs) * frame_bytes
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not needs_grad:
        return _attend_runs(q, k, v, runs, heads)
    if gathered > KEEP_BYTES:
        return _Regathered.apply(q, k, v, runs, heads)
    return torch.cat([_attend_run(q, k, v, run, heads) for run in runs], dim=1)


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], heads: int) -> Tensor:
    out = torch.empty_like(q)
    for run in runs:
        out[:, run.start : run.stop] = _attend_run(q, k, v, run, heads)
    return out


def _attend_run(q: Tensor, k: Tensor, v: Tensor, run: Run, heads: int) -> Tensor:
    return _dense(q[:, run.start : run.stop], _keys(k, run), _keys(v, run), run.shared, heads)


def _keys(x: Tensor, run: Run) -> Tensor:
    """Keys of a run: `(b, m, n, C)` if shared, else `(b, g, m, n, C)`; a view where frames follow each other."""
    first = run.keys[0][0]
    if run.shared:
        return x[:, _frame_index(run.keys, x.device)[0]] if run.copied else x[:, first : first + len(run.keys[0])]
    if run.copied:
        return x[:, _frame_index(run.keys, x.device)]
    return x[:, first : first + len(run.keys), None]


def _frame_index(keys: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(keys, device=device) if recorded() else _kept_index(keys, device)


@lru_cache(maxsize=1024)
def _kept_index(keys: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    # Made once: each copy from the host would make it wait for the device. Gradients need it outside inference mode.
    with torch.inference_mode(False):
        return torch.tensor(keys, device=device)


def _dense(q: Tensor, k: Tensor, v: Tensor, shared: bool, heads: int) -> Tensor:
    # `flatten` and `unflatten` keep the batch out of every size, so that a record of them serves any batch.
    q_rows, k_rows, v_rows = (
        (x.flatten(1, 2) if shared else x.flatten(0, 1)).unflatten(-1, (heads, -1)) for x in (q, k, v)
    )
    if not shared:
        k_rows, v_rows = (x.flatten(1, 2) for x in (k_rows, v_rows))
    out = F.scaled_dot_product_attention(q_rows.transpose(1, 2), k_rows.transpose(1, 2), v_rows.transpose(1, 2))
    out = out.transpose(1, 2).flatten(2)
    return out.unflatten(1, (q.shape[1], -1)) if shared else out.unflatten(0, (-1, q.shape[1]))


class _Regathered(torch.autograd.Function):
    """Attention that keeps q, k and v for the backward pass, never the gathered keys and values.

    The backward pass gathers those of a few frames again and adds their gradients up in place.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...], heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.runs, ctx.heads = runs, heads
        return _attend_runs(q, k, v, runs, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k) if needed[1] else None
        grad_v = torch.zeros_like(v) if needed[2] else None
        for run in ctx.runs:
            frames = slice(run.start, run.stop)
            with torch.enable_grad():
                parts = [q[:, frames].detach(), _keys(k, run).detach(), _keys(v, run).detach()]
                wanted = [part.requires_grad_() for part, need in zip(parts, (True, *needed[1:3]), strict=True) if need]
                out = _dense(*parts, run.shared, ctx.heads)
            grads = list(torch.autograd.grad(out, wanted, grad[:, frames]))
            grad_q[:, frames] = grads.pop(0)
            for total in (grad_k, grad_v):
                if total is None:
                    continue
                part = grads.pop(0)
                index = _frame_index(run.keys, part.device).flatten()
                total.index_add_(1, index, part if run.shared else part.flatten(1, 2))
        return grad_q if needed[0] else None, grad_k, grad_v, None, None


class FrameAttention(Attention):
    """An attention of diffusers whose rows are frames: switches that exchange its processor leave it as it is.

    Its own kernels are fused already, and a processor of images would make the frames forget each other.
    """

    @classmethod
    def around(cls, attention: Attention) -> FrameAttention:
        """The same attention, with its parameters and processor; it takes the place of `attention`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update(attention.__dict__)
        return made

    def set_use_memory_efficient_attention_xformers(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see the class."""

    def set_use_npu_flash_attention(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see the class."""

    def set_use_xla_flash_attention(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see the class."""

    def set_attention_slice(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, see the class."""


def projected(attn: Attention, hidden_states: Tensor, fused: bool) -> tuple[Tensor, ...]:
    """Queries, keys and values of an attention's own rows; `fused` by the one projection of `fuse_projections`."""
    if fused:
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


class TextAttnProcessor(AttnProcessor2_0):
    """Cross-attention to a text that all frames of a video share: its keys and values are projected once per video.

    The frames' tokens are queries of one attention. Where frames have texts of their own, where there is a mask, or in
    attentions of other kinds it is diffusers' own processor.

    Args:
        count: how many frames make a video, and whether they share the text; shared with the network.
    """

    def __init__(self, count: FrameCount) -> None:
        super().__init__()
        self.count = count

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Rows `(b f, n, C)` and texts `(b f, L, d)`, equal for the frames of a video, to `(b f, n, C)`."""
        special = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attention_mask)
        plain = all(part is None or part is False for part in special) and hidden_states.ndim == 3
        if not self.count.shared_text or encoder_hidden_states is None or not plain:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        frames, places = self.count.frames, hidden_states.shape[1]
        text = encoder_hidden_states.unflatten(0, (-1, frames))[:, 0]
        q = attn.to_q(hidden_states).unflatten(0, (-1, frames)).flatten(1, 2)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, attn.to_k(text), attn.to_v(text)))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out.unflatten(1, (frames, places)).flatten(0, 1)))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class SpatioTemporalAttnProcessor:
    """The processor of a diffusers `Attention` whose rows are the frames of videos (paper, section 4.1, ST-Attn).

    Args:
        count: how many frames make a video; shared with the network.
        spec: which frames a frame attends to, see `key_frames`.
        fused: whether projections are one, see `projected`.

    Raises:
        ValueError: an unknown specification.
    """

    def __init__(self, count: FrameCount, spec: FrameSpec = "first_prev", fused: bool = False) -> None:
        self.count = count
        self.spec = check_spec(spec)
        self.fused = fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Rows `(b f, n, C)` to the same.

        With `encoder_hidden_states` this is the ordinary cross-attention of a block without self-attention.

        Raises:
            ValueError: an attention mask, which has no meaning over the tokens of other frames.
        """
        if encoder_hidden_states is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if attention_mask is not None:
            raise ValueError("attention_mask says nothing about tokens of other frames: mask the text instead")
        frames = self.count.frames
        self.count.videos(hidden_states.shape[0])
        q, k, v = (rows.unflatten(0, (-1, frames)) for rows in projected(attn, hidden_states, self.fused))
        spec = self.spec if isinstance(self.spec, str) else tuple(self.spec)
        out = attend(q, k, v, key_frames(spec, frames), attn.heads).flatten(0, 1)
        out = attn.to_out[1](attn.to_out[0](out))
        return out / attn.rescale_output_factor
