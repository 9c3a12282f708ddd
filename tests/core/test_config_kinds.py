"""Values of a wrong kind: one line that names the key, the value and what it takes, before anything is trained."""

import copy
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny_experiment import train
from torch import nn

from core.config import compose, to_dict
from core.config.command.cli import stop
from core.config.key import config_key
from core.config.kinds import Built, Range, complaint, hints_of, suits
from core.config.registry import build, check
from core.engine.launch import build_trainer, run
from core.errors import ConfigError, VitrineError

NETS = '''
from collections.abc import Sequence

from torch import nn

from mypoints import Net


class Hinted(Net):
    """A network whose constructor says what it takes."""

    def __init__(self, width: int = 16, dropout: float = 0.0, depth: int = 2, sizes: Sequence[int] = (),
                 act: nn.Module | None = None):
        super().__init__(width, dropout, depth)


class Careless(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = {}
        self.table["missing"]
'''


@pytest.fixture(scope="module")
def plain(user):
    """The resolved config of the tiny experiment."""
    (user / "mynets.py").write_text(NETS)
    words = ["experiment=mine/tiny", "runtime=cpu", "train_cfg.max_epochs=1", "run_dir=here"]
    return to_dict(compose(words, config_dir=user / "configs"))


@pytest.fixture
def changed(plain, user, tmp_path, monkeypatch):
    """The config with overrides laid over it without Hydra, whose own checks are tested elsewhere."""
    monkeypatch.syspath_prepend(str(user))
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        cfg = copy.deepcopy(plain)
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            *path, last = override.key_or_group.split(".")
            node = cfg
            for part in path:
                node = node[part]
            if override.is_delete():
                del node[last]
            else:
                node[last] = override.value()
        return cfg

    return call


