"""Where a run's figures and pictures go: JSON lines, CSV, TensorBoard, Weights & Biases.

All are mmengine visualisation backends, used through ``runner.visualizer``. Beyond mmengine's interface they offer
``add_video`` (a file that exists already, so that nothing is encoded twice) and ``truncate``, which a resumed run calls
so that no step is written twice.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.visualization import TensorboardVisBackend
from mmengine.visualization.vis_backend import BaseVisBackend

from core.config.registry import VISBACKENDS


def _run_folder(save_dir: str | os.PathLike[str]) -> Path:
    """mmengine's Visualizer appends ``vis_data``; a run keeps its logs in its own folder."""
    path = Path(save_dir)
    return path.parent if path.name == "vis_data" else path


def plain_config(config: Any) -> dict[str, Any]:
    """The experiment's own config as plain values, whatever wraps it."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    inner = plain.get("experiment")
    return dict(inner) if isinstance(inner, Mapping) else plain


def _number(value: Any) -> int | float | None:
    """A Python number, or None when the value is none."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, np.ndarray | np.generic):
        return value.item() if value.size == 1 and value.dtype.kind in "biuf" else None
    return None


def _numbers(scalars: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: number for key, value in scalars.items() if (number := _number(value)) is not None}


class _LineLog(BaseVisBackend):
    """A text file that grows by a line for every call, each of them on the disk at once.

    Args:
        save_dir: the run's folder.
        filename: of the log.
    """

    heading = 0  # lines before the first that counts

    def __init__(self, save_dir: str, filename: str) -> None:
        super().__init__(save_dir)
        self.path = _run_folder(save_dir) / filename
        self._file: Any = None
        self._lines = 0

    def _init_env(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._begin(self._whole_lines())
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (open as long as the run)
        self._env_initialized = True

    def _begin(self, lines: list[str]) -> None:
        """Takes up what the file holds."""
        self._lines = max(0, len(lines) - self.heading)

    def _whole_lines(self) -> list[str]:
        """The file's lines, without half a line that a process left which was killed: it would spoil the next one."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            os.truncate(self.path, sum(map(len, lines)))
        return [line.decode(errors="replace") for line in lines]

    @property
    def experiment(self) -> _LineLog:
        """This object."""
        return self

    @property
    def lines(self) -> int:
        """How many lines the log has."""
        self._ready()
        return self._lines

    def _ready(self) -> None:
        if self._file is None:
            self._init_env()

    def _line(self, values: Mapping[str, Any]) -> str:
        """A call's values as a line."""
        raise NotImplementedError

    def _step_of(self, line: str) -> float:
        """The step of a line; infinity where it has none, so that the line never counts."""
        raise NotImplementedError

    def add_scalars(
        self, scalar_dict: Mapping[str, Any], step: int = 0, file_path: str | None = None, **_: Any
    ) -> None:
        """Writes one line."""
        self._ready()
        values = {key: value for key, value in scalar_dict.items() if key not in ("step", "epoch", "time")}
        first = {"step": int(step), "epoch": scalar_dict.get("epoch"), "time": round(time.time(), 3)}
        line = self._line({**first, **values})
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:  # a full disk: which file is it?
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._lines += 1

    def add_scalar(self, name: str, value: Any, step: int = 0, **_: Any) -> None:
        """Writes one line with one figure."""
        self.add_scalars({name: value}, step)

    def truncate(self, step: int, lines: int | None = None) -> None:
        """Drops what was written after a step, in one atomic replacement of the file.

        Args:
            step: the last step that counts.
            lines: how many lines the log had when the state of that step was saved; None: judge by the steps alone.
        """
        self.close()
        written = self._whole_lines()
        head, written = written[: self.heading], written[self.heading :]
        kept = [line for line in written[:lines] if self._step_of(line) <= step]
        if self.path.exists():
            self._replace([*head, *kept])

    def _replace(self, lines: list[str]) -> None:
        from core.checkpoint import write_text_atomic

        self.close()
        write_text_atomic("".join(lines), self.path)

    def close(self) -> None:
        """Closes the file; a later line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


@VISBACKENDS.register_module()
class JsonLines(_LineLog):
    """One JSON object per line in ``log.jsonl``: ``step``, ``epoch``, ``time`` (Unix seconds), then the figures.

    Every line is flushed. A value that is not finite is written as null, since JSON has no other word for it.

    Args:
        save_dir: the run's folder.
        filename: of the log.
    """

    def __init__(self, save_dir: str, filename: str = "log.jsonl") -> None:
        super().__init__(save_dir, filename)

    def _line(self, values: Mapping[str, Any]) -> str:
        return json.dumps({key: _json(value) for key, value in values.items()}, allow_nan=False) + "\n"

    def _step_of(self, line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf


@VISBACKENDS.register_module()
class CSV(_LineLog):
    """One row per line of the log in ``log.csv``: ``step``, ``epoch``, ``time`` (Unix seconds), then the figures.

    Figures that come later (metrics of the first evaluation) get columns behind those that are there: the file is
    written anew in one atomic replacement, with empty cells in earlier rows. A row has empty cells where it has nothing
    to say. Values that are not finite are ``nan``, ``inf`` and ``-inf``; texts are quoted where they have to be.

    Args:
        save_dir: the run's folder.
        filename: of the log.
    """

    heading = 1

    def __init__(self, save_dir: str, filename: str = "log.csv") -> None:
        super().__init__(save_dir, filename)
        self._columns: list[str] = []

    def _begin(self, lines: list[str]) -> None:
        super()._begin(lines)
        self._columns = next(csv.reader(lines[:1]), [])

    def _line(self, values: Mapping[str, Any]) -> str:
        new = [name for name in values if name not in self._columns]
        if new:
            rows = [line.rstrip("\r\n") for line in self._whole_lines()[1:]]
            self._columns += new
            self._replace([_csv_row(self._columns), *(f"{row}{',' * len(new)}\n" for row in rows)])
            self._ready()
        return _csv_row([_csv_cell(values.get(name)) for name in self._columns])

    def _step_of(self, line: str) -> float:
        try:
            return int(line.partition(",")[0])
        except ValueError:
            return math.inf


def _csv_row(cells: Sequence[Any]) -> str:
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerow(cells)
    return target.getvalue()


def _csv_cell(value: Any) -> Any:
    """A number, an empty cell, or a text without line breaks: a row is a line."""
    if value is None:
        return ""
    number = _number(value)
    return " ".join(str(value).splitlines()) if number is None else number


def _json(value: Any) -> Any:
    number = _number(value)
    if number is not None:
        return number if math.isfinite(number) else None
    if isinstance(value, torch.Tensor | np.ndarray):
        return _json(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return value if value is None or isinstance(value, str) else str(value)


@VISBACKENDS.register_module()
class TensorBoard(TensorboardVisBackend):
    """TensorBoard events in the run's folder; videos as animated pictures.

    mmengine's backend, with the run's own folder, every line flushed, lines hidden that a resumed run writes again, and
    the config as YAML. A file is begun with the first line, not with the config, which comes before `truncate`: one
    file for every time that the run is started.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(str(_run_folder(save_dir)))
        self._purge_step: int | None = None
        self._config: str | None = None

    def _init_env(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(self._save_dir, purge_step=self._purge_step)
        self._env_initialized = True
        if self._config is not None:
            self._tensorboard.add_text("config", self._config)

    @property
    def experiment(self) -> Any:
        """The SummaryWriter."""
        if not self._env_initialized:
            self._init_env()
        return self._tensorboard

    def add_config(self, config: Any, **_: Any) -> None:
        """Keeps the config; it stands as a text at the beginning of the file."""
        import yaml

        text = yaml.safe_dump(_yamlable(plain_config(config)), sort_keys=False)
        self._config = "\n".join(f"    {line}" for line in text.splitlines())

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        """Writes an RGB picture (H, W, 3) uint8."""
        self.experiment.add_image(name, image, step, dataformats="HWC")
        self.experiment.flush()

    def add_scalars(
        self, scalar_dict: Mapping[str, Any], step: int = 0, file_path: str | None = None, **_: Any
    ) -> None:
        """Writes the figures that are numbers."""
        for key, value in _numbers(scalar_dict).items():
            self.experiment.add_scalar(key, value, step)
        self.experiment.flush()

    def add_video(self, name: str, path: str | os.PathLike[str], step: int = 0, **_: Any) -> None:
        """Writes a GIF file as an animated picture; other formats are noted by name."""
        path = Path(path)
        if path.suffix.lower() != ".gif":
            self.experiment.add_text(name, path.name, step)
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = path.read_bytes()
        width, height = struct.unpack_from("<HH", content, 6)  # of the logical screen, behind the six letters GIF89a
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        summary = Summary(value=[Summary.Value(tag=name, image=encoded)])
        self.experiment._get_file_writer().add_summary(summary, step)
        self.experiment.flush()

    def truncate(self, step: int, lines: int | None = None) -> None:
        """Hides everything that earlier event files hold after a step."""
        self.close()
        self._env_initialized = False
        self._purge_step = step + 1 if step > 0 or any(Path(self._save_dir).glob("events.out.tfevents.*")) else None


@VISBACKENDS.register_module()
class Wandb(BaseVisBackend):
    """Weights & Biases: figures by training step, config, pictures and videos.

    Figures are plotted over the field ``step``, so that evaluation, media and a resumed run may write in any order. The
    run's id is kept in its folder: a resumed run continues the same one. ``WANDB_MODE=offline`` needs no network.

    Args:
        save_dir: the run's folder.
        init_kwargs: arguments of ``wandb.init`` (project, name, entity, tags, mode, ...).
    """

    def __init__(self, save_dir: str, init_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__(save_dir)
        self.folder = _run_folder(save_dir)
        self._init_kwargs = dict(init_kwargs or {})
        self._run: Any = None

    def _init_env(self) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        remembered = self.folder / "wandb_id.txt"
        options = {"dir": str(self.folder), **self._init_kwargs}
        options.setdefault("settings", wandb.Settings(console="off"))
        if "id" not in options and remembered.exists():
            options.update(id=remembered.read_text().strip(), resume=options.get("resume", "allow"))
        self._run = wandb.init(**options)
        remembered.write_text(f"{self._run.id}\n")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._env_initialized = True

    @property
    def experiment(self) -> Any:
        """The wandb run."""
        if self._run is None:
            self._init_env()
        return self._run

    def add_config(self, config: Any, **_: Any) -> None:
        """Stores the config; a resumed run may differ in where it runs."""
        self.experiment.config.update(_yamlable(plain_config(config)), allow_val_change=True)

    def add_scalars(
        self, scalar_dict: Mapping[str, Any], step: int = 0, file_path: str | None = None, **_: Any
    ) -> None:
        """Stores the figures that are numbers."""
        self.experiment.log({**_numbers(scalar_dict), "step": int(step)})

    def add_scalar(self, name: str, value: Any, step: int = 0, **_: Any) -> None:
        """Stores one figure."""
        self.add_scalars({name: value}, step)

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        """Stores an RGB picture (H, W, 3) uint8."""
        import wandb

        self.experiment.log({name: wandb.Image(image), "step": int(step)})

    def add_video(self, name: str, path: str | os.PathLike[str], step: int = 0, **_: Any) -> None:
        """Stores a video file (.gif, .mp4, .webm)."""
        import wandb

        path = Path(path)
        self.experiment.log({name: wandb.Video(str(path), format=path.suffix.lstrip(".")), "step": int(step)})

    def close(self) -> None:
        """Finishes the run: everything is on disk (and sent, online)."""
        if self._run is not None:
            self._run.finish()
            self._run = None
            self._env_initialized = False


def _yamlable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _yamlable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_yamlable(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def each_backend(visualizer: Any, method: str, *args: Any, **kwargs: Any) -> None:
    """Calls a method of the backends that have it (``add_video``, ``truncate``)."""
    for backend in getattr(visualizer, "_vis_backends", {}).values():
        if hasattr(backend, method):
            getattr(backend, method)(*args, **kwargs)
