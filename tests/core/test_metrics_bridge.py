"""torchmetrics through the engine: exact figures, on one process and on several with uneven shares."""

from __future__ import annotations

import json
import math
import os
import textwrap

import pytest
import torch

from core.config.registry import METRICS, build
from core.errors import ConfigError
from core.metrics import GroupedAccuracy, TorchMetrics
from core.metrics.predictions import MetricError
from tests import forked

CLASSES = 4


def _data(count: int) -> dict:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(count, CLASSES, generator=generator)
    label = torch.randint(CLASSES, (count,), generator=generator)
    logits[torch.arange(count), label] += 0.7
    fake = (label > 1).long()
    return {
        "logits": logits,
        "label": label,
        "score": torch.sigmoid(logits[:, 3]),
        "fake": fake,
        "question": [("what", "why", "how")[i % 3] for i in range(count)],
        "sample_id": [str(i) for i in range(count)],
    }


def _slice(data: dict, start: int, stop: int) -> dict:
    return {k: v[start:stop] for k, v in data.items()}


def _config() -> dict:
    kind = "torchmetrics.classification."
    return {
        "type": "core.metrics.TorchMetrics",
        "metrics": {
            "top1": {"type": kind + "MulticlassAccuracy", "num_classes": CLASSES, "average": "micro"},
            "top2": {"type": kind + "MulticlassAccuracy", "num_classes": CLASSES, "average": "micro", "top_k": 2},
            "per_class": {"type": kind + "MulticlassAccuracy", "num_classes": CLASSES, "average": "none"},
            "iou": {"type": kind + "MulticlassJaccardIndex", "num_classes": CLASSES},
            "auc": {"type": kind + "BinaryAUROC", "thresholds": None},
            "macro_auc": {"type": kind + "MulticlassAUROC", "num_classes": CLASSES, "thresholds": None},
            "mean": {"type": "torchmetrics.MeanMetric"},
        },
        "inputs": {"auc": ["score", "fake"], "mean": ["score"]},
        "activations": {"macro_auc": "softmax"},
    }


def _expected(data: dict) -> dict[str, float]:
    """By hand and by scikit-learn."""
    from sklearn.metrics import jaccard_score, roc_auc_score

    logits, label = data["logits"], data["label"]
    guess = logits.argmax(1)
    two = logits.topk(2).indices
    figures = {
        "top1": (guess == label).double().mean().item(),
        "top2": (two == label[:, None]).any(1).double().mean().item(),
        "iou": jaccard_score(label, guess, average="macro"),
        "auc": roc_auc_score(data["fake"], data["score"]),
        "macro_auc": sum(roc_auc_score(label == c, logits.softmax(1)[:, c]) for c in range(CLASSES)) / CLASSES,
        "mean": data["score"].double().mean().item(),
    }
    for c in range(CLASSES):
        figures[f"per_class/{c}"] = (guess[label == c] == c).double().mean().item()
    return figures


def _evaluate(metric, data: dict, sizes: list[int]) -> dict[str, float]:
    start = 0
    for size in sizes:
        metric.process({}, _slice(data, start, start + size))
        start += size
    return metric.evaluate(len(data["label"]))


def test_figures_are_those_of_the_definitions_whatever_the_batches():
    data = _data(53)
    metric = build(_config(), METRICS)
    expected = _expected(data)
    for sizes in ([53], [20, 20, 13], [1] * 53):
        figures = _evaluate(metric, data, sizes)
        assert figures.keys() == expected.keys()
        assert all(type(v) is float for v in figures.values())
        assert figures == pytest.approx(expected, abs=1e-6)


def test_prefix_batch_keys_and_lists_of_batches():
    data = _data(10)
    top1 = {"top1": _config()["metrics"]["top1"]}
    config = {"type": "core.metrics.TorchMetrics", "metrics": top1, "prefix": "clean"}
    metric = build(config, METRICS)
    metric.process({"label": data["label"]}, [{"logits": data["logits"]}])
    assert metric.evaluate(10) == {"clean/top1": pytest.approx(_expected(data)["top1"])}


def test_dictionaries_of_figures_are_spread_out():
    kind = "torchmetrics.classification."
    collection = {
        "type": "torchmetrics.MetricCollection",
        "metrics": {
            "accuracy": {"type": kind + "MulticlassAccuracy", "num_classes": CLASSES, "average": "micro"},
            "f1": {"type": kind + "MulticlassF1Score", "num_classes": CLASSES},
        },
    }
    metric = TorchMetrics({"all": collection})
    data = _data(20)
    figures = _evaluate(metric, data, [7, 13])
    assert figures.keys() == {"all/accuracy", "all/f1"}
    assert figures["all/accuracy"] == pytest.approx(_expected(data)["top1"])


