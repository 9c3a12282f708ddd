"""A gradient that is not finite stops the run before it reaches the weights, by the name of its parameter."""

import math
from pathlib import Path

import pytest
import torch
from tiny_experiment import ROOT, train
from torch import nn

from core.checkpoint import CheckpointStore
from core.checkpoint.run_folder import find_checkpoint
from core.checkpoint.weights import model_state
from core.engine.hooks.finite import NonFiniteGradient, NonFiniteLoss, not_finite
from core.optim.wrapper import OptimWrapper

AT = 7  # the step (from 0 on) with the bad gradient
HEAD = "network.head.weight"


class Harm(torch.autograd.Function):
    """The identity, whose derivative is not a number."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = ctx.value
        return gradient, None


@pytest.fixture
def harm(tiny, monkeypatch):
    """Makes the gradient of the head's weight bad in one step; the loss stays finite."""
    import mypoints

    def install(value, at=AT, upto=AT):
        losses, steps = mypoints.Classify.losses, []

        def harmed(self, batch):
            steps.append(1)
            if not at <= len(steps) - 1 <= upto:
                return losses(self, batch)
            weight = self.network.head.weight
            del self.network.head._parameters["weight"]
            self.network.head.weight = Harm.apply(weight, value)
            try:
                return losses(self, batch)
            finally:
                del self.network.head.weight
                self.network.head.register_parameter("weight", weight)

        monkeypatch.setattr(mypoints.Classify, "losses", harmed)

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", ["", "{max_norm: 1.0}", "{max_norm: 1.0, error_if_nonfinite: true}"])
def test_it_stops_before_the_weights_are_written(tiny, harm, value, clip):
    harm(value)
    options = ["train_cfg.max_epochs=1", "checkpoint.every_steps=1", "checkpoint.keep_last=null", "run_dir=harmed"]
    options += [f"+optim_wrapper.clip_grad={clip}"] if clip else []
    with pytest.raises(NonFiniteGradient) as caught:
        tiny(*options)
    message = str(caught.value)
    assert (
        f"'{HEAD}' is not finite at step {AT}" in message
        and "loss_ce=" in message
        and "the update was not made" in message
    )
    assert "point" in message and "nonfinite_step_00000007" in message
    saved = torch.load(next(Path("harmed/debug").glob("*.pt")), weights_only=True)
    before = model_state(CheckpointStore("harmed/checkpoints").path(AT))
    assert all(torch.equal(saved["model"][k], before[k]) for k in before)  # the weights of the step before
    assert find_checkpoint("harmed").name == f"step_{AT:08d}.pt"


def test_the_first_of_several_parameters_is_named_and_the_others_are_counted(tiny, monkeypatch):
    import mypoints

    forward = mypoints.Net.forward
    monkeypatch.setattr(mypoints.Net, "forward", lambda self, x: Harm.apply(forward(self, x), math.nan))
    with pytest.raises(NonFiniteGradient, match=r"'network\.stem\.weight' \(and of \d+ more parameters\)"):
        tiny("train_cfg.max_epochs=1")


def test_cleaned_gradients_do_not_stop(tiny, harm):
    harm(math.nan)
    result = tiny("train_cfg.max_epochs=1", "+optim_wrapper.clean_gradients={nan: 0.0}")
    assert result["steps"] == 10
    assert all(v.isfinite().all() for v in model_state(find_checkpoint(result["run_dir"])).values())


def test_what_cleaning_leaves_does_stop(tiny, harm):
    harm(math.inf)
    with pytest.raises(NonFiniteGradient, match=HEAD):
        tiny("train_cfg.max_epochs=1", "+optim_wrapper.clean_gradients={nan: 0.0}")


def test_overflows_of_fp16_are_skipped(tiny, harm):
    harm(math.inf)
    assert tiny("train_cfg.max_epochs=1", "runtime.precision=fp16")["steps"] == 10


def test_accumulated_gradients_are_watched_at_the_update(tiny, harm):
    harm(math.nan, at=4, upto=4)  # the first micro-step of a window of three: steps 3, 4, 5
    with pytest.raises(NonFiniteGradient, match=f"'{HEAD}' is not finite at step 5"):
        tiny("train_cfg.max_epochs=1", "optim_wrapper.accumulative_counts=3")


