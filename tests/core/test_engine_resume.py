"""Exact resume: killed anywhere, a run ends with the same weights and the same log as one that was left alone."""

import random
import signal
import time

import pytest
import torch
from tiny_experiment import begin, losses, train

from core.checkpoint.run_folder import find_checkpoint

SETTINGS = [
    "train_dataloader.num_workers=2",
    "train_dataloader.dataset.slow=0.02",
    "model.network.dropout=0.2",
    "ema={decay: 0.95}",
    "checkpoint.every_steps=4",
    "train_cfg.max_epochs=4",
    "train_cfg.val_every_epochs=null",
    "train_cfg.val_every_steps=7",
    "log_every=3",
]


def wait_for_step(run, step, process):
    """Until the log shows the step (or the run is over)."""
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if max(losses(run), default=0) >= step:
                return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(user):
    """The run that nobody interrupts."""
    train(user, *SETTINGS, "run_dir=undisturbed")
    return user / "undisturbed"


def assert_same(one, other):
    first, second = (torch.load(find_checkpoint(r), weights_only=True) for r in (one, other))
    assert first["step"] == second["step"] == 40
    for part in (lambda s: s["model"], lambda s: s["hooks"]["EMAHook"]["average"]):
        assert part(first).keys() == part(second).keys()
        assert all(torch.equal(part(first)[k], part(second)[k]) for k in part(first))
    assert losses(one) == losses(other)


@pytest.mark.child
def test_killed_at_random_moments(user, undisturbed):
    # Drawn once: other moments, as many as one likes, are tried by `python -m tests.kills`.
    left = []
    for step in sorted(random.Random(0).sample(range(1, 30), 3)):
        process = begin(user, *SETTINGS, "run_dir=killed", "resume=auto")
        wait_for_step(user / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        left.append(process.done().returncode)
    assert left[0] == -signal.SIGKILL  # the last may be done before the signal comes
    done = train(user, *SETTINGS, "run_dir=killed", "resume=auto")
    assert "resumed from" in done.stdout + done.stderr + (user / "killed" / "run.log").read_text()
    assert_same(undisturbed, user / "killed")


@pytest.mark.child
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(user, undisturbed, number):
    name = f"stopped_{number}"
    process = begin(user, *SETTINGS, f"run_dir={name}")
    wait_for_step(user / name, 6, process)
    process.send_signal(number)
    done = process.done()
    errors = done.stderr
    assert done.returncode == 2
    assert "saved" in errors and "resume=auto" in errors
    stopped = torch.load(find_checkpoint(user / name), weights_only=True)["step"]
    assert f"step {stopped}; saved" in errors  # the very step (evaluated or not), not an older checkpoint
    train(user, *SETTINGS, f"run_dir={name}", "resume=auto")
    assert_same(undisturbed, user / name)


@pytest.mark.child
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(user):
    train(user, "run_dir=full", "train_cfg.max_epochs=1")
    before = find_checkpoint(user / "full")
    content = before.read_bytes()
    (user / "full" / "result.json").unlink()
    words = ("run_dir=full", f"resume={before}", "train_cfg.max_epochs=2", "checkpoint.every_steps=5")
    # No file may grow as large as the checkpoint that is there.
    done = begin(user, *words, "visualizer.vis_backends=[]", largest=len(content) - 1).done()
    log = (user / "full" / "run.log").read_text()
    assert "checkpoint of step 15 not written" in log and str(before) in log  # went on, and said what there is
    assert done.returncode == 2 and "step_00000020.pt" in done.stderr  # the last state must be written
    assert before.read_bytes() == content
    assert {p.name for p in before.parent.iterdir()} == {before.name, "index.json"}
    train(user, "run_dir=full", "resume=auto", "train_cfg.max_epochs=2", "checkpoint.every_steps=5")
    assert torch.load(find_checkpoint(user / "full"), weights_only=True)["step"] == 20
