"""What slots and walks make of pictures: a sheet of scenes after an evaluation, and pictures of a user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from core.trainer import Batch, Inference
from slot_walks.data.transforms import WholePicture
from slot_walks.inference.drawing import (
    at_size,
    mark_patch,
    paint_heat,
    paint_segments,
    scenes,
    slot_colours,
    soft_masks,
    walk_picture,
)
from slot_walks.losses.walk_loss import WalkLoss
from slot_walks.losses.walks import transitions
from slot_walks.metrics.diagnostics import effective_slots, slot_usage
from slot_walks.models import WalkerOutput

_IGNORED = 255  # in label maps: nothing is known there


class Walks:
    """The walks of one picture, as far as they are looked at: nothing of size N x N is made.

    Args:
        output: of the network.
        index: of the picture in it.
        loss: whose temperature and target are looked at.

    Raises:
        ValueError: slots cannot be compared with features.
    """

    def __init__(self, output: WalkerOutput, index: int, loss: WalkLoss) -> None:
        if output.whole is None:
            raise ValueError("slots and features have different widths: there is no walk between them")
        self.grid, self.loss = output.grid, loss
        one = slice(index, index + 1)
        self.features, self._assignment, self._attention = (
            part[one] for part in (output.features, output.assignment, output.attention)
        )
        to_slot, to_part = transitions(self.features, output.whole[one], loss.temperature)
        self.to_slot, self.to_part = to_slot[0], to_part[0]

    def whole(self) -> Tensor:
        """Q P, `(K, K)`: from slot to part to slot."""
        return self.to_part @ self.to_slot

    def row(self, patch: tuple[int, int]) -> Tensor:
        """Where a walk from a patch ends: its row of P Q, `(h, w)`."""
        return (self.to_slot[self._number(patch)] @ self.to_part).reshape(self.grid)

    def target(self, patch: tuple[int, int]) -> Tensor:
        """Where it should end: that patch's row of the loss's target, `(h, w)`."""
        number = self._number(patch)
        rows = self.loss.rows_of_target(self.features, number, number + 1, self.grid, self._assignment, self._attention)
        return rows[0, 0].reshape(self.grid)

    def _number(self, patch: tuple[int, int]) -> int:
        return patch[0] * self.grid[1] + patch[1]


def choose_patch(assignment: Tensor, grid: tuple[int, int], point: Sequence[float] | None = None) -> tuple[int, int]:
    """The patch, `(row, column)`, that a shown walk begins at.

    Args:
        assignment: parts over slots `(N, K)`.
        grid: `(h, w)`.
        point: a place in the picture as shares of its height and width; None: the patch that is surest of its slot
            among those outside the largest segment, which is background as a rule.
    """
    if point is not None:
        return tuple(min(int(share * side), side - 1) for share, side in zip(point, grid, strict=True))
    surest, slots = assignment.max(dim=1)
    outside = slots != slots.mode().values
    return divmod(int((surest + outside).argmax()), grid[1])  # what is outside counts one more, so it comes first


def upsampled(assignment: Tensor, grid: tuple[int, int], size: tuple[int, int], slot: int) -> Tensor:
    """The soft mask `(H, W)` of one slot; see `slot_walks.losses.walks.masks`."""
    maps = rearrange(assignment[:, slot].float(), "(h w) -> 1 1 h w", h=grid[0], w=grid[1])
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0, 0]


def winners(assignment: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The slot of every pixel, `(H, W)`, as `losses.walks.segments` has it, with two masks in memory at a time."""
    best = upsampled(assignment, grid, size, 0)
    slot_of = torch.zeros(size, dtype=torch.uint8 if assignment.shape[1] <= 256 else torch.int64, device=best.device)
    for slot in range(1, assignment.shape[1]):
        mask = upsampled(assignment, grid, size, slot)
        slot_of[mask > best] = slot
        best = torch.maximum(best, mask)
    return slot_of.cpu().numpy()