WHOLE, COUNT = "a whole number from 0 on", "a whole number from 1 on"
WRONG = [
    # null, for every key that needs something
    ("name=null", "name", "there is no name"),
    ("seed=null", "seed", "null does not suit, it takes a whole number from 0 to 4294967295"),
    ("runs_dir=null", "runs_dir", "null does not suit, it takes a text"),
    ("evaluate=null", "evaluate", "one of last, best"),
    ("select_on_test=null", "select_on_test", "true or false"),
    ("stages=null", "stages", "null does not suit, it takes a list of mappings"),
    ("components=null", "components", "null does not suit, it takes a mapping of names to mappings"),
    ("vars=null", "vars", "a mapping of names"),
    ("log_every=null", "log_every", COUNT),
    ("model=null", "model", "there is no model: choose an experiment"),
    ("train_dataloader=null", "train_dataloader", "set train_cfg=null as well"),
    ("train_cfg=null", "train_cfg", "train_cfg.max_epochs=10"),
    ("optim_wrapper=null", "optim_wrapper", "the train_dataloader needs an optimizer"),
    ("val_evaluator=null", "val_evaluator", "the val_dataloader needs one"),
    ("checkpoint=null", "checkpoint", "it takes a mapping"),
    ("runtime=null", "runtime", "it takes a mapping"),
    ("train_dataloader.dataset=null", "train_dataloader.dataset", "a mapping with a type"),
    ("train_dataloader.batch_size=null", "train_dataloader.batch_size", COUNT),
    ("optim_wrapper.optimizer=null", "optim_wrapper.optimizer", "a mapping with a type"),
    ("stages=[{name: a, model: null}]", "stages.0.model", "a mapping with a type"),
    # texts, numbers and lists in each other's places
    ("train_cfg.max_epochs=two", "train_cfg.max_epochs", f"two is a text, it takes {WHOLE}"),
    ("train_cfg.max_epochs=1.5", "train_cfg.max_epochs", f"1.5 is a number, it takes {WHOLE}"),
    ("train_cfg.max_epochs=-1", "train_cfg.max_epochs", WHOLE),
    ("train_cfg.val_every_epochs=often", "train_cfg.val_every_epochs", WHOLE),
    ("train_cfg=3", "train_cfg", "3 is a whole number, it takes a mapping"),
    ("val_cfg=x", "val_cfg", "a mapping or null"),
    ("val_cfg={splt: x}", "val_cfg", "did you mean 'split'"),
    ("optim_wrapper.optimizer.lr=abc", "optim_wrapper.optimizer.lr", "abc is a text, torch.optim.AdamW takes a number"),
    ("optim_wrapper.optimizer.lr=-1", "optim_wrapper.optimizer", "ValueError: Invalid learning rate: -1"),
    ("optim_wrapper.optimizer.betas=[0.9]", "optim_wrapper.optimizer.betas", "a list of 2"),
    ("optim_wrapper.optimizer=adam", "optim_wrapper.optimizer", "a mapping with a type"),
    ("optim_wrapper.accumulative_counts=x", "optim_wrapper.accumulative_counts", "core.OptimWrapper takes a whole"),
    ("optim_wrapper.accumulative_counts=0", "optim_wrapper", "accumulative_counts must be a whole number from 1 on"),
    ("+optim_wrapper.clip_grad=3", "optim_wrapper.clip_grad", "core.OptimWrapper takes a mapping or null"),
    ("param_scheduler=none", "param_scheduler", "none is a text, it takes a mapping or a list"),
    ("param_scheduler=[{type: core.Schedule},2]", "param_scheduler.1", "it takes a mapping with a type"),
    ("param_scheduler={generator: 3}", "param_scheduler.generator", "a mapping with a type"),
    ("param_scheduler.warmup=[1]", "param_scheduler.warmup", "core.Schedule takes a number or a text or null"),
    ("param_scheduler.kind=nonsense", "param_scheduler", "schedule kind 'nonsense' does not exist"),
    ("train_dataloader.batch_size=0", "train_dataloader.batch_size", f"0 does not suit, it takes {COUNT}"),
    ("train_dataloader.batch_size=four", "train_dataloader.batch_size", f"four is a text, it takes {COUNT}"),
    ("train_dataloader.num_workers=-1", "train_dataloader.num_workers", WHOLE),
    ("train_dataloader.dataset=points", "train_dataloader.dataset", "a mapping with a type"),
    ("train_dataloader.dataset.count=-4", "train_dataloader.dataset", "mypoints.Points(count=-4, slow=0.0, "),
    ("train_dataloader.dataset.count=many", "train_dataloader.dataset", "TypeError"),
    ("train_dataloader.dataset={type: torch.nn.ReLU}", "train_dataloader.dataset", "is not a map-style data set"),
    ("train_dataloader.on_error=ignore", "train_dataloader.on_error", "one of raise, skip"),
    ("+train_dataloader.drop_last=perhaps", "train_dataloader.drop_last", "true or false"),
    ("+train_dataloader.sampler=random", "train_dataloader.sampler", "a mapping or null"),
    ("+train_dataloader.sampler={repeats: x}", "train_dataloader.sampler.repeats", "core.data.TrainSampler takes"),
    ("+train_dataloader.prefetch_factor=0", "train_dataloader.prefetch_factor", COUNT),
    ("+train_dataloader.timeout=-1", "train_dataloader.timeout", "a number from 0 on"),
    ("+train_dataloader.batchsize=3", "train_dataloader", "has no key 'batchsize': did you mean 'batch_size'"),
    ("val_dataloader.batch_size=[8]", "val_dataloader.batch_size", f"[8] is a list, it takes {COUNT}"),
    ("test_dataloader=[{batch_size: 8, dataset: {type: mypoints.Points}}]", "test_dataloader", "it takes a mapping"),
    ("test_dataloader=3", "test_dataloader", "it takes a mapping"),
    ("val_evaluator=accuracy", "val_evaluator", "accuracy is a text, it takes a mapping or a list"),
    ("val_evaluator=[1]", "val_evaluator.0", "1 is a whole number, it takes a mapping with a type"),
    ("val_evaluator={type: torch.nn.ReLU}", "val_evaluator", "an evaluator takes metrics"),
    ("log_every=0", "log_every", f"0 does not suit, it takes {COUNT}"),
    ("log_every=often", "log_every", f"often is a text, it takes {COUNT}"),
    ("stages=two", "stages", "two is a text, it takes a list of mappings"),
    ("stages=[1]", "stages.0", "1 is a whole number, it takes a mapping"),
    ("stages=[{name: a, train_cfg: {max_epochs: two}}]", "stages.0.train_cfg.max_epochs", "two is a text"),
    ("stages=[{name: a}, {name: b, trian_cfg: {}}]", "stages.1", "no key 'trian_cfg' here; did you mean train_cfg"),
    ("stages=[{name: a, train_dataloader: null}]", "stages.0", "train_dataloader=null: nothing is trained"),
    ("components=[depth]", "components", "[depth] is a list, it takes a mapping"),
    ("components={depth: 3}", "components.depth", "3 is a whole number, it takes a mapping"),
    ("+checkpoint.evry_steps=2", "checkpoint", "takes no argument 'evry_steps': did you mean 'every_steps'"),
    ("checkpoint.every_steps=often", "checkpoint.every_steps", "core.CheckpointHook takes a whole number"),
    ("checkpoint.keep_last=-1", "checkpoint.keep_last", COUNT),
    ("checkpoint.keep_best=x", "checkpoint.keep_best", WHOLE),
    ("checkpoint.metric=3", "checkpoint.metric", "core.CheckpointHook takes a text"),
    ("checkpoint.metric={a: up}", "checkpoint.metric.a", "up does not suit, core.CheckpointHook takes one of higher"),
    ("checkpoint.direction=up", "checkpoint.direction", "one of higher, lower"),
    ("checkpoint=false", "checkpoint", "false is a truth value, it takes a mapping"),
    ("seed=abc", "seed", "abc is a text, it takes a whole number"),
    ("seed=-1", "seed", "-1 does not suit, it takes a whole number from 0"),
    ("seed=99999999999", "seed", "99999999999 does not suit"),
    ("ema=true", "ema", "true is a truth value, it takes a mapping or null"),
    ("ema={decay: high}", "ema.decay", "core.EMAHook takes a number or null"),
    ("ema={dcay: 0.9}", "ema", "did you mean 'decay'"),
    ("ema={decay: 2}", "ema", "EMA decay 2 is not between 0 and 1"),
    ("custom_hooks=x", "custom_hooks", "a list of {type: ...}"),
    ("custom_hooks={mine: {type: torch.nn.ReLU}}", "custom_hooks.mine", "builds a ReLU, which is not an mmengine Hook"),
    ("custom_hooks=[{type: core.EMAHook, decay: x}]", "custom_hooks.0.decay", "core.EMAHook takes a number"),
    ("load_from=3", "load_from", "a text or a mapping or a list"),
    ("load_from={into: network}", "load_from", "either a path, or the stage"),
    ("load_from=[{path: a.pt, ignore: 3}]", "load_from.0.ignore", "3 is a whole number"),
    ("load_from={path: a.pt, intoo: x}", "load_from", "did you mean 'into'"),
    ("load_from=nothing.pt", "load_from", "no weights file nothing.pt"),
    ("evaluate=nonsense", "evaluate", "nonsense does not suit, it takes one of last, best"),
    ("visualizer=tensorboard", "visualizer", "a mapping or null"),
    ("visualizer.vis_backends=tensorboard", "visualizer.vis_backends", "a list of mappings with a type"),
    ("visualizer.vis_backends=[{type: core.JsonLine}]", "visualizer.vis_backends.0", "did you mean 'JsonLines'"),
    ("model=net", "model", "net is a text, it takes a mapping with a type"),
    ("model={network: {depth: 1}}", "model", "a mapping with a type"),
    ("model.network=net", "model", "Classify has no parameters to train, made of {type: "),
    ("model.network.width=-3", "model.network", "mypoints.Net(width=-3, dropout=0.0, depth=2) failed: RuntimeError"),
    ("model.network={type: mynets.Hinted, width: wide}", "model.network.width", "mynets.Hinted takes a whole number"),
    ("model.network={type: mynets.Hinted, width: null}", "model.network.width", "null does not suit, mynets.Hinted"),
    ("model.network={type: mynets.Hinted, dropout: a}", "model.network.dropout", "mynets.Hinted takes a number"),
    ("model.network={type: mynets.Hinted, sizes: [1, a]}", "model.network.sizes.1", "a is a text, mynets.Hinted"),
    ("model.network={type: mynets.Hinted, sizes: 3}", "model.network.sizes", "3 is a whole number, mynets.Hinted"),
    ("model.network={type: mynets.Hinted, act: relu}", "model.network.act", "{type: ...} of a Module or null"),
    ("model.network={type: mynets.Careless, width: 3}", "model.network", "failed: KeyError: 'missing' ("),
    ("~model.network", "model", "missing 1 required positional argument: 'network'"),
    ("model={type: torch.nn.Linear, in_features: 3, out_features: 2}", "model", "is not a core.Trainer"),
    ("model.frozen=network.stem", "model", "frozen=network.stem: a list of names"),
    ("runtime.device=gpu", "runtime.device", "auto, cpu or cuda"),
    ("runtime.precision=half", "runtime.precision", "one of fp32, bf16, fp16"),
    ("runtime.threads=-1", "runtime.threads", WHOLE),
    ("runtime.threads=all", "runtime.threads", WHOLE),
    ("runtime.compile=fast", "runtime.compile", "true or false or a mapping"),
    ("runtime.fsdp=true", "runtime.fsdp", "a mapping or null"),
    ("runtime.timeout_s=soon", "runtime.timeout_s", "a number from 1 on"),
    ("runtime.debug=maybe", "runtime.debug", "true or false"),
    ("select_on_test=maybe", "select_on_test", "true or false"),
    ("runs_dir=3", "runs_dir", "3 is a whole number, it takes a text"),
    ("name=[a]", "name", "[a] is a list, it takes a text"),
    ("objective={a: 1}", "objective", "the name of a metric"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "key", "message"), WRONG, ids=[case[0] for case in WRONG])
