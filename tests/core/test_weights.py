"""Weights of files into models: bare networks, parts, containers and prefixes; what is refused, and why."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core.checkpoint import StateMismatch, UnsafeCheckpointError
from core.checkpoint.weights import load_sources, load_weights, model_state
from core.errors import ConfigError
from core.trainer import Trainer


class Net(nn.Module):
    def __init__(self, width: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, classes)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


class Whole(Trainer):
    """A network, a critic of another shape, and two tokenizers of one shape."""

    def __init__(self, seed: int = 0, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = Net(classes=classes)
        self.critic = nn.Linear(5, 1)
        self.tokenizer, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


class Pair(Trainer):
    """Two networks, none of which stands out."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 2), nn.Linear(2, 1)


def same(module: nn.Module, state: dict) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def other_weights() -> Whole:
    return Whole(seed=1)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
def test_a_bare_network_goes_into_the_network(tmp_path, suffix, container):
    state = other_weights().network.state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    else:
        torch.save(state if container is None else {container: state, "epoch": 3}, path)
    model = Whole()
    before = model.critic.weight.clone()
    said = load_weights(model, path)
    assert same(model.network, state) and torch.equal(model.critic.weight, before)
    assert f"weights from {path} into network: all 10 keys" in said
    assert "left as built: critic, tokenizer, second" in said


def test_whole_trainers_wrapped_networks_and_other_parts_find_their_place(tmp_path):
    theirs = other_weights()
    path = tmp_path / "a.pt"
    torch.save(theirs.state_dict(), path)
    model = Whole()
    assert load_weights(model, path) == f"weights from {path}: all {len(theirs.state_dict())} keys"
    assert same(model, theirs.state_dict())
    for part, said in {"network": "network", "critic": "critic", "network.norm": "network.norm"}.items():
        state = theirs.get_submodule(part).state_dict()
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
        model = Whole()
        assert f"into {said}: all" in load_weights(model, path)
        assert same(model.get_submodule(part), state)
    counted = {k: v for k, v in theirs.network.state_dict().items() if "num_batches" not in k}
    torch.save(counted, path)  # converters leave the counters of batch norms out
    assert "into network: all 9 keys" in load_weights(Whole(), path)


def test_a_file_that_fits_several_parts_names_them(tmp_path):
    theirs = other_weights()
    path = tmp_path / "a.pt"
    torch.save(theirs.tokenizer.state_dict(), path)
    model = Whole()
    with pytest.raises(ConfigError, match=r"fit 2 parts of Whole: choose with into= \(tokenizer, second\)"):
        load_weights(model, path)
    load_weights(model, path, into="second")
    assert same(model.second, theirs.tokenizer.state_dict())
    assert not same(model.tokenizer, theirs.tokenizer.state_dict())
    pair = Pair()
    torch.save({"g": pair.generator.state_dict(), "d": {"ema": pair.discriminator.state_dict()}}, path)
    with pytest.raises(ConfigError, match="there are weights at key=g"):
        load_weights(pair, path)
    assert "into generator" in load_weights(Pair(), path, key="g")  # by shape: none of the two is the network
    assert "into discriminator" in load_weights(Pair(), path, key="d.ema")
    with pytest.raises(ConfigError, match=r"nothing at key=d\.model \(at 'model' there are: ema\)"):
        load_weights(pair, path, key="d.model")


def test_prefix_ignore_and_strict_take_a_part_of_a_file(tmp_path):
    theirs, path = other_weights(), tmp_path / "a.pt"
    torch.save(theirs.state_dict(), path)
    model = Whole()
    with pytest.raises(StateMismatch, match=r"prefix=network\. takes the part that does"):
        load_weights(model, path, into="network")
    load_weights(model, path, into="network", prefix="network.")
    assert same(model.network, theirs.network.state_dict()) and not same(model.critic, theirs.critic.state_dict())
    assert "into network" in load_weights(Whole(), path, prefix="network.")
    with pytest.raises(ConfigError, match=r"no key that begins with 'net\.' \(its keys begin with critic\., network\."):
        load_weights(model, path, prefix="net.")
    torch.save(theirs.network.state_dict(), path)  # already without the prefix: a converted file
    assert "into network" in load_weights(Whole(), path, into="network", prefix="network.")

    wider = Whole(classes=7)
    with pytest.raises(StateMismatch, match=r"head\.weight: the model has \(7, 3\) float32, the state has \(2, 3\)"):
        load_weights(wider, path)
    before = wider.network.head.weight.clone()
    load_weights(wider, path, ignore="head.*")
    assert torch.equal(wider.network.stem.weight, theirs.network.stem.weight)
    assert torch.equal(wider.network.head.weight, before)
    wider = Whole(classes=7)
    assert "into network: differing (2)" in load_weights(wider, path, strict=False)
    assert torch.equal(wider.network.stem.weight, theirs.network.stem.weight)
    torch.save({f"critic.{k}": v for k, v in theirs.critic.state_dict().items()}, path)
    with pytest.raises(StateMismatch, match="missing from the state"):
        load_weights(model, path)
    load_weights(model, path, strict=False)
    assert same(model.critic, theirs.critic.state_dict())