def infer_picture(
    picture: np.ndarray, output: WalkerOutput, assignment: Tensor, loss: WalkLoss, point: Sequence[float] | None = None
) -> Inference:
    """Record and pictures of one picture.

    Args:
        picture: as the user has it, uint8 `(H, W, 3)`.
        output: of the network, for a batch of this picture.
        assignment: parts over slots `(1, N, K)`.
        loss: whose walks are shown.
        point: see `choose_patch`.

    Returns:
        In the record: `width`, `height`, `grid`; `slots`, how many take a pixel (`used_slots`), `effective_slots`;
        `areas` (share of the pixels) and `usage` (share of the soft masks) of each slot; the `patch` that the shown
        walk begins at and its `slot`; `stay`, the diagonal of Q P. Pictures: `labels` (the slot of each pixel of the
        file, uint8), `segments`, `masks`, `walk`. Without walks between slots and features there is no `stay` and no
        `walk`.
    """
    parts, count = assignment[0], assignment.shape[2]
    labels = winners(parts, output.grid, picture.shape[:2])
    areas = np.bincount(labels.ravel(), minlength=count) / labels.size
    patch = choose_patch(parts, output.grid, point)
    record: dict[str, Any] = {
        "width": picture.shape[1],
        "height": picture.shape[0],
        "grid": list(output.grid),
        "slots": count,
        "used_slots": int((areas > 0).sum()),
        "effective_slots": round(float(effective_slots(assignment)[0]), 3),
        "areas": [round(float(area), 4) for area in areas],
        "usage": [round(float(share), 4) for share in slot_usage(assignment)[0]],
        "patch": list(patch),
        "slot": int(parts[patch[0] * output.grid[1] + patch[1]].argmax()),
    }
    shown, small = at_size(picture), at_size(picture, 320, 320)
    segmented = paint_segments(shown, winners(parts, output.grid, shown.shape[:2]), slot_colours(count))
    masks = [upsampled(parts, output.grid, small.shape[:2], slot).cpu().numpy() for slot in range(count)]
    pictures = {
        "segments": np.concatenate([shown, segmented], axis=0 if shown.shape[1] > shown.shape[0] else 1),
        "masks": soft_masks(small, np.stack(masks)),
    }
    if count <= 256:
        pictures["labels"] = labels
    if output.whole is not None:
        walks = Walks(output, 0, loss)
        whole = walks.whole()
        record["stay"] = [round(float(value), 4) for value in whole.diagonal()]
        arrays = (part.float().cpu().numpy() for part in (walks.row(patch), walks.target(patch), whole))
        pictures["walk"] = walk_picture(shown, *arrays, patch)
    return Inference(record, pictures)


def scenes_picture(
    batch: Batch,
    output: WalkerOutput,
    assignment: Tensor,
    loss: WalkLoss,
    transform: WholePicture | None = None,
    point: Sequence[float] | None = None,
) -> np.ndarray:
    """A column for every picture of a batch: itself, its slots, the truth, and where a walk from a patch ends.

    The truth's objects have the colour of the slot that covers them best, so two of one colour share a slot. Rows that
    there is nothing for are left out.

    Args:
        batch: `image` `(B, 3, H, W)`, and `mask` `(B, H', W')` where there is a truth (0: background, 255: unknown).
        output: of the network.
        assignment: parts over slots `(B, N, K)`.
        loss: whose walks are shown.
        transform: knows what the picture was before it was normalised; None: stretched to its extremes.
        point: see `choose_patch`.

    Returns:
        uint8 `(height, width, 3)`.
    """
    colours = slot_colours(assignment.shape[2])
    columns, names = [], []
    for index, image in enumerate(batch["image"]):
        picture = at_size(_stretched(image) if transform is None else transform.undo(image), 192, 192)
        size, parts = picture.shape[:2], assignment[index]
        found = winners(parts, output.grid, size)
        patch = choose_patch(parts, output.grid, point)
        rows = {
            "picture": mark_patch(picture, patch, output.grid),
            "slots": paint_segments(picture, found, colours),
        }
        if "mask" in batch:
            truth = F.interpolate(batch["mask"][index][None, None].float(), size=size)[0, 0].long().cpu().numpy()
            rows["truth"] = _paint_truth(picture, truth, found, colours)
        if output.whole is not None:
            walks = Walks(output, index, loss)
            walk, target = (part.float().cpu().numpy() for part in (walks.row(patch), walks.target(patch)))
            top = float(max(walk.max(), target.max()))
            rows["walk from\nthe patch"] = paint_heat(picture, walk, top, patch)
            rows["its target"] = paint_heat(picture, target, top, patch)
        names = list(rows)
        columns.append(list(rows.values()))
    return scenes(columns, names)


def _paint_truth(picture: np.ndarray, truth: np.ndarray, found: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Objects of a label map in the colour of the slot with which they overlap most (intersection over union)."""
    labels, places = np.unique(truth, return_inverse=True)
    places = places.reshape(truth.shape)
    slots = np.arange(len(colours))
    own = np.zeros((len(labels), 3), np.uint8)
    for number, label in enumerate(labels):
        inside = places == number
        both = np.bincount(found[inside].ravel(), minlength=len(slots))
        union = inside.sum() + np.bincount(found.ravel(), minlength=len(slots)) - both
        own[number] = (90, 90, 90) if label in (0, _IGNORED) else colours[(both / union).argmax()]
    return paint_segments(picture, places, own)


def _stretched(image: Tensor) -> np.ndarray:
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    pixels = 255 * (image - low) / (high - low).clamp(min=1e-6)
    return pixels.round().byte().permute(1, 2, 0).numpy()