def test_a_value_of_a_wrong_kind_is_one_line_with_its_key(changed, override, key, message):
    with pytest.raises(ConfigError) as caught:
        run(changed(override))
    text = str(caught.value)
    assert message in text
    assert re.search(rf"config key '{re.escape(key)}'|^(there is no )?{re.escape(key)}\b|\b{re.escape(key)}=", text), (
        text
    )
    assert "\n" not in text and not Path("here/checkpoints").exists()


@pytest.mark.parametrize(
    "override",
    [
        "paper=null", "resume=null", "objective=null", "val_cfg=null", "param_scheduler=null", "test_evaluator=null",
        "ema=null", "custom_hooks=null", "load_from=null", "load_from=[]", "visualizer=null", "val_dataloader=null",
        "optim_wrapper.optimizer.lr=1", "optim_wrapper.optimizer.betas=[0.8,0.9]", "train_cfg.max_epochs=1.0",
        "checkpoint.keep_last=null", "~objective", "model.network={type: mynets.Hinted, dropout: 0, sizes: [1]}",
        "train_dataloader.dataset.augment=1", "stages=[]", "components={}", "runtime.threads=null",
    ],
)  # fmt: skip
def test_a_value_that_can_be_meant_runs(changed, override):
    assert run(changed(override))["status"] == "finished"


