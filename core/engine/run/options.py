"""The options of tools/test.py and tools/infer.py: which weights, what of them goes where, and what is done.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

# Options that are passed on to `core.checkpoint.weights.Source`.
_LOAD = ("into", "prefix", "strict", "ignore", "key", "averaged", "finite")


@dataclass(kw_only=True)
class LoadOptions:
    """A checkpoint, its config, and how it is loaded."""

    checkpoint: str = field(metadata={"help": "a run's folder, a checkpoint, a file of weights, or latest"})
    best: str = field(
        default="false", metadata={"help": "of a run, true or a metric: the best checkpoint, not the newest"}
    )
    stage: str | None = field(default=None, metadata={"help": "of a run or experiment with stages, the one meant"})
    into: str | None = field(default=None, metadata={"help": "the part of the model that takes the weights"})
    prefix: str | None = field(default=None, metadata={"help": "only names with this prefix, which is cut off"})
    strict: bool = field(default=True, metadata={"help": "every name has to fit; false loads what fits"})
    ignore: list[str] = field(default_factory=list, metadata={"help": "patterns of names that need not fit: head.*"})
    key: str | None = field(default=None, metadata={"help": "where in the file the weights are, e.g. ema.model"})
    averaged: bool = field(default=True, metadata={"help": "of a run with EMA, the averaged weights"})
    finite: bool = field(default=True, metadata={"help": "refuse weights that hold NaN or infinity"})
    config_dir: str | None = field(default=None, metadata={"help": "a folder of configs of your own"})

    @classmethod
    def of(cls, options: Any) -> Self:
        """The same from any object; attributes that it has not mean their defaults."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)})

    def load(self) -> dict[str, Any]:
        """Arguments of `core.checkpoint.weights.Source` besides the path."""
        return {name: getattr(self, name) for name in _LOAD}

    def configured(self, overrides: list[str]) -> tuple[dict[str, Any], Path]:
        """The resolved config and the file of weights, see `core.engine.run.config.configured`."""
        from core.engine.run.config import configured

        best = {"false": False, "true": True}.get(str(self.best).lower(), self.best)
        names = [f.name for f in fields(self)]
        return configured(self.checkpoint, overrides, self.config_dir, stage=self.stage, best=best, options=names)


@dataclass(kw_only=True)
class EvaluationOptions(LoadOptions):
    """What to evaluate."""

    split: str = field(default="test", metadata={"help": "test or val"})
    output: str | None = field(default=None, metadata={"help": "also write the metrics to this JSON file"})


@dataclass(kw_only=True)
class InferOptions(LoadOptions):
    """What to look at."""

    output: str = field(metadata={"help": "folder for pictures and results.json"})
    input: str | None = field(default=None, metadata={"help": "a file, or a folder of files; null: nothing is needed"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
