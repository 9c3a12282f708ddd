"""Video: which frames are taken, and that exactly those are decoded."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from core.data import (
    MissingDataError,
    SampleError,
    SeededDataset,
    VideoError,
    VideoList,
    VideoReader,
    build_loader,
    sample_indices,
)

FRAMES = 40


def write_video(path, frames=FRAMES, size=(64, 48)):
    """A real mp4 file in which the brightness of frame i is 5 i, with key frames only now and then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 5 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip one.mp4")


def numbers(frames):
    """The frames' own numbers, read from their brightness."""
    # The codec darkens every frame by half a step.
    return ((frames.float().mean(dim=(-3, -2, -1)) + 2.5) / 5).round().int().tolist()


# ---------------------------------------------------------------------------- indices


def test_uniform_spreads_over_the_whole_video():
    assert sample_indices(10, 4).tolist() == [0, 3, 6, 9]
    assert sample_indices(9, 1).tolist() == [4]
    assert sample_indices(3, 5).tolist() == [0, 0, 1, 2, 2]
    clips = sample_indices(9, 3, clips=3)
    assert clips.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert torch.equal(sample_indices(10, 4, train=True), sample_indices(10, 4)), "never random"


def test_segments_take_one_frame_of_every_part():
    assert sample_indices(12, 4, "segments").tolist() == [1, 4, 7, 10]
    assert sample_indices(12, 2, "segments", clips=3).tolist() == [[1, 7], [3, 9], [5, 11]]
    seen = [set() for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        for part, index in zip(seen, sample_indices(12, 4, "segments", train=True, generator=generator), strict=True):
            part.add(int(index))
    assert seen == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {9, 10, 11}]
    assert sample_indices(2, 4, "segments").tolist() == [0, 0, 1, 1]


def test_dense_is_a_window():
    assert sample_indices(20, 4, "dense", stride=3).tolist() == [5, 8, 11, 14]
    assert sample_indices(20, 4, "dense", stride=3, clips=3)[:, 0].tolist() == [0, 5, 10]
    starts = set()
    for _ in range(300):
        window = sample_indices(20, 4, "dense", stride=3, train=True)
        assert (window.diff() == 3).all()
        starts.add(int(window[0]))
    assert starts == set(range(11)), "every place, up to the last that fits"


def test_stride_walks_from_the_start():
    assert sample_indices(10, 3, "stride", stride=2).tolist() == [0, 2, 4]
    assert sample_indices(10, 3, "stride", stride=2, start=1).tolist() == [1, 3, 5]
    assert sample_indices(10, None, "stride", stride=4).tolist() == [0, 4, 8]
    assert sample_indices(9, None, "stride", stride=4, start=1).tolist() == [1, 5]
    assert sample_indices(12, 2, "stride", stride=2, clips=3).tolist() == [[0, 2], [4, 6], [8, 10]]


def test_short_videos_are_clamped_looped_or_refused():
    assert sample_indices(5, 4, "dense", stride=2).tolist() == [0, 2, 4, 4]
    assert sample_indices(5, 4, "dense", stride=2, short="loop").tolist() == [0, 2, 4, 1]
    assert sample_indices(3, 5, "stride", short="loop").tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="4 frames with stride 2 do not fit into a video of 5 frames"):
        sample_indices(5, 4, "dense", stride=2, short="error")


@pytest.mark.parametrize("mode", ["uniform", "segments", "dense", "stride"])
@pytest.mark.parametrize("short", ["clamp", "loop"])
def test_indices_always_lie_in_the_video(mode, short):
    for total in (1, 2, 7, 16, 100, 12345):
        for frames in (1, 3, 16):
            for clips in (None, 1, 4):
                for train in (False, True):
                    picked = sample_indices(total, frames, mode, stride=3, clips=clips, train=train, short=short)
                    assert picked.shape == ((frames,) if clips is None else (clips, frames))
                    assert picked.dtype == torch.int64 and picked.min() >= 0 and picked.max() < total


@pytest.mark.parametrize("mode", ["segments", "dense"])
def test_randomness_is_the_generators(mode):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_indices(1000, 8, mode, stride=2, train=True, generator=generator).tolist()

    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(5)
    first = sample_indices(1000, 8, mode, train=True)
    torch.manual_seed(5)
    assert torch.equal(sample_indices(1000, 8, mode, train=True), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0, "frames": 1}, "video of 0 frames"),
        ({"total": 9, "frames": 0}, "must be positive"),
        ({"total": 9, "frames": None}, "goes with mode 'stride'"),
        ({"total": 9, "frames": 2, "start": 1}, "start goes with mode 'stride'"),
        ({"total": 9, "frames": 2, "start": 9, "mode": "stride"}, "start 9 lies behind the last of 9"),
        ({"total": 9, "frames": 2, "mode": "random"}, "mode must be uniform, segments, dense or stride"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(**arguments)


# ---------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "wanted",
    [[0], [39], [7, 8, 9], [30, 2, 17], [5, 5, 5], [39, 0, 39, 1], [*range(FRAMES)], [*range(0, 40, 13)]],
)
def test_the_frames_asked_for_come_in_their_order(video, wanted):
    frames = VideoReader(video).read(wanted)
    assert frames.dtype == torch.uint8 and frames.shape == (len(wanted), 48, 64, 3)
    assert numbers(frames) == wanted
    assert numbers(VideoReader(video).read(torch.tensor(wanted))) == wanted


