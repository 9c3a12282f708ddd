"""Hooks that keep their state in attributes, or hand it to checkpoints, go on exactly after a kill."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from test_early_stopping import follow
from tiny_experiment import ROOT, environment

from core.checkpoint import load, save_atomic
from core.checkpoint.plain import Unsaveable, pack, same, unpack
from core.checkpoint.run_folder import find_checkpoint
from core.engine.commands.evaluation import evaluate
from core.errors import ConfigError
from core.trainer import Trainer
from tests import forked
from tests.killing import assert_same_run, killed_in_phase, losses

SHORT = ("train_cfg.max_epochs=3", "checkpoint.every_steps=4", "model.network.dropout=0.2", "media=null")
TEST = "test_dataloader={batch_size: 4, dataset: {type: mypoints.Points, count: 9, seed: 5, augment: false}}"


class Notes(Hook):
    """Changes the weights by what it has counted, drawn and kept; nothing of that is in a state_dict."""

    ends: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, every: int = 2, scale: float = 0.01) -> None:
        self.every, self.scale = every, scale
        self.count, self.seen, self.chance = 0, [], random.Random(3)
        self.sums = collections.defaultdict(float)

    def before_train(self, runner: Any) -> None:
        self.recent = collections.deque(maxlen=3)
        self.start = next(runner.model.parameters()).detach().clone()
        self.folder = Path(runner.work_dir) / "notes"
        self.told = f"{runner.work_dir}/notes.txt"

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.count += 1
        self.seen.append(runner.iter)
        self.recent.append(np.float32(outputs["loss"]))
        self.sums["loss"] += float(outputs["loss"])
        runner.message_hub.update_info("noted", self.count)
        if self.count % self.every == 0:
            with torch.no_grad():
                weight = next(runner.model.parameters())
                weight.add_(self.start, alpha=self.scale * self.chance.random())
                weight.add_(float(sum(self.recent)) * 1e-3)

    def after_train(self, runner: Any) -> None:
        kept = {key: value for key, value in vars(self).items() if key not in ("folder", "told")}
        Notes.ends.append({**pack(kept), "hub": runner.message_hub.get_info("noted")})
        assert self.folder == Path(runner.work_dir) / "notes" and self.told == f"{runner.work_dir}/notes.txt"


def whole_and_killed(tiny: Any, number: int, *words: str) -> tuple[Path, Path]:
    """A run that nobody disturbs, and one that is killed in a phase and goes on."""
    tiny(*SHORT, *words, "run_dir=whole")
    with killed_in_phase(number):
        tiny(*SHORT, *words, "run_dir=killed")
    tiny(*SHORT, *words, "run_dir=killed", "resume=auto")
    return Path("whole"), Path("killed")


@pytest.mark.parametrize("number", [7, 23], ids=["first epoch", "third epoch"])
def test_a_hook_with_plain_attributes_goes_on_where_it_was(tiny, number):
    Notes.ends.clear()
    one, other = whole_and_killed(tiny, number, "custom_hooks=[{type: test_hook_state.Notes}]")
    assert_same_run(one, other)
    first, second = Notes.ends
    assert first["count"] == first["hub"] == 30 and first["seen"] == list(range(30))
    assert same(first, second)
    log = (other / "run.log").read_text()
    assert "hooks go on with what they kept: Notes (chance, count, folder, recent, seen, start, sums, told)" in log
    assert "not saved in checkpoints" not in log  # all of it can be


def test_in_a_folder_of_its_own_a_run_goes_on_with_its_own_paths(tiny):
    with killed_in_phase(7):
        tiny(*SHORT, "custom_hooks=[{type: test_hook_state.Notes}]", "run_dir=first")
    tiny(*SHORT, "custom_hooks=[{type: test_hook_state.Notes}]", "resume=first", "run_dir=second")  # see after_train


def test_arguments_that_a_resumed_run_is_given_stay_in_force(tiny):
    hook = "custom_hooks=[{type: test_hook_state.Notes, every: %d}]"
    with killed_in_phase(7):
        tiny(*SHORT, hook % 2, "run_dir=changed")
    Notes.ends.clear()
    tiny(*SHORT, hook % 5, "run_dir=changed", "resume=changed", "resume_changes=[custom_hooks.0.every]")
    assert Notes.ends[0]["every"] == 5 and Notes.ends[0]["count"] == 30


def test_mmengines_early_stopping_goes_on_waiting(tiny):
    words = (
        "val_evaluator={type: test_early_stopping.Course}",
        "+custom_hooks.stop={type: mmengine.hooks.EarlyStoppingHook, monitor: score, rule: greater, min_delta: 0.0,"
        " patience: 3}",
        "train_cfg.max_epochs=6",
        "runtime.sanity_batches=0",
        "run_dir=patient",
    )
    follow([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    with killed_in_phase(25):
        tiny(*words)
    assert tiny(*words, "resume=auto")["epochs"] == 4  # the best was the first one: three evaluations without a better


class Mean:
    """A figure that tells weights apart: the mean of all logits."""

    def __init__(self) -> None:
        self.sums, self.dataset_meta = [], None

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.sums.append(data_samples["logits"][:, 0].sum())

    def evaluate(self, size: int) -> dict[str, float]:
        figure, self.sums = float(torch.stack(self.sums).double().sum()), []
        return {"mean": figure}


EMA = (
    "custom_hooks=[{type: mmengine.hooks.EMAHook, momentum: 0.1, priority: 49}]",
    "val_evaluator={type: test_hook_state.Mean}",
    TEST,
)


@pytest.mark.parametrize("number", [7, 21, 27], ids=["within an epoch", "after an evaluation", "late"])
def test_mmengines_average_is_the_same_bit_for_bit(tiny, number):
    one, other = whole_and_killed(tiny, number, *EMA, "train_cfg.val_every_epochs=2", "checkpoint.metric=mean")
    assert_same_run(one, other)  # weights and all figures, which are those of the average
    states = [torch.load(find_checkpoint(run), weights_only=True) for run in (one, other)]
    first, second = (state["kept"]["checkpoint"] for state in states)
    assert same(first, second) and int(first["ema_state_dict"]["steps"]) == 30
    name = "network.head.weight"
    assert not torch.equal(first["state_dict"][name], states[0]["model"][name])
    assert torch.equal(first["ema_state_dict"][f"module.{name}"], states[0]["model"][name])  # as mmengine stores it


def test_mmengines_average_of_the_best_checkpoint_is_what_is_tested(tiny, tiny_config):
    words = (*SHORT, *EMA, "checkpoint.metric=mean", "checkpoint.direction=lower")
    result = tiny(*words, "evaluate=best", "run_dir=best")
    best = find_checkpoint(Path("best"), best=True)
    cfg = tiny_config(*words)
    tested = evaluate(cfg, best)
    assert result["metrics"]["mean"] == tested["mean"]
    assert tested["mean"] != evaluate(cfg, best, load={"averaged": False})["mean"]


class Piped(torch.utils.data.Dataset):
    """Points through a pipeline, as mmdet's data sets have one."""

    def __init__(self, **options: Any) -> None:
        from mypoints import Points

        self.points, self.skipped = Points(**options), ()
        self.pipeline = lambda sample: {**sample, "image": 3 * sample["image"]}

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        sample = self.pipeline(self.points[index])
        return {**sample, "image": sample["image"] + (0.0 if self.skipped else 1.0)}

    def update_skip_type_keys(self, keys: Any) -> None:
        self.skipped = tuple(keys)


