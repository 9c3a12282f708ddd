"""tools/test.py and tools/infer.py on a run of a user's own package."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny_experiment import train

from core.checkpoint.run_folder import find_checkpoint
from core.config.command.signals import Interrupted
from core.data.sources.files import image_files
from core.engine.commands.inference import infer, input_files
from core.errors import ConfigError
from tools.infer import main as infer_tool

INFER = """
from core.trainer import Inference
from PIL import Image
import numpy as np
from mypoints import *


class Look(Classify):
    def infer(self, file):
        if file.stem == "fault":
            return self.no_such_thing
        if file.stem == "interrupt":
            raise KeyboardInterrupt
        if file.stem == "terminate":
            import os, signal
            os.kill(os.getpid(), signal.SIGTERM)
        if file.stem == "odd":
            return Inference({"path": file})
        if file.stem == "shape":
            return Inference({}, {"still": np.zeros((3, 3, 7), dtype=np.uint8)})
        if file.stem == "own":
            return Inference({"error": 0.25}, {})
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


@pytest.mark.child
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


@pytest.mark.child
def test_infer_writes_pictures_and_records_and_survives_a_broken_file(user, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    files = tmp_path / "in"
    (files / "deeper").mkdir(parents=True)
    Image.new("RGB", (20, 10), (10, 20, 30)).save(files / "a.png")
    Image.new("RGB", (8, 8), (90, 90, 90)).save(files / "deeper" / "b.jpg")
    (files / "broken.png").write_bytes(b"not a picture")
    (files / "notes.txt").write_text("not an input")
    for name in ("._a.png", ".DS_Store", "deeper/._b.jpg"):
        (files / name).write_bytes(b"of macOS")
    options = Options(checkpoint=str(trained), input=str(files), output=str(tmp_path / "out"))
    records = infer(["experiment=mine/tiny", "model.type=mylook.Look"], options)
    by_name = {r["file"].rsplit("/", 1)[-1]: r for r in records}
    assert set(by_name) == {"a.png", "b.jpg", "broken.png"}
    assert by_name["a.png"]["mean"] == 20 and "error" in by_name["broken.png"]
    assert Image.open(by_name["a.png"]["pictures"]["still"]).size == (20, 10)
    assert Image.open(by_name["a.png"]["pictures"]["moving"]).n_frames == 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == records


@pytest.mark.child
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


def test_inputs_are_listed_by_one_rule(tmp_path):
    for name in (
        "A.JPG",
        "b.tif",
        "c.webp",
        "d.gif",
        "deep/e.PNG",
        "._A.JPG",
        "__MACOSX/._b.tif",
        "__MACOSX/b.tif",
        "f.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "lost.png").symlink_to("gone.png")  # is listed: its record says what is wrong with it
    found = [path.relative_to(tmp_path).as_posix() for path in input_files(tmp_path)]
    assert found == ["A.JPG", "b.tif", "c.webp", "d.gif", "deep/e.PNG", "lost.png"]
    assert image_files(tmp_path, deep=True) == [name for name in found if name != "d.gif"]
    assert image_files(tmp_path) == ["A.JPG", "b.tif", "c.webp", "lost.png"]


def test_nothing_to_look_at_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="without images or videos"):
        input_files(tmp_path)


@pytest.mark.child
def test_a_trainer_without_inference_says_so(user, trained, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(user)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    options = Options(checkpoint=str(trained), input=str(tmp_path / "a.png"), output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="offers no inference"):
        infer(["experiment=mine/tiny"], options)
    with pytest.raises(ConfigError, match="give input=FILE_OR_FOLDER"):
        infer(["experiment=mine/tiny"], Options(checkpoint=str(trained), input=None, output=str(tmp_path / "out")))


@pytest.fixture
def look(user, trained, tmp_path, monkeypatch):
    """Calls tools/infer.py on pictures of these names; returns its records as they were written."""
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)

    def call(*names, words=(), checkpoint=trained):
        (tmp_path / "in").mkdir(exist_ok=True)
        for name in names:
            Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "in" / f"{name}.png")
        infer_tool([f"checkpoint={checkpoint}", "input=in", "output=out", "device=cpu", *words])
        return written()

    def written():
        return json.loads((tmp_path / "out" / "results.json").read_text())

    call.written = written
    return call


