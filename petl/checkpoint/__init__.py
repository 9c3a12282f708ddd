"""Weights: the backbones' and baselines' official files, delta files, choices of channels, and peft's layout."""

from petl.checkpoint.choice import load_choice, save_choice
from petl.checkpoint.delta import delta_state, load_delta, read_delta, save_delta
from petl.checkpoint.official import DROPPED, CheckpointMismatch, convert, from_flax, resize_positions
from petl.checkpoint.packing import DeltaError

__all__ = [
    "DROPPED",
    "CheckpointMismatch",
    "DeltaError",
    "convert",
    "delta_state",
    "from_flax",
    "load_choice",
    "load_delta",
    "read_delta",
    "resize_positions",
    "save_choice",
    "save_delta",
]
