"""Conversion of checkpoints: every tensor is accounted for, whatever the file and the converter."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import StateMismatch, UnsafeCheckpointError, load
from core.engine.commands.convert import ConversionError, Options, convert_file, convert_state, main, read_state
from core.engine.commands.tracing import trace
from core.errors import ConfigError

PACKAGE = '''
import torch
from torch import nn

from core.trainer import Trainer

DROPPED = {"head_dist.*": "distillation head, unused"}


class Net(nn.Module):
    def __init__(self, dim=4, classes=3):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        return self.head(self.norm(self.qkv(x)[:, :4]))


class Own(Trainer):
    input_shape = (4,)

    def __init__(self, network):
        super().__init__()
        self.network = network


def convert(state, target=None, *, rows=None, fail=False):
    """Packs q, k, v; renames the norm; crops the head."""
    if fail:
        raise KeyError("blocks.7.norm")
    out = {}
    for part in ("weight", "bias"):
        out[f"qkv.{part}"] = torch.cat([state[f"{n}.{part}"] for n in "qkv"])
    for name, value in state.items():
        if name.startswith("bn."):
            out["norm." + name[3:]] = value
        elif name.startswith("head."):
            out[name] = value[:rows] * 1.0
    if isinstance(target, nn.Module):
        out.setdefault("norm.num_batches_tracked", torch.zeros((), dtype=torch.long))
    elif target == "extra":
        out["extra"] = torch.ones(2)
    elif target is not None:
        raise ValueError(f"unknown target {target}")
    return out


def revert(state, *, layout):
    """Unpacks q, k, v."""
    out = {}
    for part in ("weight", "bias"):
        for name, value in zip("qkv", state[f"qkv.{part}"].chunk(3)):
            out[f"{name}.{part}"] = value
    for name, value in state.items():
        if not name.startswith("qkv."):
            out[name.replace("norm.", "bn.")] = value
    return out
'''

EXPERIMENT = """# @package _global_
# A tiny network.
name: own/tiny
model:
  type: {paper}.Own
  network: {{type: {paper}.Net, classes: 3}}
