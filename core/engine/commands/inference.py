"""A trained model on a user's own files: pictures that explain, records for machines."""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.config.command.signals import StopRequest
from core.data.sources.files import IMAGE_EXTENSIONS, files_below
from core.engine.run.options import InferOptions
from core.engine.switches import switches
from core.errors import ConfigError, VitrineError

if TYPE_CHECKING:
    from core.trainer import Inference

SUFFIXES = (*IMAGE_EXTENSIONS, ".gif", ".mp4", ".avi", ".mov", ".mkv", ".webm")


def infer(overrides: list[str], options: Any) -> list[dict[str, Any]]:
    """Writes, for every input file, the trainer's pictures and other files, and ``results.json`` with all records.

    Without an input, what the trainer generates by itself is written under the name ``samples``. A file on which
    anything fails is reported in its record and does not stop the others; ``results.json`` holds what was done until
    then when the program is interrupted.

    Args:
        overrides: Hydra overrides, see `core.engine.run.config.configured`.
        options: `core.engine.run.options.InferOptions`, or an object with some of its attributes.

    Returns:
        The records; under torchrun, on the first process alone.

    Raises:
        ConfigError: no input, weights that do not fit or hold NaN, or no file could be processed.
        core.config.command.signals.Interrupted: a signal asked to stop.
    """
    from core.config.command.messages import first_process
    from core.engine.runner import pick_device

    options = InferOptions.of(options)
    if not first_process():
        return []
    files: list[Path | None] = [None]
    names = ["samples"]
    if options.input is not None:
        found = input_files(Path(options.input))
        files, names = list(found), _names(found, Path(options.input))
    device = pick_device(options.device)
    cfg, checkpoint = options.configured(overrides)
    with switches(cfg.get("runtime") or {}):
        return _inferred(cfg, checkpoint, options, device, dict(zip(names, files, strict=True)))


def _inferred(
    cfg: Any, checkpoint: Path | None, options: InferOptions, device: Any, files: Mapping[str, Path | None]
) -> list[dict[str, Any]]:
    import torch

    from core.checkpoint import write_text_atomic
    from core.checkpoint.weights import load_weights
    from core.engine.keys.check import checked
    from core.engine.launch import build_trainer

    trainer = build_trainer(checked(cfg))
    print(load_weights(trainer, checkpoint, **options.load(), rest=cfg["load_from"]), file=sys.stderr)
    trainer.to(device).eval()
    output = Path(options.output)
    _make(output)
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    try:
        with torch.no_grad(), StopRequest(f"stopped: {output / 'results.json'} holds what was done"):
            for name, file in files.items():
                records.append(_one(trainer, file, output / name, failures))
                print(json.dumps(records[-1], default=float), flush=True)
    finally:
        write_text_atomic(json.dumps(records, indent=1, default=float) + "\n", output / "results.json")
    if len(failures) == len(records):
        raise ConfigError(f"none of {len(records)} could be processed, see {output / 'results.json'}: {failures[0]}")
    if failures:
        print(f"{len(failures)} of {len(records)} files failed, see {output / 'results.json'}", file=sys.stderr)
    return records


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be made: {error.strerror}") from None


def _names(files: list[Path], root: Path) -> list[str]:
    """What pictures of each file begin with: its stem; where several files have it, the way to the file as well."""
    stems = Counter(file.stem for file in files)
    names: list[str] = []
    for file in files:
        name = file.stem if stems[file.stem] == 1 else "_".join(file.relative_to(root).parts).replace(".", "_")
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    return names


def _one(trainer: Any, file: Path | None, output: Path, failures: list[str]) -> dict[str, Any]:
    """The record of one file; what fails is in it, and in `failures`: a trainer's own record may have an `error`."""
    named = {} if file is None else {"file": str(file)}
    try:
        record = {**named, **_written(trainer.generate() if file is None else trainer.infer(file), output)}
        json.dumps(record, default=float)
        return record
    except Exception as error:
        if not isinstance(error, OSError | ValueError | VitrineError):  # not of the file alone: the code has a fault
            traceback.print_exc()
        failures.append(f"{type(error).__name__}: {error}")
        return {**named, "error": failures[-1]}


def _written(result: Inference, output: Path) -> dict[str, Any]:
    """Writes what a result holds; its record with the paths."""
    pictures = {
        name: str(write_picture(array, output.with_name(f"{output.name}_{name}")))
        for name, array in result.pictures.items()
    }
    record = {**result.record, "pictures": pictures}
    if result.arrays:
        record["arrays"] = {}
        for name, arrays in result.arrays.items():
            path = output.with_name(f"{output.name}_{name}.npz")
            np.savez(path, **arrays)
            record["arrays"][name] = str(path)
    if result.write is not None:
        record["page"] = str(result.write(output))
    return record


def input_files(path: Path) -> list[Path]:
    """The file, or the images and videos below a folder in order, without hidden ones.

    Raises:
        ConfigError: there are none.
        core.data.DataFileError: a folder that cannot be read.
    """
    if path.is_file():
        return [path]
    files = [path / name for name in files_below(path, SUFFIXES)] if path.is_dir() else []
    if not files:
        raise ConfigError(f"input={path}: no such file, or a folder without images or videos ({', '.join(SUFFIXES)})")
    return files


def write_picture(array: Any, stem: Path) -> Path:
    """A PNG from uint8 (H, W, 3) or labels (H, W), an animated GIF from uint8 (T, H, W, 3); the path written."""
    from core.output.media import write_media

    if np.ndim(array) == 2:
        from PIL import Image

        path = stem.with_name(f"{stem.name}.png")
        Image.fromarray(np.asarray(array)).save(path)
        return path
    return write_media(array, stem, fps=1 / 0.12)  # slow enough to follow
