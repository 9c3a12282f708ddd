"""Stopped by a signal, a tool says so in one line: it is no error, and there is no traceback, not even of an import."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_experiment import ROOT, environment

from core.config.command import cli
from core.config.command.signals import Interrupted, end_quietly
from core.errors import ConfigError

# A library that is stopped while it is imported.
STOPPED = "import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)\n"


def test_a_stop_is_said_without_the_word_error(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left:
        cli.stop(Interrupted("stopped at step 7; saved a.pt; go on with resume=auto"))
    assert left.value.code == 2
    assert capsys.readouterr().err == "stopped at step 7; saved a.pt; go on with resume=auto\n"
    with pytest.raises(SystemExit):
        cli.stop(ConfigError("no such key"))
    assert capsys.readouterr().err == "error: no such key\n"


def test_of_several_processes_the_first_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        cli.stop(Interrupted("stopped at step 7"))
    assert (left.value.code, capsys.readouterr().err) == (2, "")
    with pytest.raises(SystemExit):
        cli.stop(ConfigError("only this process knows"))
    assert "only this process knows" in capsys.readouterr().err


@pytest.mark.child
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("library", "words", "line"),
    [
        ("hydra", ["train.py", "experiment=stvit/digits"], "stopped before anything began"),
        ("hydra", ["table.py", "list"], "stopped before anything began"),
        ("hydra", ["test.py", "checkpoint=x"], "stopped before"),
        ("torch", ["train.py", "experiment=stvit/digits", "runtime=cpu"], "stopped before"),
        ("torch", ["profile.py", "stvit/digits"], "stopped before it was done"),
    ],
)
def test_a_tool_that_is_stopped_while_it_imports_ends_with_one_line(tmp_path, library, words, line, name):
    (tmp_path / f"{library}.py").write_text(STOPPED.format(name=name))
    environ = environment()
    environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    [said] = done.stderr.splitlines()
    assert said.startswith(line)
    assert not (tmp_path / "runs").exists()


def test_behind_a_tool_the_handlers_are_those_of_before(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    end_quietly()
    assert signal.getsignal(signal.SIGINT) is not before[0]
    cli.run(lambda argv: None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
