"""Commands and names in help texts, READMEs, cards and configs: all that they name exists in this tree."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.config import CONFIGS, compose, experiments, get
from core.config.registry import resolve
from core.data.prepare import tasks
from core.engine.commands.convert import find_converter
from core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAPERS = sorted({path.parents[1].name for path in ROOT.glob("*/tables/*.yaml")})
PACKAGES = ("core", "tools", "benchmarks", *PAPERS)
TOOLS = {path.stem for path in (ROOT / "tools").glob("*.py")}
EXAMPLE = ROOT / "tests" / "example_paper" / "configs"  # of the paper outside of the repository in CONTRIBUTING
EXPERIMENTS = experiments(EXAMPLE)
# What stands for something of the reader's own.
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z]{3,}|^mine\b|\bmine/|<|\$")


def texts() -> dict[str, str]:
    """Whatever a reader copies commands from, by place."""
    found = {}
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / paper / "README.md" for paper in PAPERS)]
    documents += sorted((ROOT / "results").glob("*.md"))
    for path in [*documents, *sorted(CONFIGS.rglob("*.yaml"))]:
        found[str(path.relative_to(ROOT))] = path.read_text()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if is_text(node)]
            if any("python " in text or "tools/" in text for text in strings):
                found[str(path.relative_to(ROOT))] = "\n".join(strings)
    return found


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every call of a tool or a module in a text; comments and what follows two spaces are left out."""
    text = re.sub(r"^[ \t]*# ?", "", text, flags=re.M)
    text = re.sub(r"\\\n\s*", " ", text)
    for match in re.finditer(
        r"(?:python3?|torchrun[^\n]*?) (-m [\w.]+|(?:tools|benchmarks|tests)/\w+\.py)([^\n`]*)", text
    ):
        program, line = match.groups()
        line = re.split(r"\s#\s|;|\s\|\s|\s&&\s|\s{3,}", line)[0].strip().rstrip(".,):")
        try:
            words = shlex.split(line)
        except ValueError:
            words = line.split()
        yield [program, *words]


FOUND = [(place, words) for place, text in texts().items() for words in commands(text)]


def test_there_are_commands_of_every_tool():
    called = {Path(words[0]).stem for _, words in FOUND if words[0].endswith(".py")}
    assert TOOLS - {"demo"} <= called
    assert len(FOUND) > 150


@cache
def config(experiment: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose([f"experiment={experiment}"], EXAMPLE), resolve=False)


@cache
def known_options(tool: str) -> frozenset[str] | None:
    """The options of a tool; None: whatever it takes."""
    modules = {
        "test": "core.engine.run.options",
        "infer": "core.engine.run.options",
        "ablate": "core.tables.ablation",
        "demo": "core.tables.demo",
    }
    modules |= {
        "table": "core.tables.table",
        "convert": "core.engine.commands.convert",
        "profile": "core.profile.experiment",
    }
    modules |= {"find_lr": "core.engine.commands.lr_finder"}
    names = {"test": "EvaluationOptions", "infer": "InferOptions"}
    if tool not in modules:
        return None
    options = getattr(importlib.import_module(modules[tool]), names.get(tool, "Options"))
    return frozenset(inspect.signature(options).parameters)


def wrong(words: list[str]) -> Iterator[str]:
    """What a command names that does not exist."""
    program, *rest = words
    if program.startswith("-m"):
        module = program.split()[1]
        if importlib.util.find_spec(module) is None:
            yield f"no module {module}"
        return
    if not (ROOT / program).is_file():
        yield f"no program {program}"
    for run in re.findall(rf"runs/((?:{'|'.join(PAPERS)})/\w+)", " ".join(rest)):
        if run not in EXPERIMENTS:
            yield f"no experiment {run}"
    tool = Path(program).stem
    if tool not in TOOLS or not program.startswith("tools/"):
        return
    given = dict(word.lstrip("-").split("=", 1) for word in rest if "=" in word and not word.startswith(("+", "~")))
    yield from _names(tool, given, [word for word in rest if "=" not in word and not word.startswith("-")])
    experiment = given.get("experiment")
    if experiment in EXPERIMENTS:
        for word in rest:
            yield from _key(tool, word, experiment, given)


