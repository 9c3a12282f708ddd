"""The walls of the house are held by a tool, and the tool knows every paper."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAPERS = (
    "stvit",
    "petl",
    "deepfake_mae",
    "slot_walks",
    "stprivacy",
    "tune_a_video",
    "ptp",
    "mist",
    "pv3d",
    "seqgan",
)


def present():
    return [p for p in PAPERS if (ROOT / p / "__init__.py").is_file()]


def lint(folder):
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def read_settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_every_paper_is_inside_every_contract():
    settings = read_settings()
    contracts = {c["name"]: c for c in settings["contracts"]}
    papers = set(present())
    assert papers <= set(settings["root_packages"])
    assert papers <= set(contracts["core knows no paper"]["forbidden_modules"])
    assert papers == set(contracts["papers know no paper"]["modules"])
    models = contracts["models import neither the engine nor trainers"]
    assert {f"{p}.models" for p in papers} <= set(models["source_modules"])
    assert {"core", *(f"{p}.trainer" for p in papers)} <= set(models["forbidden_modules"])


def test_a_paper_imported_by_the_engine_is_noticed(tmp_path):
    for package in ("core", *(folder for paper in present() for folder in (paper, f"{paper}/models"))):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    keys = ("source_modules", "forbidden_modules")
    named = {name for contract in read_settings()["contracts"] for key in keys for name in contract.get(key, ())}
    for paper, module in (name.split(".") for name in named if "." in name and not name.endswith(".models")):
        (tmp_path / paper / f"{module}.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert lint(tmp_path).returncode == 0
    (tmp_path / "core" / "bad.py").write_text("def f():\n    import stvit.models\n")
    assert "core knows no paper BROKEN" in lint(tmp_path).stdout
    (tmp_path / "core" / "bad.py").write_text("")
    (tmp_path / "stvit" / "models" / "bad.py").write_text("from core import Trainer\n")
    assert "models import neither the engine nor trainers BROKEN" in lint(tmp_path).stdout


def test_tools_reach_papers_through_the_registries_only():
    for tool in (ROOT / "tools").glob("*.py"):
        for line in tool.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in PAPERS, f"{tool.name}: {line}"
