"""Everything the tools print fits the terminal: no line is longer, no word is cut, nothing is left out."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from tiny_experiment import ROOT, environment

import core.tables.table
from core.config import experiments
from core.config.command.cli import parse
from core.config.command.console import WIDTH, listing, prose, wrapped
from core.data.prepare import main as prepare
from core.output.render import Cell, Column, Row, Table, emit, render, render_all
from core.tables.ablation import Options as AblateOptions
from core.tables.table import Options as TableOptions

WIDTHS = (60, 80, 100, 200)
CLAIM = (
    "Few tokens carry what all carry: " + "generated from all of them by attention they are as good as the full model "
)


def figures(columns=12):
    """A table of many figures."""
    heads = [Column("label", " ", align="left")]
    heads += [Column(f"c{i}", "throughput", "%", better="higher", group=f"side{i % 2}") for i in range(columns)]
    cells = {f"c{i}": Cell(10.25 + i, 0.125, 3) for i in range(columns)}
    rows = [Row({"label": f"STViT-DeiT-{n}", **cells}, section=s) for s in ("224", "384") for n in "TSB"]
    return Table("STViT-DeiT on ImageNet-1K " * 5, heads, rows, ["a note of some length " * 8])


def claims():
    """Long statements as sections, long names of rows."""
    heads = [Column("comparison", align="left"), Column("difference", signed=True), Column("verdict", align="left")]
    heads += [Column("interval", "95 % interval (t)", align="center"), Column("state", align="left")]
    rows = [
        Row(
            {
                "comparison": f"alpha {n} better than alpha 0, also in the second phase and without the entropy term",
                "difference": Cell(0.0074061, 0.00067891, 3),
                "verdict": "does not hold",
                "interval": "0.004485 to 0.01033",
                "state": "stale: the config of row 'alpha 1' has changed since",
            },
            section=f"{CLAIM * 2}{section}",
        )
        for section in "ab"
        for n in range(3)
    ]
    return Table("claims of all papers", heads, rows)


def names():
    """Names that leave figures no room at 60 columns."""
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    rows = [Row({"name": f"{name}{n}", "ms": 1.5 + n, "calls": n}) for n in range(3)]
    return Table("operators", [Column("name", align="left"), Column("ms", "time", "ms"), Column("calls")], rows)


def words(text):
    return re.findall(r"[^\s─]+", text)


def assert_fits(text, width):
    """No line is longer than the width, except one that is a single word."""
    long = [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]
    assert not long, long[0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [figures, claims, names])
def test_a_table_fits_and_every_word_is_whole(make, width):
    table = make()
    text = render(table, "text", width=width)
    assert_fits(text, width)
    shown = words(text)
    for row in table.rows:
        for column in table.columns:
            for word in words(table.shown(row, column)):
                assert word in shown
    for word in words(table.title + " ".join(table.notes)):
        assert word in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_not_broken_and_each_stands_behind_its_name(width):
    text = render(figures(), "text", width=width)
    for i in range(12):
        figure = f"{10.25 + i:.2f} ± 0.1250 (3)"
        lines = [line for line in text.splitlines() if figure in line]
        assert [line.split()[0] for line in lines] == [f"STViT-DeiT-{n}" for n in "TSBTSB"]


def test_long_statements_stand_above_a_grid_of_their_own():
    lines = render(claims(), "text", width=80).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("Few tokens")]
    assert len(starts) == 2
    for start in starts:  # over the whole width, then its own header
        assert len(lines[start]) > 70
        header = next(line for line in lines[start:] if "difference" in line)
        assert lines.index(header, start) - start < 8
    short = figures(3)
    assert render(short, "text", width=200).splitlines().count(" 224") == 1


def test_long_names_stand_above_their_figures():
    lines = render(names(), "text", width=60).splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("backward1"))
    assert lines[at + 1].split() == ["2.500", "1"]
    assert all(
        line.startswith(" aten::") == ("backward" in line) for line in lines if line.strip() and "──" not in line
    )
    wide = render(names(), "text", width=100).splitlines()
    assert any(line.split()[1:] == ["2.500", "1"] for line in wide)


@pytest.mark.parametrize("format", ["md", "csv", "json"])
def test_files_for_machines_know_no_width(format):
    table = claims()
    text = render(table, format, width=60)
    assert text == render(table, format, width=200)
    if format == "json":
        assert json.loads(text)["rows"][0]["comparison"]["value"].startswith("alpha 0 better")
    if format == "md":
        assert sum(line.startswith("| alpha") for line in text.splitlines()) == 6


@pytest.mark.parametrize("what", ["list", "claims", "stvit/imagenet_deit", "stvit/claim"])
def test_what_the_table_tool_prints_fits_every_terminal(what, monkeypatch):
    printed = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(core.tables.table, "emit", lambda tables, *_: printed.append(tables))
    core.tables.table.main([what], "doc")
    [found] = printed
    for width in WIDTHS:
        text = render_all(found if isinstance(found, list) else [found], "text", width=width)
        assert_fits(text, width)
        assert len(text.splitlines()) > 10


@pytest.mark.parametrize(("columns", "width"), [(None, WIDTH), ("70", 70)])
def test_a_line_is_as_long_as_the_terminal_or_has_a_hundred_columns(columns, width, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)  # a pipe has no columns of its own
    emit(claims())
    lines = capsys.readouterr().out.splitlines()
    assert width - 10 < max(map(len, lines)) <= width


def test_a_file_does_not_take_the_terminals_width(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    emit(claims(), output=tmp_path / "claims.txt", quiet=True)
    assert (tmp_path / "claims.txt").read_text() == render(claims(), "text", width=WIDTH)


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_and_help_fit_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    prepare(["list"], "doc")
    text = capsys.readouterr().out
    assert_fits(text, width)
    headings = re.findall(r"^paper=\w+", text, flags=re.MULTILINE)
    assert len(headings) == len(set(headings)) > 2
    assert_fits(listing(experiments()), width)
    for options, tool in ((AblateOptions, "ablate"), (TableOptions, "table")):
        doc = teaching_text(tool)
        with pytest.raises(SystemExit):
            parse(["--help"], options, doc=doc)
        assert_fits(capsys.readouterr().out, width)


def teaching_text(tool):
    """A tool's docstring; importing the tool would run it."""
    return ast.get_docstring(ast.parse((ROOT / "tools" / f"{tool}.py").read_text()), clean=True)