"""


@pytest.fixture
def paper(tmp_path, monkeypatch):
    name = f"converting_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("from .checkpoint import Net, Own\n")
    (tmp_path / name / "checkpoint.py").write_text(PACKAGE)
    (tmp_path / "configs" / "experiment" / "own").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "own" / "tiny.yaml").write_text(EXPERIMENT.format(paper=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _official(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q.weight": (4, 4),
        "k.weight": (4, 4),
        "v.weight": (4, 4),
        "q.bias": (4,),
        "k.bias": (4,),
        "v.bias": (4,),
    }
    shapes |= {"bn.weight": (4,), "bn.bias": (4,), "bn.running_mean": (4,), "bn.running_var": (4,)}
    shapes |= {"head.weight": (3, 4), "head.bias": (3,)}
    return {k: torch.rand(s, generator=generator) for k, s in shapes.items()} | more


def _convert(paper: str, src: str, dst: str = "out.safetensors", **options) -> tuple[dict, object]:
    extra = options.pop("extra", None)
    report = convert_file(Options(paper=paper, src=src, dst=dst, **options), extra)
    return load(dst), report


def test_an_official_pickle_with_its_config_becomes_plain_weights(paper):
    content = {
        "model": _official(**{"bn.num_batches_tracked": torch.tensor(9), "head_dist.weight": torch.ones(1)}),
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=0.1),
        "epoch": 3,
    }
    torch.save(content, "official.pth")
    state, report = _convert(paper, "official.pth", report="report.json")
    assert torch.equal(state["qkv.weight"], torch.cat([content["model"][f"{n}.weight"] for n in "qkv"]))
    assert torch.equal(state["norm.running_var"], content["model"]["bn.running_var"])
    assert report.mapped["qkv.bias"] == ["k.bias", "q.bias", "v.bias"] and report.mapped["norm.bias"] == ["bn.bias"]
    assert report.dropped == {"head_dist.weight": "distillation head, unused"}
    assert report.aside == ["optimizer", "args", "epoch"] and report.fresh == []
    assert json.loads(Path("report.json").read_text())["dropped"] == report.dropped
    text = str(report)
    assert "13 of 14 tensors carried over into 9: 2 under their name, 5 renamed or cut, 2 put together" in text
    assert "1 dropped (distillation head, unused): head_dist.weight" in text and "left aside: optimizer" in text


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_every_kind_of_file_is_read(paper, suffix):
    from safetensors.torch import save_file

    state = _official()
    if suffix == ".npz":
        np.savez("a.npz", **{k: v.numpy() for k, v in state.items()})
    elif suffix == ".pt":
        torch.save({k: v.numpy() for k, v in state.items()}, "a.pt")  # arrays in a pickle
    else:
        save_file(state, "a.safetensors")
    converted, _ = _convert(paper, f"a{suffix}", dst="out.pt")
    assert torch.equal(converted["head.weight"], state["head.weight"])


def test_an_entry_without_a_place_or_a_reason_stops_everything(paper):
    torch.save(_official(**{"mask_token": torch.ones(1), "extra.relative_position_index": torch.ones(1)}), "a.pt")
    with pytest.raises(
        ConversionError, match=r"1 of 14 entries are neither used nor explained[\s\S]*mask_token \(1,\)"
    ):
        _convert(paper, "a.pt")
    import os

    assert not os.path.exists("out.safetensors")
    _, report = _convert(paper, "a.pt", drop=["mask_*"])
    assert report.dropped["mask_token"] == "left out on request"
    assert "computed by the model" in report.dropped["extra.relative_position_index"]


def test_what_the_converter_makes_up_is_reported(paper):
    torch.save(_official(), "a.pt")
    _, report = _convert(paper, "a.pt", target="extra")
    assert report.fresh == ["extra"] and "1 made by the converter: extra" in str(report)


def test_the_result_is_held_against_the_experiments_model(paper):
    torch.save(_official(), "a.pt")
    options = {"experiment": "own/tiny", "config_dir": "configs"}
    state, _ = _convert(paper, "a.pt", **options)
    assert "norm.num_batches_tracked" in state  # the converter was given the model
    with pytest.raises(StateMismatch) as caught:
        convert_file(Options(paper=paper, src="a.pt", dst="b.pt", **options), overrides=["model.network.classes=7"])
    assert "head.weight: the model has (7, 4) float32, the state has (3, 4) float32" in str(caught.value)
    assert not Path("b.pt").exists()
    with pytest.raises(ConfigError, match="name the experiment"):
        convert_file(Options(paper=paper, src="a.pt", dst="b.pt"), overrides=["model.network.classes=7"])


def test_the_way_back(paper):
    official = _official()
    torch.save(official, "a.pt")
    ours, _ = _convert(paper, "a.pt", dst="ours.pt")
    theirs, report = _convert(paper, "ours.pt", dst="theirs.pt", reverse=True, extra={"layout": "official"})
    assert theirs.keys() == official.keys() and all(torch.equal(theirs[k], v) for k, v in official.items())
    assert report.mapped["k.weight"] == ["qkv.weight"]
    # Of a run's checkpoint, the network alone is what the others know.
    torch.save({"model": {f"network.{k}": v for k, v in ours.items()}, "position": {}, "hooks": {}}, "run.pt")
    from_run, _ = _convert(paper, "run.pt", dst="c.pt", reverse=True, extra={"layout": "official"})
    assert all(torch.equal(from_run[k], v) for k, v in official.items())
    with pytest.raises(ConfigError, match=r"revert needs layout="):
        _convert(paper, "ours.pt", dst="theirs.pt", reverse=True)
    with pytest.raises(ConfigError, match="target= belongs to the way in"):
        _convert(paper, "ours.pt", dst="theirs.pt", reverse=True, target="x")


def test_weights_are_found_where_they_are(paper):
    state = _official()
    content = {"ema": {"model": {f"module.{k}": v for k, v in state.items()} | {"step": 3, "other.x": torch.ones(1)}}}
    torch.save(content, "a.pt")
    found, aside = read_state("a.pt", key="ema.model")
    assert len(found) == 13 and aside == ["step"]
    converted, report = _convert(paper, "a.pt", key="ema.model", prefix="module.")
    assert torch.equal(converted["head.bias"], state["head.bias"]) and report.aside == ["step", "other.x"]
    with pytest.raises(ConversionError, match=r"nothing at key=ema.net \(at 'net' there are: model\)"):
        _convert(paper, "a.pt", key="ema.net")
    with pytest.raises(ConversionError, match=r"no entry begins with 'backbone\.'"):
        _convert(paper, "a.pt", key="ema.model", prefix="backbone.")
    torch.save({"epoch": 3}, "b.pt")
    with pytest.raises(ConversionError, match="holds no tensors"):
        _convert(paper, "b.pt")


def test_mistakes_are_answered_with_near_names(paper):
    torch.save(_official(), "a.pt")
    with pytest.raises(ConfigError, match=f"no package '{paper}y'; did you mean {paper}"):
        _convert(f"{paper}y", "a.pt")
    with pytest.raises(ConfigError, match=r"takes no argument 'row': did you mean 'rows'"):
        _convert(paper, "a.pt", extra={"row": 2})
    with pytest.raises(ConfigError, match="'state' is the state itself"):
        _convert(paper, "a.pt", extra={"state": 2})
    with pytest.raises(ConversionError, match=r"there is no entry 'blocks\.7\.norm'"):
        _convert(paper, "a.pt", extra={"fail": True})
    with pytest.raises(ConversionError, match="unknown target y"):
        _convert(paper, "a.pt", target="y")
    with pytest.raises(ConfigError, match=r"write a \.safetensors or \.pt file"):
        _convert(paper, "a.pt", dst="b.bin")
    with pytest.raises(ConfigError, match="same file"):
        _convert(paper, "a.pt", dst=str(Path("a.pt").resolve()))


def test_a_file_that_would_execute_code_is_refused(paper, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"model": _official(), "args": Attack()}, "a.pt")
    with pytest.raises(UnsafeCheckpointError, match="system"):
        _convert(paper, "a.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.child
def test_the_command_line(paper, capsys):
    torch.save(_official(), "a.pt")
    main([f"paper={paper}", "src=a.pt", "dst=b.pt", "rows=2", "drop=x.*,y"], "doc")
    assert load("b.pt")["head.weight"].shape == (2, 4)
    assert "written: b.pt" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="missing: dst="):
        main([f"paper={paper}", "src=a.pt"], "doc")


@pytest.mark.child
def test_the_tool_teaches_at_once():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/convert.py", "--help"], capture_output=True, text=True
    )
    assert ran.returncode == 0 and "paper=stvit src=official.pth" in ran.stdout
    assert "| torch" not in ran.stderr.replace("  ", " ")


# --- where tensors come from ---------------------------------------------------------------------------------------


def test_sources_are_followed_through_every_kind_of_operation():
    state = {name: torch.rand(4, 4) for name in "abcdefgh"}
    state["view_of_a"], state["tied_b"] = state["a"][:2], state["b"]

    def function(s: dict) -> dict:
        filled = torch.zeros(8, 4)
        filled[:4] = s["c"]
        filled[4:].copy_(s["d"])
        resized = torch.nn.functional.interpolate(s["e"][None, None], size=(8, 8), mode="bicubic")
        return {
            "same": s["a"],
            "cut": s["view_of_a"],
            "tied": s["tied_b"],
            "filled": filled,
            "resized": resized[0, 0].reshape(16, 4).T.contiguous(),
            "mixed": torch.stack([s["f"], s["g"]]).mean(0),
            "fresh": torch.ones(3),
        }

    result, sources = trace(function, state)
    assert sources == {
        "same": {"a"},
        "cut": {"view_of_a"},
        "tied": {"b", "tied_b"},
        "filled": {"c", "d"},
        "resized": {"e"},
        "mixed": {"f", "g"},
        "fresh": set(),
    }
    assert torch.equal(result["filled"], torch.cat([state["c"], state["d"]]))


def test_converters_may_be_called_directly():
    state, report = convert_state(
        {"a": torch.ones(1), "b": torch.ones(1)}, lambda s: {"x": s["a"]}, dropped={"b": "why"}
    )
    assert list(state) == ["x"] and report.dropped == {"b": "why"}
    with pytest.raises(ConversionError, match="no tensors: x"):
        convert_state({"a": torch.ones(1)}, lambda s: {"x": 3})
