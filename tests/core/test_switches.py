"""One run leaves nothing of its switches to the next run of the process."""

import os
import sys

import pytest
import torch
import torch.multiprocessing as mp


def switches():
    cudnn = torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "anomaly": torch.is_anomaly_enabled(),
        "check_nan": torch.is_anomaly_check_nan_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (cudnn.benchmark, cudnn.deterministic),
        "start": mp.get_start_method(allow_none=True),
        "opencv": sys.modules["cv2"].getNumThreads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
    }


@pytest.fixture
def seen(monkeypatch):
    """The switches of every batch that is trained on or predicted."""
    import cv2

    from core.trainer import Trainer

    cv2.setNumThreads(2)
    found = []
    for name in ("train_step", "val_step"):
        method = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, lambda *a, m=method, **k: found.append(switches()) or m(*a, **k))
    return found


DEBUG = ("runtime=debug", "runtime.threads=2", "runtime.cudnn_benchmark=true")


def test_a_run_after_a_debug_run_has_the_switches_that_the_process_had(tiny, seen, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = switches()
    assert tiny(*DEBUG)["status"] == "trial"
    assert seen and all(s["anomaly"] and s["deterministic"] and s["threads"] == 2 for s in seen)
    assert all(s["cudnn"][1] and s["opencv"] <= 1 and s["start"] == "fork" for s in seen)
    assert switches() == before
    seen.clear()
    tiny("train_cfg.max_epochs=1")
    same = ("threads", "anomaly", "check_nan", "deterministic", "warn_only", "cudnn")
    assert seen and all(s[key] == before[key] for s in seen for key in same)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        tiny(*DEBUG, "runtime.deterministic=false")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_that_fails_leaves_nothing_either(tiny, seen, monkeypatch):
    import mypoints

    before = switches()
    monkeypatch.setattr(mypoints.Classify, "losses", lambda self, batch: {}["nothing"])
    with pytest.raises(KeyError):
        tiny(*DEBUG)
    assert seen and switches() == before


def test_tools_leave_nothing(tiny, tiny_config, user, seen, monkeypatch, tmp_path):
    import mypoints

    from core.engine.commands.evaluation import evaluate
    from core.engine.commands.inference import infer
    from core.engine.commands.lr_finder import Options, find_lr
    from core.trainer import Inference

    before = switches()
    evaluate(tiny_config(*DEBUG), None, "val")
    assert len(seen) == 2 and seen[0]["anomaly"] and switches() == before
    seen.clear()
    find_lr(tiny_config(*DEBUG), Options("mine/tiny", steps=10), tmp_path / "rates")
    assert len(seen) == 10 and seen[0]["anomaly"] and switches() == before
    run = tiny(*DEBUG)["run_dir"]
    asked = []
    generate = lambda self: asked.append(switches()) or Inference({}, {})  # noqa: E731
    monkeypatch.setattr(mypoints.Classify, "generate", generate)
    infer([], type("O", (), {"checkpoint": run, "output": str(tmp_path / "out"), "device": "cpu"})())
    assert asked[0]["anomaly"] and asked[0]["threads"] == 2 and switches() == before
