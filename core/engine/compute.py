"""A stage that computes something in place of training: a file that a later stage's model reads by key.

    stages:
      - {name: align, ...}
      - name: choose
        load_from: {stage: align}
        train_dataloader: null
        test_dataloader: null
        val_dataloader: null
        compute: {type: petl.ChooseChannels, k: 96, dataloader: {batch_size: 64, dataset: {...}}}
      - name: tune
        load_from: {stage: align, ignore: [tuning.*]}
        model: {network: {method: {channels: {stage: choose, file: channels.safetensors}}}}

What `compute` names is built without its `dataloader` and called as ``object(trainer, loader, folder)`` on the
first process, with the trainer in evaluation mode and the whole data set in order. It writes its files into the
stage's folder and returns figures (numbers by name), which become the stage's metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.config.command.processes import first_decides
from core.config.key import config_key
from core.config.registry import build
from core.data.loading.loader import build_loader
from core.errors import ConfigError
from core.trainer import unwrap


def compute(runner: Any) -> dict[str, Any]:
    """Runs the computation of a runner's config; see above.

    Raises:
        ConfigError: no dataloader, or what is built cannot be called.
    """
    settings = dict(runner.settings["compute"])
    with config_key("compute"):
        loading = settings.pop("dataloader", None)
        if loading is None:
            raise ConfigError("it needs a dataloader: {dataset: ..., batch_size: ...}")
        job = build(settings)
        if not callable(job):
            raise ConfigError(f"{settings.get('type')} builds a {type(job).__name__}, which cannot be called")
    runner.call_hook("before_run")
    runner.load_or_resume()
    trainer = unwrap(runner.model)
    trainer.eval()

    def work() -> dict[str, Any]:
        # Not the share of one process: the first one reads all.
        with config_key("compute"), config_key("dataloader"):
            loader = build_loader(loading, seed=runner.seed, training=False, rank=0, world_size=1)
        return dict(job(trainer, loader, Path(runner.settings["run_dir"])) or {})

    figures = first_decides(work)
    runner.call_hook("after_run")
    return figures