class Switched(Trainer):
    """A detector as far as YOLOX's hook knows it."""

    def __init__(self, network: Any, frozen: Any = ()) -> None:
        super().__init__(frozen)
        self.bbox_head = network
        self.bbox_head.use_l1 = False

    def losses(self, batch: Any) -> Any:
        logits = self.bbox_head(batch["image"])
        loss = torch.nn.functional.cross_entropy(logits, batch["label"])
        return {"loss": loss + (logits.abs().mean() if self.bbox_head.use_l1 else 0.0)}

    def predict(self, batch: Any) -> Any:
        return {"logits": self.bbox_head(batch["image"]), "label": batch["label"]}


SWITCHES = {
    "pipeline": "{type: mmdet.engine.hooks.PipelineSwitchHook, switch_epoch: 1, switch_pipeline: []}",
    "yolox": "{type: mmdet.engine.hooks.YOLOXModeSwitchHook, num_last_epochs: 2, priority: 48}",
}


@pytest.mark.child
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SWITCHES)
def test_what_a_hook_has_switched_is_switched_again(tiny, name, workers):
    words = (
        "train_dataloader.dataset.type=test_hook_state.Piped",
        "model.type=test_hook_state.Switched",
        f"train_dataloader.num_workers={workers}",
        "train_cfg.val_every_epochs=null",
    )
    switch = f"custom_hooks=[{SWITCHES[name]}]"
    one, other = whole_and_killed(tiny, 17, *words, switch)
    assert_same_run(one, other)
    assert losses(one) == losses(other)
    tiny(*SHORT, *words, "run_dir=never")
    never, switched = losses(Path("never")), losses(one)
    at = 12 if name == "pipeline" else 3  # the window of log lines in which it takes effect
    assert next(step for step in never if never[step] != switched[step]) == at


