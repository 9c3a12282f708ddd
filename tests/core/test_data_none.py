"""What is not a sample never vanishes: it is an error that names it, or it is counted."""

import json
from pathlib import Path

import pytest
import torch
from tiny_experiment import train

from core.data import build_loader
from core.data.errors import SampleError


class Holes(torch.utils.data.Dataset):
    """Nine numbers, of which some are not samples."""

    def __init__(self, holes, count=9):
        self.holes, self.count = holes, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.holes[int(index)] if int(index) in self.holes else {"x": torch.tensor(float(index))}


def batches(holes, training, workers=0, wrap=lambda data: data, **options):
    cfg = {"dataset": wrap(Holes(holes)), "batch_size": 4, "num_workers": workers, **options}
    return list(build_loader(cfg, seed=0, training=training))


@pytest.mark.child
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hole", [None, {}, [], ()])
def test_it_is_an_error_with_data_set_and_index(training, workers, hole):
    with pytest.raises(SampleError, match=r"Holes\[3\]: .*returned .* not a sample"):
        batches({3: hole}, training, workers)


def test_a_wrapper_that_hands_on_none_is_named():
    def wrap(data):
        return torch.utils.data.Subset(data, range(5, 9))

    with pytest.raises(SampleError, match=r"Subset\[1\]: .*returned None"):
        batches({6: None}, True, wrap=wrap)


@pytest.mark.child
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_it_counts(workers):
    seen = batches({2: None, 4: None, 5: {}, 6: None, 7: None}, False, workers, on_error="skip")
    values = [batch.data["x"].tolist() if batch.data is not None else None for batch in seen]
    assert values == [[0, 1, 3], None, [8]]
    assert [fault.index for batch in seen for fault in batch.errors] == [2, 4, 5, 6, 7]


def test_training_puts_another_in_its_place_and_counts():
    seen = batches({2: None, 3: ()}, True, on_error="skip")
    values = sorted(value for batch in seen for value in batch.data["x"].tolist())
    assert values == [0, 1, 4, 4, 4, 5, 6, 7, 8]
    assert sorted((f.index, f.substitute) for batch in seen for f in batch.errors) == [(2, 3), (3, 4), (3, 4)]


def test_a_run_stops_at_it_or_counts_it(tiny, monkeypatch):
    import mypoints

    read = mypoints.Points.__getitem__
    monkeypatch.setattr(mypoints.Points, "__getitem__", lambda self, i: None if int(i) == 3 else read(self, i))
    with pytest.raises(SampleError, match=r"Points\[3\].*None"):
        tiny("train_cfg.max_epochs=1")
    skip = ("train_dataloader.on_error=skip", "+val_dataloader.on_error=skip", "train_cfg.max_epochs=2")
    result = tiny(*skip)
    assert result["skipped_samples"] == 2
    assert result["metrics"]["seen"] == 20 and result["metrics"]["skipped_samples"] == 1
    assert "Points[3]" in (Path(result["run_dir"]) / "run.log").read_text()


HOLES = """
import mypoints


class Points(mypoints.Points):
    def __getitem__(self, index):
        return None if int(index) in (3, 4, 7) else super().__getitem__(index)
"""


@pytest.mark.processes
def test_two_processes_count_together(user):
    (user / "myholes.py").write_text(HOLES)
    words = [f"{split}_dataloader.dataset.type=myholes.Points" for split in ("train", "val")]
    words += ["train_dataloader.on_error=skip", "+val_dataloader.on_error=skip"]
    words += ["train_cfg.max_epochs=1", "run_dir=holes"]
    train(user, *words, torchrun=2)
    result = json.loads((user / "holes" / "result.json").read_text())
    assert result["skipped_samples"] == 4  # 3, 4 in place of 3, 4 and 7
    assert result["metrics"]["skipped_samples"] == 3 and result["metrics"]["seen"] == 18
