"""Means over VTAB-1k from every published row, tables, and recipes of the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.config import CONFIGS
from core.errors import ConfigError
from core.tables.table_file import load_table
from petl.data import GROUPS, TASKS
from petl.data.domain import VARIANTS
from petl.data.few_shot import FEW_SHOT_TASKS
from petl.data.fgvc import FGVC_TASKS
from petl.metrics import MixedOriginError, VTABSummary, selected_by

TABLES = Path(__file__).resolve().parents[2] / "petl" / "tables"

#: natural, specialised, structured, both means: of the sheet, section 7.2.
MEANS = {
    "Full": (75.89, 83.38, 47.64, 65.57, 68.97),
    "Linear": (68.93, 77.15, 26.85, 52.94, 57.64),
    "BitFit": (73.30, 78.25, 44.10, 62.05, 65.22),
    "VPT-Shallow": (76.81, 79.67, 46.98, 64.85, 67.82),
    "VPT-Deep": (78.49, 82.42, 55.00, 69.43, 71.97),
    "Adapter": (79.01, 84.08, 58.49, 71.44, 73.86),
    "AdaptFormer": (80.56, 84.88, 58.83, 72.32, 74.75),
    "LoRA": (79.49, 84.55, 59.78, 72.25, 74.60),
    "NOAH": (80.26, 84.88, 61.30, 73.25, 75.48),
    "SSF": (81.57, 86.55, 58.96, 73.10, 75.69),
    "FacT": (80.64, 85.30, 60.71, 73.23, 75.55),
    "RepAdapter": (81.63, 85.42, 61.23, 73.84, 76.09),
    "SCT, K = 96": (82.23, 85.90, 59.87, 73.59, 76.00),
}


def published():
    """Rows of both tables of VTAB-1k: label -> task -> per cent."""
    rows = {}
    for name in ("vtab1k", "vtab1k_augreg"):
        for row in load_table(TABLES / f"{name}.yaml").rows:
            rows[row.label] = {task: figure.value for task, figure in row.paper.items()}
    return rows


def test_every_published_row_is_there():
    rows = published()
    assert set(rows) == {*MEANS, "TTC, K = 96"} and rows["TTC, K = 96"] == {}
    assert all(list(rows[label]) == list(TASKS) for label in MEANS)
    assert rows["LoRA"]["dmlab"] == 49.8 and rows["SSF"]["smallnorb_ele"] == 37.9 and rows["Full"]["cifar"] == 68.9


@pytest.mark.parametrize("label", MEANS)
def test_both_means_of_every_published_row(label):
    summary = VTABSummary()
    for task, accuracy in reversed(published()[label].items()):
        found = summary.update(task, accuracy)
    assert list(found["tasks"]) == list(TASKS)
    ours = (*found["groups"].values(), found["mean_19"], found["mean_groups"])
    # The sheet's two digits, which round half either way.
    assert ours == pytest.approx(MEANS[label], abs=0.00501)
    assert f"{found['mean_19']:.2f}" in str(summary) and f"{found['mean_groups']:.2f}" in str(summary)


def test_a_summary_without_all_tasks_has_no_mean_over_all():
    summary = VTABSummary()
    for task in GROUPS["specialised"]:
        found = summary.update(task, 0.5)
    assert found["groups"] == {"specialised": 0.5} and found["mean_19"] is None and found["mean_groups"] is None
    assert "missing: cifar" in str(summary) and "mean over 19" not in str(summary)


def test_a_task_counts_once_and_has_to_exist():
    summary = VTABSummary()
    summary.update("cifar100", 70.0)
    with pytest.raises(ValueError, match="cifar has an accuracy already"):
        summary.update("cifar", 71.0)
    with pytest.raises(ConfigError, match="no task 'imagenet'"):
        summary.update("imagenet", 70.0)


@pytest.mark.parametrize(
    "other", [{"source": "png", "norm": "imagenet"}, {"source": "noah_jpeg", "norm": "inception"}, None]
)
def test_sources_and_normalisations_are_not_mixed(other):
    first = {"source": "noah_jpeg", "norm": "imagenet", "task": "cifar", "images": 10000}
    summary = VTABSummary()
    summary.update("cifar", 70.0, first)
    summary.update("dtd", 70.0, {**first, "task": "dtd", "images": 1880})
    with pytest.raises(MixedOriginError, match=r"svhn was measured on .*cifar on source noah_jpeg, norm imagenet"):
        summary.update("svhn", 70.0, other)
    found = summary.compute()
    assert list(found["tasks"]) == ["cifar", "dtd"] and found["source"] == "noah_jpeg" and found["norm"] == "imagenet"
    assert "source noah_jpeg, norm imagenet" in str(summary)


def test_how_weights_were_chosen_is_named():
    assert selected_by({"evaluate": "last"}) == "last" and selected_by({}) == "last"
    assert selected_by({"evaluate": "best", "select_on_test": False}) == "val"
    assert selected_by({"evaluate": "best", "select_on_test": True}) == "test_best"


# ---------------------------------------------------------------------- tables and recipes
@pytest.mark.parametrize("name", ["fgvc", "fgvc_augreg"])
def test_means_of_the_fine_grained_rows(name):
    """The table derives the mean; the sheet's own stands beside it."""
    for row in load_table(TABLES / f"{name}.yaml").rows:
        if row.paper:
            values = [row.paper[task].value for task in FGVC_TASKS]
            assert sum(values) / 5 == pytest.approx(row.paper["mean"].value, abs=0.00501), row.label


