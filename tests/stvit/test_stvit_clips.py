"""Video data and training: clips from real files, views, moving glyphs, and whole runs."""

import json

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from core.config import compose, to_dict
from core.data import MissingDataError, VideoError
from core.data.prepare import run_task
from core.engine.launch import build_trainer, run
from core.errors import ConfigError
from core.metrics import TorchMetrics
from stvit.data.clips import ClipEvalTransform, ClipTrainTransform, ClipViews, MultiViewVideos, spatial_crops
from stvit.models.stvit_video import STViTVideoSwin
from stvit.standin.moving_glyphs import DIRECTIONS, MovingGlyphs, class_names, sample_clip
from stvit.trainer.video import VideoClassificationTrainer

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two real mp4 files, 96 x 48: brightness counts the frames, the thirds of the picture differ by 60."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("long one.mp4", 40), ("short.mp4", 5)):
        writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 48))
        for frame in range(frames):
            picture = np.repeat([0, 60, 120], 32)[None, :, None] + 3 * frame + np.zeros((48, 1, 3))
            writer.write(picture.astype(np.uint8))
        writer.release()
    (folder / "list.txt").write_text("long one.mp4 1\nshort.mp4 0\n")
    return folder


def brightness(views):
    """(V, T) of (V, C, T, H, W) in units of a pixel, of the middle of the pictures."""
    return (255 * views[..., 20:28, 20:28]).mean(dim=(1, 3, 4))


# ---------------------------------------------------------------------------- clips and views


def test_views_are_clips_of_crops_in_order(videos):
    sample = MultiViewVideos(videos / "list.txt", ClipViews(frames=4, stride=2, clips=3, crops=3, size=48, **PLAIN))[0]
    assert sample["video"].shape == (9, 3, 4, 48, 48) and sample["video"].dtype == torch.float32
    assert sample["label"] == 1 and sample["sample_id"] == "long one.mp4"
    # 40 frames leave 34 places for clips of 7: the first, the middle, the last; left, middle, right of each.
    first = torch.tensor([0, 16, 33]).repeat_interleave(3)[:, None] + 2 * torch.arange(4)
    third = torch.tensor([0.0, 60.0, 120.0]).repeat(3)[:, None]
    assert torch.allclose(brightness(sample["video"]), 3 * first + third, atol=4)


def test_short_videos_begin_again(videos):
    views = ClipViews(frames=8, stride=1, clips=1, crops=1, size=48, **PLAIN)(videos / "short.mp4")
    assert torch.allclose(brightness(views)[0], 60.0 + 3 * (torch.arange(8) % 5), atol=4)


def test_list_files_and_broken_videos(videos, tmp_path):
    assert [len(MultiViewVideos(videos / "list.txt")), MultiViewVideos(videos / "list.txt").views.crops] == [2, 3]
    with pytest.raises(MissingDataError, match="list_file"):
        MultiViewVideos(None)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("bad.mp4 3\nnone.mp4 2\n")
    broken = MultiViewVideos(tmp_path / "list.txt")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        broken[0]
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        broken[1]


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_crops_spread_along_the_longer_side(shape):
    frames = torch.arange(shape[1] * shape[2]).reshape(1, *shape[1:]).expand(shape)
    long = frames if shape[2] > shape[1] else frames.transpose(1, 2)
    crops = spatial_crops(frames, 8, 3)
    crops = crops if shape[2] > shape[1] else crops.transpose(2, 3)
    for crop, start in zip(crops, (0, 6, 12), strict=True):
        assert torch.equal(crop, long[:, :, start : start + 8])
    assert torch.equal(spatial_crops(frames, 8, 1)[0], spatial_crops(frames, 8, 3)[1])
    with pytest.raises(ValueError, match="do not come out"):
        spatial_crops(frames, 9, 3)


