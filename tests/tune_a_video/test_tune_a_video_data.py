"""Clips from files, folders and arrays; DAVIS; LOVEU-TGVE's table, frames and submissions."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import DataFileError, MissingDataError
from core.errors import ConfigError
from core.output.media import write_media
from tune_a_video.data import (
    DAVIS,
    ClipFolder,
    DrawnClip,
    LoveuTGVE,
    OneShotVideoDataset,
    Submission,
    clip_indices,
    fit,
    open_frames,
)
from tune_a_video.data.video_io import save_video
from tune_a_video.standin import draw_clip


def numbered(frames, height=16, width=24):
    """uint8 (f, H, W, 3); the grey value tells the frame."""
    return np.stack([np.full((height, width, 3), 10 * i, np.uint8) for i in range(frames)])


def write_frames(folder, frames, name="{:05d}.png", **size):
    folder.mkdir(parents=True)
    for i, frame in enumerate(numbered(frames, **size)):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def greys(video):
    """Which frame is which, from a video in [-1, 1]."""
    return ((video.mean((1, 2, 3)) + 1) * 12.75).round().long().tolist()


# ---------------------------------------------------------------------- which frames
def test_frames_start_at_start_and_keep_their_distance():
    assert clip_indices(20, 4, start=3, stride=2) == [3, 5, 7, 9]
    assert clip_indices(20, None, start=3, stride=5) == [3, 8, 13, 18]


def test_short_clips_are_an_error_that_says_what_fits():
    with pytest.raises(ConfigError, match=r"car has 46 frames.*23 of the 24.*n_frames=23, stride=1, pad=loop"):
        clip_indices(46, 24, stride=2, name="car")
    with pytest.raises(ConfigError, match=r"n_frames=10, pad=loop"):  # no stride helps
        clip_indices(10, 24, name="car")
    with pytest.raises(ConfigError, match="start=10, but car has 10 frames"):
        clip_indices(10, 2, start=10, name="car")
    with pytest.raises(ConfigError, match="n_frames=0"):
        clip_indices(10, 0)
    with pytest.raises(ConfigError, match="pad=repeat"):
        clip_indices(10, 2, pad="repeat")
    assert clip_indices(46, 23, stride=2)[-1] == 44


def test_short_clips_may_loop_or_run_back():
    assert clip_indices(7, 7, start=1, stride=2, pad="loop") == [1, 3, 5, 1, 3, 5, 1]
    assert clip_indices(7, 7, start=1, stride=2, pad="mirror") == [1, 3, 5, 3, 1, 3, 5]
    assert clip_indices(3, 4, start=2, pad="mirror") == [2, 2, 2, 2]


# ---------------------------------------------------------------------- one clip
def test_a_folder_of_frames_in_the_order_of_their_numbers(tmp_path):
    folder = write_frames(tmp_path / "surf", 12, "frame_{}.png")
    data = OneShotVideoDataset(folder, "a man is surfing", n_frames=5, start=1, stride=2, size=(8, 16))
    sample = data[0]
    assert len(data) == 1 and sample["video"].shape == (5, 3, 8, 16) and sample["video"].dtype == torch.float32
    assert greys(sample["video"]) == [1, 3, 5, 7, 9]
    assert (sample["caption"], sample["sample_id"]) == ("a man is surfing", "surf")
    assert sample["video"].min() == pytest.approx(10 / 127.5 - 1)
    with pytest.raises(IndexError):
        data[1]


def test_video_files_and_arrays_give_the_same_frames(tmp_path):
    pixels = numbered(8, 32, 32)
    options = {"prompt": "grey", "n_frames": 3, "stride": 3, "size": 16}
    array = OneShotVideoDataset(pixels, **options)[0]
    assert greys(array["video"]) == [0, 3, 6] and array["sample_id"] == "array"
    for kind in ("mp4", "gif"):
        path = write_media(pixels, tmp_path / "clip", video=kind)
        small = write_media(pixels[:, :16, :16], tmp_path / "small", video=kind)  # narrower than decord can hand over
        for file in (path, small):
            sample = OneShotVideoDataset(file, **options)[0]
            assert sample["video"].shape == (3, 3, 16, 16) and sample["sample_id"] == file.stem
            assert (sample["video"] - array["video"]).abs().max() < 0.05, file
    with pytest.raises(OSError, match="no frames that can be decoded"):
        (tmp_path / "broken.gif").write_bytes(b"GIF89a")
        OneShotVideoDataset(tmp_path / "broken.gif", "x")
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    same = OneShotVideoDataset(floats, "grey", n_frames=3, stride=3, size=None)[0]
    assert torch.equal(same["video"], floats[::3])


def test_a_decoders_own_size_is_the_asked_one(tmp_path):
    path = write_media(numbered(4, 48, 64), tmp_path / "clip", video="mp4")
    for resize in ("stretch", "center_crop", "pad"):
        sample = OneShotVideoDataset(path, "x", n_frames=2, size=(16, 24), resize=resize)[0]
        assert sample["video"].shape == (2, 3, 16, 24)


def test_clips_that_are_none_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="there is no clip"):
        OneShotVideoDataset(tmp_path / "none.mp4", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match="holds no picture"):
        OneShotVideoDataset(tmp_path / "empty", "x")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(OSError, match=r"broken\.mp4"):
        OneShotVideoDataset(tmp_path / "broken.mp4", "x")
    with pytest.raises(ValueError, match=r"float \(f, 3, H, W\)"):
        OneShotVideoDataset(torch.zeros(4, 8, 8, 3), "x")
    folder = write_frames(tmp_path / "mixed", 3)
    Image.new("RGB", (8, 8)).save(folder / "00001.png")
    with pytest.raises(ValueError, match=r"00001.png is 8 x 8, not 24 x 16"):
        OneShotVideoDataset(folder, "x", n_frames=3, size=16)[0]


def test_odd_sizes_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"size is 500 x 512.*size=\[496,512\]"):
        OneShotVideoDataset(numbered(3), "x", n_frames=3, size=(500, 512))
    with pytest.raises(ConfigError, match=r"array is 16 x 20.*size=\[16,16\]"):
        OneShotVideoDataset(numbered(3, 16, 20), "x", n_frames=3, size=None)[0]
    assert OneShotVideoDataset(numbered(3, 16, 20), "x", n_frames=3, size=None, multiple=4)[0]["video"].shape[3] == 20
    with pytest.raises(ConfigError, match="size="):
        OneShotVideoDataset(numbered(3), "x", n_frames=3, size=(8, 8, 8))


# ---------------------------------------------------------------------- size
def test_three_ways_to_a_size():
    frames = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    frames[..., 8:24] = 200  # the middle half
    stretched = fit(frames, (16, 16), "stretch")
    assert stretched[0, 0, 8, 8] == 200 and stretched[0, 0, 8, 1] == 0
    cropped = fit(frames, (16, 16), "center_crop")
    assert (cropped == 200).all()
    padded = fit(frames, (32, 32), "pad")
    assert padded.shape == (1, 3, 32, 32)
    assert (padded[:, :, :8] == 0).all() and (padded[:, :, 24:] == 0).all() and (padded[0, 0, 8:24, 16] == 200).all()
    dark = fit(frames / 127.5 - 1, (32, 32), "pad")
    assert (dark[:, :, 0] == -1).all() and dark.max() <= 200 / 127.5 - 1
    with pytest.raises(ConfigError, match="resize=letterbox"):
        fit(frames, (8, 8), "letterbox")


# ---------------------------------------------------------------------- folders
def test_a_folder_of_clips_with_captions(tmp_path):
    root = tmp_path / "clips"
    write_frames(root / "bear", 6)
    write_media(numbered(6, 16, 24), root / "car", video="mp4")
    (root / "notes.txt").write_text("no clip")
    data = ClipFolder(root, n_frames=4, size=16)
    assert data.names == ["bear", "car"] and data[1]["caption"] == ""
    (tmp_path / "captions.txt").write_text("car a car turns\n\nbear  a bear walks\n")
    data = ClipFolder(root, captions=tmp_path / "captions.txt", n_frames=4, size=16)
    assert [data[i]["caption"] for i in range(2)] == ["a car turns", "a bear walks"]
    assert [data[i]["sample_id"] for i in range(2)] == ["car", "bear"]
    (tmp_path / "captions.json").write_text(json.dumps({"bear": "a bear"}))
    assert len(ClipFolder(root, captions=tmp_path / "captions.json", n_frames=4, size=16)) == 1
    with pytest.raises(MissingDataError, match=r"no clip 'bera'.*bear"):
        ClipFolder(root, names=["bera"])
    with pytest.raises(MissingDataError, match="'car' has no caption"):
        ClipFolder(root, captions={"bear": "a bear"}, names=["car"])
    (tmp_path / "captions.txt").write_text("car\n")
    with pytest.raises(MissingDataError, match=r"captions\.txt, line 1"):
        ClipFolder(root, captions=tmp_path / "captions.txt")
    with pytest.raises(MissingDataError, match="no folder"):
        ClipFolder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"clips/bear has 6 frames"):
        ClipFolder(root, n_frames=7, size=16)[0]


def test_clips_whose_files_share_a_stem_are_all_there(tmp_path):
    for name in ("clip.gif", "clip.mp4", "other.gif"):
        save_video(torch.rand(3, 2, 16, 16), tmp_path / name)
    data = ClipFolder(tmp_path, n_frames=2, size=16)
    assert [data[i]["sample_id"] for i in range(len(data))] == ["clip.gif", "clip.mp4", "other"]
    with pytest.raises(MissingDataError, match="no clip 'clip'"):
        ClipFolder(tmp_path, names=["clip"])


def test_davis_lists_of_both_years(tmp_path):
    for name in ("bear", "camel", "car-turn"):
        write_frames(tmp_path / "JPEGImages/480p" / name, 3, "{:05d}.jpg")
    for year, text in ((2017, "camel\nbear\n"), (2016, "/JPEGImages/480p/bear/00000.jpg /Annotations/x.png\n" * 2)):
        (tmp_path / f"ImageSets/{year}").mkdir(parents=True)
        (tmp_path / f"ImageSets/{year}/val.txt").write_text(text)
    options = {"n_frames": 2, "size": 16}
    assert DAVIS(tmp_path, **options).names == ["bear", "camel", "car-turn"]
    assert DAVIS(tmp_path, split="val", **options).names == ["camel", "bear"]
    assert DAVIS(tmp_path, split="val", year=2016, **options).names == ["bear"]
    data = DAVIS(tmp_path, captions={"car-turn": "a jeep car is moving on the road"}, **options)
    assert data[0]["sample_id"] == "car-turn" and data[0]["video"].shape == (2, 3, 16, 16)
    with pytest.raises(MissingDataError, match="JPEGImages/480p"):
        DAVIS(tmp_path / "JPEGImages", **options)


def write_masks(folder, frames, height, width):
    """Palette images of object 1 in a block that moves right by two columns a frame."""
    folder.mkdir(parents=True)
    for i in range(frames):
        labels = np.zeros((height, width), np.uint8)
        labels[4:8, 2 * i : 2 * i + 4] = 1
        image = Image.fromarray(labels, "P")
        image.putpalette([0, 0, 0, 128, 0, 0])
        image.save(folder / f"{i:05d}.png")


def test_masks_go_with_the_frames_that_are_taken(tmp_path):
    write_frames(tmp_path / "clips/bear", 6, height=16, width=32)
    write_masks(tmp_path / "masks/bear", 6, 16, 32)
    options = {"masks": tmp_path / "masks", "n_frames": 3, "start": 1, "stride": 2}
    plain = ClipFolder(tmp_path / "clips", size=None, **options)[0]
    assert plain["mask"].shape == (3, 16, 32) and plain["mask"].dtype == torch.bool
    for mask, frame in zip(plain["mask"], (1, 3, 5), strict=True):
        assert mask.sum() == 16 and mask[4:8, 2 * frame : 2 * frame + 4].all()
    # The crop takes columns 8 to 23 of every frame, and of its mask.
    cropped = ClipFolder(tmp_path / "clips", size=16, resize="center_crop", **options)[0]
    assert torch.equal(cropped["mask"], plain["mask"][..., 8:24])
    stretched = ClipFolder(tmp_path / "clips", size=(8, 16), **options)[0]["mask"]
    assert stretched.shape == (3, 8, 16) and stretched[0, 2:4, 1:3].all() and stretched[0].sum() == 4
    assert "mask" not in ClipFolder(tmp_path / "clips", n_frames=3, size=16)[0]
    write_masks(tmp_path / "few/bear", 5, 16, 32)
    with pytest.raises(DataFileError, match="5 masks for a clip of 6 frames"):
        ClipFolder(tmp_path / "clips", size=None, **{**options, "masks": tmp_path / "few"})[0]
    write_masks(tmp_path / "small/bear", 6, 8, 16)
    with pytest.raises(DataFileError, match=r"\(8, 16\) for frames of \(16, 32\)"):
        ClipFolder(tmp_path / "clips", size=None, **{**options, "masks": tmp_path / "small"})[0]


def test_davis_gives_its_annotations(tmp_path):
    write_frames(tmp_path / "JPEGImages/480p/bear", 3, "{:05d}.jpg", height=16, width=16)
    write_masks(tmp_path / "Annotations/480p/bear", 3, 16, 16)
    sample = DAVIS(tmp_path, masks=True, n_frames=2, size=16)[0]
    assert sample["mask"].shape == (2, 16, 16) and sample["mask"][1, 4:8, 2:6].all() and sample["mask"].sum() == 32


def test_drawn_clips():
    sample = DrawnClip(seed=2, n_frames=5)[0]
    assert sample["video"].shape == (5, 3, 16, 16) and sample["caption"] == "a pinkish ball moves in the snow"
    assert sample["sample_id"] == "drawn-2" and sample["centres"].shape == (5, 2)
    assert torch.equal(sample["mask"], draw_clip(2, 5).masks) and sample["mask"].dtype == torch.bool
    curved = DrawnClip(seed=2, n_frames=5, path="curved")[0]
    assert torch.equal(curved["centres"], draw_clip(2, 5, "curved").centres)


# ---------------------------------------------------------------------- LOVEU-TGVE-2023
HEAD = [
    "Video name",
    "Our GT caption",
    "Style Change Caption",
    "Object Change Caption",
    "Background Change Caption",
    "Multiple Changes Caption",
]


@pytest.fixture
def tgve(tmp_path):
    root = tmp_path / "loveu-tgve-2023"
    rows = [
        ["DAVIS Videos:", "", "", "", "", ""],
        ["bear", "A bear walks, slowly", "…, anime style", "A lion walks", "A bear in snow", "A lion in snow"],
        ["", "", "", "", "", ""],
        ["Youtube Videos:", "", "", "", "", ""],
        [" drone ", "A drone flies", "", "A bird flies", "A drone over the sea", "A bird over the sea"],
    ]
    write_frames(root / "DAVIS_480p/480p_frames/bear", 4, "{:05d}.jpg")
    write_frames(root / "youtube_480p/480p_frames/drone", 12, "{:05d}.jpg")
    with open(root / "LOVEU-TGVE-2023_Dataset.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([HEAD, *rows])
    return root


def test_the_benchmarks_table_and_frames(tgve):
    data = LoveuTGVE(tgve, n_frames=4)
    assert [(c.group, c.name) for c in data.clips] == [("DAVIS_480p", "bear"), ("youtube_480p", "drone")]
    bear, drone = data[0], data[1]
    assert bear["caption"] == "A bear walks, slowly" and bear["sample_id"] == "DAVIS_480p/bear"
    assert bear["edits"]["multiple"] == "A lion in snow" and set(drone["edits"]) == {"object", "background", "multiple"}
    assert bear["video"].shape == (4, 3, 16, 24) and greys(drone["video"]) == [0, 1, 2, 3]
    assert len(LoveuTGVE(tgve, n_frames=None)[1]["video"]) == 12
    with pytest.raises(ConfigError, match="bear has 4 frames"):
        LoveuTGVE(tgve, n_frames=8)[0]


def test_places_are_drawn_once_per_clip(tgve):
    places = set()
    for seed in range(12):
        data = LoveuTGVE(tgve, n_frames=4, start=None, seed=seed)
        assert greys(data[0]["video"]) == [0, 1, 2, 3]
        first = greys(data[1]["video"])
        assert first == greys(data[1]["video"]) == list(range(first[0], first[0] + 4))
        places.add(first[0])
    assert len(places) > 3
    data.clips.append(data.clips[1])
    pairs = []
    for data.seed in range(6):
        pairs.append([greys(data[i]["video"])[0] for i in (1, 2)])
    assert any(one != other for one, other in pairs)  # clips do not share their place


def test_tables_and_frames_that_do_not_fit_are_named(tgve):
    table = tgve / "LOVEU-TGVE-2023_Dataset.csv"
    text = table.read_text(encoding="utf-8-sig")
    table.write_text(text.replace(" drone ", "plane"))
    with pytest.raises(MissingDataError, match=r"'plane'.*\n.*DAVIS_480p/480p_frames/plane"):
        LoveuTGVE(tgve)
    table.write_text(text.replace("Style Change Caption", "Style"))
    with pytest.raises(MissingDataError, match="no column 'Style Change Caption'"):
        LoveuTGVE(tgve)
    table.rename(tgve.parent / table.name)
    (tgve.parent / table.name).write_text(text)
    assert len(LoveuTGVE(tgve)) == 2  # beside the folder
    (tgve.parent / table.name).unlink()
    with pytest.raises(MissingDataError, match=r"LOVEU-TGVE-2023_Dataset\.csv"):
        LoveuTGVE(tgve)


def test_submissions_have_the_benchmarks_layout(tgve, tmp_path):
    clips = LoveuTGVE(tgve, n_frames=4).clips
    out = Submission(tmp_path / "out", "team")
    assert len(list(out.missing(clips))) == 7
    video = torch.zeros(3, 3, 16, 24)
    video[0] = torch.tensor([0.0, 0.5, 1.0])[:, None, None]  # the red of three frames
    folder = out.write(clips[0], "style", video)
    assert folder == tmp_path / "out/team/DAVIS_480p/bear/style"
    assert sorted(p.name for p in folder.iterdir()) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    frames = open_frames(folder).read([0, 1, 2], None)
    assert frames.shape == (3, 3, 16, 24)
    assert (frames[:, 0, 8, 8].float() - torch.tensor([0, 127.5, 255])).abs().max() < 4
    assert len(list(out.missing(clips))) == 6 and len(list(out.missing(clips, frames=4))) == 7
    out.write(clips[0], "style", np.zeros((2, 16, 16, 3), np.uint8))
    assert len(list(folder.iterdir())) == 2  # nothing is left of a longer one
    with pytest.raises(ValueError, match="kind='colour'"):
        out.write(clips[0], "colour", video)
    with pytest.raises(ValueError, match=r"\(3, f, H, W\)"):
        out.write(clips[0], "style", torch.zeros(4, 3, 16, 16))
    with pytest.raises(ValueError, match="team="):
        Submission(tmp_path, "a/b")
