"""A trained model on a user's own files: pictures that explain, records for machines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.config import compose
from core.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".mp4", ".avi", ".mov", ".mkv", ".webm")


class InferOptions(Protocol):
    """What `infer` reads of the command line."""

    checkpoint: str
    input: str | None
    output: str
    device: str
    config_dir: str | None


def infer(overrides: list[str], options: InferOptions) -> list[dict[str, Any]]:
    """Writes, for every input file, the trainer's pictures and other files, and ``results.json`` with all records.

    Without an input, what the trainer generates by itself is written under the name ``samples``.

    A file that cannot be read is reported in its record and does not stop the others.

    Args:
        overrides: Hydra overrides that name the experiment.
        options: see ``tools/infer.py --help``.

    Returns:
        The records.

    Raises:
        ConfigError: no input, or no file could be processed.
    """
    import torch

    from core.launch import build_trainer
    from core.run_folder import find_checkpoint
    from core.runner import pick_device
    from core.weights import load_weights

    files: list[Path | None] = [None]
    names = ["samples"]
    if options.input is not None:
        found = input_files(Path(options.input))
        files, names = list(found), _names(found, Path(options.input))
    device = pick_device(options.device)
    trainer = build_trainer(compose(overrides, options.config_dir))
    print(load_weights(trainer, find_checkpoint(options.checkpoint)))
    trainer.to(device).eval()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    records = []
    with torch.no_grad():
        for file, name in zip(files, names, strict=True):
            records.append(_one(trainer, file, output / name))
            print(json.dumps(records[-1], default=float))
    (output / "results.json").write_text(json.dumps(records, indent=1, default=float) + "\n")
    if all("error" in record for record in records):
        raise ConfigError(f"none of {len(records)} files could be processed; {output / 'results.json'} says why")
    return records


def _names(files: list[Path], root: Path) -> list[str]:
    """What pictures of each file begin with: its stem; where several files have it, the way to the file as well."""
    stems = Counter(file.stem for file in files)
    names: list[str] = []
    for file in files:
        name = file.stem if stems[file.stem] == 1 else "_".join(file.relative_to(root).parts).replace(".", "_")
        names.append(name if name not in names else f"{name}_{names.count(name) + 1}")
    return names


def _one(trainer: Any, file: Path | None, output: Path) -> dict[str, Any]:
    named = {} if file is None else {"file": str(file)}
    try:
        result = trainer.generate() if file is None else trainer.infer(file)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        return {**named, "error": f"{type(error).__name__}: {error}"}
    pictures = {
        name: str(write_picture(array, output.with_name(f"{output.name}_{name}")))
        for name, array in result.pictures.items()
    }
    record = {**named, **result.record, "pictures": pictures}
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
    """The file, or the images and videos below a folder in order.

    Raises:
        ConfigError: there are none.
    """
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not files:
        raise ConfigError(f"input={path}: no such file, or a folder without images or videos ({', '.join(SUFFIXES)})")
    return files


def write_picture(array: Any, stem: Path, seconds_per_frame: float = 0.12) -> Path:
    """A PNG from uint8 (H, W, 3), an animated GIF from uint8 (T, H, W, 3); the path written."""
    from PIL import Image

    array = np.asarray(array)
    if array.ndim == 4:
        path = stem.with_name(stem.name + ".gif")
        first, *rest = [Image.fromarray(frame) for frame in array]
        first.save(path, save_all=True, append_images=rest, duration=int(1000 * seconds_per_frame), loop=0)
    else:
        path = stem.with_name(stem.name + ".png")
        Image.fromarray(array).save(path)
    return path
