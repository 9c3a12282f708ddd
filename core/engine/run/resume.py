"""What may differ when a run goes on, and what it goes on from.

A run goes on with the config that it was begun with (the one in its folder's ``config.yaml``). Against that one may
change

- whatever changes no figure (`core.config.influence`): where things are stored, how it is watched, the machine;
- evaluation: loaders and evaluators of both splits, how often is evaluated, ``evaluate``, ``checkpoint``;
- the length, ``train_cfg.max_epochs`` or ``max_steps``, down to what is done: more of it extends the run, a finished
  one, too, and schedules are those of the new length from there on;
- the batch of a process, if the number of processes changes so that their joint batch stays the same;
- keys that are named in ``resume_changes=[KEY,...]``.

Everything else is an error that names the key. ``resume=auto`` looks for a run of this very config instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.composition import get
from core.config.fingerprint import relevant
from core.engine.keys.check import stage_config
from core.errors import ConfigError, close_names

HISTORY = "resume_history"
BATCH = "train_dataloader.batch_size"
LENGTH = ("train_cfg.max_epochs", "train_cfg.max_steps")
_EVALUATION = frozenset(
    [
        "val_dataloader",
        "test_dataloader",
        "val_evaluator",
        "test_evaluator",
        "val_cfg",
        "test_cfg",
        "evaluate",
        "select_on_test",
        "checkpoint",
    ]
)
_ABSENT = "(not there)"


@dataclass(frozen=True)
class Difference:
    """One key in which two configs differ.

    Attributes:
        key: dotted, within its stage's config.
        old, new: its values.
        stage: number of the stage, where there are stages.
    """

    key: str
    old: Any
    new: Any
    stage: int | None = None

    @property
    def name(self) -> str:
        """The key as an override would name it."""
        return self.key if self.stage is None else f"stages.{self.stage}.{self.key}"

    @property
    def of_length(self) -> bool:
        """Whether it says how long is trained."""
        return self.key in LENGTH

    @property
    def of_evaluation(self) -> bool:
        """Whether it says what, how and how often is evaluated, or which checkpoints stay."""
        return self.key.partition(".")[0] in _EVALUATION or self.key.startswith("train_cfg.val_")

    def named_by(self, keys: Iterable[str]) -> bool:
        """Whether one of the keys is this one, or one above it."""
        return any(name == key or name.startswith(f"{key}.") for key in keys for name in (self.key, self.name))

    def __str__(self) -> str:
        return f"{self.name} is {self.old!r} there and {self.new!r} here"


def differences(stored: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[Difference]:
    """Where two configs differ in what changes figures; each stage's own config is held against its own."""
    names = [[stage.get("name") for stage in one.get("stages") or ()] for one in (stored, cfg)]
    if names[0] != names[1]:
        return [Difference("stages", *(", ".join(map(str, listed)) or "none" for listed in names))]
    if not names[0]:
        return list(_differences(_compared(stored), _compared(cfg)))
    found: list[Difference] = []
    for index, stages in enumerate(zip(stored["stages"], cfg["stages"], strict=True)):
        old, new = (_compared(stage_config(one, stage)) for one, stage in zip((stored, cfg), stages, strict=True))
        found += _differences(old, new, stage=index)
    return _of_all_stages(found, len(names[0]))


def _of_all_stages(found: list[Difference], count: int) -> list[Difference]:
    """Differences that all stages share, once and without a stage, before the others."""
    stages: dict[tuple[str, str], list[Difference]] = {}
    for one in found:
        stages.setdefault((one.key, repr((one.old, one.new))), []).append(one)
    shared = [Difference(same[0].key, same[0].old, same[0].new) for same in stages.values() if len(same) == count]
    return shared + [one for same in stages.values() if len(same) < count for one in same]


def stage_differences(stored: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[Difference]:
    """As `differences` of what two stages' folders hold: there, ``load_from`` names files in place of stages."""
    return differences({**stored, "load_from": None}, {**cfg, "load_from": None})


def _compared(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in relevant(cfg).items() if key not in (HISTORY, "stages")}


def _differences(old: Any, new: Any, path: str = "", stage: int | None = None) -> Iterator[Difference]:
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("type") == new.get("type"):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner, stage)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}.{index}", stage)
    elif old != new:
        yield Difference(path, old, new, stage)


