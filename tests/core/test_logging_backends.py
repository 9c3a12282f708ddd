"""Where figures and pictures end up: JSON lines, TensorBoard events, a wandb run (offline)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from core.output.backends import JsonLines, TensorBoard, plain_config
from core.output.media import as_pixels, write_media


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_step_epoch_time_and_figures(tmp_path):
    log = JsonLines(str(tmp_path / "vis_data"))
    before = time.time()
    log.add_scalars({"epoch": 2, "loss": torch.tensor(0.5), "lr": 0.1, "bad": float("nan"), "list": [1, 2]}, step=7)
    log.add_scalar("top1", np.float32(0.25), step=8)
    lines = _lines(tmp_path / "log.jsonl")  # readable while the run goes on
    assert lines[0] == {
        "step": 7,
        "epoch": 2,
        "time": lines[0]["time"],
        "loss": 0.5,
        "lr": 0.1,
        "bad": None,
        "list": [1, 2],
    }
    assert list(lines[0])[:3] == ["step", "epoch", "time"] and before - 1 <= lines[0]["time"] <= time.time() + 1
    assert lines[1]["top1"] == 0.25
    assert log.lines == 2
    log.close()
    log.add_scalars({"loss": 1.0}, step=9)
    assert JsonLines(str(tmp_path)).lines == 3


def test_truncation_drops_later_lines_and_half_a_line(tmp_path):
    log = JsonLines(str(tmp_path))
    for step in range(1, 6):
        log.add_scalars({"loss": step}, step=step)
    log.add_scalars({"val": 1}, step=4)
    with open(log.path, "a") as file:
        file.write('{"step": 6, "lo')
    log.truncate(4)
    log.add_scalars({"loss": 50}, step=5)
    assert [(x["step"], x.get("loss")) for x in _lines(log.path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (4, None),
        (5, 50),
    ]


def test_truncation_to_a_known_number_of_lines(tmp_path):
    log = JsonLines(str(tmp_path))
    for step in (1, 2, 2):
        log.add_scalars({"loss": step}, step=step)
    log.truncate(2, lines=2)
    assert [x["step"] for x in _lines(log.path)] == [1, 2]
    log.truncate(0)
    assert log.path.read_text() == ""
    JsonLines(str(tmp_path / "new")).truncate(3)
    assert not (tmp_path / "new").exists()


def test_a_half_line_of_a_killed_process_does_not_spoil_the_next(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    log = JsonLines(str(tmp_path))
    log.add_scalars({"loss": 3}, step=2)
    assert [x["loss"] for x in _lines(log.path)] == [2, 3]


def _events(folder: Path) -> tuple[dict, dict, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0] for tag in events.Tags()["tensors"]}
    return scalars, images, texts


@pytest.fixture
def counted_anew(monkeypatch):
    """TensorBoard reads event files of one second by name, where its tenth comes before its ninth: it counts anew."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_tensorboard_holds_scalars_images_videos_and_config(tmp_path):
    board = TensorBoard(str(tmp_path / "vis_data"))
    board.add_config(Config({"compile": False, "experiment": {"name": "a/b", "model": {"depth": 3}}}))
    board.add_scalars({"loss": 0.5, "note": "text", "epoch": 1}, step=3)
    picture = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    board.add_image("picture", picture, step=3)
    movie = write_media(np.stack([picture, 255 - picture]), tmp_path / "movie")
    board.add_video("movie", movie, step=3)
    scalars, images, texts = _events(tmp_path)  # nothing has been closed: every call reaches the disk
    assert scalars == {"loss": [(3, 0.5)], "epoch": [(3, 1.0)]}
    assert (images["picture"][0].width, images["picture"][0].height) == (6, 5)
    assert images["movie"][0].encoded_image_string == movie.read_bytes()
    assert b"depth: 3" in next(iter(texts.values())) and b"name: a/b" in next(iter(texts.values()))
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_has_one_file_for_every_start_of_a_run(tmp_path, counted_anew):
    for start in (1, 2):
        board = TensorBoard(str(tmp_path))
        board.add_config({"name": "a/b"})  # the Runner does so when it is built
        board.truncate(10 * (start - 1))  # the logging hook does so when training begins
        board.add_scalars({"loss": 0.5}, step=10 * start)
        board.close()
        assert len(list(tmp_path.glob("events.out.tfevents.*"))) == start
    scalars, _, texts = _events(tmp_path)
    assert scalars["loss"] == [(10, 0.5), (20, 0.5)] and b"name: a/b" in next(iter(texts.values()))


def test_a_resumed_tensorboard_run_shows_every_step_once(tmp_path, counted_anew):
    board = TensorBoard(str(tmp_path))
    board.truncate(0)
    for step in range(1, 7):
        board.add_scalars({"loss": step}, step=step)
    board.close()
    again = TensorBoard(str(tmp_path))
    again.truncate(4)
    for step in (5, 6):
        again.add_scalars({"loss": 10 * step}, step=step)
    again.close()
    assert _events(tmp_path)[0]["loss"] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]