@pytest.mark.parametrize("name, tasks", [("vtab1k", TASKS), ("vtab1k_augreg", TASKS), ("fgvc", FGVC_TASKS)])
def test_columns_choose_tasks_that_exist(name, tasks):
    columns = [column for column in load_table(TABLES / f"{name}.yaml").columns if column.overrides]
    assert [column.key for column in columns] == list(tasks)
    assert all(column.overrides == (f"vars.task={column.key}",) for column in columns)


def recipe(name):
    return OmegaConf.load(CONFIGS / "recipe" / f"petl_task_{name}.yaml")


@pytest.mark.parametrize("name, tasks", [("vtab", TASKS), ("fgvc", FGVC_TASKS), ("few_shot", FEW_SHOT_TASKS)])
def test_recipes_know_the_classes_of_every_task(name, tasks):
    listed = OmegaConf.to_container(recipe(name).vars.tasks)
    assert {task: entry["classes"] for task, entry in listed.items()} == {k: v.classes for k, v in tasks.items()}


def test_per_task_settings_of_the_released_recipes():
    tasks = OmegaConf.to_container(recipe("vtab").vars.tasks)
    numbers = {"sct": 3, "ssf": 3, "fact": 2, "repadapter": 1, "convpass": 1}
    for entry in tasks.values():
        for key, count in numbers.items():
            assert (
                sum(isinstance(value, int | float) and not isinstance(value, bool) for value in entry[key].values())
                == count
            )
    assert tasks["cifar"]["sct"] == {"lr": 0.013, "weight_decay": 1.0, "smoothing": 0.1, "aug": "none"}
    assert tasks["smallnorb_ele"]["ssf"] == {"lr": 0.005, "weight_decay": 0.05, "drop_path": 0.2}
    assert sum(entry["fact"]["rank"] == 16 for entry in tasks.values()) == 6
    assert tasks["dsprites_loc"]["convpass"] == {"scale": 100.0, "xavier": True}
    assert [task for task, entry in tasks.items() if entry["sct"]["aug"] == "rand"] == [
        "dtd", "oxford_iiit_pet", "svhn", "patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy",
        "clevr_count", "clevr_dist", "dmlab", "kitti",
    ]  # fmt: skip
    # SCT never asks for an augmentation that changes a task's labels.
    assert all(TASKS[task].moves for task, entry in tasks.items() if entry["sct"]["aug"] == "rand")


def test_the_recipe_of_domain_generalisation_tests_every_variant():
    sets = recipe("domain").test_dataloader.sets
    assert list(sets) == list(VARIANTS)
    assert [entry.get("dataset", {}).get("data", "imagenet") for entry in sets.values()] == list(VARIANTS)
