"""Pictures and videos that a trainer makes of its own work, after evaluations."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from core.config.registry import HOOKS
from core.engine.state.randomness import fixed_randomness
from core.errors import ConfigError
from core.output.backends import each_backend
from core.output.media import as_pixels, write_media
from core.trainer import unwrap

_SEED = 20150916  # any constant: media of two runs show the same draws


@HOOKS.register_module()
class MediaHook(Hook):
    """After every `interval`-th evaluation, writes what ``trainer.media(batch)`` shows of the first samples.

    Every run has this hook, with the arguments of the config's ``media``; one in `custom_hooks` takes its place.

    ``media(batch)`` returns names -> uint8 picture (H, W, 3), uint8 video (T, H, W, 3), or the path of a finished file.
    Files go to ``media/`` in the run's folder (``<name>_step_00001234.png``; ``test_<name>_...`` those of the final
    test, with the step of the weights that are tested) and to the visualizer. Evaluation weights (averaged ones, with
    EMA) are in place, randomness is fixed and put back afterwards. A trainer without ``media`` is left alone. Pictures
    that fail are reported and do not end the run.

    Args:
        interval: evaluations from one to the next; None: as many as give some ten pictures in a training, and the last
            evaluation. The final test is always shown.
        max_items: samples of the first batch that are shown.
        fps: frames per second of videos.
        video: file format of videos.

    Raises:
        ConfigError: `interval` or `max_items` below 1.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook puts the trained weights back

    def __init__(
        self, interval: int | None = 1, max_items: int = 8, fps: float = 8.0, video: Literal["gif", "mp4"] = "gif"
    ) -> None:
        if (interval is not None and interval < 1) or max_items < 1:
            raise ConfigError(f"MediaHook: interval={interval}, max_items={max_items}: both are at least 1")
        self.interval, self.max_items, self.fps, self.video = interval, max_items, fps, video
        self._evaluations = 0
        self._batch: Any = None

    def before_val_epoch(self, runner: Any) -> None:
        """Forgets the last evaluation's samples."""
        self._batch = None

    def before_test_epoch(self, runner: Any) -> None:
        """Forgets the last evaluation's samples."""
        self._batch = None

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the first samples."""
        if self._batch is None and hasattr(unwrap(runner.model), "media"):
            self._batch = first_items(data_batch, self.max_items)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the first samples."""
        self.after_val_iter(runner, batch_idx, data_batch, outputs)

    def after_val_set(self, runner: Any, name: str) -> None:
        """Of several evaluation sets (`core.engine.keys.eval_sets`), one is over: its media bear its name."""
        if self._due(runner):
            self._show(runner, f"{name}_")
        self._batch = None

    def after_test_set(self, runner: Any, name: str) -> None:
        """Of several test sets, one is over."""
        self._show(runner, f"test_{name}_")

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the media when they are due."""
        if self._due(runner):
            self._show(runner)
        self._evaluations += 1

    def _due(self, runner: Any) -> bool:
        loop = getattr(runner, "_train_loop", None)
        last = self.interval is None and runner.iter >= getattr(loop, "max_iters", 0)
        return last or (self._evaluations + 1) % (self.interval or _tenth(loop)) == 0

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the media."""
        self._show(runner, "test_")

    def _show(self, runner: Any, prefix: str = "") -> None:
        trainer = unwrap(runner.model)
        batch, self._batch = self._batch, None
        computes = is_main_process() or getattr(runner, "sharded", False)  # sharded networks: all processes or none
        if batch is None or not hasattr(trainer, "media") or not computes:
            return
        try:
            shown = self._media(trainer, batch)
            if is_main_process():
                self._write(runner, shown, prefix)
        except Exception as error:  # whatever a drawing does, the training is worth more
            runner.logger.error(
                f"no pictures at step {runner.iter}: {type(trainer).__name__}.media(batch), or writing what it gave, "
                f"failed with {type(error).__name__}: {error}; the run goes on (media=null switches pictures off)",
                exc_info=error,
            )

    def _media(self, trainer: Any, batch: Any) -> Mapping[str, Any]:
        autocast = trainer.autocast() if hasattr(trainer, "autocast") else contextlib.nullcontext()
        with fixed_randomness(_SEED), torch.no_grad(), autocast:
            return trainer.media(batch)

    def _write(self, runner: Any, shown: Mapping[str, Any], prefix: str) -> None:
        judged = getattr(runner, "evaluated_step", None)
        step = runner.iter if judged is None else judged
        for name, media in shown.items():
            name = prefix + name
            plain = re.sub(r"[^\w.-]+", "_", name).strip("_") or "media"
            stem = Path(runner.work_dir) / "media" / f"{plain}_step_{step:08d}"
            path = write_media(media, stem, fps=self.fps, video=self.video)
            if path.suffix == ".png":
                pixels = _read_picture(path) if isinstance(media, str | Path) else as_pixels(media, name)
                runner.visualizer.add_image(name, pixels, runner.iter)
            else:
                each_backend(runner.visualizer, "add_video", name, path, runner.iter)

    def state_dict(self) -> dict[str, int]:
        """How many evaluations there were."""
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting."""
        self._evaluations = state["evaluations"]


def _tenth(loop: Any) -> int:
    """Evaluations from one picture to the next, for ten of them in a training."""
    if getattr(loop, "val_every_epochs", None):
        planned = loop.max_epochs // loop.val_every_epochs
    elif getattr(loop, "val_every_steps", None):
        planned = loop.max_iters // loop.val_every_steps
    else:
        planned = 1
    return max(1, -(-planned // 10))


def first_items(batch: Any, count: int) -> Any:
    """The first samples of a batch: of every tensor, array and list in it that is as long as the batch."""
    if not isinstance(batch, Mapping):
        return batch
    lengths = [len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim]
    size = len(batch["sample_id"]) if "sample_id" in batch else max(lengths, default=0)
    return {k: _first(v, count) if hasattr(v, "__getitem__") and _length(v) == size else v for k, v in batch.items()}


def _first(values: Any, count: int) -> Any:
    """A copy where it is a tensor: a view would keep the whole batch in memory."""
    return values[:count].clone() if isinstance(values, torch.Tensor) else values[:count]


def _length(value: Any) -> int | None:
    if isinstance(value, str | Mapping) or (isinstance(value, torch.Tensor) and not value.ndim):
        return None
    return len(value) if hasattr(value, "__len__") else None


def _read_picture(path: Path) -> Any:
    import numpy as np

    from core.data import load_image

    return np.asarray(load_image(path))
