"""``python -m tests.cuda``: what it says without a GPU, and that its checks run and find what is wrong."""

import json
import math

import pytest
import torch
from tiny_experiment import ROOT, environment

import tests.cuda.subjects as subjects
from core.config import compose, to_dict
from core.errors import ConfigError
from tests import forked
from tests.cuda import steps
from tests.cuda.__main__ import CHECKS, outcome
from tests.cuda.engine import Batches, prefetch

CPU = torch.device("cpu")


def call(*words, cwd=ROOT):
    environ = {**environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return forked.run(["-m", "tests.cuda", *words], cwd, environ)


@pytest.mark.child
def test_without_a_gpu_it_says_that_nothing_was_checked():
    before = (ROOT / "results" / "cuda.json").exists()
    done = call()
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "no CUDA device here: nothing was checked (device=cpu runs what has a meaning on a CPU)"
    ]
    assert (ROOT / "results" / "cuda.json").exists() == before


@pytest.mark.child
def test_on_a_cpu_every_check_runs_on_an_experiment_and_on_the_engine(tmp_path):
    done = call("device=cpu", "experiments=slot_walks/blobworld_fe", f"output={tmp_path / 'report.json'}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {one["check"]: one["verdict"] for one in report["checks"]} == dict.fromkeys(CHECKS, "holds")
    figures = {one["check"]: one["figures"] for one in report["checks"]}
    assert figures["agreement"] == {"difference": 0.0, "after_update": 0.0}
    assert figures["ddp"]["backend"] == "gloo" and figures["resume"]["steps"] == figures["torchrun"]["steps"] == 30
    assert figures["fp16"]["difference"] < 0.1 and figures["waiting"]["steps"] == 27
    assert "nothing about CUDA" in done.stdout and report["device"].startswith("cpu")


@pytest.mark.child
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("checks=agrement", "did you mean 'agreement'"),
        ("experiments=stvit/digts", "stvit/digits"),
        ("device=tpu", "cuda"),
    ],
)
def test_a_wrong_word_is_one_line(word, message):
    done = call("device=cpu", "checks=agreement", word)
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ")


def test_the_smallest_experiment_of_every_kind_of_step_is_taken(tmp_path):
    names = ["stvit/digits", "stvit/glyphs", "stvit/moving_glyphs", "stvit/deit_base", "slot_walks/blobworld_kmeans"]
    kept, left = subjects.choose(names, 60, tmp_path)
    assert [s.name for s in kept] == ["stvit/glyphs", "stvit/moving_glyphs"]  # without training there is no step
    assert left == []
    kept, left = subjects.choose(["stvit/deit_base", "seqgan/shape_glyphs"], 60, tmp_path)
    assert [s.name for s in kept] == ["seqgan/shape_glyphs:tokenizer", "seqgan/shape_glyphs:transformer"]
    [line] = left
    assert "stvit.ClassificationTrainer" in line and "87 million" in line
    with pytest.raises(ConfigError, match="did you mean 'stvit/digits'"):
        subjects.choose(["stvit/digts"], 60, tmp_path)


@pytest.fixture
def glyphs():
    return subjects.Subject("stvit/glyphs", to_dict(compose(["experiment=stvit/glyphs", "runtime=cpu"])))


def test_every_build_of_a_subject_trains_alike(glyphs):
    first, second = (glyphs.steps(glyphs.build(CPU), 2) for _ in range(2))
    assert first == second and first[0] != first[1] and "loss" in first[0]
    batch = glyphs.batch(glyphs.build(CPU))
    assert 0.4 < float(batch["image"].mean()) < 0.6 and float(batch["image"].std()) > 0.1  # noise, not zeros


