"""Every paper's demo runs, at reduced length, and says what it shows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.data.prepare import run_task
from core.errors import ConfigError
from core.tables import demo as demo_module
from core.tables.demo import Options, load_demo, main, shortened, show
from seqgan.standin import judges

ROOT = Path(__file__).resolve().parents[1]
DEMOS = sorted(ROOT.glob("*/tables/demo.yaml"))
PAPERS = sorted(path.parents[1].name for path in ROOT.glob("*/tables/*.yaml") if path.parents[1].name != "core")


def test_every_paper_has_one():
    assert {path.parents[1].name for path in DEMOS} == set(PAPERS)


@pytest.mark.long
@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.parents[1].name)
def test_a_demo_trains_its_rows_and_shows_images(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if path.parents[1].name == "tune_a_video":
        steps = ["unet_steps=1", "clip_steps=1", "judge_steps=1", "check_steps=0"]
        run_task("tune_a_video", "tiny_sd", ["output=data/tiny_sd", *steps])
    if path.parents[1].name == "seqgan":
        recipes = {kind: (model, 12, stream) for kind, (model, _, stream) in judges._RECIPES.items()}
        monkeypatch.setattr(judges, "_RECIPES", recipes)  # networks that judge: a few steps
    demo = load_demo(path)
    show(demo, Options(output="out", threads=1, quick=True))
    said = capsys.readouterr().out
    assert demo.says in said and all(row.label in said for row in demo.table.rows)
    assert all(line in said for line in demo.next) and len(demo.next) >= 2
    assert "Source: measured here" in said and "Paper:" not in said and "no image" not in said
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(figures["rows"]) == len(demo.table.rows)
    for image in demo.images:
        written = sorted((tmp_path / "out").glob(f"{Path(image.output).stem}*.png"))
        assert len(written) == (1 if image.row else len(demo.table.rows))
    runs = sorted((tmp_path / "out").rglob("result.json"))
    show(demo, Options(output="out", threads=1, quick=True))  # what has ended is shown, not trained again
    assert sorted((tmp_path / "out").rglob("result.json")) == runs


def test_reduced_length_changes_only_what_trains():
    demo = load_demo(ROOT / "slot_walks" / "tables" / "demo.yaml")
    before, after = demo.table.rows, shortened(demo).rows
    assert [len(b.overrides) < len(a.overrides) for b, a in zip(before, after, strict=True)] == [True, True, False]


def test_a_run_without_images_is_named(tmp_path):
    demo = load_demo(ROOT / "stvit" / "tables" / "demo.yaml")
    evaluation = SimpleNamespace(spec=demo.table, run_of=lambda row, seed: tmp_path / "run")
    lines = list(demo_module._copied(demo, evaluation, 0, tmp_path))
    assert len(lines) == len(demo.images) and all("no image media/" in line for line in lines)
    assert f"{demo.images[0].row}: " in lines[0] and str(tmp_path / "run") in lines[0]


def test_a_missing_preparation_is_announced_with_its_time_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    called = []
    monkeypatch.setattr("core.data.prepare.run_task", lambda *words: called.append(words) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        show(load_demo(ROOT / "tune_a_video" / "tables" / "demo.yaml"), Options())
    assert called == [("tune_a_video", "tiny_sd", ["output=data/tiny_sd"])]
    assert "12 minutes" in capsys.readouterr().out


def test_unknown_papers_and_wrong_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="paper=stvitt: it has no demo: did you mean 'stvit'"):
        main(["paper=stvitt"], "")
    text = (ROOT / "stvit" / "tables" / "demo.yaml").read_text()
    wrong = tmp_path / "stvit" / "tables" / "demo.yaml"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(text.replace("{row: STViT,", "{row: STVit,"))
    with pytest.raises(ConfigError, match=r"demo\.images\[0\]\.row: no row 'STVit': did you mean 'STViT'"):
        load_demo(wrong)
    wrong.write_text(text.replace("  says:", "  say:"))
    with pytest.raises(ConfigError, match="unknown key 'say': did you mean 'says'"):
        load_demo(wrong)
