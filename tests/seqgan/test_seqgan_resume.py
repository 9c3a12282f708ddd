"""A run of the stand-in that is killed in any of its stages ends as one that was left alone."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from core.config import compose
from core.engine.launch import run
from seqgan.standin import judges
from tests import forked
from tests.killing import assert_same_run, killed_in_phase, weights

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
# Steps of the three stages; in each, a phase is a step.
STEPS = (4, 3, 4)
SETTINGS = {
    "experiment": "seqgan/shape_glyphs",
    "runtime": "cpu",
    "stages.2.model.network.dim": 16,
    "stages.2.model.network.depth": 1,
    "+train_dataloader.dataset.count": 128,
    "train_dataloader.batch_size": 16,
    "+stages.2.test_dataloader.dataset.count": 60,
    "train_cfg.max_steps": STEPS[0],
    "stages.1.train_cfg.max_steps": STEPS[1],
    "stages.2.train_cfg.max_steps": STEPS[2],
    "param_scheduler.0.warmup": 1,
    "checkpoint.every_steps": 2,
    "run_dir": "run",
}
CODES = Path("data/shape_glyphs/codes")


def train(*overrides: str) -> dict:
    return run(compose([*(f"{key}={value}" for key, value in SETTINGS.items()), *overrides]))


@pytest.fixture(scope="module", autouse=True)
def quick_networks() -> None:
    """Loss network and judge of twelve steps."""
    with pytest.MonkeyPatch.context() as patch:
        recipes = {kind: (model, 12, stream) for kind, (model, _, stream) in judges._RECIPES.items()}
        patch.setattr(judges, "_RECIPES", recipes)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder in which a run was left alone; it holds the loss network and the judge, too."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train()
    return folder


@pytest.fixture
def beside(undisturbed, tmp_path, monkeypatch) -> Path:
    """A folder with the same networks, and no codes."""
    shutil.copytree(undisturbed / "data", tmp_path / "data", ignore=shutil.ignore_patterns("codes"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Codes are there from the last stage on: before, there are none to remove.
@pytest.mark.parametrize(
    ("stage", "codes"),
    [(0, "kept"), (1, "kept"), (2, "kept"), (2, "removed"), *((stage, "of another run") for stage in (0, 1, 2))],
)
def test_a_killed_stage_goes_on_exactly(undisturbed, beside, stage, codes) -> None:
    if codes == "of another run":
        shutil.copytree(undisturbed / CODES, CODES)
    with killed_in_phase(sum(STEPS[:stage]) + 3):
        train()
    assert len(list(Path("run").glob("stage_*"))) == stage + 1
    if codes == "removed":
        shutil.rmtree(CODES, ignore_errors=True)
    train("resume=auto")
    assert_same_run(undisturbed / "run", Path("run"))
    assert [p.name for p in CODES.iterdir()] == [p.name for p in (undisturbed / CODES).iterdir()]


def assert_same_transformer(undisturbed: Path) -> None:
    again = weights(Path("run"))
    last = {name: value for name, value in weights(undisturbed / "run").items() if name.startswith("stage_2")}
    assert last and not [name for name, value in last.items() if not torch.equal(again[name], value)]
    assert [p.name for p in CODES.iterdir()] == [p.name for p in (undisturbed / CODES).iterdir()]


def test_the_frozen_tokenizer_of_the_checkpoint_serves_when_its_stage_is_gone(undisturbed, beside) -> None:
    with killed_in_phase(sum(STEPS[:2]) + 3):
        train()
    shutil.rmtree(CODES)
    shutil.rmtree("run/stage_0_tokenizer/checkpoints")
    train("resume=auto")
    assert_same_transformer(undisturbed)
    assert "its checkpoint has all weights" in Path("run/stage_2_transformer/run.log").read_text()


def test_a_tokenizer_that_has_changed_since_does_not_reach_what_was_begun(undisturbed, beside) -> None:
    with killed_in_phase(sum(STEPS[:2]) + 3):
        train()
    shutil.rmtree(CODES)
    newest = max(Path("run/stage_0_tokenizer/checkpoints").glob("step_*.pt"))
    state = torch.load(newest, weights_only=True)
    state["model"]["network.encoder.0.weight"] += 0.1
    torch.save(state, newest)
    train("resume=auto")
    assert_same_transformer(undisturbed)
    assert "no longer given by load_from" in Path("run/stage_2_transformer/run.log").read_text()


SCRIPT = """
import os, signal, sys
from core.config import compose
from core.engine.launch import run
from core.trainer import Trainer

phase, seen = Trainer.phase, 0

def counting(self, *args, **options):
    global seen
    seen += 1
    if seen == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return phase(self, *args, **options)

Trainer.phase = counting
run(compose(sys.argv[2:]))
"""


@pytest.mark.child
def test_a_process_that_is_killed_in_the_transformer_stage(undisturbed, beside) -> None:
    shutil.copytree(undisturbed / "run", "run")  # both tokenizers are trained
    shutil.rmtree("run/stage_2_transformer")
    Path("run/result.json").unlink()
    words = [f"{key}={value}" for key, value in SETTINGS.items()]
    ended = forked.run(["-c", SCRIPT, "3", *words, "resume=auto"], Path.cwd(), dict(os.environ))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not Path("run/stage_2_transformer/result.json").exists()
    shutil.rmtree(CODES)
    train("resume=auto")
    assert_same_run(undisturbed / "run", Path("run"))
