"""tools/test.py and tools/infer.py on a run of a user's own package."""

import json

import pytest
from PIL import Image
from tiny_experiment import train

from core.errors import ConfigError
from core.inference import infer, input_files

INFER = """
from core.trainer import Inference
from PIL import Image
import numpy as np
from mypoints import *


class Look(Classify):
    def infer(self, file):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        logits = self.network(torch.zeros(1, 8))
        return Inference(
            {"mean": float(pixels.mean()), "class": int(logits.argmax())},
            {"still": pixels, "moving": np.stack([pixels, 255 - pixels])},
        )
"""


@pytest.fixture(scope="module")
def trained(user):
    """One epoch of the tiny experiment."""
    (user / "mylook.py").write_text(INFER)
    train(user, "run_dir=for_tools", "train_cfg.max_epochs=1", "model.type=mylook.Look")
    return user / "for_tools"


def test_test_gives_the_figures_of_the_run(user, trained):
    words = ["checkpoint=for_tools", "model.type=mylook.Look", "split=val", "output=figures.json"]
    train(user, "--config_dir=configs", *words, tool="test.py")
    figures = json.loads((user / "figures.json").read_text())
    assert figures == json.loads((trained / "result.json").read_text())["val_metrics"]


class Options:
    """As the command line gives them."""

    def __init__(self, **given):
        self.device, self.config_dir = "cpu", "configs"
        self.__dict__.update(given)


def test_infer_writes_pictures_and_records_and_survives_a_broken_file(user, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    files = tmp_path / "in"
    (files / "deeper").mkdir(parents=True)
    Image.new("RGB", (20, 10), (10, 20, 30)).save(files / "a.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(files / "deeper" / "b.jpg")
    (files / "broken.png").write_bytes(b"not a picture")
    (files / "notes.txt").write_text("not an input")
    options = Options(checkpoint=str(trained), input=str(files), output=str(tmp_path / "out"))
    records = infer(["experiment=mine/tiny", "model.type=mylook.Look"], options)
    by_name = {r["file"].rsplit("/", 1)[-1]: r for r in records}
    assert set(by_name) == {"a.png", "b.jpg", "broken.png"}
    assert by_name["a.png"]["mean"] == 20 and "error" in by_name["broken.png"]
    assert Image.open(by_name["a.png"]["pictures"]["still"]).size == (20, 10)
    assert Image.open(by_name["a.png"]["pictures"]["moving"]).n_frames == 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == records


def test_files_of_one_name_do_not_overwrite_each_others_pictures(user, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    files = tmp_path / "in"
    for index, name in enumerate(("a.png", "a.bmp", "x/a.png", "y/a.png", "b.png")):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + index, 8), (10, 20, 30)).save(files / name)
    options = Options(checkpoint=str(trained), input=str(files), output=str(tmp_path / "out"))
    records = infer(["experiment=mine/tiny", "model.type=mylook.Look"], options)
    sizes = {Image.open(record["pictures"]["still"]).size[0] for record in records}
    assert len(records) == 5 and sizes == {8, 9, 10, 11, 12}
    named = {record["file"].rsplit("/in/", 1)[-1]: record["pictures"]["still"].rsplit("/", 1)[-1] for record in records}
    assert named["b.png"] == "b_still.png" and named["x/a.png"] == "x_a_png_still.png"


def test_nothing_to_look_at_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="without images or videos"):
        input_files(tmp_path)


def test_a_trainer_without_inference_says_so(user, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    options = Options(checkpoint=str(trained), input=str(tmp_path / "a.png"), output=str(tmp_path / "out"))
    words = ["experiment=mine/tiny", "model.type=mypoints.Classify"]
    with pytest.raises(ConfigError, match="offers no inference"):
        infer(words, options)
    with pytest.raises(ConfigError, match="give input=FILE_OR_FOLDER"):
        infer(words, Options(checkpoint=str(trained), input=None, output=str(tmp_path / "out")))