def test_what_a_part_lacks_comes_from_elsewhere_and_the_remainder_is_named(tmp_path):
    theirs = other_weights()
    torch.save(theirs.network.state_dict(), tmp_path / "network.pt")
    torch.save(theirs.tokenizer.state_dict(), tmp_path / "tokenizer.pt")
    torch.save(theirs.state_dict(), tmp_path / "whole.pt")
    rest = [{"path": str(tmp_path / "tokenizer.pt"), "into": name} for name in ("tokenizer", "second")]
    model = Whole()
    said = load_weights(model, tmp_path / "network.pt", rest=rest)
    assert same(model.second, theirs.tokenizer.state_dict()) and same(model.network, theirs.network.state_dict())
    assert said.endswith("left as built: critic")
    missing = [{"path": "gone.pt", "into": "tokenizer"}]
    with pytest.raises(ConfigError, match=r"gone\.pt[\s\S]*load_from=null"):
        load_weights(model, tmp_path / "network.pt", rest=missing)
    load_weights(model, tmp_path / "whole.pt", rest=missing)  # nothing is lacking, nothing is read


def test_the_entries_of_load_from_are_checked(tmp_path):
    torch.save(other_weights().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"load_from takes no argument 'inot': did you mean 'into'"):
        load_sources(Whole(), {"path": str(tmp_path / "a.pt"), "inot": "network"})
    with pytest.raises(ConfigError, match="`path` is missing"):
        load_sources(Whole(), [{"into": "network"}])
    with pytest.raises(ConfigError, match="give a path, or"):
        load_sources(Whole(), 3)
    with pytest.raises(ConfigError, match="no submodule 'netwrk': did you mean 'network'"):
        load_sources(Whole(), {"path": str(tmp_path / "a.pt"), "into": "netwrk"})
    with pytest.raises(ConfigError, match=r"no weights file .*b\.pt: .* did you mean|nor a run's folder"):
        load_sources(Whole(), str(tmp_path / "b.pt"))
    assert load_sources(Whole(), None) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_with_nan_or_infinity_are_refused_by_name(tmp_path, value):
    theirs = other_weights()
    theirs.network.stem.weight.data[0, 0] = value
    theirs.network.norm.running_var[1] = value
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    model = Whole()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    named = r"NaN or infinity in 2 of \d+ tensors \(network\.stem\.weight, network\.norm\.running_var\)"
    with pytest.raises(ConfigError, match=named + r"[\s\S]*finite=false"):
        load_weights(model, tmp_path / "a.pt")
    assert same(model, before)
    load_weights(model, tmp_path / "a.pt", finite=False)
    assert not torch.isfinite(model.network.stem.weight).all()


def test_infinity_that_the_model_computes_itself_is_no_fault(tmp_path):
    theirs = other_weights()
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    assert torch.isinf(model_state(tmp_path / "a.pt")["network.mask"]).any()
    load_weights(Whole(), tmp_path / "a.pt")


def test_pickles_of_others_are_read_as_data_and_nothing_is_executed(tmp_path):
    import os

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    state = other_weights().network.state_dict()
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    model = Whole()
    load_weights(model, tmp_path / "a.pth")
    assert same(model.network, state)
    torch.save({"model": state, "args": Attack()}, tmp_path / "b.pth")
    with pytest.raises(UnsafeCheckpointError, match="system"):
        load_weights(model, tmp_path / "b.pth")
    assert not (tmp_path / "executed").exists()
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    with pytest.raises(ConfigError, match="holds no tensors"):
        load_weights(model, tmp_path / "c.pth")


def test_averages_of_others_are_found_and_a_choice_is_said(tmp_path):
    raw, average = Whole(seed=2).network.state_dict(), Whole(seed=3).network.state_dict()
    path = tmp_path / "a.pt"
    torch.save({"model_ema": average, "epoch": 1}, path)
    model = Whole()
    load_weights(model, path)
    assert same(model.network, average)
    torch.save({"model": raw, "model_ema": average}, path)
    load_weights(model, path, averaged=False)
    assert same(model.network, raw)
    load_weights(model, path)  # as timm takes them
    assert same(model.network, average)
    load_weights(model, path, key="model")
    assert same(model.network, raw)