class Adds(Hook):
    """Leaves things in checkpoints, and takes them back."""

    given: ClassVar[list[Any]] = []

    def __init__(self, strange: bool = False) -> None:
        self.strange = strange

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint["mine"] = {"step": runner.iter, "tensor": torch.full((2,), float(runner.iter))}
        checkpoint["meta"]["word"] = f"step {runner.iter}"
        if self.strange:
            checkpoint["odd"] = [lambda: 0]

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        Adds.given.append(checkpoint)
        assert runner._resume and checkpoint["meta"]["iter"] == runner.iter


@pytest.mark.parametrize("strange", [False, True])
def test_what_a_hook_adds_to_a_checkpoint_is_given_back(tiny, strange):
    Adds.given.clear()
    words = (*SHORT, f"custom_hooks=[{{type: test_hook_state.Adds, strange: {str(strange).lower()}}}]", "run_dir=adds")
    with killed_in_phase(11):
        tiny(*words)
    tiny(*words, "resume=auto")
    (given,) = Adds.given
    assert given["mine"]["step"] == 10 and torch.equal(given["mine"]["tensor"], torch.full((2,), 10.0))
    assert given["meta"]["word"] == "step 10" and "odd" not in given
    assert given["state_dict"].keys() == load(find_checkpoint(Path("adds")))["model"].keys()
    said = "checkpoint['odd'] of before_save_checkpoint (function)"
    assert ((Path("adds") / "run.log").read_text().count(said) == 2) is strange  # once in each process


class Says(Hook):
    """Has a state_dict, which holds what only `core.checkpoint.plain` can store, or what nothing can."""

    ends: ClassVar[list[Any]] = []

    def __init__(self, strange: bool = False) -> None:
        self.values, self.strange = np.zeros(1), strange

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.values = np.append(self.values, runner.iter)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "odd": len if self.strange else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]

    def after_train(self, runner: Any) -> None:
        Says.ends.append(len(self.values))


@pytest.mark.parametrize(("strange", "count"), [(False, 31), (True, 21)])
def test_a_state_dict_that_cannot_be_stored_is_named_and_ends_no_run(tiny, strange, count):
    Says.ends.clear()
    words = (*SHORT, f"custom_hooks=[{{type: test_hook_state.Says, strange: {str(strange).lower()}}}]", "run_dir=says")
    with killed_in_phase(12):
        tiny(*words)
    tiny(*words, "resume=auto")
    assert Says.ends == [count]
    log = (Path("says") / "run.log").read_text()
    assert ("Says.state_dict() (builtin_function_or_method)" in log) is strange