def test_every_frame_is_decoded_once_and_no_other(video):
    reader = VideoReader(video)
    asked = []
    decoder = reader._video

    class Counting:
        def get_batch(self, indices):
            asked.append(list(indices))
            return decoder.get_batch(indices)

        def __len__(self):
            return len(decoder)

    reader._video = Counting()
    assert numbers(reader.read([30, 2, 30, 17, 2])) == [30, 2, 30, 17, 2]
    assert asked == [[2, 17, 30]]


def test_a_reader_is_used_again_and_knows_its_video(video):
    reader = VideoReader(video)
    assert len(reader) == FRAMES and reader.fps == pytest.approx(10)
    for wanted in ([20, 21], [3], [39, 5]):
        assert numbers(reader.read(wanted)) == wanted


def test_frames_are_resized_by_the_decoder(video):
    assert VideoReader(video, width=20, height=30).read([3]).shape == (1, 30, 20, 3)
    assert VideoReader(video, short_side=24).read([3]).shape == (1, 24, 32, 3)
    assert VideoReader(video, short_side=25).read([3]).shape == (1, 25, 33, 3)
    assert numbers(VideoReader(video, short_side=24).read([3, 20])) == [3, 20]
    with pytest.raises(ValueError, match="width and height, or short_side"):
        VideoReader(video, width=20).read([3])


def test_missing_and_broken_videos_are_named(video, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such video: '.*nowhere.mp4'"):
        VideoReader(tmp_path / "nowhere.mp4").read([0])
    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(b"no video" * 100)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[:1000])
    for path in (garbage, cut):
        with pytest.raises(VideoError, match=f"{path} cannot be opened as a video") as caught:
            VideoReader(path).read([0])
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value), "decord's C++ stack is left out"
    with pytest.raises(IndexError, match=rf"frames 3..40 of a video of {FRAMES} frames"):
        VideoReader(video).read([3, 40])
    with pytest.raises(ValueError, match="no frames are asked for"):
        VideoReader(video).read([])


# ---------------------------------------------------------------------------- lists


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    root = tmp_path_factory.mktemp("list")
    write_video(root / "run/a b.mp4")
    write_video(root / "jump/c.mp4", frames=6)
    (root / "train.txt").write_text("run/a b.mp4 0\n\njump/c.mp4 1\n")
    return root


def test_a_list_gives_clips(listed):
    data = VideoList(listed / "train.txt", frames=4, stride=2)
    sample = data[0]
    assert sample["video"].shape == (3, 4, 48, 64) and type(sample["video"]) is torch.Tensor
    assert numbers(sample["video"].permute(1, 2, 3, 0)) == [16, 18, 20, 22]
    assert (sample["label"], sample["sample_id"]) == (0, "run/a b.mp4")
    assert numbers(data[1]["video"].permute(1, 2, 3, 0)) == [0, 2, 4, 5]
    views = VideoList(listed / "train.txt", listed, frames=2, mode="uniform", clips=3, short_side=24)[0]["video"]
    assert views.shape == (3, 3, 2, 24, 32)
    assert numbers(views.permute(0, 2, 3, 4, 1).flatten(0, 1)) == [0, 23, 8, 31, 16, 39]


@pytest.mark.child
def test_one_random_choice_holds_for_all_frames_of_a_clip(listed):
    transform = v2.Compose([v2.RandomCrop(20), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    data = VideoList(listed / "train.txt", frames=8, train=True, transform=transform)

    def load(workers):
        cfg = {"dataset": data, "batch_size": 2, "num_workers": workers}
        return next(iter(build_loader(cfg, seed=3, training=True))).data

    # Workers first: a fork while the decoder's threads of this process come to their end can hang the worker.
    worked = [load(workers)["video"] for workers in (1, 2)]
    alone = load(0)
    assert alone["video"].shape == (2, 3, 8, 20, 20) and alone["video"].max() <= 1
    for video in worked:
        assert torch.equal(video, alone["video"]), "random clips do not depend on workers"


def test_mistakes_in_lists_are_named(listed, tmp_path):
    with pytest.raises(MissingDataError, match=r"(?s)no file '.*nowhere.txt'.*dataset.list_file.*path label"):
        VideoList(tmp_path / "nowhere.txt")
    with pytest.raises(MissingDataError, match="there is no folder"):
        VideoList(listed / "train.txt", tmp_path / "nowhere")
    bad = tmp_path / "bad.txt"
    bad.write_text("a.mp4 0\nb.mp4\n")
    with pytest.raises(MissingDataError, match=r"bad.txt, line 2: expected 'path label': 'b.mp4'"):
        VideoList(bad)
    bad.write_text("gone.mp4 0\n")
    with pytest.raises(SampleError, match=r"VideoList\[0\] \(.*gone.mp4\): MissingDataError: no such video"):
        SeededDataset(VideoList(bad))[0]