def test_training_crops_all_frames_alike():
    picture = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    transform = ClipTrainTransform(size=16)
    outputs = [transform(tv_tensors.Video(picture.expand(5, -1, -1, -1))) for _ in range(4)]
    assert all(out.shape == (5, 3, 16, 16) and torch.equal(out, out[:1].expand_as(out)) for out in outputs)
    assert not torch.equal(outputs[0], outputs[1])
    mirrored = ClipTrainTransform(size=40, scale=(1, 1), ratio=(1, 1), flip=1.0, **PLAIN)
    square = picture[..., :40]
    assert torch.allclose(mirrored(square), square.flip(-1) / 255, atol=1e-6)
    assert torch.allclose(ClipEvalTransform(size=40, resize=None, **PLAIN)(picture), picture[..., 5:45] / 255)
    assert ClipEvalTransform(size=16, resize=20)(picture).shape == (1, 3, 16, 16)


# ---------------------------------------------------------------------------- prediction


class Recorder(torch.nn.Module):
    """Logits are the means of the first two channels; remembers how many clips came at once."""

    clip_size = (2, 4, 4)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, clips):
        self.calls.append(len(clips))
        return self.scale * clips.mean(dim=(2, 3, 4))[:, :2]


def test_predictions_are_mean_probabilities_of_the_own_views():
    trainer = VideoClassificationTrainer(Recorder(), views_at_once=4)
    logits = torch.tensor([[[0.0, 9.0], [2.0, 0.0], [2.0, 0.0]], [[-2.0, 2.0], [0.0, 0.5], [3.0, 0.0]]])
    views = torch.cat([logits, logits[..., :1]], dim=-1)[..., None, None, None].expand(-1, -1, -1, 2, 4, 4)
    batch = {"video": views, "label": torch.tensor([0, 1]), "sample_id": ["a", "b"]}
    predicted = trainer.val_step(batch)
    expected = logits.softmax(-1).mean(dim=1)
    assert torch.allclose(predicted["probability"], expected)
    assert expected.argmax(1).tolist() == [0, 1]
    assert logits.mean(1).argmax(1).tolist() == [1, 1], "the mean of logits would say something else"
    assert predicted["label"].tolist() == [0, 1] and predicted["sample_id"] == ["a", "b"]
    assert trainer.network.calls == [4, 2]
    trainer.views_at_once = None
    assert torch.allclose(trainer.val_step(batch)["probability"], expected) and trainer.network.calls[-1] == 6
    single = trainer.val_step({**batch, "video": views[:, 0]})
    assert torch.allclose(single["probability"], logits[:, 0].softmax(-1))
    with pytest.raises(ValueError, match="at least one clip"):
        VideoClassificationTrainer(Recorder(), views_at_once=0)


def test_metrics_count_videos_not_views():
    trainer = VideoClassificationTrainer(Recorder())
    accuracy = {"type": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 2, "average": "micro"}
    metric = TorchMetrics({"top1": accuracy}, prediction="probability")
    # Three views each; videos are right, right, wrong, while 4 of 9 views are wrong.
    votes = torch.tensor([[5.0, 5.0, -1.0], [5.0, -1.0, 5.0], [-5.0, -5.0, 1.0]])
    views = torch.zeros(3, 3, 3, 2, 4, 4)
    views[:, :, 0] = votes[..., None, None, None]
    for part in (slice(0, 2), slice(2, 3)):
        batch = {"video": views[part], "label": torch.zeros(3, dtype=torch.long)[part]}
        metric.process(batch, trainer.val_step(batch))
    assert metric.evaluate(3)["top1"] == pytest.approx(2 / 3), "a size other than the videos' would be an error"


def test_losses_take_every_view_as_a_sample():
    trainer = VideoClassificationTrainer(Recorder(), smoothing=0.2)
    views, label = torch.randn(2, 3, 3, 2, 4, 4), torch.tensor([0, 1])
    terms = trainer.losses({"video": views, "label": label})
    logits = trainer.network(views.flatten(0, 1))
    expected = torch.nn.functional.cross_entropy(logits, label.repeat_interleave(3), label_smoothing=0.2)
    assert torch.allclose(terms["loss_cls"], expected)
    assert terms["accuracy"] == (logits.argmax(1) == label.repeat_interleave(3)).float().mean()
    assert trainer.input_shape == (3, 2, 4, 4)
    assert trainer.example_batch(2, "cpu")["video"].shape == (2, 3, 2, 4, 4)