def test_a_loss_that_is_not_finite_is_still_told_as_such(tiny):
    with pytest.raises(NonFiniteLoss, match=r"the loss of step \d+ is not finite: loss=nan"):
        tiny("train_dataloader.dataset.nan=[7]", "train_cfg.max_epochs=1")


def test_one_of_two_optimizers(tiny, monkeypatch):
    import mypoints

    losses, steps = mypoints.Duel.discriminator_losses, []

    def harmed(self, batch):
        steps.append(1)
        terms = losses(self, batch)
        bias = self.discriminator.bias
        return {**terms, "loss_bad": (bias - bias.detach()).abs().sqrt().sum()} if len(steps) == AT else terms

    monkeypatch.setattr(mypoints.Duel, "discriminator_losses", harmed)
    with pytest.raises(NonFiniteGradient, match=r"'discriminator\.bias' is not finite at step 6"):
        tiny(
            "~model",
            "+model={type: mypoints.Duel, generator: {type: torch.nn.Linear, in_features: 8, out_features: 8},"
            " discriminator: {type: torch.nn.Linear, in_features: 8, out_features: 1}}",
            "~optim_wrapper",
            "+optim_wrapper={generator: {optimizer: {type: torch.optim.Adam, lr: 0.01}, params: [generator]},"
            " discriminator: {optimizer: {type: torch.optim.SGD, lr: 0.1}, params: [discriminator]}}",
            "param_scheduler=null",
            "train_cfg.max_epochs=1",
        )


def parameters(*gradients):
    made = []
    for gradient in gradients:
        p = nn.Parameter(torch.zeros_like(gradient.to_dense() if gradient.is_sparse else gradient))
        p.grad = gradient
        made.append(p)
    return made


@pytest.mark.parametrize(("value", "made"), [(math.nan, False), (math.inf, True)])
def test_clipping_by_value_comes_first(value, made):
    (weight,) = parameters(torch.tensor([value, 1.0]))
    wrapper = OptimWrapper(torch.optim.SGD([weight], lr=1.0), clip_grad={"type": "value", "clip_value": 2.0})
    seen = []
    wrapper.watch = lambda them: seen.append(not_finite(them).any().item()) or not seen[-1]
    wrapper.step()
    assert seen == [not made] and weight.tolist() == ([-2.0, -1.0] if made else [0.0, 0.0])


def test_only_what_is_not_finite_is_found():
    huge = torch.full((4,), 3e38)  # finite, though its squares are not
    half = torch.full((4,), 60000.0, dtype=torch.float16)
    sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, math.inf], (4,))
    empty = torch.zeros(0, 3)
    assert not_finite(parameters(huge, half, empty)).tolist() == [0, 0, 0]
    found = not_finite(parameters(empty, huge, sparse, half, torch.tensor([0.0, math.nan])))
    assert found.tolist() == [0, 0, 1, 0, 1]


HARMED = """
import math

import mypoints
import torch
from test_engine_gradients import Harm


class Net(mypoints.Net):
    steps = 0

    def forward(self, x):
        logits = super().forward(x)
        self.steps += self.training
        harmed = self.training and self.steps == 4 and torch.distributed.get_rank() == 1
        return Harm.apply(logits, math.nan) if harmed else logits
"""


@pytest.mark.processes
@pytest.mark.parametrize("runtime", ["default", "fsdp"])
def test_all_processes_stop(user, monkeypatch, runtime):
    """Of the sharded weight (2, 16) one process holds the row whose gradient is bad, the other the row that is not."""
    (user / "myharmed.py").write_text(HARMED)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
    words = ["model.network.type=myharmed.Net", "model.frozen=[network.stem,network.blocks,network.norm]"]
    words += [f"runtime={runtime}", "runtime.device=cpu", f"run_dir=all_{runtime}", "train_cfg.max_epochs=1"]
    done = train(user, *words, torchrun=2, check=False)
    assert done.returncode
    saved = list((user / f"all_{runtime}" / "debug").glob("nonfinite_step_00000003_rank*.pt"))
    assert len(saved) == 2, done.stderr
    assert "'network.head.weight' (and of 1 more parameters) is not finite at step 3" in done.stderr
