"""A stage that computes something in place of training: a file that a later stage's model reads by key.

    stages:
      - {name: align, ...}
      - name: choose
        load_from: {stage: align}
        compute: {type: petl.ChooseChannels, k: 96, dataloader: {batch_size: 64, dataset: {...}}}
      - name: tune
        load_from: {stage: align, ignore: [network.tuning.*]}
        model: {network: {method: {channels: {stage: choose, file: channels.safetensors}}}}

What `compute` names is built without its `dataloader` and called as ``object(trainer, batches, folder)`` on the first
process, with the trainer in evaluation mode. `batches` gives the collated samples of the whole data set, in its order,
as often as it is iterated, and has the data set as `dataset`. What is called writes its files into the stage's folder
and returns figures (numbers by name), which become the stage's metrics. Such a stage neither trains nor evaluates,
whatever the experiment says of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.config.command.processes import first_decides
from core.config.key import config_key
from core.config.registry import build
from core.data.loading.loader import Loader, build_loader
from core.errors import ConfigError
from core.trainer import unwrap


class Batches:
    """The data of a loader's batches, without what was passed over to make them.

    Args:
        loader: from `core.data.build_loader`.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.dataset = getattr(loader.dataset, "dataset", loader.dataset)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return (batch.data for batch in self.loader if batch.data is not None)


def compute(runner: Any) -> dict[str, Any]:
    """Runs the computation of a runner's config; see above.

    Raises:
        ConfigError: what is built cannot be called.
    """
    settings = dict(runner.settings["compute"])
    with config_key("compute"):
        loading = settings.pop("dataloader")
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
        return dict(job(trainer, Batches(loader), Path(runner.settings["run_dir"])) or {})

    figures = first_decides(work)
    runner.call_hook("after_run")
    return figures