@pytest.mark.parametrize(
    ("word", "message"), [("runtime=null", "no such runtime"), ("checkpoint.evry_steps=2", "every_steps")]
)
def test_hydra_is_asked_with_the_same_care(user, word, message):
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=mine/tiny", word], config_dir=user / "configs")


def test_the_length_can_be_taken_away(user):
    assert "train_cfg" not in compose(["experiment=mine/tiny", "~train_cfg"], config_dir=user / "configs")


def test_the_model_alone_is_checked_alike(changed):
    for override, message in (
        ("model=net", "config key 'model': net is a text"),
        ("model.network.width=-3", "width=-3"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_trainer(changed(override))


def test_the_cause_and_the_place_stay_findable(changed, capsys, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        run(changed("model.network={type: mynets.Careless, width: 3}"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert re.search(r"mynets\.py:\d+; VITRINE_TRACEBACK=1 shows the traceback", str(caught.value))
    for wanted in ("0", "1"):
        monkeypatch.setenv("VITRINE_TRACEBACK", wanted)
        with pytest.raises(SystemExit):
            stop(caught.value)
        said = capsys.readouterr().err
        assert ('self.table["missing"]' in said) == (wanted == "1")
        assert said.splitlines()[-1].startswith("error: config key 'model.network': mynets.Careless(width=3) failed")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("no"), r"^config key 'a\.b': no$"),
        (
            ValueError("first line\nsecond"),
            r"^config key 'a\.b': ValueError: first line \([^\n]*shows the traceback\)$",
        ),
        (ConfigError("a.b=3: no"), r"^a\.b=3: no$"),
        (ConfigError("a.b.c is not"), r"^a\.b\.c is not$"),
        (ConfigError("a.bc is not"), r"^config key 'a\.b': a\.bc is not$"),
    ],
)
def test_a_key_is_added_on_the_way_out(error, message):
    with pytest.raises(ConfigError, match=message), config_key("a"), config_key(""), config_key("b"):
        raise error


@pytest.mark.parametrize("kind", [ImportError, KeyboardInterrupt, VitrineError])
def test_errors_that_are_not_the_configs_pass(kind):
    with pytest.raises(kind, match=r"^as it is$"), config_key("a"):
        raise kind("as it is")


def test_nested_parts_are_named_from_the_outside():
    linear = {"type": "torch.nn.Linear", "in_features": 2, "out_features": -1}
    with pytest.raises(ConfigError, match=r"^config key 'parts\.1\.layer': torch\.nn\.Linear\(in_features=2, out_f"):
        build({"parts": [{"layer": 1}, {"layer": linear}]})
    with pytest.raises(ConfigError, match=r"^config key 'm\.parts\.0\.bias': maybe is a text, torch\.nn\.Linear takes"):
        check({"parts": [{**linear, "bias": "maybe"}]}, "m")


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True), (1.0, int, True), (1.5, int, False), (True, int, False), (True, float, False),
        (1, bool, True), ("1", int, False), (None, int, False), (None, int | None, True),
        ("a", Literal["a", "b"], True), ("c", Literal["a", "b"], False), (True, Literal[1], False),
        ([1, 2], tuple[int, int], True), ([1], tuple[int, int], False), ([1, 2, 3], tuple[int, ...], True),
        ("abc", list[str], False), (["a"], list[str], True), ({"a": 1}, dict[str, int], True),
        ({"a": "x"}, dict[str, int], False),
        ([1], dict, False), ("cpu", torch.device, True), ("f", torch.Tensor, False), (3, nn.Module, False),
        (nn.ReLU(), nn.Module, True), (nn.ReLU(), int, True), ({"type": "x"}, int, True), ("Unknown", "Unknown", True),
        (5, Annotated[int, Range(1, 4)], False), (4, Annotated[int, Range(1, 4)], True), ({"type": "x"}, Built, True),
        ({"a": 1}, Built, False), (None, Annotated[int, Range(1)] | None, True), ("p", Path, True), (3, Path, False),
    ],
)  # fmt: skip
def test_what_suits_a_hint(value, hint, fits):
    assert suits(value, hint) is fits
    assert fits or complaint(value, hint)


def test_hints_that_only_type_checkers_can_read_leave_the_others(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nowhere import Thing\n\n\n"
        "def make(a: Thing, b: int, c, *, d: str = 'x'):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import half

    hints = hints_of(half.make)
    assert {name: hint for name, (hint, _) in hints.items()} == {"b": int, "d": str}


@pytest.mark.child
def test_the_tool_prints_one_line(user):
    done = train(user, "train_cfg.max_epochs=two", check=False)
    wanted = "error: config key 'train_cfg.max_epochs': two is a text, it takes a whole number from 0 on or null\n"
    assert (done.returncode, done.stderr) == (2, wanted)
