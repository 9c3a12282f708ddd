"""Reading golden cases: `<case>.json` describes one, `<case>.npz` beside it holds what the reference gave.

Weights and inputs are not in the files. Both are standard normal numbers of a generator that is seeded with the name
of the tensor, brought to a sensible scale; so every machine makes the same ones from the names alone.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Where a case names no bar of its own: largest error over the output's largest magnitude.
DEFAULT_RTOL = 1e-4
# An output that is zero throughout has no magnitude to measure by.
ZERO_SCALE = 1e-6


class UnknownPiece(Exception):
    """The adapter does not know this piece or inventory."""


class Mismatch(AssertionError):
    """An output differs from the reference; `worst` is the largest relative error (infinite for a wrong shape)."""

    def __init__(self, message: str, worst: float = math.inf) -> None:
        super().__init__(message)
        self.worst = worst


def seeded_normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers in float32 that depend on `name` and the number of elements only."""
    bits = np.random.Philox(key=zlib.crc32(name.encode()))
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float64).astype(np.float32)


def make_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter by its reference name.

    By the last part of the name: running variances lie above 1, scales of norms around 1, matrices and kernels have
    deviation `fan_in ** -0.5`, and whatever else there is (biases, tables, tokens, layer scales) 0.1.
    """
    values = seeded_normal(name, shape)
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        values = 1 + 0.1 * np.abs(values)
    elif len(shape) == 1 and leaf in {"weight", "gamma"}:
        values = 1 + 0.1 * values
    elif len(shape) > 1 and leaf.endswith("weight"):
        values = values / math.sqrt(math.prod(shape[1:]))
    else:
        values = 0.1 * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32).reshape(shape))


def make_input(name: str, description: Mapping[str, Any]) -> Tensor:
    """An input by its name and description: `{"value": ...}`, or `shape` with `kind`, `low` and `high`.

    Kinds: `normal`; `uniform` in `[low, high)`; `int` (int64, same range); `bool` (True above `low`).

    Raises:
        ValueError: another kind.
    """
    if "value" in description:
        return torch.tensor(description["value"])
    kind, low, high = (description.get(key, default) for key, default in (("kind", "normal"), ("low", 0), ("high", 1)))
    values = torch.from_numpy(seeded_normal(f"input:{name}", tuple(description["shape"])))
    if kind == "normal":
        return values
    if kind == "bool":
        return values > low
    if kind not in ("uniform", "int"):
        raise ValueError(f"input {name!r}: unknown kind {kind!r}")
    # The normal distribution function turns the numbers into uniform ones.
    values = low + (high - low) * 0.5 * (1 + torch.special.erf(values.double() / math.sqrt(2)))
    return values.float() if kind == "uniform" else values.floor().clamp(low, high - 1).long()


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
        paper: name of the folder that holds it.
        name: file name without suffix.
        meta: `piece`, `config`, `mode`, `how`, `source` and optionally `rule`, `rtol`, `output_scale`, ...
        params: `(name, shape)` of the reference's parameters and float buffers.
        given: inputs, see `make_input`.
        outputs: `(full shape, stride)` of each output; large ones keep every stride-th element.
        golden: the kept elements of each output, flat.
    """

    paper: str
    name: str
    meta: dict[str, Any]
    params: list[tuple[str, tuple[int, ...]]]
    given: dict[str, dict[str, Any]]
    outputs: dict[str, tuple[tuple[int, ...], int]]
    golden: dict[str, np.ndarray]

    @property
    def piece(self) -> str:
        """Which piece of the paper's code it is a case of."""
        return self.meta["piece"]

    @property
    def config(self) -> dict[str, Any]:
        """The reference's constructor or call arguments."""
        return self.meta["config"]

    @property
    def training(self) -> bool:
        """Whether modules are in training mode."""
        return str(self.meta.get("mode", "eval")).startswith("train")

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's parameters by name; the case's machine-readable rule is applied.

        A rule in words is for the adapter to follow.
        """
        rule = self.meta.get("rule")
        steps = rule.get("steps", []) if isinstance(rule, Mapping) else []
        state = {}
        for name, shape in self.params:
            value = make_weight(name, shape)
            for step in steps:
                if re.search(step["match"], name) and value.ndim >= step.get("min_ndim", 0):
                    value = _apply(step, value)
            state[name] = value
        return state

    def inputs(self) -> dict[str, Tensor]:
        """The inputs by name."""
        return {name: make_input(name, description) for name, description in self.given.items()}

    def compare(self, outputs: Mapping[str, Any]) -> float:
        """Hold outputs (tensors, arrays or numbers) against the golden ones.

        An output passes when its largest absolute error is within `rtol` of its largest magnitude; integers and
        booleans must agree exactly.

        Returns:
            The largest relative error over all outputs.

        Raises:
            Mismatch: the first output that is missing, misshapen, not finite or too far off.
        """
        rtol = float(self.meta.get("rtol", DEFAULT_RTOL))
        factors = self.meta.get("output_scale", {})
        worst = 0.0
        for name, golden in self.golden.items():
            if name not in outputs:
                raise Mismatch(f"output {name!r} is missing; the adapter gave {', '.join(outputs) or 'nothing'}")
            got = outputs[name]
            got = got.detach().cpu() if isinstance(got, Tensor) else torch.as_tensor(np.asarray(got))
            shape, stride = self.outputs[name]
            if tuple(got.shape) != shape:
                raise Mismatch(f"{name}: shape {tuple(got.shape)}, reference {shape}")
            exact = golden.dtype.kind in "bui"
            # bfloat16 has no numpy counterpart, so the comparison goes through torch's float64.
            got = got.double().flatten()[::stride].numpy() * float(factors.get(name, 1.0))
            want = golden.astype(np.float64).reshape(-1)
            error = float(np.abs(got - want).max(initial=0.0))
            scale = float(np.abs(want).max(initial=0.0))
            bar = 0.0 if exact else rtol * scale if scale > ZERO_SCALE else ZERO_SCALE
            relative = error / scale if scale > ZERO_SCALE else error
            if not np.isfinite(got).all():
                raise Mismatch(f"{name}: not finite")
            if error > bar:
                raise Mismatch(f"{name}: error {error:.3e} at magnitude {scale:.3e}, allowed {bar:.3e}", relative)
            worst = max(worst, relative)
        return worst


def _apply(step: Mapping[str, Any], value: Tensor) -> Tensor:
    operation = step["op"]
    if operation == "mul":
        return value * step["value"]
    if operation == "add":
        return value + step["value"]
    if operation == "mul_sqrt_fan_in":
        return value * math.sqrt(math.prod(value.shape[1:]))
    raise ValueError(f"unknown operation {operation!r} in the case's rule")


def load_case(path: Path) -> Case | None:
    """Read `<case>.json` with its `.npz`; None when the JSON is no case (an inventory).

    Raises:
        FileNotFoundError: the outputs are missing.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or "meta" not in content:
        return None
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    return Case(
        paper=path.parent.name,
        name=path.stem,
        meta=content["meta"],
        params=[(name, tuple(shape)) for name, shape in content["params"]],
        given=content["given"],
        outputs={name: (tuple(shape), stride) for name, (shape, stride) in content["strides"].items()},
        golden=golden,
    )


def find_cases(folder: Path) -> list[Path]:
    """All JSON files below a folder (or the file itself), sorted.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no folder {folder}: give folders that hold <case>.json files")
    return [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
