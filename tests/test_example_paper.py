"""A paper outside this repository: CONTRIBUTING.md quotes its files, and its commands run here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "tests" / "example_paper"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------- what is quoted
def quotes():
    """(file, pieces) of every block that opens with a file of the example; dots stand for what is left out."""
    for _, text in BLOCKS:
        first, _, rest = text.partition("\n")
        if found := re.fullmatch(r"# ((?:retouch|configs)/\S+)", first):
            pieces = re.split(r"^ *\.\.\.\n", rest, flags=re.MULTILINE)
            yield found[1], [piece.strip("\n") for piece in pieces if piece.strip()]


@pytest.mark.parametrize(("file", "pieces"), list(quotes()), ids=[file for file, _ in quotes()])
def test_what_is_quoted_stands_in_the_file(file, pieces):
    text, place = (EXAMPLE / file).read_text(), 0
    for piece in pieces:
        assert piece in text[place:], f"{file} has no such lines (behind those before):\n{piece}"
        place = text.index(piece, place) + len(piece)


def test_every_kind_of_file_is_quoted():
    assert {Path(file).name for file, _ in quotes()} >= {
        "models.py",
        "trainer.py",
        "data.py",
        "prepare.py",
        "checkpoint.py",
        "discs.yaml",
        "discs_stages.yaml",
        "claim.yaml",
    }


# ---------------------------------------------------------------------- what is run
def lines():
    """The commands of the walk, in order; a line that ends with a backslash goes on."""
    for kind, text in BLOCKS:
        if kind == "sh":
            yield from (line for line in text.replace("\\\n", " ").splitlines() if line.startswith("python $VITRINE"))


def call(line):
    """One command, in this process."""
    program, path, *words = shlex.split(line, comments=True)
    name = Path(path).stem
    assert program == "python" and path == f"$VITRINE/tools/{name}.py", line
    if name == "profile":  # the file stands in for the standard library's module unless it is the program
        from core.profile.experiment import main

        return main(words, "")
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main(words, tool.__doc__) if tool.main.__module__.startswith("core.") else tool.main(words)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which every command of the walk has run."""
    folder = tmp_path_factory.mktemp("walk") / "mine"
    shutil.copytree(EXAMPLE, folder)
    before, path, argv, environment = Path.cwd(), list(sys.path), list(sys.argv), dict(os.environ)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        for line in lines():
            call(line)
        yield folder
    finally:
        os.chdir(before)
        sys.path[:], sys.argv[:] = path, argv
        os.environ.clear()
        os.environ.update(environment)
        for name in [name for name in sys.modules if name.split(".")[0] == "retouch"]:
            del sys.modules[name]


def results(folder, name):
    paths = sorted((folder / "runs" / "retouch" / name).glob("2*/result.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_the_walk_uses_every_tool():
    used = {Path(shlex.split(line)[1]).stem for line in lines()}
    assert used == {path.stem for path in (ROOT / "tools").glob("*.py")} - {"demo", "__init__"}


@pytest.mark.long
def test_it_trains_tests_and_leaves_images(walked):
    first = results(walked, "discs")[0]
    assert first["status"] == "finished" and first["metrics"]["psnr"] > 22  # the damaged images have 18
    folder = walked / first["run_dir"]
    assert len(list((folder / "media").glob("images_*.png"))) == 4
    losses = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"loss_l1", "loss_adversarial", "loss_critic", "lr_restorer", "lr_critic"} <= losses[-2].keys()


@pytest.mark.long
def test_it_infers_on_files(walked):
    records = json.loads((walked / "images" / "results.json").read_text())
    assert len(records) == 16 and all(0 < record["difference"] < 0.1 for record in records)
    assert all((walked / path).is_file() for record in records for path in record["pictures"].values())


@pytest.mark.long
def test_it_suggests_a_rate(walked):
    found = json.loads((walked / "rates" / "lr.json").read_text())
    assert found["part"] == "restorer" and 1e-5 < found["suggestion"] < 1.0


@pytest.mark.long
def test_a_run_again_differs_in_what_was_asked(walked):
    first, *_, again = sorted(results(walked, "discs")[:2], key=lambda result: result["seed"])
    assert (first["seed"], again["seed"]) == (0, 1) and first["metrics"] != again["metrics"]


@pytest.mark.long
def test_weights_go_there_and_back(walked):
    from core.checkpoint import load
    from core.checkpoint.run_folder import find_checkpoint

    theirs, ours = load(walked / "theirs.pt"), load(walked / "ours.pt")
    run = load(find_checkpoint(walked / "runs" / "retouch" / "discs" / "latest"))["model"]
    assert set(theirs) == {
        f"netG.{part}.{kind}" for part in ("conv1", "conv2", "conv3", "out") for kind in ("weight", "bias")
    }
    assert ours and all((value == run[f"restorer.{name}"]).all() for name, value in ours.items())


@pytest.mark.long
def test_stages_start_from_one_another(walked):
    staged = results(walked, "discs_stages")[0]
    assert set(staged["stages"]) == {"alone", "adversarial"} and staged["metrics"]["psnr"] > 22


@pytest.mark.long
def test_components_table_and_claim(walked):
    ablation = json.loads((walked / "runs" / "ablations" / "retouch" / "discs" / "table.json").read_text())
    assert "paste" in json.dumps(ablation) and "critic" in json.dumps(ablation)
    claim = (walked / "claim.md").read_text()
    assert "The claim holds" in claim and "whole image" in claim


def test_every_key_of_paramwise_is_explained():
    import yaml

    from core.optim.groups import _PARAMWISE

    (block,) = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml" and text.startswith("paramwise:")]
    assert set(block["paramwise"]) == set(_PARAMWISE)
