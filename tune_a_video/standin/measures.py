"""Exact readings of a video of the drawn world: where the object is, which words and looks its frames show.

Videos are (f, 3, 16, 16) in -1 to 1, as datasets give them; what a pipeline returns in [0, 1] is 2 x - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tune_a_video.standin.networks import Judge
from tune_a_video.standin.world import Words, words_of_looks

LOST = 8.0  # pixels that a frame without an object counts
_FAINT = 0.15  # largest difference from the background, of [0, 1], below which there is no object
_STILL = 0.5  # pixels a frame, below which a displacement has no direction
_NEAR = 1.5  # pixels within which a frame is on its path


class Reading(NamedTuple):
    """What one edited clip scores.

    path         mean distance to the source's path in pixels
    words        share of frames with the three words asked for
    agree        share of pairs of frames with the same three looks
    agree_right  the same of frames that have their words: one that draws the source whatever is asked agrees, too
    joint        share of frames that have the words, are near the path and have the clip's most frequent looks
    jitter       100 x deviation of the object's colour over the frames
    """

    path: float
    words: float
    agree: float
    agree_right: float
    joint: float
    jitter: float


class Motion(NamedTuple):
    """How the object of an edited clip moves.

    motion_cosine  mean cosine of its displacement from frame to frame and the source's, over the source's moves
    speed_error    mean difference of the two displacements' lengths, in pixels a frame
    """

    motion_cosine: float
    speed_error: float


def measure(video: Tensor, centres: Tensor, words: Words, judge: Judge) -> Reading:
    """All five measures of a video.

    Args:
        video: (f, 3, 16, 16), -1 to 1.
        centres: where the object is in the source, (f, 2) in pixels.
        words: that were asked for.
        judge: of looks.

    Raises:
        ValueError: as many centres as frames are needed.
    """
    distances = path_distances(video, centres)
    looks = judge.looks(video)
    right = right_words(looks, words)
    return Reading(
        path=distances.mean().item(),
        words=right.float().mean().item(),
        agree=agreement(looks),
        agree_right=agreement(looks, right),
        joint=joint_frames(distances, looks, words).float().mean().item(),
        jitter=jitter(video),
    )


def object_weights(video: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels are the object.

    The background is the median of the border, the difference a pixel's largest over the colours. Pixels above half of
    the largest difference count, with their difference.

    Args:
        video: (f, 3, H, W), -1 to 1.

    Returns:
        Weights (f, H, W) that are 0 off the object, and whether there is one (f,).
    """
    pixels = (video + 1) / 2
    ring = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 1:-1, 0], pixels[..., 1:-1, -1]], dim=-1)
    background = ring.median(dim=-1).values
    difference = (pixels - background[..., None, None]).abs().amax(1)
    largest = difference.amax((1, 2))
    return difference * (difference > largest[:, None, None] / 2), largest >= _FAINT


def object_centres(video: Tensor) -> tuple[Tensor, Tensor]:
    """Where the object of every frame is, (f, 2) in pixels, and whether there is one (f,).

    Args:
        video: (f, 3, H, W), -1 to 1.
    """
    weights, there = object_weights(video)
    total = weights.sum((1, 2)).clamp(min=1e-12)
    height, width = weights.shape[1:]
    columns, rows = (torch.arange(n, device=video.device) + 0.5 for n in (width, height))
    x = (weights.sum(1) * columns).sum(1) / total
    y = (weights.sum(2) * rows).sum(1) / total
    return torch.stack([x, y], dim=1), there


def path_distances(video: Tensor, centres: Tensor) -> Tensor:
    """Distance of every frame's object to where it should be, in pixels (f,); 8 where there is none.

    Args:
        video: (f, 3, H, W), -1 to 1.
        centres: x and y in pixels from the left upper corner, (f, 2).

    Raises:
        ValueError: another number of centres than frames.
    """
    if len(video) != len(centres):
        raise ValueError(f"{len(centres)} centres for {len(video)} frames: give one for each")
    found, there = object_centres(video)
    distances = (found - centres.to(video.device)).norm(dim=1)
    return torch.where(there, distances, torch.full_like(distances, LOST))


def motion(video: Tensor, centres: Tensor) -> Motion:
    """How the object's displacement from frame to frame compares with the source's; where it is does not count.

    Args:
        video: (f, 3, H, W), -1 to 1.
        centres: where the object is in the source, (f, 2) in pixels.

    Raises:
        ValueError: another number of centres than frames, less than two frames, or a source that stands still.
    """
    if len(video) != len(centres) or len(video) < 2:
        raise ValueError(f"{len(centres)} centres for {len(video)} frames: give one for each of at least two")
    found, there = object_centres(video)
    steps, source = found.diff(dim=0), centres.to(video.device).diff(dim=0)
    length, wanted = steps.norm(dim=1), source.norm(dim=1)
    moves = wanted > _STILL
    if not moves.any():
        raise ValueError("the source's object stands still: its displacement has no direction")
    whole = there[1:] & there[:-1]
    cosines = torch.where(whole, torch.nn.functional.cosine_similarity(steps, source, dim=1), 0.0)
    # A frame without an object has no displacement: it is as wrong as one of the walls' distance.
    errors = torch.where(whole, (length - wanted).abs(), torch.full_like(length, LOST))
    return Motion(cosines[moves].mean().item(), errors.mean().item())


def right_words(looks: Tensor, words: Words) -> Tensor:
    """Whether a frame shows the three words: looks (f, 3) to (f,)."""
    return (words_of_looks(looks) == torch.tensor(words, device=looks.device)).all(1)


def agreement(looks: Tensor, right: Tensor | None = None) -> float:
    """Share of pairs of frames with the same three looks, from looks (f, 3); of a single frame 1, or whether it counts.

    Args:
        looks: (f, 3).
        right: which frames count, (f,) bool: pairs with another are not the same. None: all.
    """
    frames = len(looks)
    counts = torch.ones(frames, dtype=torch.bool, device=looks.device) if right is None else right
    if frames < 2:
        return float(counts.all())
    same = (looks[:, None] == looks[None]).all(2) & counts[:, None] & counts[None]
    return (same.sum().item() - counts.sum().item()) / (frames * (frames - 1))


def joint_frames(distances: Tensor, looks: Tensor, words: Words) -> Tensor:
    """Whether a frame has the words, lies within 1.5 pixels of its path and has each head's most frequent look.

    Args:
        distances: (f,), see `path_distances`.
        looks: (f, 3).
        words: that were asked for.
    """
    usual = (looks == looks.mode(dim=0).values).all(1)
    return right_words(looks, words) & (distances < _NEAR) & usual


def jitter(video: Tensor) -> float:
    """100 x the deviation over frames of the object's mean colour in [0, 1], mean of the channels.

    Args:
        video: (f, 3, H, W), -1 to 1.
    """
    if len(video) < 2:
        return 0.0
    weights, _ = object_weights(video)
    total = weights.sum((1, 2)).clamp(min=1e-12)
    pixels = rearrange((video + 1) / 2, "f c h w -> c f h w")
    colour = (pixels * weights).sum((2, 3)) / total
    return 100 * colour.std(dim=1, correction=0).mean().item()
