"""Two processes train like one: DistributedDataParallel and FSDP2 under accumulation, clipping, averaging, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from core.optim.ema import EMA, AveragedNetwork
from core.optim.groups import OptimConstructor
from core.optim.wrapper import OptimWrapper
from tests import forked

CONFIG = {
    "optimizer": {"type": "torch.optim.AdamW", "lr": 0.01},
    "accumulative_counts": 3,
    "paramwise": {"no_decay": True},
}
KINDS = ("ddp", "fsdp")
CLIPS = {
    "2-norm": {"max_norm": 0.02},
    "inf-norm": {"max_norm": 0.02, "norm_type": float("inf")},
    "value": {"type": "value", "clip_value": 0.01},
}
STEPS = 8  # windows of 3, 3 and 2 micro-steps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        self.average = AveragedNetwork(self.inner, decay=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def data() -> Tensor:
    return torch.randn(STEPS, 4, 5, generator=torch.Generator().manual_seed(1))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, wrapper: OptimWrapper, ema: EMA, batches: Tensor) -> None:
    average = (model.module if isinstance(model, DistributedDataParallel) else model).average
    for batch in batches:
        before = wrapper.updates
        with wrapper.optim_context(model):
            loss = model(batch).square().mean()
        wrapper.update_params(loss)
        if wrapper.updates > before:
            ema.update()
            average.update()


def single(clip: dict[str, Any]) -> dict[str, Any]:
    model = network()
    wrapper = OptimConstructor({**CONFIG, "clip_grad": clip})(model)
    wrapper.initialize_count_status(model, 0, STEPS)
    ema = EMA(model, 0.9)
    train(model, wrapper, ema, data())
    return {
        "model": model.state_dict(),
        "optim": wrapper.state_dict()["state"],
        "ema": ema.state_dict()["average"],
        "norm": wrapper.grad_norm,
    }


def _parallel(kind: str, model: Net) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.inner[0], model.inner, model.average.network, model):
        fully_shard(part, mesh=mesh)
    return model


def _begin(kind: str, clip: dict[str, Any], weights: dict | None = None) -> tuple[nn.Module, OptimWrapper, EMA]:
    inner = network()
    if weights is not None:
        inner.load_state_dict(weights)
    model = _parallel(kind, inner)
    wrapper = OptimConstructor({**CONFIG, "clip_grad": clip})(model)
    return model, wrapper, EMA(inner, 0.9)


def _whole_weights(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return copy.deepcopy(get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True)))


def _case(rank: int, kind: str, clip: dict[str, Any]) -> dict[str, Any]:
    mine = data().unflatten(1, (2, 2))[:, rank]  # half of every batch
    model, wrapper, ema = _begin(kind, clip)
    wrapper.initialize_count_status(model, 0, STEPS)
    train(model, wrapper, ema, mine[:4])
    saved = copy.deepcopy((wrapper.state_dict(), ema.state_dict()))  # one micro-step into the second window
    middle = _whole_weights(model)
    train(model, wrapper, ema, mine[4:])
    straight = {
        "model": _whole_weights(model),
        "optim": wrapper.state_dict()["state"],
        "ema": ema.state_dict()["average"],
        "norm": wrapper.grad_norm,
    }
    shared = [middle]
    dist.broadcast_object_list(shared)  # FSDP gives whole weights to the first process alone
    model, wrapper, ema = _begin(kind, clip, weights=shared[0])
    wrapper.load_state_dict(saved[0])
    ema.load_state_dict(saved[1])
    wrapper.initialize_count_status(model, 4, STEPS)
    train(model, wrapper, ema, mine[4:])
    resumed = {"model": _whole_weights(model), "ema": ema.state_dict()["average"]}
    with ema.swapped(), torch.no_grad():
        swapped = model(mine[0])
    with torch.no_grad():
        after = model(mine[0])
    return {"straight": straight, "resumed": resumed, "swapped": swapped, "after": after}


def _worker(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}.meet", world_size=2, rank=rank)
    got = {f"{kind} {name}": _case(rank, kind, clip) for kind in KINDS for name, clip in CLIPS.items()}
    if rank == 0:
        torch.save(got, out)
    dist.barrier()  # nobody tears down while the other still works
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("distributed") / "out.pt"
    forked.pair(_worker, str(out))
    return torch.load(out, weights_only=True)


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", CLIPS)
def test_two_processes_equal_one(two_processes: dict[str, Any], kind: str, clip: str) -> None:
    got, want = two_processes[f"{kind} {clip}"], single(CLIPS[clip])
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(got["straight"], want, **close)
    assert "norm" not in clip or want["norm"] > CLIPS[clip]["max_norm"], "the case must clip"
    for piece in ("model", "ema"):
        torch.testing.assert_close(got["resumed"][piece], want[piece], **close)

    model = network()
    model.load_state_dict(want["model"])
    torch.testing.assert_close(got["after"], model(data()[0, :2]).detach(), **close)
    model.load_state_dict(want["ema"], strict=False)
    torch.testing.assert_close(got["swapped"], model(data()[0, :2]).detach(), **close)
