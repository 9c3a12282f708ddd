"""Every public model of every paper: its samples do not see each other, gradients reach every parameter, half precision
is finite, and it leaves Python as it is: compiled, by `torch.export`, ONNX of both exporters and `torch.jit.trace`.

`tests/PAPER/subjects.py` lists the models, `tests/contract.py` says what a line of it means.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.contract import COMPILED, Subject
from tests.exported import WAYS, check, tensors
from tests.gradients import unreached

PAPERS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/subjects.py") if path.parent.name != "cuda")
SUBJECTS: dict[str, Subject] = {
    f"{paper}/{name}": subject
    for paper in PAPERS
    for name, subject in importlib.import_module(f"tests.{paper}.subjects").SUBJECTS.items()
}
quick = pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.quick])

trained = pytest.mark.parametrize("name", [n for n, subject in SUBJECTS.items() if subject.quick and subject.trained])


def ways(*wanted: str) -> pytest.MarkDecorator:
    """Cases of the ways that subjects ask for, the further ones marked slow."""
    cases = []
    for name, subject in SUBJECTS.items():
        for way in (*subject.ways, *subject.slow):
            marks = [pytest.mark.slow] if way in subject.slow else []
            if way in wanted:
                cases.append(
                    pytest.param(name, way, marks=[*marks, *([pytest.mark.compile] if way != "trace" else [])])
                )
    return pytest.mark.parametrize(("name", "way"), cases)


@quick
def test_samples_of_a_batch_do_not_see_each_other(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.made().eval()
    inputs = subject.inputs(3)
    with torch.no_grad():
        together = [out for out in tensors(subject.run(model, inputs)) if out.ndim and len(out) == 3]
        alone = [
            [out for out in tensors(subject.run(model, [value[i : i + 1] for value in inputs])) if out.ndim]
            for i in range(3)
        ]
    assert together
    for index, out in enumerate(together):
        single = torch.cat([each[index] for each in alone])
        torch.testing.assert_close(out, single, rtol=1e-4, atol=10 * subject.atol)


@trained
def test_gradients_reach_every_parameter(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.made().train()
    subject.loss(model, subject.run(model, subject.inputs(subject.batch))).backward()
    assert [name for name in unreached(model) if not name.startswith(subject.idle or "\0")] == []


@trained
def test_a_step_in_mixed_precision_is_finite(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.made().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = subject.loss(model, subject.run(model, subject.inputs(subject.batch)))
    loss.backward()
    assert loss.isfinite()
    assert [name for name in unreached(model) if not name.startswith(subject.idle or "\0")] == []


@quick
def test_weights_in_half_precision_give_finite_outputs(name: str) -> None:
    subject = SUBJECTS[name]
    model = subject.made().eval().to(torch.bfloat16)
    inputs = [value.bfloat16() if value.is_floating_point() else value for value in subject.inputs(2)]
    with torch.no_grad():
        found = [out for out in tensors(subject.run(model, inputs)) if out.is_floating_point()]
    assert found and all(out.isfinite().all() for out in found)


@ways(*COMPILED)
def test_it_compiles_in_one_piece(name: str, way: str) -> None:
    subject = SUBJECTS[name]
    model = subject.made().train(way == "train")
    inputs = subject.inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(model if subject.call is None else subject.call, fullgraph=True, backend="eager")
    with torch.no_grad() if way == "compile" else contextlib.nullcontext():
        out = compiled(*inputs) if subject.call is None else compiled(model, *inputs)
    if way == "train":
        subject.loss(model, out).backward()
        assert [name for name in unreached(model) if not name.startswith(subject.idle or "\0")] == []
        return
    with torch.no_grad():
        expected = tensors(subject.run(model, inputs))  # afterwards: tables of a trace must not have stayed
    assert len(tensors(out)) == len(expected)
    for got, wanted in zip(tensors(out), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=subject.atol)


@ways(*WAYS)
def test_it_leaves_python_as_it_is(name: str, way: str, tmp_path: Path) -> None:
    """At another batch size than it was made with: one that is baked in shows there, and a wrong number, too."""
    subject = SUBJECTS[name]
    check(way, subject.made().eval(), subject.inputs, tmp_path, call=subject.call)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_public_network_is_listed(paper: str) -> None:
    """A class of `PAPER/__init__.pyi` that is a module is a subject or a part of one; those that are not say why."""
    listed = importlib.import_module(f"tests.{paper}.subjects")
    package = importlib.import_module(paper)
    models = f"{paper}.models"
    public = {
        name
        for name in package.__all__
        if isinstance(one := getattr(package, name), type)
        and issubclass(one, nn.Module)
        and (one.__module__ == models or one.__module__.startswith(f"{models}."))
    }
    built = {type(part).__name__ for subject in listed.SUBJECTS.values() for part in subject.made().modules()}
    assert public - built - set(listed.ELSEWHERE) == set()
    assert public >= set(listed.ELSEWHERE)