@pytest.mark.child
@pytest.mark.parametrize("width", [60, 100])
def test_the_help_of_the_training_tool_fits_the_terminal(width):
    words = [sys.executable, "tools/train.py", "--help"]
    environ = {**environment(), "COLUMNS": str(width)}
    done = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=True)
    assert_fits(done.stdout, width)
    assert "experiment/stvit: " in done.stdout and "--hydra-help" in done.stdout


@pytest.mark.child
@pytest.mark.parametrize("words", [["train.py", "--list"], ["prepare_data.py", "list"]])
def test_a_reader_that_has_seen_enough_ends_a_tool_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, f"tools/{words[0]}", words[1]]
    done = subprocess.run(words, cwd=ROOT, env=environment(), stdout=writing, stderr=subprocess.PIPE, timeout=600)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_experiment_is_listed_once_with_its_whole_purpose():
    for width in WIDTHS:
        text = listing(experiments(), width)
        for name, purpose in experiments().items():
            assert [line.split()[0] for line in text.splitlines() if line[0] != " "].count(name) == 1
            assert purpose in " ".join(text.split())


def test_folded_commands_can_still_be_pasted():
    text = prose(
        "First\nline.\n\n  python tools/x.py experiment=stvit/digits seeds=3 components=a,b   what it does\n", 50
    )
    assert text.splitlines()[0] == "First line."
    command = text.partition("  python")[2].partition("\n        what")[0].replace(" \\\n", " ")
    assert command.split() == ["tools/x.py", "experiment=stvit/digits", "seeds=3", "components=a,b"]
    assert "\n        what it does" in text


def test_a_word_longer_than_the_line_stays_whole():
    assert wrapped("a " + "x" * 50 + " b", 20).splitlines() == ["a", "x" * 50, "b"]
