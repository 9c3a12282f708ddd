"""The checkpoints of one run: newest, best, and which old ones go."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.checkpoint.files import CheckpointWriteError, FileRecord, is_temporary, save_atomic, write_text_atomic
from core.checkpoint.official.archive import opened
from core.checkpoint.selection import Direction, Metric, ranking
from core.errors import ConfigError

INDEX = "index.json"
_NAME = re.compile(r"step_(\d{8,})\.pt")


class Damaged(UserWarning):
    """A checkpoint was passed over because it is not whole."""


class CheckpointStore:
    """A folder of checkpoints ``step_00001234.pt`` with an index of sizes, digests and metrics.

    A checkpoint counts as whole when its size and SHA-256 are those of the index or, for a file the index does not
    know, when every record of the zip archive passes its checksum. A file that is cut off or altered is never whole.

    Args:
        folder: made at the first save.
        keep_last: how many of the newest whole checkpoints stay; None keeps all.
        keep_best: how many of the best by every `metric` stay as well.
        metric: the metric that ranks checkpoints, or several: see `core.checkpoint.selection.ranking`. None: no
            ranking.
        direction: whether a higher or a lower metric is better, where `metric` does not say.

    Raises:
        ValueError: a number below 1 (`keep_last`) or 0 (`keep_best`), or an unknown direction.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_last: int | None = 3,
        keep_best: int = 1,
        metric: Metric = None,
        direction: Direction = "higher",
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint stays (null keeps all)")
        if keep_best < 0:
            raise ValueError(f"keep_best={keep_best} is negative")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.ranking = ranking(metric, direction)
        self._written: Path | None = None  # by this object, and so known to be whole

    def save(
        self,
        state: Mapping[str, Any],
        step: int,
        metrics: Mapping[str, float] | None = None,
        interim: bool = False,
    ) -> Path:
        """Writes the checkpoint of a step, then removes what need not stay.

        Args:
            state: see `core.checkpoint.save_atomic`.
            step: training steps done.
            metrics: of an evaluation at this step, if there was one.
            interim: stays until the next is written, whatever `keep_last` says (unless it is one of the best).

        Raises:
            CheckpointWriteError: the disk is full or the like; all earlier checkpoints are as they were.
        """
        path = self.path(step)
        self._remove_leftovers()
        record = save_atomic(state, path)
        index = self._index()
        index[path.name] = {
            "step": step,
            "size": record.size,
            "sha256": record.sha256,
            "metrics": _figures(metrics or {}),
            **({"interim": True} if interim else {}),
        }
        self._write_index(index)
        self._written = path
        self._prune(index, whole=path)
        return path

    def annotate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of an evaluation that came after the checkpoint of its step was saved.

        Raises:
            KeyError: there is no checkpoint of that step.
        """
        path = self.path(step)
        if not path.exists():
            raise KeyError(f"there is no checkpoint of step {step} in '{self.folder}'")
        index = self._index()
        entry = index.setdefault(path.name, {"step": step, "metrics": {}})
        entry["metrics"] = {**entry["metrics"], **_figures(metrics)}
        self._write_index(index)
        self._prune(index, whole=path if path == self._written else None)

    def keep(self, step: int) -> None:
        """Makes an interim checkpoint one of those that `keep_last` counts."""
        index = self._index()
        if index.get(self.path(step).name, {}).pop("interim", False):
            self._write_index(index)

    def path(self, step: int) -> Path:
        """The file of a step, whether it exists or not."""
        return self.folder / f"step_{step:08d}.pt"

    def steps(self) -> list[int]:
        """Steps that have a file, ascending; whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name)))

    def metrics(self, step: int) -> dict[str, Any]:
        """What is known about a step's evaluation; empty when nothing is."""
        return dict(self._index().get(self.path(step).name, {}).get("metrics", {}))

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None; warns about damaged ones that it passes over."""
        index = self._index()
        return next((path for path in self._descending() if self._whole_or_warn(path, index)), None)

    def best(self, metric: str | None = None) -> Path | None:
        """The best whole checkpoint, the newer of equals. None without a metric or an evaluation.

        Args:
            metric: one of those that rank; None: the first.

        Raises:
            ConfigError: checkpoints are not ranked by it.
        """
        if metric is None:
            metric = next(iter(self.ranking), None)
        elif metric not in self.ranking:
            raise ConfigError(
                f"'{self.folder}' holds no best checkpoint by '{metric}': its run's checkpoint.metric is "
                f"{', '.join(self.ranking) or 'null'}"
            )
        index = self._index()
        return next((path for path in self._ranked(index, metric) if self._whole_or_warn(path, index)), None)

    def is_whole(self, path: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint file is complete and unaltered."""
        path = Path(path)
        return _is_whole(path, self._index().get(path.name, {}))

    def prune(self) -> list[Path]:
        """Removes checkpoints beyond `keep_last` and `keep_best`; never the only whole one, never the best.

        Returns:
            The removed files.
        """
        return self._prune(self._index())

    def _prune(self, index: dict[str, dict], whole: Path | None = None) -> list[Path]:
        """Removes what need not stay; `whole` is a checkpoint that was written just now."""
        existing = self._descending()
        sound = [p for p in existing if p == whole or self._seems_whole(p, index)]
        lasting = [p for p in sound if not index.get(p.name, {}).get("interim")]
        keep = {*lasting[: self.keep_last], *sound[:1], *([whole] if whole else [])}
        for metric in self.ranking:
            keep.update([p for p in self._ranked(index, metric) if p in sound][: self.keep_best])
        if not keep:
            return []
        # A damaged file is no reason to remove a whole one, and goes when everything around it has gone.
        removable = [p for p in existing if p not in keep and (p in sound or p < min(keep))]
        if removable and whole is None and not any(_is_whole(p, index.get(p.name, {})) for p in sorted(keep)[::-1]):
            last_resort = next((p for p in removable if _is_whole(p, index.get(p.name, {}))), None)
            removable = [p for p in removable if p != last_resort]
        for path in removable:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            index.pop(path.name, None)
        if removable:
            self._write_index(index)
        return removable

    def _descending(self) -> list[Path]:
        return [self.path(step) for step in reversed(self.steps())]

    def _ranked(self, index: dict[str, dict], metric: str | None) -> list[Path]:
        """Existing checkpoints that have the metric, best first."""
        if metric is None:
            return []
        values = {p: index.get(p.name, {}).get("metrics", {}).get(metric) for p in self._descending()}
        known = [(v, p) for p, v in values.items() if isinstance(v, int | float) and math.isfinite(v)]
        sign = -1 if self.ranking[metric] == "higher" else 1
        return [p for _, p in sorted(known, key=lambda item: sign * item[0])]

    def _seems_whole(self, path: Path, index: dict[str, dict]) -> bool:
        """The cheap check: the right size, or for a file the index does not know, the end of a zip archive."""
        size = index.get(path.name, {}).get("size")
        with contextlib.suppress(OSError):
            return path.stat().st_size == size if size is not None else zipfile.is_zipfile(path)
        return False

    def _whole_or_warn(self, path: Path, index: dict[str, dict]) -> bool:
        if _is_whole(path, index.get(path.name, {})):
            return True
        warnings.warn(f"checkpoint '{path}' is damaged or incomplete and is passed over", Damaged, stacklevel=3)
        return False

    def _index(self) -> dict[str, dict]:
        try:
            index = json.loads((self.folder / INDEX).read_text())["checkpoints"]
            return {name: _checked(entry) for name, entry in index.items() if (self.folder / name).exists()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"'{self.folder / INDEX}' cannot be read ({error}): the checkpoints are judged without it"
            warnings.warn(message, Damaged, stacklevel=3)
            return {}

    def _write_index(self, index: dict[str, dict]) -> None:
        """A full disk costs the metrics, not the checkpoint: files are judged by their own checksums then."""
        text = json.dumps({"checkpoints": dict(sorted(index.items()))}, indent=1)
        try:
            write_text_atomic(text + "\n", self.folder / INDEX)
        except CheckpointWriteError as error:
            warnings.warn(f"the index of the checkpoints is out of date: {error}", stacklevel=4)

    def _remove_leftovers(self) -> None:
        """Temporary files of a process that was killed while it wrote."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if is_temporary(path.name):
                    with contextlib.suppress(OSError):
                        path.unlink()


def _checked(entry: Any) -> dict[str, Any]:
    """An entry of the index, when what is looked at in it has the right kinds."""
    if not isinstance(entry, dict) or not isinstance(entry.get("metrics", {}), dict):
        raise TypeError("an entry is not what the store writes")
    return entry


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        if "sha256" in entry and path.stat().st_size == entry["size"] and FileRecord.of(path).sha256 == entry["sha256"]:
            return True
        # Not in the index, or written anew just before the index was: the archive's own checksums decide.
        with open(path, "rb") as file, opened(file) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return False


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON has a word for: numbers (of arrays and tensors, too), texts, lists of these."""
    kept = {}
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            value = value.item() if hasattr(value, "item") else value
            json.dumps(value)
            kept[str(name)] = value
    return kept
