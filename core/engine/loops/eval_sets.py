"""The loop that evaluates several sets one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config.command.processes import total
from core.config.key import config_key
from core.config.registry import LOOPS
from core.engine.keys import eval_sets
from core.engine.loops.evaluation import EVALUATION_SEED, EvalLoop
from core.engine.state.randomness import fixed_randomness


class _Together:
    """The loaders of all sets, as far as bars count batches."""

    def __init__(self, parts: Mapping[str, EvalLoop]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part.dataloader) for part in self.parts.values())


@LOOPS.register_module()
class EvalSetsLoop(EvalLoop):
    """Evaluates the sets of a split (see `core.engine.keys.eval_sets`), each as if it were alone; hooks see one
    evaluation.

    After every set, hooks that have ``after_{split}_set(runner, name)`` are called.

    Args:
        runner: the mmengine Runner.
        dataloader: config of a loader with ``sets``.
        evaluator: for all sets, or by their names.
        split: "val" or "test".
    """

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, split: str = "val") -> None:
        loaders = eval_sets.loaders(dataloader, f"{split}_dataloader")
        judges = eval_sets.evaluators(evaluator, list(loaders), f"{split}_evaluator")
        self.parts = {}
        for name, loader in loaders.items():
            with config_key(eval_sets.place(f"{split}_dataloader", name)):
                opened = runner.build_dataloader(loader, split=split)
            with config_key(eval_sets.place(f"{split}_evaluator", name)):
                judge = runner.build_evaluator(judges[name])
            self.parts[name] = EvalLoop(runner, opened, judge, split)
        self._runner, self.split = runner, split
        self.dataloader = _Together(self.parts)
        self.metrics: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    def _run_batches(self) -> int:
        self._found = {}
        for name, part in self.parts.items():
            with fixed_randomness(EVALUATION_SEED):
                skipped = total(part._run_batches())
                metrics = part._compute()
            if skipped:
                metrics["skipped_samples"] = skipped
            self._found |= {f"{name}/{figure}": value for figure, value in metrics.items()}
            self.runner.call_hook(f"after_{self.split}_set", name=name)
        return 0

    def _compute(self) -> dict[str, Any]:
        self.left_out = [metric for part in self.parts.values() for metric in part.left_out]
        return self._found
