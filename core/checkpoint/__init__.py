"""Checkpoints: atomic writing, safe reading, official pickles, state-dict loading, and a run's checkpoint folder."""

from __future__ import annotations

from core.checkpoint.files import (
    CheckpointReadError,
    CheckpointWriteError,
    FileRecord,
    UnsafeCheckpointError,
    save_atomic,
    write_text_atomic,
)
from core.checkpoint.official.builders import OFFICIAL_GLOBALS, Record
from core.checkpoint.official.reading import load, load_metadata, load_official
from core.checkpoint.state import StateDiff, StateMismatch, diff_state, load_state
from core.checkpoint.store import CheckpointStore, Damaged

__all__ = [
    "OFFICIAL_GLOBALS",
    "CheckpointReadError",
    "CheckpointStore",
    "CheckpointWriteError",
    "Damaged",
    "FileRecord",
    "Record",
    "StateDiff",
    "StateMismatch",
    "UnsafeCheckpointError",
    "diff_state",
    "load",
    "load_metadata",
    "load_official",
    "load_state",
    "save_atomic",
    "write_text_atomic",
]
