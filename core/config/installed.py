"""Which distribution stands behind ``import mmengine``: looked at once, when the engine first imports it.

Two distributions have that import name. ``onedl-mmengine`` is maintained; ``mmengine`` is not, and plain pip installs
it beside the other, because ``mmcv-lite`` asks for it. They overwrite each other's files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from pathlib import Path

REMEDY = (
    "pip uninstall -y mmengine onedl-mmengine, then pip install --no-deps onedl-mmengine "
    "(`uv pip install -e .` in vitrine's folder leaves the unmaintained one out by itself)"
)


class TwoMMEngines(UserWarning):
    """The unmaintained mmengine is installed beside the one that the engine is written for."""


def check_mmengine() -> None:
    """Warns where both distributions are installed.

    Raises:
        ImportError: only the unmaintained one is.
    """
    ours, other = _version("onedl-mmengine"), _version("mmengine")
    if other is None:
        return
    if ours is None:
        raise ImportError(f"mmengine {other} is not maintained any more, vitrine needs onedl-mmengine: {REMEDY}")
    whose = "onedl-mmengine's" if _files_are_ours() else "the unmaintained one's"
    warnings.warn(
        f"mmengine {other} is installed beside onedl-mmengine {ours}, under the same import name; the files that "
        f"Python finds are {whose}, until one of them is installed again. Remedy: {REMEDY}",
        TwoMMEngines,
        stacklevel=2,
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _files_are_ours() -> bool:
    """Whether the files that are imported are those of onedl-mmengine, whose version is read from its own metadata."""
    spec = importlib.util.find_spec("mmengine")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and "onedl" in version.read_text(errors="replace")
