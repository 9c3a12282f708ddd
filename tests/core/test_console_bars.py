"""Bars at every width: steps, rate and time left are always there; the same value is shown once."""

import io
import json
import re

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from test_logging_hook import BATCH, FakeRunner

from core.engine.hooks.logging import LoggingHook
from core.output.progress import _columns


def shown(width, note="loss 2.345  accuracy 0.1234  grad_norm 12.34", name="train", total=312500):
    """The line of a bar after 20 seconds, 617 steps each."""
    target, clock = io.StringIO(), [0.0]
    console = Console(width=width, file=target, force_terminal=True, color_system=None)
    bars = Bars(*_columns(), console=console, get_time=lambda: clock[0])
    task = bars.add_task(name, total=total, note=note)
    for _ in range(20):
        clock[0] += 1.0
        bars.advance(task, 617)
    console.print(bars.make_tasks_table(bars.tasks))
    return target.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", ["train", "unpacking ILSVRC2012_img_train.tar into one folder per class"])
def test_steps_rate_and_time_left_are_whole_at_every_width(width, name):
    text = shown(width, name=name)
    [line] = text.splitlines()
    assert len(line) <= width
    assert re.search(r"\b12340/312500 617\.0/s +left 08:07\b", line)
    assert name in line or "…" in line


def test_the_note_is_cut_first_and_whole_where_there_is_room():
    note = "loss 2.345  accuracy 0.1234  grad_norm 12.34"
    assert note in shown(160, note) and "╸" in shown(160, note)
    assert re.search(r"left 08:07 loss 2\S*.*…", shown(80, note))
    assert "train" in shown(60, note)


def test_brackets_of_a_name_are_no_markup():
    assert "loss[a]" in shown(120, note="loss[a] 1") and "[val]" in shown(120, name="[val]")


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ({"loss": 0.75, "loss_cls": 0.75, "accuracy": 0.5}, "loss 0.75  accuracy 0.5"),
        ({"loss": 1.0, "loss_cls": 0.75, "loss_box": 0.25}, "loss 1  loss_cls 0.75  loss_box 0.25"),
        ({"loss": 0.75, "loss_cls": 0.75, "loss_box": 0.0}, "loss 0.75  loss_cls 0.75  loss_box 0"),
        ({"loss": 1.5, "loss_cls": 0.75}, "loss 1.5  loss_cls 0.75"),
        ({"loss_g": 0.5}, "loss_g 0.5"),
    ],
)
def test_the_only_part_of_a_loss_is_not_shown_twice(tmp_path, terms, line):
    runner, hook = FakeRunner(tmp_path, steps=2), LoggingHook(2, progress="plain")
    noted = []
    hook.before_train(runner)
    hook.progress.note = lambda name, text: noted.append(text)
    for _ in range(2):
        hook.before_train_iter(runner, 0, BATCH)
        hook.after_train_iter(runner, 0, BATCH, terms)
        runner.iter += 1
    said = next(text for text in runner.messages if "step 2/2" in text)
    assert f"step 2/2  {line}  lr" in said
    assert noted == [line]
    [logged] = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {name: logged[name] for name in terms} == terms  # the log keeps every key
