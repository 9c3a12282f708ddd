"""`runtime=debug` on the papers' stand-ins: two steps of every stage, two batches of every evaluation, no cache."""

from pathlib import Path

import pytest

from core.config import compose
from core.engine.launch import run

SMALL = {
    "stvit/digits": ("train_dataloader.batch_size=4", "test_dataloader.batch_size=4"),
    "slot_walks/blobworld": ("train_dataloader.dataset.count=64", "test_dataloader.dataset.count=4"),
    "seqgan/shape_glyphs": (
        "+train_dataloader.dataset.count=128",
        "train_dataloader.batch_size=16",
        "stages.2.model.network.dim=16",
        "stages.2.model.network.depth=1",
        "+stages.2.test_dataloader.dataset.count=60",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("experiment", list(SMALL))
def test_a_stand_in_runs_under_debug(experiment, tmp_path, monkeypatch):
    from core.engine.loops.train import TrainLoop
    from seqgan.standin import judges

    # Loss network and judge of seqgan's stand-in, in a few steps.
    recipes = {kind: (model, 12, stream) for kind, (model, _, stream) in judges._RECIPES.items()}
    monkeypatch.setattr(judges, "_RECIPES", recipes)
    monkeypatch.chdir(tmp_path)
    steps, step = [], TrainLoop._run_step
    monkeypatch.setattr(TrainLoop, "_run_step", lambda self, batch: steps.append(1) or step(self, batch))
    result = run(compose([f"experiment={experiment}", "runtime=debug", *SMALL[experiment]]))
    assert result["status"] == "trial" and result["metrics"]
    assert len(steps) == 2 * max(1, len(result.get("stages", ())))
    assert not list(Path().rglob("provenance.json"))
