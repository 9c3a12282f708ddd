"""Runs in this process: what a config says happens, and what it cannot mean is refused before anything is built."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_experiment import losses

from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.config import compose
from core.data import LoadedBatch
from core.engine.commands.evaluation import evaluate
from core.engine.hooks.finite import NonFiniteLoss
from core.engine.launch import build_trainer
from core.engine.loops import train as train_loop
from core.errors import ConfigError


def cfg(user, *overrides):
    return compose(["experiment=mine/tiny", "runtime=cpu", *overrides], config_dir=user / "configs")


def weights(result, best=False):
    return model_state(find_checkpoint(result["run_dir"], best=best))


def test_a_run_leaves_everything_behind(tiny):
    result = tiny("train_cfg.max_epochs=2")
    folder = Path(result["run_dir"])
    assert result["status"] == "finished" and result["steps"] == 20 and result["epochs"] == 2
    assert result["metrics"]["seen"] == 21  # every sample of the evaluation split exactly once
    assert result == json.loads((folder / "result.json").read_text())
    assert {"config.yaml", "overrides.txt", "log.jsonl", "checkpoints", "run.log"} <= {p.name for p in folder.iterdir()}
    assert list(folder.rglob("events.out.tfevents*"))
    assert (folder / "overrides.txt").read_text().splitlines()[-1] == "train_cfg.max_epochs=2"
    assert losses(folder).keys() == {3, 6, 9, 12, 15, 18, 20}


def test_same_seed_same_weights_other_seed_other_weights(tiny):
    one, same, other = (weights(tiny("train_cfg.max_epochs=1", f"seed={s}")) for s in (0, 0, 1))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.child
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_result(tiny, workers):
    alone = weights(tiny("train_cfg.max_epochs=1", "model.network.dropout=0.2"))
    beside = weights(
        tiny("train_cfg.max_epochs=1", "model.network.dropout=0.2", f"train_dataloader.num_workers={workers}")
    )
    assert all(torch.equal(alone[k], beside[k]) for k in alone)


def test_accumulation_equals_the_bigger_batch(tiny):
    big = weights(tiny("train_dataloader.batch_size=8", "train_cfg.max_epochs=1", "param_scheduler=null"))
    small = weights(tiny("optim_wrapper.accumulative_counts=2", "train_cfg.max_epochs=1", "param_scheduler=null"))
    for key in big:
        torch.testing.assert_close(big[key], small[key], rtol=1e-4, atol=1e-6)


def test_clipping_is_logged(tiny):
    result = tiny("+optim_wrapper.clip_grad={max_norm: 0.001}", "train_cfg.max_epochs=1")
    lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms and all(norm > 0.001 for norm in norms)  # the norm before it was cut


def test_an_endless_sampler_goes_with_a_schedule_in_steps(tiny):
    endless = ["+train_dataloader.sampler={type: core.data.TrainSampler, infinite: true}", "train_cfg.max_epochs=null"]
    result = tiny(*endless, "+train_cfg.max_steps=12")
    log = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in log if "lr" in line}
    assert result["steps"] == 12 and rates[3] > rates[6] > rates[9] > rates[12] > 0.0001


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(tiny, precision):
    result = tiny(f"runtime.precision={precision}", "train_cfg.max_epochs=3")
    log = losses(result["run_dir"])
    assert all(math.isfinite(v) for v in log.values())
    assert log[max(log)] < log[min(log)]


@pytest.mark.compile
def test_compiled_and_channels_last_give_the_same_result(tiny):
    plain = weights(tiny("train_cfg.max_epochs=1"))
    fast = weights(tiny("train_cfg.max_epochs=1", "runtime.compile={backend: eager}", "runtime.channels_last=true"))
    assert plain.keys() == fast.keys()
    assert all(torch.allclose(plain[k], fast[k], atol=1e-6) for k in plain)


def test_frozen_parts_stay_and_stay_in_evaluation_mode(tiny, user):
    result = tiny("model.frozen=[network.norm,network.stem]", "model.network.dropout=0.1", "train_cfg.max_epochs=1")
    before = build_trainer(cfg(user, "model.network.dropout=0.1", "model.frozen=[network.norm]"))
    after = weights(result)
    assert torch.equal(after["network.norm.running_mean"], torch.zeros(16))
    assert after["network.norm.num_batches_tracked"] == 0
    assert before.train().network.norm.training is False and before.network.training is True
    assert result["trainable_parameters"] < result["parameters"]


def test_two_optimizers_take_turns(tiny):
    result = tiny(
        "~model",
        "+model={type: mypoints.Duel, generator: {type: torch.nn.Linear, in_features: 8, out_features: 8},"
        " discriminator: {type: torch.nn.Linear, in_features: 8, out_features: 1}}",
        "~optim_wrapper",
        "+optim_wrapper={generator: {optimizer: {type: torch.optim.Adam, lr: 0.01}, params: [generator]},"
        " discriminator: {optimizer: {type: torch.optim.SGD, lr: 0.1}, params: [discriminator]}}",
        "train_cfg.max_epochs=1",
    )
    state = torch.load(find_checkpoint(result["run_dir"]), weights_only=True)
    assert set(state["optim"]) == {"generator", "discriminator"}
    lines = [json.loads(line) for line in (Path(result["run_dir"]) / "log.jsonl").read_text().splitlines()]
    assert any("loss_g" in line and "loss_d" in line for line in lines)


def test_ema_is_what_is_evaluated_and_what_a_checkpoint_gives(tiny):
    result = tiny("ema={decay: 0.9}", "train_cfg.max_epochs=1")
    path = find_checkpoint(result["run_dir"])
    average, raw = model_state(path), model_state(path, averaged=False)
    assert average.keys() == raw.keys()
    assert not torch.equal(average["network.head.weight"], raw["network.head.weight"])


def test_stages_follow_each_other_and_finished_ones_are_skipped(tiny, user):
    stages = (
        "stages=[{name: first, train_cfg: {max_epochs: 1}},"
        " {name: second, train_cfg: {max_epochs: 2}, load_from: {stage: first}, optim_wrapper: {optimizer: {lr: 0.0}}}]"
    )
    result = tiny(stages, "run_dir=staged", "param_scheduler=null", "optim_wrapper.optimizer.weight_decay=0")
    assert set(result["stages"]) == {"first", "second"}
    first, second = (model_state(find_checkpoint(f"staged/stage_{i}")) for i in ("0_first", "1_second"))
    assert all(torch.equal(first[k], second[k]) for k in first)  # lr 0: the second stage began where the first ended
    stamp = Path("staged/stage_0_first/result.json").stat().st_mtime_ns
    Path("staged/stage_1_second/result.json").unlink()
    tiny(stages, "run_dir=staged", "resume=auto", "param_scheduler=null", "optim_wrapper.optimizer.weight_decay=0")
    assert Path("staged/stage_0_first/result.json").stat().st_mtime_ns == stamp
    assert Path("staged/stage_1_second/result.json").is_file()


TESTED = "test_dataloader={batch_size: 8, dataset: {type: mypoints.Points, count: 5, seed: 7, augment: false}}"
JUDGE = "{type: core.metrics.TorchMetrics, metrics: {a: {type: torchmetrics.classification.MulticlassAccuracy, %s}}}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("test_evaluator=" + JUDGE % "num_classes: -1", "larger than 1"),
        ("test_dataloader.dataset.count=-1", "upper bound"),
        ("test_dataloader.batch_size=0", "batch_size"),
    ],
)
def test_a_wrong_test_split_ends_a_run_before_it_trains(tiny, wrong, message):
    with pytest.raises(Exception, match=message):
        tiny(TESTED, wrong, "run_dir=here")
    assert not Path("here/log.jsonl").exists() and not Path("here/checkpoints").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("test_evaluator: " + JUDGE % "num_classes: -1", "larger than 1"),
        ("test_dataloader: {dataset: {count: -1}}", "upper"),
    ],
)
def test_a_wrong_test_split_of_a_later_stage_ends_the_first_before_it_trains(tiny, wrong, message):
    with pytest.raises(Exception, match=message):
        tiny(TESTED, f"stages=[{{name: first}}, {{name: second, {wrong}}}]", "run_dir=staged")
    assert not Path("staged/stage_0_first").exists()


def test_a_test_split_is_built_once_and_does_not_change_training(tiny, monkeypatch):
    import mypoints

    built, make, judge = [], mypoints.Points.__init__, mypoints.Accuracy.__init__

    def note(self, *args, **options):
        built.append(options.get("seed"))
        make(self, *args, **options)

    def draw(self):
        judge(self)
        torch.rand(3)

    monkeypatch.setattr(mypoints.Points, "__init__", note)
    monkeypatch.setattr(mypoints.Accuracy, "__init__", draw)
    common = ("train_cfg.max_epochs=1", "model.network.dropout=0.2")
    stages = "stages=[{name: first}, {name: second}]"
    alone, tested, staged = tiny(*common), tiny(*common, TESTED), tiny(*common, TESTED, stages)
    assert built.count(7) == 1 + 2
    assert tested["metrics"]["seen"] == 5 and staged["stages"]["second"]["seen"] == 5
    one, two, three = (weights(result) for result in (alone, tested, staged))
    assert all(torch.equal(one[k], two[k]) and torch.equal(one[k], three[k]) for k in one)


def test_best_checkpoint_is_kept_and_can_be_evaluated(tiny, user):
    result = tiny("checkpoint.metric=accuracy", "checkpoint.keep_last=1", "train_cfg.max_epochs=3")
    folder = Path(result["run_dir"]) / "checkpoints"
    assert 1 <= len(list(folder.glob("step_*.pt"))) <= 2
    again = evaluate(cfg(user), find_checkpoint(result["run_dir"]), split="val")
    assert again["accuracy"] == result["val_metrics"]["accuracy"]


def test_selection_on_the_test_split_must_be_said(tiny):
    same = ["test_dataloader={batch_size: 8, dataset: {type: mypoints.Points, count: 21, seed: 1, augment: false}}"]
    with pytest.raises(ConfigError, match="select_on_test"):
        tiny(*same, "evaluate=best", "checkpoint.metric=accuracy")
    result = tiny(*same, "evaluate=best", "checkpoint.metric=accuracy", "select_on_test=true", "train_cfg.max_epochs=1")
    assert result["metrics"]["seen"] == 21


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_samples(tiny, user):
    with pytest.raises(NonFiniteLoss) as caught:
        tiny("train_dataloader.dataset.nan=[7]", "run_dir=broken", "checkpoint.every_steps=1")
    message = str(caught.value)
    assert "step" in message and "loss_ce=nan" in message and "point7" in message
    saved = next(Path("broken/debug").glob("nonfinite_step_*.pt"))
    state = torch.load(saved, weights_only=True)
    assert "point7" in state["batch"]["sample_id"] and state["model"]


def test_broken_samples_raise_with_their_name_or_are_skipped_and_counted(tiny):
    with pytest.raises(Exception, match=r"Points.*3.*cannot read point 3"):
        tiny("train_dataloader.dataset.bad=[3]", "train_cfg.max_epochs=1")
    result = tiny("train_dataloader.dataset.bad=[3]", "train_dataloader.on_error=skip", "train_cfg.max_epochs=2")
    assert result["skipped_samples"] == 2
    assert "cannot read point 3" in (Path(result["run_dir"]) / "run.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.type=mypoints.Clasify"], "did you mean 'Classify'"),
        (["model.network.type=mypoint.Net"], "there is no package 'mypoint': did you mean 'mypoints'"),
        (["+model.network.widht=3"], "did you mean 'width'"),
        (["modle.network.width=3"], "did you mean model.network.width"),
        (["optim_wrapper.optimizer.type=torch.optim.AdmW"], "did you mean 'AdamW'"),
        (["runtime=cpuu"], "did you mean cpu"),
        (["+optim_wraper={}"], "did you mean"),
        (["train_cfg.max_epochs=null"], "exactly one of max_epochs and max_steps"),
        (["checkpoint.metric=acuracy", "train_cfg.max_epochs=1"], "is none of \\['accuracy', 'seen'\\]"),
        (["model.frozen=[network.sten]"], "did you mean 'network.stem'"),
        (["load_from=nothing.pt"], "no weights file nothing.pt"),
    ],
)
def test_what_cannot_be_meant_is_answered_with_the_nearest_names(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)


def test_an_import_error_inside_a_users_package_shows(tiny, user):
    (user / "mybroken.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ImportError, match="a_package_that_is_not_there"):
        tiny("model.network.type=mybroken.Net")
    sys.modules.pop("mybroken", None)


def test_a_new_run_does_not_write_over_an_old_one(tiny):
    tiny("run_dir=here", "train_cfg.max_epochs=1")
    with pytest.raises(ConfigError, match="resume=auto"):
        tiny("run_dir=here", "train_cfg.max_epochs=1")


def test_initial_weights_into_a_part_and_a_mismatch_lists_what_differs(tiny):
    first = tiny("train_cfg.max_epochs=1")
    path = find_checkpoint(first["run_dir"])
    second = tiny(
        f"load_from={{path: {path}, into: network, prefix: network.}}",
        "train_cfg.max_epochs=1",
        "optim_wrapper.optimizer.lr=0",
        "optim_wrapper.optimizer.weight_decay=0",
        "param_scheduler=null",
    )
    assert all(torch.equal(v, weights(second)[k]) for k, v in weights(first).items())
    with pytest.raises(Exception, match=r"stem\.weight"):
        tiny(f"load_from={path}", "model.network.width=8")


def test_a_batch_passes_eight_files_of_core_from_loader_to_loss_and_back(tiny):
    """Whose functions are called with the batch, hooks that look on aside; the training loop lists the same files."""
    root, seen = Path(train_loop.__file__).parents[2], set()

    def look(frame, event, arg):
        file = Path(frame.f_code.co_filename)
        if event != "call" or root not in file.parents or frame.f_code.co_name.startswith(("before_", "after_", "<")):
            return
        for value in frame.f_locals.values():
            data = getattr(value, "data", None) if isinstance(value, LoadedBatch) else value
            if isinstance(data, dict) and isinstance(data.get("image"), torch.Tensor) and data["image"].ndim == 2:
                seen.add("core." + ".".join(file.relative_to(root).with_suffix("").parts))

    sys.setprofile(look)
    try:
        tiny("train_cfg.max_epochs=1", "runtime.sanity_batches=0", "val_dataloader=null", "val_evaluator=null")
    finally:
        sys.setprofile(None)
    listed = re.findall(r"^\d\. (core\.[\w.]+)", train_loop.__doc__, flags=re.M)
    assert len(listed) <= 8 and seen <= set(listed), seen - set(listed)
    assert {"core.data.loading.prefetch", "core.engine.loops.train", "core.trainer"} <= seen
