"""Several processes, one console: the first one speaks, the others' warnings are in logs of their own."""

import warnings

import pytest
from tiny_experiment import train

from core.config.command.messages import first_process_speaks

NOISY = """
import logging
import sys
import warnings

import mypoints

warnings.simplefilter("always")
warnings.warn("warned while imported")
logger = logging.getLogger("a_library")
logger.addHandler(logging.StreamHandler())


class Noisy(mypoints.Classify):
    def losses(self, batch):
        warnings.warn("warned in a step")
        logger.warning("logged in a step")
        return super().losses(batch)
"""

# two steps on each of two processes
SHORT = ("train_cfg.max_epochs=1", "train_dataloader.dataset.count=16", "param_scheduler=null", "log_every=1")


@pytest.mark.processes
def test_of_two_processes_only_the_first_warns_on_the_console(user):
    (user / "mynoise.py").write_text(NOISY)
    done = train(user, "run_dir=noisy", "model.type=mynoise.Noisy", *SHORT, torchrun=2)
    assert done.stderr.count("UserWarning: warned while imported") == 1
    assert done.stderr.count("UserWarning: warned in a step") == 2  # two steps, one process
    said = [line for line in done.stderr.splitlines() if line == "logged in a step"]
    assert len(said) == 2
    logs = {path.name: path.read_text() for path in (user / "noisy").glob("*.log")}
    assert set(logs) == {"run.log", "run_rank1.log"}
    assert logs["run_rank1.log"].count("UserWarning: warned in a step") == 2


def test_a_single_process_keeps_pythons_own_warnings(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    before = warnings.showwarning
    first_process_speaks()
    assert warnings.showwarning is before


def test_a_resumed_run_appends_to_its_log(tiny, tmp_path):
    words = ("run_dir=appended", "train_cfg.max_epochs=1")
    tiny(*words)
    (tmp_path / "appended" / "result.json").unlink()
    first = (tmp_path / "appended" / "run.log").read_text()
    assert "step 10/10" in first
    tiny(*words, "resume=auto")
    both = (tmp_path / "appended" / "run.log").read_text()
    assert both.startswith(first) and "resumed from" in both
    assert not list(tmp_path.rglob("run_rank*.log"))


@pytest.mark.parametrize(("rank", "times"), [(0, 1), (1, 0)])
def test_one_process_says_that_a_run_is_finished(tiny, monkeypatch, capsys, rank, times):
    words = ("run_dir=done", "train_cfg.max_epochs=1")
    tiny(*words)
    capsys.readouterr()
    monkeypatch.setattr("core.engine.launch.rank", lambda: rank)
    tiny(*words, "resume=auto")
    assert capsys.readouterr().out.count("already finished") == times