def _names(tool: str, given: dict[str, str], bare: list[str]) -> Iterator[str]:
    experiment = given.get("experiment")
    for name in filter(None, [experiment, given.get("vs", "").split(" ")[0]]):
        if name not in EXPERIMENTS and not PLACEHOLDER.search(name):
            yield f"no experiment {name}"
    paper = given.get("paper")
    if paper is not None and paper not in PAPERS and not PLACEHOLDER.search(paper):
        yield f"no paper {paper}"
    task = given.get("task", bare[0] if bare else "list")
    if tool == "prepare_data" and task != "list" and not PLACEHOLDER.search(task):
        known = {name: one for of in [None, *PAPERS] if paper in (None, of) for name, one in tasks(of).items()}
        if task not in known:
            yield f"no task {task}"
        elif strange := set(given) - {"paper", "task"} - set(inspect.signature(known[task]).parameters):
            yield f"task {task} takes no {', '.join(sorted(strange))}"
    if tool == "convert" and paper in PAPERS:
        converter, _ = find_converter(paper, reverse=given.get("reverse") == "true")
        for key in set(given) - known_options("convert") - set(inspect.signature(converter).parameters):
            if "." not in key:
                yield f"the converter takes no {key}"
    if tool == "table":
        for name in bare[:1]:
            if not PLACEHOLDER.search(name) and name not in ("list", "claims") and not table(name):
                yield f"no table {name}"
        if "only" in given and not any(given["only"] == row.get("label") for row in table(bare[0]).get("rows", [])):
            yield f"{bare[0]} has no row {given['only']}"
    if experiment in EXPERIMENTS:
        for component in filter(None, given.get("components", "").strip("[]").split(",")):
            if component not in config(experiment)["components"]:
                yield f"{experiment} has no component {component}"
        for metric in filter(None, given.get("metric", "").strip("[]").split(",")) if tool == "ablate" else ():
            if metric not in metrics(experiment):
                yield f"{experiment} has no metric {metric}"


def _key(tool: str, word: str, experiment: str, given: dict[str, str]) -> Iterator[str]:
    """An override of a key, or an option, that does not exist."""
    key = word.lstrip("-~").partition("=")[0]
    options = known_options(tool) or frozenset()
    if "=" not in word or word.startswith("+") or key in options or PLACEHOLDER.search(key):
        return
    if tool == "convert" and "." not in key:
        return
    if (CONFIGS / key).is_dir() or key == "rerun" or key.startswith("hydra."):
        return
    try:
        get(config(experiment), key)
    except ConfigError:
        if "${" not in str(config(experiment)):
            yield f"{experiment} has no key {key}"
        else:  # a key of a value that is interpolated
            from omegaconf import OmegaConf

            if OmegaConf.select(OmegaConf.create(config(experiment)), key, default=...) is ...:
                yield f"{experiment} has no key {key}"


@cache
def table(name: str) -> dict[str, Any]:
    path = ROOT / name.partition("/")[0] / "tables" / f"{name.partition('/')[2]}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


@cache
def metrics(experiment: str) -> frozenset[str]:
    """Names of an experiment's figures: of its evaluators, and those that its paper's tables show."""
    cfg = config(experiment)
    found: set[str] = set()
    for evaluator in (cfg["test_evaluator"], cfg["val_evaluator"]):
        for one in evaluator if isinstance(evaluator, list) else [evaluator or {}]:
            found |= set(one.get("metrics") or ())
    for path in (ROOT / experiment.partition("/")[0] / "tables").glob("*.yaml"):
        shown = yaml.safe_load(path.read_text())
        found |= {str(column.get("of", name)) for name, column in (shown.get("columns") or {}).items()}
        found |= {str(shown.get("metric"))}
    return frozenset(found)


@pytest.mark.parametrize("place", sorted({place for place, _ in FOUND}))
def test_commands_name_what_exists(place):
    problems = [f"{' '.join(words)}: {problem}" for p, words in FOUND if p == place for problem in wrong(words)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *(f"{paper}/README.md" for paper in PAPERS)])
def test_names_in_documents_exist(document):
    text = (ROOT / document).read_text()
    names = re.findall(rf"(?:`|type: )((?:{'|'.join(PACKAGES)})\.[A-Za-z_][\w.]*)", text)
    problems = []
    for name in sorted(set(names)):
        if name.rpartition(".")[2] in ("py", "yaml", "md", "png", "json"):
            continue
        try:
            resolve(name)
        except (ConfigError, ImportError) as error:
            problems.append(f"{name}: {error}")
    assert not problems, "\n".join(problems)


def test_a_wrong_name_is_noticed():
    text = """
    python tools/ablate.py experiment=stvit/digits components=poling metric=acuracy   # of nothing
    python tools/table.py stvit/clam run=true
    torchrun --nproc-per-node 8 tools/train.py experiment=stvit/digits \\
      model.network.tokn_grid=3
    python tools/profile.py experiment=stvit/digits vs='stvit/digit model.network.token_grid=3'
    python tools/prepare_data.py paper=stvit task=imagenet_ train=a
    python tools/convert.py paper=stvit src=a dst=b.pt bse_depth=4 experiment=stvit/deit_small
    python tools/table.py stvit/claim only='random token'
    python -m stvit.nothing
    """
    problems = [problem for words in commands(text) for problem in wrong(words)]
    assert problems == [
        "stvit/digits has no component poling",
        "stvit/digits has no metric acuracy",
        "no table stvit/clam",
        "stvit/digits has no key model.network.tokn_grid",
        "no experiment stvit/digit",
        "no task imagenet_",
        "the converter takes no bse_depth",
        "stvit/claim has no row random token",
        "no module stvit.nothing",
    ]