def test_half_precision_scores_are_widened():
    data = _data(40)
    half = {**data, "logits": data["logits"].bfloat16(), "score": data["score"].bfloat16()}
    exact = {**data, "logits": half["logits"].float(), "score": half["score"].float()}
    assert _evaluate(build(_config()), half, [40]) == pytest.approx(_evaluate(build(_config()), exact, [40]))


def test_tensors_in_any_memory_format_are_taken():
    made, real = (torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    metric = TorchMetrics({"l1": {"type": "torchmetrics.MeanAbsoluteError"}}, prediction="made", target="image")
    metric.process({}, {"made": made.transpose(2, 3), "image": real.transpose(2, 3)})
    assert metric.evaluate(2)["l1"] == pytest.approx(float((made - real).abs().mean()))


def test_an_evaluation_that_means_nothing_is_an_error_and_the_next_one_is_clean():
    data = _data(12)
    metric = build(_config())
    with pytest.raises(MetricError, match="not one sample"):
        metric.evaluate(12)
    bad = {**data, "logits": data["logits"].clone()}
    bad["logits"][5, 2] = float("nan")
    with pytest.raises(MetricError, match="1 values of the predictions are NaN"):
        _evaluate(TorchMetrics({"top1": _config()["metrics"]["top1"]}), bad, [6, 6])
    with pytest.raises(MetricError, match="NaN"):
        _evaluate(metric, bad, [6, 6])
    metric.process({}, data)
    metric.process({}, _slice(data, 0, 2))
    with pytest.raises(MetricError, match="14 samples were evaluated, but the data set has 12"):
        metric.evaluate(12)
    metric.process({}, data)
    with pytest.warns(UserWarning, match="only 12 of 20 samples"):
        assert metric.evaluate(20) == pytest.approx(_expected(data), abs=1e-6)


def test_a_figure_that_is_nan_is_an_error_unless_it_is_allowed():
    flat = {**_data(12), "zero": torch.zeros(12)}
    metric = TorchMetrics({"r": {"type": "torchmetrics.PearsonCorrCoef"}}, inputs={"r": ["zero", "score"]})
    with pytest.raises(MetricError, match="r came out as NaN"):
        _evaluate(metric, flat, [12])
    metric.allow_nan = True
    assert math.isnan(_evaluate(metric, flat, [12])["r"])


def test_mistakes_are_named():
    top1 = _config()["metrics"]["top1"]
    with pytest.raises(ConfigError, match="at least one metric"):
        TorchMetrics({})
    with pytest.raises(ConfigError, match="did you mean 'top1'"):
        TorchMetrics({"top1": top1}, inputs={"topl": ["a"]})
    with pytest.raises(ConfigError, match=r"activations\.top1=tanh"):
        TorchMetrics({"top1": top1}, activations={"top1": "tanh"})
    with pytest.raises(ConfigError, match="not a torchmetrics metric"):
        TorchMetrics({"top1": {"type": "torch.nn.ReLU"}})
    with pytest.raises(MetricError, match="did you mean 'logits'"):
        TorchMetrics({"top1": top1}, prediction="logit").process({}, _data(3))
    with pytest.raises(
        MetricError, match=r"metric 'top1' does not take \(\(3, 4\) torch.float32, \(2,\) torch.int64\)"
    ):
        TorchMetrics({"top1": top1}).process({}, {"logits": torch.zeros(3, 4), "label": torch.zeros(2).long()})
    matrix = {"type": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": CLASSES}
    with pytest.raises(MetricError, match=r"\(4, 4\) figures"):
        _evaluate(TorchMetrics({"matrix": matrix}), _data(5), [5])


# --- grouped accuracy ----------------------------------------------------------------------------------------------


def test_groups_by_hand():
    metric = GroupedAccuracy("question", merge={"TP": "TN"}, aggregates={"T": ["T*"], "all": ["*"]})
    logits = torch.eye(3)
    metric.process(
        {"question": ["TN", "TP", "CW"]}, {"logits": logits, "label": torch.tensor([0, 0, 2])}
    )  # right, wrong, right
    metric.process({"question": ["TC"]}, {"logits": logits[:1], "label": torch.tensor([-1])})  # unknown answer: wrong
    assert metric.evaluate(4) == {
        "micro": 0.5,
        "macro": pytest.approx((1.0 + 0.0 + 0.5) / 3),
        "CW": 1.0,
        "TC": 0.0,
        "TN": 0.5,
        "T": pytest.approx(1 / 3),
        "all": 0.5,
    }


def test_a_sample_of_several_groups_counts_in_each_and_once_in_all():
    metric = GroupedAccuracy("types", aggregates={"either": ["a", "b"]}, prefix="agqa")
    predicted = {"logits": torch.eye(2), "label": torch.tensor([0, 0]), "types": [["a", "b"], ["b"]]}
    metric.process({}, predicted)
    assert metric.evaluate(2) == {
        "agqa/micro": 0.5,
        "agqa/macro": 0.75,
        "agqa/a": 1.0,
        "agqa/b": 0.5,
        "agqa/either": 0.5,
    }


def test_top_k_integer_groups_and_predicted_classes():
    data = _data(30)
    groups = torch.arange(30) % 2
    best = GroupedAccuracy("g", top_k=10)
    best.process({"g": groups}, data)
    assert best.evaluate(30)["micro"] == 1.0  # ten of four classes: all of them
    two = GroupedAccuracy("g", top_k=2)
    two.process({"g": groups}, data)
    assert two.evaluate(30)["micro"] == pytest.approx(_expected(data)["top2"])
    classes = GroupedAccuracy("g", prediction="guess")
    classes.process({"g": groups}, {**data, "guess": data["logits"].argmax(1)})
    figures = classes.evaluate(30)
    right = data["logits"].argmax(1) == data["label"]
    assert figures["0"] == pytest.approx(right[0::2].double().mean().item())
    assert figures["macro"] == pytest.approx((figures["0"] + figures["1"]) / 2)


def test_groups_that_must_occur_and_other_mistakes():
    metric = GroupedAccuracy("question", groups=["what", "where"])
    data = _data(6)
    metric.process({}, data)
    with pytest.raises(MetricError, match=r"no sample belongs to 'where' \(there are how, what, why\)"):
        metric.evaluate(6)
    with pytest.raises(MetricError, match="not one sample"):
        metric.evaluate(6)
    with pytest.raises(MetricError, match="names 5 samples, 'label' has 6"):
        metric.process({}, {**data, "question": ["what"] * 5})
    with pytest.raises(MetricError, match=r"scores \(B, K\) are expected"):
        metric.process({}, {**data, "logits": data["score"]})
    with pytest.raises(MetricError, match="did you mean 'question'"):
        GroupedAccuracy("questions").process({}, data)
    with pytest.raises(ConfigError, match="top_k=0"):
        GroupedAccuracy("question", top_k=0)
    bad = {**data, "logits": data["logits"] / 0.0 * 0.0}
    metric = GroupedAccuracy("question")
    metric.process({}, bad)
    with pytest.raises(MetricError, match="NaN"):
        metric.evaluate(6)


# --- several processes ---------------------------------------------------------------------------------------------

SHARES = {"uneven": [[5, 5, 3], [4]], "one process without samples": [[11], []]}

WORKER = textwrap.dedent(
    """
    import json, os, sys
    sys.path.insert(0, os.path.join("tests", "core"))
    import torch, torch.distributed as dist
    from test_metrics_bridge import SHARES, _config, _data, _slice
    from core.metrics import GroupedAccuracy
    from core.config.registry import METRICS, build
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    bridge, grouped = build(_config(), METRICS), GroupedAccuracy("question", aggregates={"w": ["w*"]})
    found = {}
    for name, shares in SHARES.items():
        data, start = _data(sum(map(sum, shares))), sum(map(sum, shares[:rank]))
        for size in shares[rank]:
            bridge.process({}, _slice(data, start, start + size))
            grouped.process({}, _slice(data, start, start + size))
            start += size
        found[name] = [bridge.evaluate(len(data["label"])), grouped.evaluate(len(data["label"]))]
    with open(os.path.join(sys.argv[1], f"figures-{rank}.json"), "w") as file:
        json.dump(found, file)
    try:
        grouped.process({}, {**data, "logits": data["logits"] * (float("nan") if rank else 1.0)})
        grouped.evaluate(None)
    except ValueError:
        open(os.path.join(sys.argv[1], f"refused-{rank}"), "w").close()
    dist.destroy_process_group()
    """
)


@pytest.mark.processes
def test_processes_with_uneven_shares_give_the_figures_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ran = forked.run([str(tmp_path / "worker.py"), str(tmp_path)], os.getcwd(), environment, 2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Files, not standard output: the lines of two processes run into each other where Python is unbuffered.
    found = [json.loads((tmp_path / f"figures-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    for name, shares in SHARES.items():
        data = _data(sum(map(sum, shares)))
        alone = GroupedAccuracy("question", aggregates={"w": ["w*"]})
        alone.process({}, data)
        assert found[0][name][0] == pytest.approx(_expected(data), abs=1e-6), name
        assert found[0][name][1] == pytest.approx(alone.evaluate(len(data["label"]))), name
    # The NaN of one process is the error of every process: none waits for the other.
    assert len(list(tmp_path.glob("refused-*"))) == 2


def test_which_names_of_figures_other_samples_may_give():
    each = {"type": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 3, "average": "none"}
    precision = {"type": "torchmetrics.detection.MeanAveragePrecision"}
    measures = TorchMetrics({"each": each, "map": precision})
    may = ("each/2", "map/map_small")
    assert [n for n in (*may, "each/3", "each/x", "each", "other/2") if measures.may_report(n)] == list(may)

    class Renamed(TorchMetrics):
        def evaluate(self, size=None):
            return {"other/2": super().evaluate(size)["each/2"]}

    assert Renamed({"each": each}).may_report("other/2")
