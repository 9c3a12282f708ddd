"""The walls of the house are held by a tool, and the tool knows every paper."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.child
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


@pytest.fixture
def house(tmp_path):
    """A house with every package and module that the contracts name, all empty."""
    settings = read_settings()
    keys = ("source_modules", "forbidden_modules")
    named = {name for contract in settings["contracts"] for key in keys for name in contract.get(key, ())}
    for package in sorted({*settings["root_packages"], *named, *(f"core.{room}" for room in rooms())}):
        folder = tmp_path / package.replace(".", "/")
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert lint(tmp_path).returncode == 0
    return tmp_path


def rooms():
    """The rooms of core, each of which imports later ones only."""
    (contract,) = (c for c in read_settings()["contracts"] if c["type"] == "layers")
    return [room for layer in contract["layers"] for room in layer.split(" | ")]


@pytest.mark.child
def test_a_paper_imported_by_the_engine_is_noticed(house):
    bad = house / "core" / "engine" / "bad.py"
    bad.write_text("def f():\n    import stvit.models\n")
    assert "core knows no paper BROKEN" in lint(house).stdout
    bad.write_text("")
    (house / "stvit" / "models" / "bad.py").write_text("from core import Trainer\n")
    assert "models import neither the engine nor trainers BROKEN" in lint(house).stdout


@pytest.mark.child
def test_a_room_that_imports_an_upper_one_is_noticed(house):
    assert rooms()[-1] == "errors" and len(rooms()) == 12
    bad = house / "core" / "config" / "bad.py"
    bad.write_text("def f():\n    from core.data import bad\n")
    (house / "core" / "data" / "bad.py").write_text("")
    assert "rooms of core import lower ones BROKEN" in lint(house).stdout
    bad.write_text("")
    (house / "core" / "more.py").write_text("")  # a thirteenth room
    assert lint(house).returncode != 0


def test_a_folder_of_core_is_seen_at_a_glance():
    entries = {path for path in (ROOT / "core").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert len(entries - {ROOT / "core" / "__init__.py"}) <= 12
    for folder in [path.parent for path in (ROOT / "core").rglob("__init__.py")]:
        modules = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        assert len(modules) <= 12, f"{folder}: {modules}"


SHAPE = {
    "models", "losses", "trainer", "data", "standin", "metrics", "checkpoint", "inference", "interop", "tables",
}  # fmt: skip


@pytest.mark.parametrize("paper", present())
def test_a_paper_has_the_shape_of_all(paper):
    entries = {path.name.removesuffix(".py") for path in (ROOT / paper).iterdir() if path.suffix in ("", ".py")}
    assert entries - {"__init__", "__pycache__"} <= SHAPE
    assert {"models", "trainer", "data", "tables"} <= entries


def imports_of(path, modules):
    """Modules of core that a file imports, at its top or later; what only type checkers read does not count."""
    found, queue = set(), list(ast.parse(path.read_text()).body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{one.name}" for one in node.names}
            found |= inner & modules or {node.module}
        queue += ast.iter_child_nodes(node)
    return found & modules


def test_no_module_of_core_imports_itself_by_way_of_others():
    files = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in (ROOT / "core").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    order = TopologicalSorter({name: imports_of(path, files.keys() - {name}) for name, path in files.items()})
    order.prepare()  # raises CycleError, which names the modules


def test_tools_reach_papers_through_the_registries_only():
    for tool in (ROOT / "tools").glob("*.py"):
        for line in tool.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in PAPERS, f"{tool.name}: {line}"


# How images are opened without core's readers, which know every mode and Exif's orientation.
OPENERS = {
    "PIL.Image.open", "PIL.ImageFile.Parser", "PIL.ImageOps.exif_transpose", "cv2.imread", "cv2.imreadmulti",
    "cv2.imdecode", "torchvision.io", "torchvision.datasets.folder.default_loader", "torchvision.datasets.ImageFolder",
    "imageio", "skimage.io", "tifffile", "matplotlib.image.imread", "matplotlib.pyplot.imread", "mmcv.imread",
    "mmcv.imfrombytes", "mmcv.image", "diffusers.utils.load_image", "transformers.image_utils.load_image",
}  # fmt: skip


def openers(source):
    """What a file's code calls or imports of `OPENERS`, by its full name, whatever it was imported as."""
    if not any(one.split(".")[0] in source for one in OPENERS):
        return []
    tree, names, found = ast.parse(source), {}, []

    def full(node):
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for one in node.names:
                names[one.asname or one.name.split(".")[0]] = base + (
                    one.name if one.asname or base else one.name.split(".")[0]
                )
                found.append(base + one.name)
    found += [full(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted(name for name in set(found) if f"{name}.".startswith(tuple(f"{one}." for one in OPENERS)))


def test_images_are_opened_in_one_place():
    places = ["core", "tools", "benchmarks", *present()]
    found = {}
    for path in (path for place in places for path in sorted((ROOT / place).rglob("*.py"))):
        if names := openers(path.read_text()):
            found[path.relative_to(ROOT).as_posix()] = names
    assert found == {"core/data/sources/images.py": ["PIL.Image.open"]}


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open('a')",
        "import PIL.Image\nPIL.Image.open('a')",
        "from PIL import Image as I\nread = I.open",
        "from PIL.Image import open as read",
        "def f():\n    import cv2\n    return cv2.imread('a')",
        "from torchvision.io import read_image",
        "import torchvision\ntorchvision.io.read_image('a')",
        "from diffusers.utils import load_image",
    ],
)
def test_another_opener_of_images_is_noticed(code):
    assert openers(code)
    assert not openers("from PIL import Image\nImage.fromarray(a).save('b')\nimport cv2\ncv2.VideoCapture('c')")
