"""Golden cases: our pieces against the reference implementations, and the runner against broken cases."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from .__main__ import main
from .cases import Case, Mismatch, load_case, make_input, make_weight
from .runner import run_file

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("path", sorted(CASES.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path) -> None:
    result = run_file(path)
    assert result.status == "PASS", f"{result.line()}\n{result.trace}"


def _case(folder: Path, name: str = "toy", *, paper: str = "stvit", **meta: object) -> Path:
    """Write a case whose reference output is 2 * x of an input, under a piece that no adapter knows."""
    x = make_input("x", {"shape": [4, 3]}).numpy()
    path = folder / paper / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "meta": {"piece": "toy", "config": {}, "mode": "eval"} | meta,
        "params": [["fc.weight", [2, 3]], ["fc.bias", [2]]],
        "given": {"x": {"shape": [4, 3]}},
        "strides": {"y": [[4, 3], 2]},
    }
    path.write_text(json.dumps(described))
    np.savez(path.with_suffix(".npz"), y=(2 * x).reshape(-1)[::2])
    return path


def _loaded(folder: Path, **meta: object) -> tuple[Case, torch.Tensor]:
    case = load_case(_case(folder, **meta))
    return case, 2 * case.inputs()["x"]


def test_an_output_passes_within_the_bar_and_fails_beyond(tmp_path: Path) -> None:
    case, y = _loaded(tmp_path)
    scale = y.flatten()[::2].abs().max()
    off = y.clone()
    off[0, 0] += 0.9e-4 * scale
    assert case.compare({"y": off}) == pytest.approx(0.9e-4, rel=1e-2)
    off[0, 0] += 0.2e-4 * scale
    with pytest.raises(Mismatch, match="error"):
        case.compare({"y": off})


def test_case_bar_and_output_scale_are_honoured(tmp_path: Path) -> None:
    case, y = _loaded(tmp_path, rtol=1e-2)
    assert case.compare({"y": y * 1.005}) == pytest.approx(5e-3, rel=1e-2)
    case, y = _loaded(tmp_path, output_scale={"y": 10.0})
    assert case.compare({"y": y / 10}) < 1e-6
    with pytest.raises(Mismatch):
        case.compare({"y": y})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda y: {}, "missing"),
        (lambda y: {"y": y[:, :2]}, "shape"),
        (lambda y: {"y": y.masked_fill(torch.ones_like(y, dtype=torch.bool), math.nan)}, "finite"),
    ],
)
def test_a_wrong_output_says_what_is_wrong(tmp_path: Path, broken: object, message: str) -> None:
    case, y = _loaded(tmp_path)
    with pytest.raises(Mismatch, match=message):
        case.compare(broken(y))


def test_small_outputs_have_no_absolute_slack() -> None:
    case = Case("p", "lr", {"piece": "lr", "config": {}}, [], {}, {"lr": ((1,), 1)}, {"lr": np.array([3e-5])})
    assert case.compare({"lr": np.array([3e-5])}) == 0
    with pytest.raises(Mismatch):
        case.compare({"lr": np.array([3.01e-5])})


def test_integers_are_compared_exactly() -> None:
    case = Case("p", "i", {"piece": "i", "config": {}}, [], {}, {"i": ((1,), 1)}, {"i": np.array([100_000])})
    with pytest.raises(Mismatch):
        case.compare({"i": np.array([100_001])})


def test_weights_follow_the_naming_rule_and_the_cases_own(tmp_path: Path) -> None:
    assert make_weight("a.norm.weight", (4096,)).mean().item() == pytest.approx(1, abs=0.01)
    assert make_weight("a.fc.weight", (64, 256)).std().item() == pytest.approx(1 / 16, rel=0.05)
    assert make_weight("a.fc.bias", (4096,)).std().item() == pytest.approx(0.1, rel=0.05)
    assert (make_weight("bn.running_var", (64,)) >= 1).all()
    assert torch.equal(make_weight("a.b", (3,)), make_weight("a.b", (3,)))
    steps = [
        {"match": r"weight$", "min_ndim": 2, "op": "mul_sqrt_fan_in"},
        {"match": "bias", "op": "add", "value": 1.0},
    ]
    state = load_case(_case(tmp_path, rule={"text": "-", "steps": steps})).state_dict()
    assert torch.allclose(state["fc.weight"], make_weight("fc.weight", (2, 3)) * 3**0.5)
    assert torch.allclose(state["fc.bias"], make_weight("fc.bias", (2,)) + 1)


def test_inputs_have_their_kind_and_range() -> None:
    integers = make_input("i", {"shape": [1000], "kind": "int", "low": 2, "high": 5})
    assert integers.dtype == torch.int64
    assert set(integers.tolist()) == {2, 3, 4}
    uniform = make_input("u", {"shape": [1000], "kind": "uniform", "low": -1.0, "high": 1.0})
    assert -1 <= uniform.min() < -0.9 and 0.9 < uniform.max() <= 1
    assert make_input("b", {"shape": [8], "kind": "bool"}).dtype == torch.bool
    assert make_input("v", {"value": [[1, 2]]}).tolist() == [[1, 2]]


def test_runner_counts_and_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "any" / "stvit"
    good.mkdir(parents=True)
    for suffix in (".json", ".npz"):
        shutil.copy(CASES / "stvit" / f"attention_cross{suffix}", good)
    (good / "keys_other.json").write_text(json.dumps({"keys": []}))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("PASS stvit/attention_cross ")
    assert float(out[0].split()[-1]) < 1e-4
    assert out[1].startswith("NOT RUN stvit/keys_other")
    assert out[-1] == "1 passed, 0 failed"

    _case(tmp_path / "more")
    _case(tmp_path / "more", paper="no_such_paper")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL stvit/toy") and "knows no piece 'toy'" in line for line in out)
    assert any(line.startswith("FAIL no_such_paper/toy") and "no adapter" in line for line in out)
    assert out[-1] == "1 passed, 2 failed"


def test_runner_does_not_pass_without_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_a_crashing_adapter_is_one_failed_line(tmp_path: Path) -> None:
    path = _case(tmp_path, piece="attention")
    result = run_file(path)
    assert result.status == "FAIL"
    assert "KeyError" in result.reason
    assert "Traceback" in result.trace
    path.with_suffix(".npz").unlink()
    assert "FileNotFoundError" in run_file(path).reason


def test_gradients_of_a_scaled_case_are_those_of_what_the_piece_is_given(tmp_path: Path) -> None:
    """The entropy term's case at another scale: gradients at the scaled features and codes, not at those before."""
    path = tmp_path / "seqgan" / "entropy_usage.json"
    path.parent.mkdir()
    described = json.loads((CASES / "seqgan" / "entropy_usage.json").read_text())
    described["meta"]["config"]["scale"] = scale = 0.5
    path.write_text(json.dumps(described))
    given = {name: make_input(name, description) for name, description in described["given"].items()}
    z, codes = ((scale * given[name]).double().requires_grad_() for name in ("z", "codebook"))
    shares = (-torch.cdist(z.movedim(1, -1).flatten(0, -2), codes).square()).softmax(dim=-1).mean(dim=0)
    value = torch.special.entr(shares).sum()
    at_z, at_codes = torch.autograd.grad(value, (z, codes))
    right = {"usage": shares, "entropy": value, "grad_z": at_z, "grad_codebook": at_codes}
    described["strides"] = {f"{name}_l2_squared": [list(v.shape), 1] for name, v in right.items()}
    np.savez(path.with_suffix(".npz"), **{f"{n}_l2_squared": v.detach().flatten().numpy() for n, v in right.items()})
    path.write_text(json.dumps(described))
    assert run_file(path).line().startswith("PASS")