def test_films_show_the_first_frame_of_every_slice_of_the_middle_view(monkeypatch):
    shown = []

    def picture(frame, maps, captions):
        shown.append((float(frame.mean()), tuple(maps.shape)))
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("stvit.inference.visualize.token_picture", picture)
    sizes = dict(patch_size=(2, 2, 2), window=(4, 7, 7), embed_dim=8, depths=(4, 1), num_heads=(2, 2), base_depth=1)
    network = STViTVideoSwin((8, 28, 28), num_classes=3, **sizes)
    views = torch.arange(3.0)[:, None, None, None, None] * 10 + torch.arange(8.0)[:, None, None]
    trainer = VideoClassificationTrainer(network, views=lambda path: views.expand(3, 3, 8, 28, 28)).eval()
    assert trainer.infer("any.mp4").pictures["tokens"].shape == (4, 2, 2, 3)
    assert shown == [(10.0 + frame, (1, 36, 14, 14)) for frame in (0, 2, 4, 6)]
    with pytest.raises(ValueError, match=r"model\.views"):
        VideoClassificationTrainer(network).infer("any.mp4")


# ---------------------------------------------------------------------------- moving glyphs


def test_a_clip_depends_on_seed_split_and_number_alone():
    few, many = MovingGlyphs("val", count=3), MovingGlyphs("val", count=5)
    assert all(torch.equal(few[i]["video"], many[i]["video"]) and few[i]["label"] == many[i]["label"] for i in range(3))
    assert not torch.equal(few[0]["video"], MovingGlyphs("val", count=3, seed=1)[0]["video"])
    assert not torch.equal(few[0]["video"], MovingGlyphs("test", count=3)[0]["video"])
    sample = few[0]
    assert sample["video"].shape == (3, 8, 28, 28) and sample["video"].dtype == torch.float32
    assert len(few.classes) == 16 and few.classes[0] == "disc right" and few.classes == class_names(4)
    train = MovingGlyphs(count=64)
    whole = torch.stack([train[i]["video"] for i in range(64)])
    assert abs(whole.mean()) < 0.15 and 0.8 < whole.std() < 1.2
    with pytest.raises(ValueError, match="no split"):
        MovingGlyphs("dev")
    with pytest.raises(ValueError, match="1 to 8"):
        MovingGlyphs(shapes=9)


