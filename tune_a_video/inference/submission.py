"""Edited clips of LOVEU-TGVE-2023 go into the layout of a submission as they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from core.config.registry import HOOKS
from core.errors import ConfigError
from tune_a_video.data.tgve import Submission, TGVEClip


@HOOKS.register_module()
class SubmissionFiles(Hook):
    """After each evaluated clip, writes its edits as `ROOT/TEAM/GROUP/CLIP/KIND/00000.jpg`, ...

    Every clip has a folder of its own, so runs for single clips and several processes fill one submission together.

    Args:
        root: folder that is written to.
        team: name of the team.
        quality: of the JPEG files.
    """

    changes_training = False

    def __init__(self, root: str | os.PathLike[str], team: str, quality: int = 95) -> None:
        try:
            self.submission = Submission(root, team, quality)
        except ValueError as error:
            raise ConfigError(f"custom_hooks: {error}") from error

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Writes the edits of the clips of a batch.

        Raises:
            ConfigError: the edits are not those of the benchmark's table.
        """
        kinds = data_batch.get("edits")
        if not kinds:
            raise ConfigError("a submission needs the edits of LoveuTGVE: set test_dataloader.dataset.type to it")
        wanted = []
        for i, (sample_id, caption) in enumerate(zip(data_batch["sample_id"], data_batch["caption"], strict=True)):
            group, _, name = sample_id.partition("/")
            clip = TGVEClip(group, name, caption, {kind: texts[i] for kind, texts in kinds.items()}, Path())
            wanted += [(clip, kind) for kind in clip.edits]
        if [clip.edits[kind] for clip, kind in wanted] != list(outputs["prompt"]):
            raise ConfigError("a submission takes the prompts of the benchmark's table: set model.prompts=null")
        for (clip, kind), video in zip(wanted, outputs["video"], strict=True):
            runner.logger.info(f"submission: {self.submission.write(clip, kind, video)}")

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """Writes the edits of the clips of a batch."""
        self.after_test_iter(runner, batch_idx, data_batch, outputs)