def test_plain_config_unwraps_the_experiment():
    assert plain_config(Config({"experiment": {"a": [1]}})) == {"a": [1]}
    assert plain_config({"a": 1}) == {"a": 1}


WANDB = textwrap.dedent(
    """
    import sys, numpy as np
    from mmengine.visualization import Visualizer
    from mmengine.config import Config
    from core.output.media import write_media
    from core.output.backends import each_backend
    folder = sys.argv[1]
    backend = {"type": "vitrine.Wandb", "init_kwargs": {"project": "vitrine", "name": "tests/wandb"}}
    import core.config.registry
    from mmengine.registry import VISBACKENDS
    for part in range(2):
        from core.output.backends import Wandb
        visualizer = Visualizer(vis_backends=[Wandb(folder + "/vis_data", backend["init_kwargs"])], name=f"v{part}")
        visualizer.add_config(Config({"experiment": {"name": "a/b", "model": {"type": "x.Y", "depths": [2, 3]}}}))
        for step in range(3 * part + 1, 3 * part + 4):
            visualizer.add_scalars({"epoch": 1, "loss": 1.0 / step}, step=step)
        picture = np.full((4, 5, 3), 40 * part, np.uint8)
        visualizer.add_image("tokens", picture, step=3 * part + 2)
        for kind in ("gif", "mp4"):
            path = write_media(np.stack([picture] * 3), folder + f"/media/walk_{part}", video=kind)
            each_backend(visualizer, "add_video", "walk_" + kind, path, 3 * part + 3)
        visualizer.add_scalars({"val/top1": 0.5 + part / 4}, step=3 * part + 2)
        visualizer.close()
    """
)


def _wandb_records(path: Path) -> list:
    """The run file's records: LevelDB's log format (blocks of 32 KiB, records cut into first, middle, last pieces)."""
    from wandb.proto import wandb_internal_pb2

    data, records, piece = path.read_bytes(), [], b""
    assert data[:4] == b":W&B"
    position = 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too short for a header: padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


@pytest.mark.child
def test_an_offline_wandb_run_holds_metrics_config_and_media(tmp_path):
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    environment |= {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert all(f.name == f"run-{identity}.wandb" for f in files)  # the second part continues the run of the first
    history, config, media = [], {}, set()
    for file in files:
        for record in _wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.append(row)
            elif kind == "config":
                config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
            elif kind == "run":
                config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
                assert record.run.project == "vitrine" and record.run.display_name == "tests/wandb"
        media |= {p.suffix for p in (file.parent / "files" / "media").rglob("*") if p.is_file()}
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert losses == pytest.approx({step: 1.0 / step for step in range(1, 7)})
    assert [(row["step"], row["val/top1"]) for row in history if "val/top1" in row] == [(2, 0.5), (5, 0.75)]
    assert [row["step"] for row in history if row.get("tokens/_type") == "image-file"] == [2, 5]
    assert [row["step"] for row in history if row.get("walk_gif/_type") == "video-file"] == [3, 6]
    assert config["name"] == "a/b" and config["model"] == {"type": "x.Y", "depths": [2, 3]}
    assert media == {".png", ".gif", ".mp4"}


# --- media files ---------------------------------------------------------------------------------------------------


def test_pictures_and_videos_come_back_as_they_were(tmp_path):
    import cv2
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(write_media(torch.from_numpy(picture), tmp_path / "a/b"))), picture)
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    frames = np.stack([np.full((33, 21, 3), c, np.uint8) for c in colours])
    gif = Image.open(write_media(frames, tmp_path / "c", fps=4))
    assert gif.n_frames == 3 and gif.size == (21, 33) and gif.info["duration"] == 250 and gif.info["loop"] == 0
    for index, colour in enumerate(colours):
        gif.seek(index)
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - colour).max() < 8
    reader = cv2.VideoCapture(str(write_media(frames, tmp_path / "c", fps=4, video="mp4")))
    assert reader.get(cv2.CAP_PROP_FPS) == 4
    decoded = []
    while (read := reader.read())[0]:
        decoded.append(read[1][16, 10, ::-1].astype(int))
    assert len(decoded) == 3
    assert all(np.abs(got - colour).max() < 40 for got, colour in zip(decoded, colours, strict=True))
    (tmp_path / "own.webm").write_bytes(b"video")
    assert write_media(tmp_path / "own.webm", tmp_path / "d").read_bytes() == b"video"


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8, 8), "uint8"), ((8, 8, 3), "float64"), ((0, 8, 8, 3), "uint8")])
def test_what_is_no_picture_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"media 'x' is .* uint8 \(H, W, 3\)"):
        as_pixels(np.zeros(shape, dtype), "x")
