"""What a user may choose by one key: declared components, and runs behind cells of the tables."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from core.config import compose, experiments, get, to_dict
from core.config.fingerprint import fingerprint
from core.engine.keys.check import checked, stage_config
from core.engine.launch import build_trainer
from core.tables.ablation import declared
from core.tables.table_file import load_table
from tests.composed import composed

NAMES = sorted(name for name in experiments() if name.startswith("seqgan/"))
# One experiment for every recipe; the others declare the same components.
BUILT = (
    "seqgan/shape_glyphs",
    "seqgan/ffhq256_tokenizer",
    "seqgan/imagenet256_vqgan",
    "seqgan/ffhq256_nar",
    "seqgan/imagenet256_ar",
)
TABLES = {p.stem: p for p in sorted((Path(__file__).parents[2] / "seqgan" / "tables").glob("[!c]*.yaml"))}


_built: set[str] = set()


@functools.cache
def resolved(*words: str) -> dict[str, Any]:
    """A config as a run has it; cells and tables share many."""
    return checked(to_dict(compose(list(words))))


def assert_it_builds(model: dict[str, Any]) -> None:
    """Once for every model of this file's tests."""
    if (key := json.dumps(model, sort_keys=True)) not in _built:
        tensors = [*build_trainer({"model": model}, device="meta").parameters()]
        assert tensors and all(tensor.is_meta for tensor in tensors)
        _built.add(key)


def phases_of(cfg: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage_config(cfg, stage) for stage in cfg["stages"]] or [cfg]


@pytest.mark.parametrize("name", NAMES)
def test_experiments_of_a_recipe_declare_the_same(name: str) -> None:
    cfg = composed(f"experiment={name}")
    kind = next(kind for kind in ("tokenizer", "vqgan", "nar", "ar", "") if kind in name.rpartition("/")[2])
    other = next((built for built in BUILT if kind and kind in built.rpartition("/")[2].split("_")), BUILT[0])
    changes = [
        {c.name: (c.key, sorted(map(str, (c.default, *c.alternatives)))) for c in declared(one)}
        for one in (cfg, composed(f"experiment={other}"))
    ]
    if kind == "ar" and "imagenet" not in name:
        del changes[1]["guidance"]  # classes guide; unconditional models have none
    if not cfg["stages"]:  # of a first phase alone, the later ones' are none
        changes[1] = {name: change for name, change in changes[1].items() if not change[0].startswith("stages.")}
    assert changes[0] == changes[1]


@pytest.mark.long
@pytest.mark.parametrize("name", BUILT)
def test_every_alternative_composes_builds_and_is_another_run(name: str) -> None:
    base = composed(f"experiment={name}")
    prints, models = {fingerprint(base)}, []
    for component in declared(base):
        for change in component.changes():
            cfg = resolved(f"experiment={name}", *change.overrides)
            assert get(cfg, component.key) == change.value
            prints.add(fingerprint(cfg))
            models += [phase["model"] for phase in phases_of(cfg) if phase["model"] not in models]
    assert len(prints) == 1 + sum(len(c.alternatives) for c in declared(base))
    for model in models:
        assert_it_builds(model)


@pytest.mark.long
@pytest.mark.parametrize("name", TABLES)
def test_cells_of_tables_are_runs(name: str) -> None:
    """Every cell's run composes and takes its tokenizer from a file whose codes fit."""
    spec = load_table(TABLES[name])
    seen: list[dict[str, Any]] = []
    for row in spec.rows:
        for column in spec.columns:
            source = row.source(column)
            if source is None:
                continue
            cfg = resolved(f"experiment={source[0]}", *source[1])
            if column.of == "gfid" and column.key not in ("ffhq", "church", "cat", "bedroom"):
                assert cfg["model"]["sample_evaluation"] and cfg["test_evaluator"]["weights"]
            if column.of in ("rfid", "lpips"):
                assert cfg["val_evaluator"]["weights"] and (column.of == "rfid" or cfg["val_evaluator"]["lpips"])
            if "tokenizer" in cfg["model"]:
                model = cfg["model"]
                assert model["tokenizer"]["codebook_size"] == model["network"]["codebook_size"]
            seen += [phase["model"] for phase in phases_of(cfg) if phase["model"] not in seen]
    for model in seen:
        assert_it_builds(model)


def test_transformers_of_a_row_load_the_tokenizer_of_that_row() -> None:
    """Tables 1, 5 and 6: the network is the row's, and rows of the same tokenizer name the same file in all tables."""
    files: dict[str, str] = {}
    for name in ("tradeoff", "regularisation", "perceptual_layers"):
        spec = load_table(TABLES[name])
        for row in spec.rows:
            own = resolved(f"experiment={row.experiment}", *row.overrides)
            assert own["stages"] == []
            for key in row.cells:
                experiment, words = row.source(spec.column(key))
                cfg = resolved(f"experiment={experiment}", *words)
                file = cfg["load_from"]["path"]
                assert files.setdefault(file, fingerprint(own)) == fingerprint(own), f"{file}: {row.label}"
                for part in ("extra", "quantizer", "codebook_size", "z_dim", "shortcut"):
                    assert cfg["model"]["tokenizer"][part] == own["model"]["network"][part], (row.label, key, part)
                options = (
                    network["quantizer_options"] for network in (cfg["model"]["tokenizer"], own["model"]["network"])
                )
                assert len({o.get("code_dim") for o in options}) == 1
    assert len(files) == len(set(files.values())) == 3 + 4 + 7 - 2
