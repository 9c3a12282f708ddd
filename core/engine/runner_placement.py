"""How a run's model comes to its device: initial weights, memory format, batch norms, DDP or FSDP2, compilation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner as MMRunner
from torch import nn

from core.checkpoint import load
from core.config.key import config_key
from core.data.loading.prefetch import DevicePrefetcher
from core.engine.detection import networks
from core.engine.state.initial_weights import Beginning, derives_data
from core.errors import ConfigError
from core.optim.buffers import place_batch_norms
from core.optim.fsdp import shard
from core.optim.wrapper import autocast
from core.trainer import DataParallelTrainer, Trainer, unwrap


class Placement(MMRunner):
    """The part of `core.engine.runner.Runner` that deals with devices."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Places the trainer: device, memory format, compilation, DDP or FSDP2.

        Raises:
            ConfigError: FSDP is asked for without several processes, or for a model that is no Trainer.
        """
        runtime = self.runtime
        with config_key("load_from"):
            self._load_initial_weights(model)
        if runtime["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        model = place_batch_norms(model, self.device, synchronised=runtime["sync_batchnorm"])
        if runtime["fsdp"] is not None:
            if not dist.is_initialized():
                raise ConfigError(
                    "runtime.fsdp needs several processes: torchrun --nproc-per-node N tools/train.py ..."
                )
            if not isinstance(model, Trainer):
                raise ConfigError("runtime.fsdp works with trainers derived from core.Trainer")
            model = model.to(self.device)
            with config_key("runtime.fsdp"):
                shard(model, self.device, **runtime["fsdp"])
            self.sharded = True
        else:
            model = model.to(self.device)
        if runtime["compile"]:
            options = runtime["compile"] if isinstance(runtime["compile"], dict) else {}
            for network in networks(model).values():
                network.compile(**options)
        if self.sharded or not dist.is_initialized():
            return model
        return self._data_parallel(model, model_wrapper_cfg)

    def _data_parallel(self, model: nn.Module, model_wrapper_cfg: dict | None) -> nn.Module:
        if model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        unused = self.runtime["find_unused_parameters"]
        if unused is None:  # a phase of an adversarial step leaves the other networks' parameters without gradients
            several = bool(getattr(model, "optimizer_parts", ()))
            unused = several or "optimizer" not in (self.settings["optim_wrapper"] or {"optimizer": None})
        wrapper = DataParallelTrainer if isinstance(model, Trainer) else MMDistributedDataParallel
        return wrapper(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=unused,
        )

    def _load_initial_weights(self, model: nn.Module) -> None:
        """Gives the model the weights that the run begins with, or, where it goes on, those that it began with.

        The checkpoint to go on from comes last (`load_or_resume`); what is derived from weights before, as training
        data, is then derived from the same ones as in the first leg.

        """
        from core.checkpoint.weights import load_sources

        resumed = self.settings.get("resume_from")
        warn = "load_from: %s\nThe run goes on all the same: its checkpoint has all weights"
        tolerate = (lambda error: self.logger.warning(warn, error)) if resumed else None
        for line in load_sources(model, self.settings["load_from"], tolerate):
            self.logger.info(line)
        if not derives_data(model):
            return
        self._beginning = Beginning(model, load(resumed) if resumed else None)
        if taken := self._beginning.taken:
            self.logger.warning(
                f"{len(taken)} weights ({taken[0]}, ...) are no longer given by load_from and the model's files as the "
                f"run began with them: those of {resumed} are taken"
            )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The run's precision in evaluation, for models that do not see to it themselves as trainers do."""
        if isinstance(unwrap(self.model), Trainer):
            return contextlib.nullcontext()
        return autocast(self.runtime["precision"], self.device.type)

    def prefetcher(self, loader: Iterable[Any]) -> DevicePrefetcher:
        """A loader's batches on this process's device, in the run's memory format."""
        runtime = self.runtime
        return DevicePrefetcher(
            loader, self.device, enabled=bool(runtime["prefetch"]), channels_last=bool(runtime["channels_last"])
        )


def pick_device(name: str) -> torch.device:
    """The device of this process: "auto" is CUDA where there is one.

    Raises:
        ConfigError: "cuda" without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("runtime.device=cuda, but PyTorch sees no CUDA device (runtime=cpu runs on the CPU)")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device={name}: there is no such device, it takes auto, cpu or cuda") from error