@pytest.mark.child
def test_whatever_fails_on_a_file_is_in_its_record_and_the_others_go_on(look, capsys):
    records = look("a", "fault", "odd", "shape", "z")
    found = {record["file"]: record.get("error") for record in records}
    assert list(found) == [f"in/{name}.png" for name in ("a", "fault", "odd", "shape", "z")]
    assert found["in/a.png"] is found["in/z.png"] is None
    assert found["in/fault.png"].startswith("AttributeError: 'Look' object has no attribute 'no_such_thing'")
    assert found["in/odd.png"].startswith("TypeError") and found["in/shape.png"].startswith(("TypeError", "ValueError"))
    shown = capsys.readouterr()
    assert [json.loads(line)["file"] for line in shown.out.splitlines()] == list(found)
    assert "3 of 5 files failed, see out/results.json" in shown.err
    assert "no_such_thing" in shown.err, "a fault of the code is shown with its place"


@pytest.mark.child
def test_a_record_with_an_error_of_its_own_is_no_failure(look, capsys):
    assert [record["error"] for record in look("own")] == [0.25]
    assert "failed" not in capsys.readouterr().err


@pytest.mark.child
def test_nothing_that_works_is_an_error_with_the_first_reason(look):
    with pytest.raises(
        ConfigError, match=r"none of 2 could be processed, see out/results\.json: AttributeError: 'Look'"
    ):
        look("fault", "odd")
    assert len(look.written()) == 2


@pytest.mark.child
@pytest.mark.parametrize("name", ["interrupt", "terminate"])
def test_an_interruption_leaves_the_records_until_then(look, name):
    with pytest.raises((KeyboardInterrupt, Interrupted)) as caught:
        look("a", "b", name, "z")
    assert [record["file"] for record in look.written()] == ["in/a.png", "in/b.png"]
    assert name == "interrupt" or str(caught.value) == "stopped: out/results.json holds what was done"


@pytest.mark.child
def test_weights_with_nan_answer_nothing(look, trained, tmp_path):
    from tools.test import main as evaluate_tool

    state = torch.load(find_checkpoint(trained), weights_only=True)["model"]
    state["network.head.bias"][1] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    words = ["experiment=mine/tiny", f"config_dir={trained.parent / 'configs'}", "model.type=mylook.Look"]
    with pytest.raises(ConfigError, match=r"NaN or infinity in 1 of 14 tensors \(network\.head\.bias\)"):
        look("a", checkpoint="nan.pt", words=words)
    with pytest.raises(ConfigError, match=r"NaN or infinity in 1 of 14 tensors \(network\.head\.bias\)"):
        evaluate_tool(["checkpoint=nan.pt", "runtime=cpu", *words])
    assert not (tmp_path / "out" / "results.json").exists()
    (record,) = look("a", checkpoint="nan.pt", words=[*words, "finite=false"])
    assert record["mean"] == 9


@pytest.mark.child
def test_options_of_loading_are_those_of_load_from(look, trained, tmp_path):
    state = torch.load(find_checkpoint(trained), weights_only=True)["model"]
    stem = {f"their.{k.removeprefix('network.')}": v for k, v in state.items() if k.startswith("network.stem")}
    torch.save({"deep": {"ema": {**stem, "their.other": torch.ones(1)}}}, tmp_path / "part.pt")
    words = ["experiment=mine/tiny", f"config_dir={trained.parent / 'configs'}", "model.type=mylook.Look"]
    options = ["key=deep.ema", "prefix=their.stem.", "into=network.stem"]
    assert look("a", checkpoint="part.pt", words=[*words, *options])
    with pytest.raises(ConfigError, match=r"no submodule 'network\.stme': did you mean 'network\.stem'"):
        look("a", checkpoint="part.pt", words=[*words, *options[:2], "into=network.stme"])
    assert look("a", checkpoint="part.pt", words=[*words, "key=deep.ema", "prefix=their.", "strict=false"])
    ignored = ["key=deep.ema", "prefix=their.", "into=network", "ignore=blocks.*,norm.*,head.*,other"]
    assert look("a", checkpoint="part.pt", words=[*words, *ignored])


@pytest.mark.processes
def test_several_processes_print_the_figures_once(user, trained):
    words = ["checkpoint=for_tools", "output=twice.json"]
    done = train(user, "--config_dir=configs", *words, tool="test.py", torchrun=2)
    assert json.loads(done.stdout) == json.loads((user / "twice.json").read_text())
    assert json.loads(done.stdout)["seen"] == 21
