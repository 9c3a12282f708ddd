"""Files of the tiny base model for ``python -m tests.cuda``: random weights in the layout that an experiment reads."""

from __future__ import annotations

from pathlib import Path

from .random_sd import make_pipeline


def overrides(folder: Path) -> list[str]:
    """A random pipeline in `folder`, and the overrides that name it."""
    make_pipeline().save_pretrained(folder)
    return [f"model.base={folder}"]
