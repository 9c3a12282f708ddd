"""What changes no figure makes no run another one: hooks that only watch, how and where it is watched and kept."""

import json

import pytest
from lab import Lab
from mmengine.hooks import Hook

from core.config import compose, to_dict
from core.config.fingerprint import _formerly_relevant, digest, fingerprint, fingerprints
from core.engine.launch import run
from core.tables.claim_file import load_claim
from core.tables.claims import stale
from core.tables.runs import Results

HERE = __name__
CACHED = "+model.cache={type: seqgan.CodeCache, folder: a, views: 1}"


class Drawing(Hook):
    """A hook that says that it only draws."""

    changes_training = False


class Meddling(Hook):
    """A hook that may do anything."""


@pytest.fixture
def composed(user, monkeypatch):
    monkeypatch.syspath_prepend(str(user))
    return lambda *words: compose(["experiment=mine/tiny", "runtime=cpu", *words], config_dir=user / "configs")


@pytest.mark.parametrize(
    "words",
    [
        ["+custom_hooks.shown={type: core.MediaHook, max_items: 2}"],
        ["custom_hooks=[{type: core.LoggingHook, interval: 7}, {type: ProfilerHook}]"],
        [f"+custom_hooks.mine={{type: {HERE}.Drawing}}"],
        ["media=null"],
        ["media.max_items=3", "log_every=1", "visualizer=null", "+vars.width=3"],
        ["checkpoint.metric=accuracy", "checkpoint.every_steps=3", "checkpoint.keep_best=0"],
        ["train_cfg.val_every_epochs=null", "train_cfg.val_every_steps=4"],
        ["select_on_test=true"],
        ["train_dataloader.num_workers=2", "+train_dataloader.timeout=9", "runtime.timeout_s=5"],
        ["without_influence=[model.frozen]", "model.frozen=[network.stem]"],
    ],
)
def test_what_only_watches_is_the_same_run(composed, words):
    if "without_influence=[model.frozen]" in words:  # declared on both sides
        assert fingerprint(composed(*words)) == fingerprint(composed(words[0]))
        assert fingerprint(composed(words[1])) != fingerprint(composed())
    else:
        assert fingerprint(composed(*words)) == fingerprint(composed())


@pytest.mark.parametrize(
    "words",
    [
        [f"+custom_hooks.mine={{type: {HERE}.Meddling}}"],
        ["+custom_hooks.mine={type: mypoints.MediaHook}"],
        ["custom_hooks=[{type: EMAHook}]"],
        ["seed=1"],
        ["train_cfg.max_epochs=4"],
        ["train_dataloader.on_error=skip"],
        ["evaluate=best", "checkpoint.metric=accuracy"],
    ],
)
def test_what_may_change_figures_is_another_run(composed, words):
    assert fingerprint(composed(*words)) != fingerprint(composed())


@pytest.mark.parametrize("judge", ["evaluate=best", f"+custom_hooks.stop={{type: {HERE}.Meddling}}"])
def test_how_often_is_judged_counts_where_something_depends_on_it(composed, judge):
    common = [judge, "checkpoint.metric=accuracy"]
    every = ["train_cfg.val_every_epochs=null", "train_cfg.val_every_steps=4"]
    assert fingerprint(composed(*common, *every)) != fingerprint(composed(*common))
    assert fingerprint(composed(judge, "checkpoint.metric=seen")) != fingerprint(composed(*common))


def test_places_and_speed_of_caches_do_not_count_but_what_is_kept_does(composed):
    first = fingerprint(composed(CACHED))
    assert fingerprint(composed(CACHED.replace("folder: a", "folder: b, batch_size: 9, num_workers: 2"))) == first
    assert fingerprint(composed(CACHED.replace("views: 1", "views: 2"))) != first


def test_stages_are_reduced_like_the_config(composed):
    stages = "stages=[{name: a, load_from: null%s}]"
    plain = fingerprint(composed(stages % ""))
    watched = ", custom_hooks: {x: {type: core.MediaHook}}, log_every: 3, checkpoint: {metric: accuracy, keep_last: 4}"
    hooks = ", custom_hooks: []"
    assert fingerprint(composed(stages % watched)) == fingerprint(composed(stages % hooks))
    assert fingerprint(composed(stages % ", log_every: 3, checkpoint: {every_steps: 2}")) == plain


def test_a_new_root_key_at_its_default_makes_no_run_another_one(composed, monkeypatch):
    from core.config import influence

    before = fingerprint(composed())
    monkeypatch.setattr(influence, "_defaults", lambda: {"newly": {"on": False}, "other": None})
    plain = to_dict(composed())
    for same in ({"newly": {"on": False}}, {"other": []}, {}):
        assert fingerprint({**plain, **same}) == before
    assert fingerprint({**plain, "newly": {"on": True}}) != before


def test_a_finished_run_counts_and_is_found_with_a_hook_that_draws(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(composed("train_cfg.max_epochs=1"))
    drawn = [
        "train_cfg.max_epochs=1",
        f"+custom_hooks.mine={{type: {HERE}.Drawing}}",
        "+custom_hooks.s={type: core.MediaHook}",
    ]
    assert run(composed(*drawn, "resume=auto"))["run_dir"] == first["run_dir"]
    found = Results(tmp_path / "runs", lambda words: composed(*words[1:])).match(composed(*drawn))
    assert found is not None and found.data["run_dir"] == first["run_dir"]
    other = run(composed("train_cfg.max_epochs=1", f"+custom_hooks.m={{type: {HERE}.Meddling}}", "resume=auto"))
    assert other["run_dir"] != first["run_dir"]


CLAIM = """
statement: Deep is better than shallow.
metric: accuracy
direction: higher
seeds: [0, 1]
rows:
  - {label: deep, role: ours, experiment: mine/tiny}
  - {label: shallow, role: control, experiment: mine/tiny, overrides: [model.network.depth=1]}
comparisons:
  - {better: deep, than: shallow}
"""


def test_results_stored_under_the_former_fingerprint_still_count(user, tmp_path, monkeypatch):
    from core.tables.claim_store import ClaimStore
    from core.tables.claims import Evidence

    monkeypatch.syspath_prepend(str(user))
    path = tmp_path / "mine" / "tables" / "claim.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(CLAIM)
    lab = Lab(user, tmp_path / "runs", lambda cfg: {"accuracy": 0.1 * cfg["model"]["network"]["depth"]})
    claim, store = load_claim(path), ClaimStore.of(path)
    new = Evidence(claim, store, compose=lab.compose, runs_dir=lab.runs)
    new.train(lab.run, save=lambda: None)
    text = json.dumps(new.record())
    for cfg in new.configs.values():
        former = digest(_formerly_relevant(cfg))
        assert former != fingerprint(cfg) and list(fingerprints(cfg)) == [former, fingerprint(cfg)]
        text = text.replace(fingerprint(cfg), former)
    store.write(json.loads(text))
    again = Evidence(claim, store, compose=lab.compose, runs_dir=tmp_path / "nothing")
    assert again.missing == [] and stale(claim, store.read(), lab.compose) is None
    assert again.record() == new.record()  # and is kept under the present one from then on
