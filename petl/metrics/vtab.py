"""Both means over VTAB-1k: over its nineteen tasks, and over its three groups. Papers print either without a word."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from core.errors import VitrineError, some
from petl.data.vtab import GROUPS, TASKS, task_named

#: What accuracies of one row must have in common; the two have a larger effect than most methods.
SAME = ("source", "norm")


class MixedOriginError(VitrineError, ValueError):
    """Accuracies of one row were measured on data that do not compare."""


class VTABSummary:
    """Accuracies of one method by task, and their means.

        summary = VTABSummary()
        summary.update("cifar", 75.3, dataset.origin)
        print(summary)
        summary.compute()["mean_groups"]

    An accuracy is in per cent or a share: the means are in the same unit.
    """

    def __init__(self) -> None:
        self.accuracy: dict[str, float] = {}
        self.origin: dict[str, Any] = {}
        self._first = ""

    def update(self, task: str, accuracy: float, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Adds the accuracy of a task (a name in `TASKS`, or an alias), and gives what there is so far, see `compute`.

        Args:
            task: of VTAB-1k.
            accuracy: top-1, every test image counting the same.
            origin: of the test data, `VTAB1k.origin`, as the result of a run has it.

        Raises:
            ConfigError: no such task.
            ValueError: the task is there already.
            MixedOriginError: images of another source, or normalised otherwise, than those before; or an accuracy
                without origin beside ones that have it.
        """
        task = task_named(task)
        if task in self.accuracy:
            raise ValueError(f"{task} has an accuracy already ({self.accuracy[task]:g}): one summary holds one row")
        own = {key: origin.get(key) for key in SAME} if origin is not None else {}
        if self.accuracy and own != self.origin:
            raise MixedOriginError(
                f"{task} was measured on {_words(own)}, {self._first} on {_words(self.origin)}: these do not make one "
                "mean. Run the tasks with one data.source and one data.norm"
            )
        self._first, self.origin = self._first or task, own
        self.accuracy[task] = float(accuracy)
        return self.compute()

    def compute(self) -> dict[str, Any]:
        """`tasks`: accuracy by task, in the order of published tables; `groups`: the mean of each group that is whole;
        `mean_19`: over all tasks, and `mean_groups`: over the three groups, None until all tasks are there; and the
        `source` and `norm` of the data."""
        tasks = {task: self.accuracy[task] for task in TASKS if task in self.accuracy}
        groups = {
            group: fmean(tasks[task] for task in members)
            for group, members in GROUPS.items()
            if all(task in tasks for task in members)
        }
        whole = len(tasks) == len(TASKS)
        return {
            "tasks": tasks,
            "groups": groups,
            "mean_19": fmean(tasks.values()) if whole else None,
            "mean_groups": fmean(groups.values()) if whole else None,
            **self.origin,
        }

    def __str__(self) -> str:
        """The row as text: tasks by group, groups' means and both means."""
        found, lines = self.compute(), []
        for group, members in GROUPS.items():
            own = "  ".join(f"{task} {found['tasks'][task]:.1f}" for task in members if task in found["tasks"])
            mean = f"{found['groups'][group]:.2f}" if group in found["groups"] else "-"
            lines.append(f"{group:<12} {mean:>6}   {own}")
        missing = [task for task in TASKS if task not in found["tasks"]]
        if missing:
            lines.append(f"missing: {some(missing, len(TASKS))}; no mean over all")
        else:
            lines.append(f"mean over 19 tasks {found['mean_19']:.2f}, over 3 groups {found['mean_groups']:.2f}")
        return "\n".join([*lines, f"data: {_words(self.origin)}"])


def selected_by(cfg: Mapping[str, Any]) -> str:
    """How a run chooses the weights that it reports, for the column "selected by" of tables.

    Args:
        cfg: of the run.

    Returns:
        `last`: those of the last step; `val`: the best on validation images; `test_best`: the best on the test images,
        as much of the field does, which is selection on the test set.
    """
    if cfg.get("evaluate") != "best":
        return "last"
    return "test_best" if cfg.get("select_on_test") else "val"


def _words(origin: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in origin.items()) or "data of no stated origin"
