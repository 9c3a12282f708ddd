"""What a user adds to a config: variables of their own, and hooks by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from core.config.composition import CONFIGS, command_line, compose, experiments, to_dict
from core.config.fingerprint import fingerprint
from core.engine.keys.check import checked
from core.engine.keys.hooks import hook_configs
from core.engine.launch import run
from core.errors import ConfigError

PACKAGE = '''
from mmengine.hooks import Hook


class Note(Hook):
    """Writes its text once the run begins."""

    def __init__(self, text):
        self.text = text

    def before_run(self, runner):
        with open("notes.txt", "a") as file:
            file.write(self.text + "\\n")
'''


@pytest.fixture
def mine(user, tmp_path, monkeypatch):
    """Composes the tiny experiment with overrides, with a hook package beside it."""
    (tmp_path / "mynotes.py").write_text(PACKAGE)
    for folder in (user, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mynotes", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        return compose(["experiment=mine/tiny", "runtime=cpu", *overrides], config_dir=user / "configs")

    return call


# ---------------------------------------------------------------------- variables
def test_a_variable_of_ones_own_is_read_where_it_is_interpolated(mine):
    cfg = mine("+vars.width=12", "model.network.width=${vars.width}", "train_cfg.max_epochs=1")
    result = run(cfg)
    stored = yaml.safe_load((Path(result["run_dir"]) / "config.yaml").read_text())
    assert stored["model"]["network"]["width"] == 12 and stored["vars"] == {"width": 12}
    assert "model.network.width=${vars.width}" in result["overrides"] == stored["overrides"]
    assert result["parameters"] == run(mine("model.network.width=12", "train_cfg.max_epochs=1"))["parameters"]


def test_a_variable_may_hold_anything_and_is_never_built(mine):
    kept = to_dict(mine("+vars.grid=[1,2]", "+vars.part={type: nowhere.AtAll, size: 3}"))
    assert checked(kept)["vars"] == {"grid": [1, 2], "part": {"type": "nowhere.AtAll", "size": 3}}


def test_a_variable_changes_a_runs_identity_through_its_uses_only(mine):
    plain = fingerprint(mine())
    assert fingerprint(mine("+vars.width=12")) == plain
    assert fingerprint(mine("+vars.width=16", "model.network.width=${vars.width}")) == plain
    assert fingerprint(mine("+vars.width=12", "model.network.width=${vars.width}")) != plain


def test_variables_that_cannot_be_meant(mine):
    with pytest.raises(ConfigError, match=r"model\.network\.width.*vars\.widht.*did you mean vars\.width"):
        to_dict(mine("+vars.width=12", "model.network.width=${vars.widht}"))
    with pytest.raises(ConfigError, match=r"vars=5.*mapping"):
        checked(to_dict(mine("vars=5")))
    with pytest.raises(ConfigError, match=r"\+vars\.width=12' adds"):
        mine("vars.width=12")
    with pytest.raises(ConfigError, match=r"stages\.0\.vars has no effect"):
        checked(to_dict(mine("stages=[{name: one, vars: {width: 12}}]")))


# ---------------------------------------------------------------------- hooks
def test_a_hook_is_added_and_taken_away_by_its_name(mine, user, tmp_path):
    run(mine("+custom_hooks.note={type: mynotes.Note, text: alone}", "train_cfg.max_epochs=1"))
    path = user / "configs" / "experiment" / "mine" / "hooked.yaml"
    path.write_text(
        "# @package _global_\ndefaults: [/experiment/mine/tiny]\n"
        "custom_hooks: {first: {type: mynotes.Note, text: first}, second: {type: mynotes.Note, text: second}}\n"
    )
    try:
        hooked = "experiment=mine/hooked"
        run(mine(hooked, "+custom_hooks.third={type: mynotes.Note, text: third}", "train_cfg.max_epochs=1"))
        run(mine(hooked, "~custom_hooks.first", "custom_hooks.second.text=other", "train_cfg.max_epochs=1"))
        run(mine(hooked, "custom_hooks.first=null", "train_cfg.max_epochs=1"))
    finally:
        path.unlink()
    assert (tmp_path / "notes.txt").read_text().split() == ["alone", "first", "second", "third", "other", "second"]


def test_a_list_of_hooks_means_the_same_run_as_a_mapping(mine, tmp_path):
    listed = mine("custom_hooks=[{type: mynotes.Note, text: listed}]", "train_cfg.max_epochs=1")
    named = mine("+custom_hooks.note={type: mynotes.Note, text: listed}", "train_cfg.max_epochs=1")
    assert fingerprint(listed) == fingerprint(named) != fingerprint(mine("train_cfg.max_epochs=1"))
    run(listed)
    assert (tmp_path / "notes.txt").read_text() == "listed\n"


def test_a_hook_is_added_to_a_list(mine, user, tmp_path):
    listed = "custom_hooks=[{type: mynotes.Note, text: listed}]"
    added = (
        "+custom_hooks.more={type: mynotes.Note, text: '${vars.text}'}",
        "+custom_hooks.last={type: core.MediaHook}",
    )
    cfg = mine(listed, *added, "+vars.text=added", "train_cfg.max_epochs=1")
    assert [hook["type"] for hook in to_dict(cfg)["custom_hooks"]] == ["mynotes.Note"] * 2 + ["core.MediaHook"]
    given = to_dict(cfg)["overrides"]
    assert set(added) < set(given) and set(to_dict(cfg)) == set(to_dict(mine()))
    assert fingerprint(mine(*given)) == fingerprint(cfg)
    run(cfg)
    assert (tmp_path / "notes.txt").read_text().split() == ["listed", "added"]
    path = user / "configs" / "experiment" / "mine" / "listed.yaml"
    path.write_text(
        "# @package _global_\ndefaults: [/experiment/mine/tiny]\ncustom_hooks:\n  - {type: mynotes.Note, text: file}\n"
    )
    try:
        flags, words = command_line(["experiment=mine/listed", *added, "+vars.text=x"], user / "configs")
        assert flags == [] and words[1].startswith("+appended_hooks.more=")
        assert len(to_dict(mine("experiment=mine/listed", *added, "+vars.text=x"))["custom_hooks"]) == 3
    finally:
        path.unlink()


def with_own_hooks():
    """Experiments that say something about hooks themselves, and the first of every paper."""
    texts = {name: (CONFIGS / "experiment" / f"{name}.yaml").read_text() for name in sorted(experiments())}
    first = {name.split("/")[0]: name for name in reversed(texts)}
    return sorted({*first.values(), *(name for name, text in texts.items() if "custom_hooks" in text)})


@pytest.mark.parametrize("name", with_own_hooks())
def test_a_hook_can_be_added_to_every_experiment(name):
    before = hook_configs(to_dict(compose([f"experiment={name}"]))["custom_hooks"])
    after = to_dict(compose([f"experiment={name}", "+custom_hooks.mine={type: core.MediaHook}"]))["custom_hooks"]
    assert [*hook_configs(after).values()] == [*before.values(), {"type": "core.MediaHook"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["custom_hooks=5"], r"custom_hooks=5 is neither"),
        (["+custom_hooks.media=5"], r"custom_hooks\.media=5 is not a hook's config"),
        (["custom_hooks={type: core.MediaHook}"], r"give it a name.*NAME: \{type: core\.MediaHook"),
        (["custom_hooks=[{interval: 2}]"], r"custom_hooks\.0=.*not a hook's config"),
        (["+custom_hooks.media={type: core.MediaHok}"], r"custom_hooks\.media.*did you mean 'MediaHook'"),
        (
            ["custom_hooks=[{type: core.MediaHook}]", "custom_hooks.other={type: core.MediaHook}"],
            r"custom_hooks is a list here.*'\+custom_hooks\.other=",
        ),
        (["custom_hooks.media={type: core.MediaHook}"], r"'\+custom_hooks\.media=.*adds"),
    ],
)
def test_hooks_that_cannot_be_meant(mine, words, message):
    with pytest.raises(ConfigError, match=message):
        checked(to_dict(mine(*words)))


def test_seeds_take_turns(mine):
    """`${turn:...}` spreads the seeds of a design, and a run is known by what its seed got."""
    wide = "model.network.width='${turn:${seed},8,16,24}'"
    assert [mine(wide, f"seed={seed}").model.network.width for seed in range(4)] == [8, 16, 24, 8]
    assert fingerprint(mine(wide, "seed=1")) == fingerprint(mine("model.network.width=16", "seed=1"))


def test_a_factor_is_the_ratio_of_two_rates(mine):
    """`${ratio:...}` makes a multiplier of a rate that is said as such."""
    words = ["+vars.rate=0.1", "+vars.head=0.02", "optim_wrapper.optimizer.lr='${vars.rate}'"]
    factor = "+optim_wrapper.paramwise.multipliers.head.lr='${ratio:${vars.head},${vars.rate}}'"
    assert mine(*words, factor).optim_wrapper.paramwise.multipliers["head"]["lr"] == pytest.approx(0.2)