def test_glyphs_move_as_their_class_says():
    """Shifting the glyph of the first frame round the torus, the way of the class, gives that of a later frame."""
    seen = set()
    for index in range(24):
        clip, label = sample_clip("train", 0, index, noise=0.0, speed=(2.0, 2.0), frames=5)
        first, last = clip[0].astype(int), clip[4].astype(int)
        glyph = (first != last).any(axis=-1)  # where either has it
        fits = {}
        for number, (dx, dy) in enumerate(DIRECTIONS.values()):
            moved = np.roll(first, (8 * dy, 8 * dx), axis=(0, 1))
            fits[number] = np.abs(moved - last)[glyph].mean()
        assert min(fits, key=fits.get) == label // 4, (index, fits)
        seen.add(label // 4)
    assert seen == {0, 1, 2, 3}


def test_a_single_frame_is_as_likely_in_every_direction():
    """The glyph's place in the first and in the last frame is spread evenly over the picture, whatever the class."""
    for frame in (0, 7):
        places = {}
        for index in range(300):
            clip, label = sample_clip("train", 0, index, noise=0.0)
            bright = np.abs(clip[frame].astype(int) - np.median(clip, axis=0)).sum(axis=-1)
            row, column = np.unravel_index(bright.argmax(), bright.shape)
            places.setdefault(label // 4, []).append((row, column))
        for found in places.values():
            assert (np.abs(np.mean(found, axis=0) - 13.5) < 4 * 8.1 / np.sqrt(len(found))).all()


# ---------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def glyph_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("glyphs") / "root"
    text = run_task("stvit", "moving_glyphs", [f"root={root}", "train=6", "val=3", "frames=12", "size=56"])
    assert "6 videos of 16 classes" in text
    return root


def test_the_task_writes_what_the_readers_read(glyph_files):
    entries = [line.rsplit(" ", 1) for line in (glyph_files / "val.txt").read_text().splitlines()]
    names = (glyph_files / "classes.txt").read_text().split()
    assert len(entries) == 3 and len(names) == 16
    read = MultiViewVideos(glyph_files / "val.txt", ClipViews(frames=12, stride=1, clips=1, crops=1, size=56, **PLAIN))
    for index, (path, label) in enumerate(entries):
        assert path.split("/")[1] == names[int(label)]
        clip, expected = sample_clip("val", 0, index, size=56, frames=12)
        assert int(label) == expected == read[index]["label"]
        error = read[index]["video"][0].permute(1, 2, 3, 0) - torch.from_numpy(clip) / 255
        assert error.abs().mean() < 0.06, "but for noise, which the codec smooths"


def test_the_task_goes_on_and_guards_its_folder(glyph_files):
    paths = sorted(glyph_files.rglob("*.mp4"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    paths[2].unlink()
    words = [f"root={glyph_files}", "train=6", "val=3", "frames=12", "size=56"]
    run_task("stvit", "moving_glyphs", words)
    changed = [path for path in paths if path.stat().st_mtime_ns != times[path]]
    assert changed == [paths[2]] and not list(glyph_files.rglob("*.part*"))
    with pytest.raises(ConfigError, match="empty root"):
        run_task("stvit", "moving_glyphs", [*words, "seed=1"])
    with pytest.raises(ConfigError, match="at least 1"):
        run_task("stvit", "moving_glyphs", [f"root={glyph_files}", "train=0"])


# ---------------------------------------------------------------------------- runs

TINY = ("runtime=cpu", "model.network.embed_dim=8", "model.network.depths=[4,1]", "train_dataloader.batch_size=2")


@pytest.mark.long
@pytest.mark.parametrize("name", ["moving_glyphs", "moving_glyphs_full"])
def test_two_steps_on_moving_glyphs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = ["+train_dataloader.dataset.count=4", "+test_dataloader.dataset.count=4"]
    result = run(compose([f"experiment=stvit/{name}", *TINY, *count, "train_cfg.max_epochs=1"]))
    assert result["status"] == "finished" and result["steps"] == 2
    assert result["metrics"]["top1"] * 4 == pytest.approx(round(result["metrics"]["top1"] * 4), abs=1e-4)
    films = list(tmp_path.rglob("media/*.gif"))
    assert bool(films) == (name == "moving_glyphs")


@pytest.mark.parametrize("name", ["moving_glyphs_files", "kinetics_video_swin_tiny", "kinetics_stvit_video_swin_small"])
def test_views_of_the_test_are_those_of_the_model(name):
    config = to_dict(compose([f"experiment=stvit/{name}", "model.views.clips=5"]))
    assert config["test_dataloader"]["dataset"]["views"] == config["model"]["views"]
    assert config["model"]["views"]["clips"] == 5


def test_clips_of_files_are_normalised_as_the_views_are():
    config = to_dict(compose(["experiment=stvit/moving_glyphs_files", "model.views.mean=[0.1,0.2,0.3]"]))
    assert config["train_dataloader"]["dataset"]["transform"]["mean"] == [0.1, 0.2, 0.3]


def test_steps_on_files_and_several_views(glyph_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [
        f"train_dataloader.dataset.list_file={glyph_files / 'train.txt'}",
        f"test_dataloader.dataset.list_file={glyph_files / 'val.txt'}",
    ]
    config = compose(["experiment=stvit/moving_glyphs_files", *TINY, *files, "train_cfg.max_epochs=1"])
    result = run(config)
    assert result["steps"] == 3
    assert result["metrics"]["top1"] * 3 == pytest.approx(round(result["metrics"]["top1"] * 3), abs=1e-4)
    trainer = build_trainer(config).eval()
    assert tuple(trainer.classes) == class_names(4)
    inference = trainer.infer(next(glyph_files.rglob("val/*/*.mp4")))
    assert inference.record["views"] == 3 and len(inference.record["top"]) == 5
    film = inference.pictures["tokens"]
    assert film.dtype == np.uint8 and film.ndim == 4 and len(film) == 4 and film.shape[-1] == 3
    assert json.loads(json.dumps(inference.record))["class"] == inference.record["top"][0]["class"]
    assert isinstance(trainer.network, STViTVideoSwin)