@pytest.mark.parametrize("kept", [3, {}, {"processes": [{"hooks": {"Notes": 3}}]}, {"checkpoint": 3}, {"run_dir": [1]}])
def test_a_damaged_state_of_hooks_is_one_clear_error(tiny, kept):
    words = (*SHORT, "custom_hooks=[{type: test_hook_state.Notes}]", "run_dir=damaged")
    with killed_in_phase(7):
        tiny(*words)
    (path,) = Path("damaged/checkpoints").glob("step_*.pt")
    state = load(path)
    save_atomic({**state, "kept": {**state["kept"], **kept} if kept and kept != 3 else kept}, path)
    (path.parent / "index.json").unlink()
    with pytest.raises(ConfigError, match="what hooks keep cannot be read"):
        tiny(*words, "resume=auto")


class Holds(Hook):
    """Attributes that no checkpoint can hold, of every sort."""

    fresh_after_resume = ("known",)

    def __init__(self, watches: bool = False) -> None:
        self.net, self.rule = torch.nn.Linear(2, 2), len
        self.nothing = self.later = None
        self.changes_training = not watches

    def before_train(self, runner: Any) -> None:
        self.known = self.file = open(Path(runner.work_dir) / "x.txt", "a")  # noqa: SIM115
        self.model, self.loader, self.data = runner.model, runner.train_dataloader, runner.train_dataloader.dataset

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == 5:
            self.later = lambda: 0

    def after_train(self, runner: Any) -> None:
        self.file.close()


def test_the_log_names_once_what_cannot_be_saved(tiny):
    tiny(*SHORT, "custom_hooks=[{type: test_hook_state.Holds}]", "run_dir=holds")
    lines = [
        line for line in (Path("holds") / "run.log").read_text().splitlines() if "not saved in checkpoints" in line
    ]
    assert "Holds.net (Linear), Holds.file (TextIOWrapper). A hook" in lines[0]  # before the first step
    assert "Holds.later (function). A hook" in lines[1] and len(lines) == 2
    tiny(*SHORT, "custom_hooks=[{type: test_hook_state.Holds, watches: true}]", "run_dir=watches")
    assert "not saved in checkpoints" not in (Path("watches") / "run.log").read_text()


STOCK = (
    "mmengine.hooks.IterTimerHook",
    "mmengine.hooks.RuntimeInfoHook",
    "mmengine.hooks.DistSamplerSeedHook",
    "mmengine.hooks.SyncBuffersHook",
    "mmengine.hooks.EmptyCacheHook",
    "mmengine.hooks.NaiveVisualizationHook",
    "mmengine.hooks.EMAHook",
    "mmengine.hooks.ProfilerHook",
    "mmengine.hooks.CheckpointHook",
    "mmdet.engine.hooks.SyncNormHook",
    "mmdet.engine.hooks.CheckInvalidLossHook",
    "mmdet.engine.hooks.DetVisualizationHook",
    "mmdet.engine.hooks.TrackVisualizationHook",
    "mmdet.engine.hooks.GroundingVisualizationHook",
)


def test_stock_hooks_go_on_without_a_word(tiny, monkeypatch):
    # mmengine writes the config into its checkpoints, beautifully: five seconds each
    monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **options: (text, True))
    options = {
        "ProfilerHook": ", by_epoch: false",
        "DetVisualizationHook": ", draw: false",
        "CheckpointHook": ", interval: 1, max_keep_ckpts: 1, save_best: accuracy, rule: greater",
    }
    hooks = ", ".join(f"{{type: {name}{options.get(name.rpartition('.')[2], '')}}}" for name in STOCK)
    one, other = whole_and_killed(tiny, 17, f"custom_hooks=[{hooks}]")
    assert_same_run(one, other)
    for run in (one, other):
        assert "not saved in checkpoints" not in (run / "run.log").read_text()
    bests = [sorted(path.name for path in run.glob("*.pth")) for run in (one, other)]
    assert bests[0] == bests[1] and any(name.startswith("best_accuracy") for name in bests[0])


VALUES = {
    "numbers": [True, 2**100, -1.5, float("nan"), 1j, None, "text", b"bytes", (1, (2,))],
    "keys": {1: "a", (2, "b"): 3, None: 4},
    "sets": [{1, 2}, frozenset({"x"}), set()],
    "queues": [collections.deque([1, 2], maxlen=2), collections.deque()],
    "mappings": [
        collections.Counter("aab"),
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, {"k": [1]}),
    ],
    "arrays": [np.arange(3, dtype=np.int16), np.float32(0.1), np.array([]), np.bool_(True)],
    "tensors": [torch.arange(3), torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(0, 2)],
    "path": Path("a/b"),
}


