"""Strips show every video's frames in order, with room for a name, at a readable size."""

import numpy as np
import pytest
import torch

from tune_a_video.inference.strips import strips


def flat(values: list[float], height: int, width: int) -> torch.Tensor:
    frames = torch.tensor(values)[None, :, None, None]
    return frames.expand(3, -1, height, width)


def test_frames_lie_side_by_side_and_videos_below_each_other() -> None:
    sheet = strips([("source", flat([0.2, 0.4, 0.6], 16, 16)), ("edit", flat([0.8, 0.0, 1.0], 16, 16))], smallest=48)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 3 * (48 + 4) + 4
    rows = [26 + 24, 26 + 48 + 26 + 24]  # the middle of each row of frames
    seen = [[int(sheet[row, 4 + 24 + column * 52, 0]) for column in range(3)] for row in rows]
    assert seen == [[51, 102, 153], [204, 0, 255]]
    assert (sheet[4:26, :60] < 128).any()  # the name


def test_long_and_large_videos_are_made_smaller() -> None:
    sheet = strips([("clip", flat([i / 23 for i in range(24)], 64, 256))], frames=8, width=800)
    assert 780 <= sheet.shape[1] <= 800
    middle = sheet[sheet.shape[0] // 2 + 10]
    assert middle[10, 0] == 0 and middle[-10, 0] == 255  # first and last frame are among those shown
    with pytest.raises(ValueError, match="no videos"):
        strips([])
