"""Clips longer than memory or training allows: overlapping windows of frames that share the first frame.

Every step predicts window by window and takes the mean where windows overlap (MultiDiffusion, Bar-Tal et al. 2023).
Windows that do not begin with the clip's first frame get it in front, so that its keys stay everybody's anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def window_spans(frames: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """First and last-plus-one frame of each window; the last one is moved back to end with the clip.

    Args:
        frames: of the clip.
        window: frames of a window.
        overlap: frames that neighbouring windows have in common.

    Raises:
        ValueError: windows that do not move on, or of a single frame.
    """
    if window < 2 or not 0 <= overlap < window:
        raise ValueError(f"window={window}, overlap={overlap}: at least 2 frames, and an overlap smaller than that")
    if frames <= window:
        return [(0, frames)]
    starts = list(range(0, frames - window, window - overlap))
    return [(start, start + window) for start in (*starts, frames - window)]


def predict_in_windows(
    predict: Callable[[Tensor, Sequence[int]], Tensor], latents: Tensor, window: int, overlap: int
) -> Tensor:
    """A network's prediction for a clip of any length.

    Args:
        predict: latents `(b, c, f, h, w)`, and the numbers of their frames in the clip, to the same shape.
        latents: of the clip, `(b, c, F, h, w)`.
        window, overlap: see `window_spans`.
    """
    spans = window_spans(latents.shape[2], window, overlap)
    if len(spans) == 1:
        return predict(latents, range(latents.shape[2]))
    total = torch.zeros_like(latents, dtype=torch.float32)
    count = torch.zeros(latents.shape[2], device=latents.device)
    for start, stop in spans:
        anchored = start > 0
        frames = [0, *range(start, stop)] if anchored else range(start, stop)
        part = latents[:, :, start:stop]
        if anchored:
            part = torch.cat([latents[:, :, :1], part], dim=2)
        output = predict(part, frames)[:, :, int(anchored) :]
        total[:, :, start:stop] += output
        count[start:stop] += 1
    return (total / count.view(1, 1, -1, 1, 1)).to(latents.dtype)
