"""Configs that several tests look at: each is composed once by a worker."""

from __future__ import annotations

import functools

from omegaconf import DictConfig

from core.config import compose


def composed(*overrides: str) -> DictConfig:
    """As `core.config.compose`, with a copy of what the same words gave before."""
    return _composed(overrides).copy()


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose(list(overrides))