# ---------------------------------------------------------------------- rules
def check_changes(cfg: Mapping[str, Any], stored: Mapping[str, Any], found: list[Difference], run: Path) -> None:
    """Holds differences against the rules at the top of this file.

    Args:
        cfg: the config given.
        stored: the run's.
        found: their differences.
        run: the run's folder, for messages.

    Raises:
        ConfigError: a key that may not change, with both values and the ways out; a key in `resume_changes` that
            neither config has.
    """
    named = cfg.get("resume_changes") or ()
    named = [named] if isinstance(named, str) else [str(key) for key in named]
    for key in named:
        if get(cfg, key, None) is None and get(stored, key, None) is None and not any(d.named_by([key]) for d in found):
            close = close_names(key, [d.name for d in found], count=1, cutoff=0.6)
            raise ConfigError(
                f"resume_changes names {key}, which neither config has"
                + (f": did you mean {close[0]}?" if close else "")
            )
    wrong = [d for d in found if not (d.of_length or d.of_evaluation or d.named_by(named))]
    if not wrong:
        return
    more = "".join(f"\n  {d}" for d in wrong[1:6]) + (f"\n  and {len(wrong) - 6} more" if len(wrong) > 6 else "")
    keys = ",".join(dict.fromkeys(d.name for d in wrong))
    raise ConfigError(
        f"{run} was begun with another config: {wrong[0]}{more}\n"
        "A run goes on with the config that it was begun with; its length and its evaluation may change. Leave the "
        "override out; or start a new run from its weights, "
        f"load_from={run} in place of resume; or change it knowingly from here on: resume_changes=[{keys}]"
    )


def check_very_config(found: list[Difference], run: Path) -> None:
    """For ``resume=auto`` in a folder that is given.

    Raises:
        ConfigError: the folder holds a run of another config; the message names the first difference.
    """
    if not found:
        return
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ConfigError(
        f"run_dir={run} holds a run of another config: {found[0]}{more}. resume=auto goes on with a run of this very "
        f"config: give another run_dir, or resume={run}, which may change the run's length and evaluation"
    )


def check_length(cfg: Mapping[str, Any], checkpoint: Path) -> None:
    """Holds the length that is asked for against what is done.

    Raises:
        ConfigError: more is done already.
    """
    from core.checkpoint import load

    train_cfg, position = cfg["train_cfg"] or {}, load(checkpoint)["position"]
    done = {"max_steps": position["iter"], "max_epochs": position["epoch"] + bool(position["batches_taken"])}
    for key, count in done.items():
        if train_cfg.get(key) is not None and train_cfg[key] < count:
            raise ConfigError(
                f"train_cfg.{key}={train_cfg[key]}, but the run has done {count} already ({checkpoint}): make it "
                "longer; for a shorter one, start anew or resume an earlier checkpoint in a new run_dir"
            )


def changes_figures(cfg: Mapping[str, Any], found: Iterable[Difference]) -> list[Difference]:
    """Those differences after which a run is no longer the one that its config alone describes."""
    from core.config.influence import judged_while_training

    return [d for d in found if not d.of_evaluation or judged_while_training(relevant(cfg))]


# ---------------------------------------------------------------------- what is gone on from
@dataclass(frozen=True)
class Origin:
    """What ``resume=`` names.

    Attributes:
        run: the run's folder; None for a checkpoint that lies in none.
        file: the checkpoint, where one is named.
        stage: name of the stage's folder that the checkpoint is of.
    """

    run: Path | None
    file: Path | None = None
    stage: str | None = None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.run or self.file.parent

    @property
    def name(self) -> str:
        """What is named, wherever it is seen from."""
        return str((self.file or self.run).resolve())

    def is_of(self, folder: Path) -> bool:
        """Whether a checkpoint is named, and belongs to the run or stage of a folder."""
        owner = self.folder / self.stage if self.stage else self.folder
        return self.file is not None and owner.resolve() == folder.resolve()

    def is_elsewhere(self, folder: Path) -> bool:
        """Whether it is not the run of a folder."""
        return self.run is None or self.run.resolve() != folder.resolve()


def origin(resume: Any) -> Origin | None:
    """What ``resume=`` names; None for false and auto.

    Raises:
        ConfigError: it is neither auto nor a run's folder nor a file.
    """
    if not resume or resume is True or resume == "auto":
        return None
    path = Path(str(resume))
    if path.is_symlink():  # `latest` may point elsewhere tomorrow
        path = path.parent / path.readlink()
    if path.is_file():
        if path.parent.name != "checkpoints":
            return Origin(None, path)
        owner = path.parent.parent
        return Origin(owner.parent, path, owner.name) if _is_stage(owner) else Origin(owner, path)
    if path.is_dir():
        path = path.parent if path.name == "checkpoints" else path
        path = path.parent if _is_stage(path) else path
        if (path / "config.yaml").is_file() or next(path.rglob("step_*.pt"), None) is not None:
            return Origin(path)
        raise ConfigError(f"resume={resume}: the folder holds no run (neither config.yaml nor checkpoints)")
    beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = close_names(resume, ["auto", "true", "false", *beside], count=1)
    raise ConfigError(
        f"resume={resume}: no such run folder or checkpoint"
        + (f"; did you mean {close[0]}?" if close else "")
        + " (resume=auto goes on with the newest run of this config)"
    )


def _is_stage(folder: Path) -> bool:
    return folder.name.startswith("stage_") and (folder.parent / "config.yaml").is_file()