@pytest.mark.parametrize("check", ["agreement", "channels_last", "ddp"])
def test_a_step_that_computes_something_else_fails(glyphs, monkeypatch, check):
    """The second trainer that a check builds gets other weights."""
    build, built = glyphs.build, []

    def other(*args, **kwargs):
        made = build(*args, **kwargs)
        if built:
            with torch.no_grad():
                next(iter(made.trainer.parameters())).mul_(1.5)
        built.append(made)
        return made

    monkeypatch.setattr(glyphs, "build", other)
    call = {"agreement": steps.agreement, "channels_last": steps.channels_last, "ddp": steps.data_parallel}[check]
    made = outcome(check, glyphs.name, lambda: call(glyphs, CPU))
    assert made.verdict == "fails" and "loss terms differ by" in made.reason
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p.data.fill_(math.nan), "the first step's terms are not finite"),
        (lambda p: p.requires_grad_(False), "no weight has changed"),
    ],
)
def test_a_precision_that_spoils_training_fails(glyphs, monkeypatch, spoil, reason):
    build = glyphs.build

    def spoilt(device, precision="fp32", **runtime):
        made = build(device, precision=precision, **runtime)
        if precision == "bf16":
            made.optimizer()
            for parameter in made.trainer.parameters():
                spoil(parameter)
            if reason.startswith("no weight"):
                monkeypatch.setattr(made.trainer, "train_step", lambda data, wrapper: made.trainer.losses(data))
        return made

    monkeypatch.setattr(glyphs, "build", spoilt)
    made = outcome("bf16", glyphs.name, lambda: steps.precision(glyphs, CPU, "bf16"))
    assert made.verdict == "fails" and reason in made.reason


def test_differences_are_relative_and_other_terms_are_infinitely_far():
    assert steps.difference({"loss": 2.0}, {"loss": 2.0}) == 0
    assert steps.difference({"loss": 2.0, "a": 0.0}, {"loss": 1.0, "a": 0.0}) == 0.5
    assert steps.difference({"loss": 1.0}, {"loss": 1.0, "b": 1.0}) == math.inf
    assert steps.difference({"loss": 1.0}, {"loss": math.nan}) == math.inf


DRAWS = {
    "rand": lambda device: torch.rand(3, device=device),
    "randint": lambda device: torch.randint(9, (3,), device=device),
    "randperm": lambda device: torch.randperm(4, device=device),
    "normal_": lambda device: torch.zeros(3, device=device).normal_(),
    "bernoulli": lambda device: torch.bernoulli(torch.full((3,), 0.5, device=device)),
    "dropout": lambda device: torch.nn.functional.dropout(torch.ones(3, device=device)),
    "rand_like": lambda device: torch.rand_like(torch.zeros(3, device=device)),
    "multinomial": lambda device: torch.multinomial(torch.ones(3, device=device), 2),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_for_another_device_come_from_the_cpus_generator(name, monkeypatch):
    """The device without memory stands for a GPU: what is drawn for it moves the CPU's generator as on the CPU."""
    seen = []

    def on_cpu(value):
        if not isinstance(value, torch.Tensor):
            return value
        seen.append(value.device.type)
        return torch.full(value.shape, 0.5, dtype=value.dtype)

    monkeypatch.setattr(subjects, "_cpu", on_cpu)
    torch.manual_seed(0)
    with subjects.DrawsOnCpu():
        there = DRAWS[name](torch.device("meta"))
    after = torch.default_generator.get_state()
    torch.manual_seed(0)
    with subjects.DrawsOnCpu():
        here = DRAWS[name](CPU)
    assert there.device.type == "meta" and there.shape == here.shape and there.dtype == here.dtype
    assert torch.equal(torch.default_generator.get_state(), after)
    torch.manual_seed(0)
    assert not torch.equal(torch.default_generator.get_state(), after)
    assert set(seen) <= {"meta"}


def test_a_generator_of_ones_own_does_not_make_devices_differ():
    own = torch.Generator().manual_seed(5)
    torch.manual_seed(0)
    with subjects.DrawsOnCpu():
        drawn = torch.rand(3, generator=own)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_lost_batches_fail(monkeypatch):
    monkeypatch.setattr(Batches, "__iter__", lambda self: iter([self.batch] * (self.count - 1)))
    made = outcome("prefetch", "engine", lambda: prefetch(CPU, count=4))
    assert made.verdict == "fails" and "3 batches of 4 came" in made.reason


def test_a_check_that_breaks_is_a_failure_with_its_reason(capsys):
    def breaks():
        raise RuntimeError("out of memory\nlong story")

    made = outcome("fp32", "a/b", breaks)
    assert (made.verdict, made.reason) == ("fails", "RuntimeError: out of memory")
    assert "in breaks" in capsys.readouterr().err
