"""Every form of an evaluator means the same wherever one is built: validation, test, stages, stock loops."""

from pathlib import Path

import pytest
from mmengine.evaluator import Evaluator
from torchmetrics.classification import MulticlassAccuracy

from core.errors import ConfigError
from core.metrics import TorchMetrics
from core.metrics.evaluators import build_evaluator

MEASURE = "{type: torchmetrics.classification.MulticlassAccuracy, num_classes: 2}"
METRIC = f"{{type: core.metrics.TorchMetrics, metrics: {{top1: {MEASURE}}}}}"
TEST = "test_dataloader={batch_size: 8, dataset: {type: mypoints.Points, count: 9, seed: 7, augment: false}}"
FORMS = {
    "mapping": METRIC,
    "list": f"[{METRIC}]",
    "several": f"[{METRIC}, {{type: mypoints.Accuracy}}]",
    "evaluator": f"{{type: Evaluator, metrics: [{METRIC}]}}",
    "evaluator by path": f"{{type: mmengine.evaluator.Evaluator, metrics: {METRIC}}}",
    "metrics alone": f"{{metrics: [{METRIC}]}}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stages", ["[]", "[{name: a}, {name: b}]"], ids=["one", "stages"])
def test_every_form_judges_validation_and_test_alike(tiny, form, stages):
    words = ["train_cfg.max_epochs=1", "~val_evaluator", f"+val_evaluator={FORMS[form]}", f"stages={stages}"]
    result = tiny(TEST, *words, "run_dir=here")
    assert 0 < result["val_metrics"]["top1"] <= 1 and 0 < result["metrics"]["top1"] <= 1
    if form == "several":
        assert (result["val_metrics"]["seen"], result["metrics"]["seen"]) == (21, 9)


def test_a_later_stage_changes_parts_of_the_evaluator(tiny):
    other = "{type: torchmetrics.classification.MulticlassF1Score, num_classes: 2}"
    stages = (
        f"stages=[{{name: a}}, {{name: b, val_evaluator: {{metrics: {{top1: null, f1: {other}}}}}}},"
        " {name: c, test_evaluator: {type: mypoints.Accuracy}},"
        " {name: d, test_dataloader: null, test_evaluator: {type: mypoints.Accuracy}}]"
    )
    words = ["train_cfg.max_epochs=1", "~val_evaluator", f"+val_evaluator={METRIC}", stages]
    result = tiny(TEST, *words, "run_dir=here")
    assert {name: set(figures) for name, figures in result["stages"].items()} == {
        "a": {"top1"}, "b": {"f1"}, "c": {"accuracy", "seen"}, "d": {"top1"},
    }  # fmt: skip


def test_built_objects_are_taken_as_they_are():
    metric = TorchMetrics({"top1": MulticlassAccuracy(num_classes=2)})
    whole = Evaluator(metric)
    assert build_evaluator(whole) is whole
    assert build_evaluator(metric).metrics == [metric] == build_evaluator([metric]).metrics
    with pytest.raises(ConfigError, match=r"an evaluator takes metrics.*not 1"):
        build_evaluator([metric, 1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("[]", "an evaluator needs a metric"),
        ("[1]", "val_evaluator.*a mapping with a type"),
        (f"{{top1: {MEASURE}}}", r"an evaluator takes metrics.*with process\(data_batch"),
        ("{type: core.metrics.TorchMetrics, metrics: {top1: null}}", "at least one metric"),
    ],
)
@pytest.mark.parametrize("stages", ["[]", "[{name: a}, {name: b}]"], ids=["one", "stages"])
def test_what_is_no_evaluator_is_refused_before_training(tiny, wrong, message, stages):
    with pytest.raises(ConfigError, match=message):
        tiny(TEST, "~val_evaluator", f"+val_evaluator={wrong}", f"stages={stages}", "run_dir=here")
    assert not [path for path in Path("here").rglob("*") if path.name == "log.jsonl" or path.suffix == ".pt"]
