"""One table model, five formats: figures, marks and empty cells survive in each."""

import csv
import io
import json

import pytest

from core.errors import ConfigError
from core.output.render import Cell, Column, Row, Table, emit, number, plot_differences, render, render_all


@pytest.fixture
def table():
    return Table(
        "Models",
        [
            Column("label", "model", align="left"),
            Column("params", unit="M", digits=2),
            Column("top1", "Top-1", "%", better="higher", digits=1, group="paper"),
            Column("ours", "Top-1", "%", better="higher", digits=1, group="ours"),
            Column("change", unit="%", digits=1, signed=True),
        ],
        [
            Row({"label": "small", "params": 22.0506, "top1": Cell(79.8, mark="from memory")}, section="224"),
            Row({"label": "a|b", "ours": Cell(80.12, 0.251, 3), "top1": Cell(">79", mark="cited: T2")}, section="224"),
            Row({"label": "big", "change": 1.25, "top1": Cell(81.0, mark="from memory")}, section="384"),
        ],
        notes=["a note"],
    )


def lines(text):
    return [line.split() for line in text.splitlines()]


def test_text_shows_figures_marks_and_gaps(table):
    text = render(table, "text")
    assert ["small", "22.05", "79.8ᵃ"] in lines(text)
    assert ["a|b", ">79ᵇ", "80.1", "±", "0.3", "(3)"] in lines(text)
    assert ["big", "81.0ᵃ", "+1.2"] in lines(text)
    assert text.splitlines()[-3:] == ["ᵃ from memory", "ᵇ cited: T2", "a note"]
    assert [line for line in text.splitlines() if line.strip() in ("224", "384")] == [" 224", " 384"]
    assert "Top-1 [%] ↑" in text


def test_text_never_cuts_without_a_terminal():
    wide = Table("wide", [Column("label")], [Row({"label": "x" * 500})])
    assert "x" * 500 in render(wide, "text")
    narrow = render(Table("t", [Column("label")], [Row({"label": "word " * 40})]), "text", width=60)
    assert narrow.split().count("word") == 40


def test_markdown_escapes_and_keeps_shape(table):
    rows = [line for line in render(table, "md").splitlines() if line.startswith("|")]
    assert rows[1] == "| :--- | ---: | ---: | ---: | ---: |"
    assert rows[0].split(" | ")[2] == "Top-1 [%] ↑, paper"
    assert any("a\\|b" in row for row in rows)
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


def test_csv_keeps_full_precision_and_leaves_gaps_empty(table):
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert rows[0] == {
        "section": "224",
        "label": "small",
        "params": "22.0506",
        "top1": "79.8",
        "top1_mark": "from memory",
        "ours": "",
        "ours_spread": "",
        "ours_n": "",
        "change": "",
    }
    assert (rows[1]["ours"], rows[1]["ours_spread"], rows[1]["ours_n"]) == ("80.12", "0.251", "3")


def test_json_is_valid_whatever_the_values(table):
    table.rows = [*table.rows, Row({"label": "nan", "params": float("nan"), "change": float("-inf")})]
    data = json.loads(render(table, "json"), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert data["rows"][0]["ours"] == {"value": None}
    assert data["rows"][1]["ours"] == {"value": 80.12, "spread": 0.251, "count": 3}
    assert data["rows"][2]["top1"] == {"value": 81.0, "mark": "from memory"}
    assert data["rows"][3]["params"]["value"] == "nan"
    assert [c["unit"] for c in data["columns"]] == ["", "M", "%", "%", "%"]
    assert len(json.loads(render_all([table, table], "json"))) == 2


def test_png_is_a_picture_that_grows_with_the_table(table, tmp_path):
    from matplotlib.image import imread

    emit(table, output=tmp_path / "new" / "one.png", quiet=True)
    emit([table, table], output=tmp_path / "two.png", quiet=True)
    one, two = imread(tmp_path / "new" / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[0] == pytest.approx(2 * one.shape[0], abs=2)
    assert two.shape[1] == one.shape[1]
    assert (one[..., :3].min(axis=-1) < 0.5).mean() > 0.005  # ink


def test_output_suffix_decides_the_format(table, tmp_path, capsys):
    emit(table, output=tmp_path / "t.md")
    emit(table, "csv", tmp_path / "t.txt")
    assert (tmp_path / "t.md").read_text() == render(table, "md")
    assert (tmp_path / "t.txt").read_text() == render(table, "csv")
    assert "wrote" in capsys.readouterr().err
    emit(table, "md")
    assert capsys.readouterr().out == render(table, "md")
    with pytest.raises(ConfigError, match="text, md, csv, json, png"):
        emit(table, "html")


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 2, ""),
        (True, None, "True"),
        (22050664, None, "22,050,664"),
        (1.23456, None, "1.235"),
        (0.00012345, None, "1.234e-04"),
        (1234567.8, None, "1.235e+06"),
        (0.0, None, "0"),
        (12.345, 1, "12.3"),
        ("> 1024", 1, "> 1024"),
        (float("inf"), 1, "inf"),
    ],
)
def test_numbers_as_people_read_them(value, digits, shown):
    assert number(value, digits) == shown


def test_difference_plot_draws_each_known_difference(tmp_path):
    from matplotlib.image import imread

    def draw(name, means):
        path = plot_differences(
            ["a", "b"],
            means,
            [0.1, None],
            tmp_path / name,
            title="t",
            unit="u",
            points=[[0.2], [-0.3]],
            better="higher",
        )
        image = imread(path)[..., :3]
        green = (image[..., 1] > image[..., 0] + 0.15).sum()
        red = (image[..., 0] > image[..., 1] + 0.15).sum()
        return green, red

    green, red = draw("both.png", [0.2, -0.3])
    assert green > 0
    assert red > 0
    green, red = draw("one.png", [0.2, None])
    assert green > 0
    assert red == 0
