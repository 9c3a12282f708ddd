"""log.csv: one row per line of the log, columns that come later, resumed runs without double rows."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from core.output.backends import CSV, JsonLines


def table(folder):
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_hold_step_epoch_time_and_figures(tmp_path):
    log = CSV(str(tmp_path / "vis_data"))
    log.add_scalars({"epoch": 2, "loss": torch.tensor(0.5), "lr": 1e-5, "bad": float("nan")}, step=7)
    text = (tmp_path / "log.csv").read_text()  # readable while the run goes on
    assert text.splitlines()[0] == "step,epoch,time,loss,lr,bad"
    [row] = table(tmp_path)
    assert (row["step"], row["epoch"], row["loss"], float(row["lr"])) == ("7", "2", "0.5", 1e-5)
    assert math.isnan(float(row["bad"]))
    log.add_scalars({"loss": 0.25, "note": 'a "word", and\nanother'}, step=8)
    assert table(tmp_path)[1]["note"] == 'a "word", and another'
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3 == log.lines + 1


def test_columns_that_come_later_leave_earlier_rows_empty(tmp_path):
    log = CSV(str(tmp_path))
    log.add_scalars({"loss": 1.0}, step=1)
    log.add_scalars({"val/top1": 0.5, "a,b": 3}, step=1)
    log.add_scalars({"loss": 0.5}, step=2)
    rows = table(tmp_path)
    assert list(rows[0]) == ["step", "epoch", "time", "loss", "val/top1", "a,b"]
    assert [(r["step"], r["loss"], r["val/top1"], r["a,b"]) for r in rows] == [
        ("1", "1.0", "", ""),
        ("1", "", "0.5", "3"),
        ("2", "0.5", "", ""),
    ]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_resumed_run_goes_on_with_the_same_columns(tmp_path):
    log = CSV(str(tmp_path))
    for step in range(1, 6):
        log.add_scalars({"loss": float(step)}, step=step)
    log.add_scalars({"val/top1": 0.5}, step=5)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("6,1,17")  # a process was killed here
    again = CSV(str(tmp_path))
    assert again.lines == 6
    again.truncate(3)
    again.add_scalars({"loss": 40.0, "lr": 0.1}, step=4)
    rows = table(tmp_path)
    assert [(r["step"], r["loss"], r["val/top1"], r["lr"]) for r in rows] == [
        ("1", "1.0", "", ""),
        ("2", "2.0", "", ""),
        ("3", "3.0", "", ""),
        ("4", "40.0", "", "0.1"),
    ]


@pytest.mark.parametrize("half", ["", "step,epo", "step,epoch,time,loss\n"])
def test_a_file_without_rows_is_begun_anew(tmp_path, half):
    (tmp_path / "log.csv").write_text(half)
    CSV(str(tmp_path)).add_scalars({"loss": 1.0}, step=1)
    assert [(r["step"], r["loss"]) for r in table(tmp_path)] == [("1", "1.0")]


def test_rows_and_json_lines_are_cut_alike(tmp_path):
    logs = [CSV(str(tmp_path)), JsonLines(str(tmp_path))]
    for step in (1, 2, 2, 3):
        for log in logs:
            log.add_scalars({"loss": step}, step=step)
    for log in logs:
        log.truncate(2, lines=2)
    assert [r["step"] for r in table(tmp_path)] == ["1", "2"]
    assert [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    CSV(str(tmp_path / "new")).truncate(3)
    assert not (tmp_path / "new").exists()


def test_a_run_with_logger_csv_has_the_figures_of_its_log(tiny, tmp_path):
    tiny("logger=csv", "run_dir=watched", "train_cfg.max_epochs=1")
    lines = [json.loads(x) for x in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    rows = table(tmp_path / "watched")
    assert len(rows) == len(lines) > 4
    assert {name for line in lines for name in line} == set(rows[0])
    for line, row in zip(lines, rows, strict=True):
        known = {name: float(value) for name, value in row.items() if value and name != "time"}
        assert known == {name: value for name, value in line.items() if name != "time"}


def test_a_resumed_run_has_every_row_once(tiny, tmp_path):
    words = ("logger=csv", "train_cfg.max_epochs=2", "checkpoint.every_steps=4", "checkpoint.keep_last=10")
    tiny("run_dir=whole", *words)
    tiny("run_dir=again", *words)
    folder = tmp_path / "again"
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").glob("*.pt"):
        if "00000008" not in path.name:
            path.unlink()
    tiny("run_dir=again", *words, "resume=auto")
    whole, again = table(tmp_path / "whole"), table(folder)
    assert [r["step"] for r in again] == [r["step"] for r in whole]
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]
