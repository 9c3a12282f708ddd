"""Ends of benchmarks: the parts asked for, what figures were taken on, print and file."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from core.errors import ConfigError
from core.profile.benchmarking import conditions, measure, publish


@dataclass
class Options:
    parts: list[str] = field(default_factory=lambda: ["b"])
    threads: int = 3


@dataclass
class OnDevice(Options):
    device: str = "cpu"


def test_parts_that_are_asked_for_are_measured():
    parts = {"a": lambda options: 1, "b": lambda options: options.threads}
    assert measure(parts, Options()) == {"b": 3}
    with pytest.raises(ConfigError, match=r"parts: no 'bb': did you mean 'b'\? \(there are: a, b\)"):
        measure(parts, Options(["a", "bb"]))


def test_figures_say_how_to_repeat_them():
    said = conditions("/somewhere/speed.py", ["rounds=2", "output=/home/me/x.json", "--output=y"], Options())
    assert said == {"threads": 3, "torch": torch.__version__, "command": "python benchmarks/speed.py rounds=2"}
    assert conditions("speed.py", [], OnDevice())["device"].startswith("cpu (")


def test_figures_are_printed_and_written(tmp_path, capsys):
    publish({"a": 1}, None)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    file = tmp_path / "new" / "figures.json"
    publish({"a": 1, "b": 2}, str(file), shown={"b": 2})
    assert json.loads(capsys.readouterr().out) == {"b": 2}
    assert json.loads(file.read_text()) == {"a": 1, "b": 2}