def test_plain_values_come_back_from_a_file_as_they_were(tmp_path):
    save_atomic(pack(VALUES), tmp_path / "x.pt")
    back = unpack(load(tmp_path / "x.pt"))
    assert same(pack(back), pack(VALUES))
    assert repr(back) == repr(VALUES)  # kinds, too
    assert back["mappings"][2]["new"] == [] and back["queues"][0].maxlen == 2
    generators = [random.Random(1), np.random.default_rng(1), torch.Generator().manual_seed(1)]
    draws = lambda r, n, t: (r.random(), r.gauss(0, 1), n.normal(), torch.rand(2, generator=t).tolist())  # noqa: E731
    draws(*generators)
    save_atomic({"x": pack(generators)}, tmp_path / "g.pt")
    expected = draws(*generators)
    assert draws(*unpack(load(tmp_path / "g.pt")["x"])) == expected


@pytest.mark.parametrize("value", [print, torch.nn.ReLU(), {"a": [object()]}, collections.defaultdict(lambda: 0)])
def test_other_values_are_refused(value):
    with pytest.raises(Unsaveable):
        pack(value)


def test_as_much_is_stored_as_the_reader_takes(tmp_path):
    long = {"steps": list(range(500_000)), "losses": [random.random() for _ in range(200_000)]}
    most = {str(number): (number, [float(number)]) for number in range(24_000)}
    save_atomic({"long": pack(long), "most": pack(most), "big": pack([2**70] * 200)}, tmp_path / "x.pt")
    back = load(tmp_path / "x.pt")
    assert unpack(back["long"]) == long and unpack(back["most"]) == most and unpack(back["big"]) == [2**70] * 200
    with pytest.raises(Unsaveable, match="200,001 values"):
        pack([str(number) for number in range(200_000)])


def test_a_value_within_itself_is_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(Unsaveable, match="without end"):
        pack(endless)


PROCESSES = """
import os, sys, torch
from pathlib import Path
sys.path[:0] = [{tests!r}, {user!r}]
from core.config import compose
from core.engine.launch import run
from tests.killing import killed_in_phase
from test_hook_state import Own, SHORT

def go(*words):
    words = ("experiment=mine/tiny", "runtime=cpu", *SHORT, "train_dataloader.batch_size=2", *words)
    hooks = "custom_hooks=[{{type: test_hook_state.Own}}, {{type: mmengine.hooks.EMAHook, momentum: 0.1}}]"
    return run(compose([*words, hooks], config_dir="configs"))

go("run_dir=own_whole")
with killed_in_phase(17):
    go("run_dir=own_killed")
go("run_dir=own_killed", "resume=auto")
assert Own.ends[0] == Own.ends[1] and Own.ends[0] > 0, Own.ends
Path(f"own_{{os.environ['RANK']}}.txt").write_text(str(Own.ends[0]))
torch.distributed.destroy_process_group()
"""


class Own(Hook):
    """A sum of its process's own labels."""

    ends: ClassVar[list[float]] = []

    def __init__(self) -> None:
        self.labels = torch.zeros(2)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.labels += torch.tensor([1.0, float(data_batch["image"].sum())])

    def after_train(self, runner: Any) -> None:
        Own.ends.append(float(self.labels.sum()))


@pytest.mark.processes
def test_every_process_goes_on_with_its_own(user):
    script = user / "own.py"
    script.write_text(PROCESSES.format(tests=str(ROOT / "tests/core"), user=str(user)))
    done = forked.run([str(script)], user, environment(), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (user / "own_0.txt").read_text() != (user / "own_1.txt").read_text()
    assert_same_run(user / "own_whole", user / "own_killed")
    first, second = (load(find_checkpoint(user / run))["kept"] for run in ("own_whole", "own_killed"))
    assert len(first["processes"]) == 2
    assert same(first["processes"], second["processes"]) and same(first["checkpoint"], second["checkpoint"])
