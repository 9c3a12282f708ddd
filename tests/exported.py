"""Models in the forms that they leave Python in: `torch.export`, ONNX by both exporters, `torch.jit.trace`.

Every form is made from a batch of one size and run on a batch of another: a batch size, mask or table that was baked in
shows there, and a wrong number, too.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WAYS = ("export", "dynamo", "legacy", "trace")


class _Flat(nn.Module):
    """A model whose outputs are a tuple of tensors: fields of other kinds, and those that are None, are left out."""

    def __init__(self, model: nn.Module, call: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(*inputs) if self.call is None else self.call(self.model, *inputs)
        return tuple(tensors(out))


def tensors(out: Any) -> list[Tensor]:
    """The tensors of a nest of lists, tuples and dicts, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [tensor for part in out for tensor in tensors(part)] if isinstance(out, list | tuple) else []


def run(way: str, model: nn.Module, made: Sequence[Tensor], asked: Sequence[Tensor], call: Any, folder: Path) -> list:
    """Outputs for `asked` of the model as it was exported with `made`."""
    flat, made, asked = _Flat(model, call).eval(), tuple(made), tuple(asked)
    batch = {0: torch.export.Dim.DYNAMIC}
    if way == "export":
        # Inputs of `*inputs` are one argument, a tuple.
        program = torch.export.export(flat, made, dynamic_shapes=(tuple(batch for _ in made),))
        return list(program.module()(*asked))
    if way == "trace":
        kept = io.BytesIO()
        torch.jit.save(torch.jit.trace(flat, made, check_trace=False), kept)
        kept.seek(0)
        return list(torch.jit.load(kept)(*asked))
    names = [f"input_{i}" for i in range(len(made))]
    file = folder / f"{way}.onnx"
    outputs = [f"output_{i}" for i in range(len(flat(*made)))]
    if way == "dynamo":
        shapes = (tuple({0: "batch"} for _ in made),)
        torch.onnx.export(
            flat, made, file, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False, optimize=False
        )
    else:
        axes = {name: {0: "batch"} for name in (*names, *outputs)}
        torch.onnx.export(
            flat,
            made,
            str(file),
            dynamo=False,
            input_names=names,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=18,
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), asked, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]


def check(
    way: str,
    model: nn.Module,
    inputs: Callable[[int], Sequence[Tensor]],
    folder: Path,
    *,
    call: Callable[..., Any] | None = None,
    made: int = 2,
    asked: int = 3,
    atol: float = 1e-5,
) -> None:
    """Holds an exported model against the model itself, at another batch size than it was exported with.

    Args:
        way: one of `WAYS`.
        model: in evaluation mode.
        inputs: batch size -> inputs, all with the batch as their first axis.
        folder: for files.
        call: `(model, *inputs)` -> outputs; None: the model itself.
        made: batch size that is exported.
        asked: batch size that is run.
        atol: largest difference, times the largest value where that is above 1.
    """
    torch.manual_seed(0)
    wanted = inputs(asked)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(way, model, inputs(made), wanted, call, folder)
        expected = tensors(model(*wanted) if call is None else call(model, *wanted))
    assert len(found) == len(expected) > 0
    for have, want in zip(found, expected, strict=True):
        assert have.shape == want.shape and have.dtype == want.dtype
        scale = max(1.0, want.abs().max().item()) if want.is_floating_point() else 1.0
        difference = (have.double() - want.double()).abs().max().item()
        assert difference <= atol * scale, f"{way}: {difference:.2e} apart at values of up to {scale:.2e}"
