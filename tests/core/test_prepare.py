"""Preparation tasks: found by name, called with typed arguments, and the shared ones make what the readers read."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data import ImageFolder, ImageNet
from core.data.prepare import argument_texts, describe, main, preparer, run_task, tasks_of
from core.data.prepare_images import PreparationError, image_shards, image_zip, imagenet
from core.errors import ConfigError

PACKAGE = '''
from pathlib import Path
from typing import Literal

from core.data.prepare import preparer


@preparer("lists")
def lists(
    root: Path,
    ratio: float = 0.5,
    names: list[str] | None = None,
    sizes: list[int] = (),
    mode: Literal["fast", "slow"] = "fast",
    force: bool = False,
) -> str:
    """Lists of files, one per split.

    More text.

    Args:
        root: the unpacked
            folder.
        ratio: of the first split.

    Raises:
        ValueError: never.
    """
    return repr((root, ratio, names, sizes, mode, force))


def no_task() -> None:
    """Not decorated."""
'''


@pytest.fixture
def paper(tmp_path, monkeypatch):
    name = f"preparing_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "prepare.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_arguments_have_their_types(paper, capsys):
    main([f"paper={paper}", "task=lists", "root=a/b", "ratio=0.25", "names=x,y", "sizes=1,2", "--force"], "doc")
    assert capsys.readouterr().out.strip() == repr((Path("a/b"), 0.25, ["x", "y"], [1, 2], "fast", True))
    assert run_task(paper, "lists", ["--root", "c", "names=null"]) == repr((Path("c"), 0.5, None, (), "fast", False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["root=a", "ration=1"], "did you mean ratio"),
        (["root=a", "ratio=much"], "ratio=much: not a valid float"),
        (["root=a", "mode=idle"], "choose one of fast, slow"),
        ([], "missing: root="),
    ],
)
def test_wrong_arguments_are_named(paper, words, message):
    with pytest.raises(ConfigError, match=message):
        run_task(paper, "lists", words)


def test_unknown_tasks_and_papers_are_answered_with_near_names(paper):
    with pytest.raises(ConfigError, match=r"no task 'list_s'.*did you mean lists"):
        run_task(paper, "list_s", [])
    with pytest.raises(ConfigError, match=f"no package '{paper}x'; did you mean {paper}"):
        run_task(f"{paper}x", "lists", [])
    with pytest.raises(ConfigError, match=r"package 'json' has no data/prepare\.py"):
        run_task("json", "lists", [])


def test_lists_and_help_teach(paper, capsys):
    main(["list", f"paper={paper}"], "doc")
    out = capsys.readouterr().out
    assert "lists   Lists of files, one per split." in out and "no_task" not in out
    assert "root: Path   the unpacked folder." in out and "ratio: float = 0.5   of the first split." in out
    assert "image_zip   " in out  # a paper has the shared tasks, too
    main([], "doc")
    out = capsys.readouterr().out
    assert f"paper={paper}\nlists   Lists of files" in out and "imagenet   " in out
    with pytest.raises(SystemExit):
        main([f"paper={paper}", "lists", "--help"], "doc")
    out = capsys.readouterr().out
    assert "More text." in out and "root: Path (required)   the unpacked folder." in out
    with pytest.raises(SystemExit):
        main(["--help"], "THE DOC")
    assert "THE DOC" in capsys.readouterr().out


def test_an_import_error_inside_a_paper_is_shown(paper, tmp_path):
    broken = tmp_path / f"{paper}_broken"
    broken.mkdir()
    (broken / "prepare.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ImportError, match="a_package_that_is_not_there"):
        describe(broken.name)


def test_tasks_need_names_and_hints():
    with pytest.raises(ValueError, match="lower-case"):
        preparer("My Task")
    with pytest.raises(ValueError, match="root need type hints"):
        preparer("task")(lambda root: None)

    @preparer("own")
    def own(a: int) -> None:
        """Own."""

    assert tasks_of(type("module", (), {"x": own, "y": 3})) == {"own": own}
    assert argument_texts(own) == {}


@pytest.mark.child
def test_the_tool_answers_at_once():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/prepare_data.py", "list"], capture_output=True, text=True
    )
    assert ran.returncode == 0 and "image_shards" in ran.stdout
    assert "| torch" not in ran.stderr.replace("  ", " ")


# --- the shared tasks ----------------------------------------------------------------------------------------------


def _image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (6, 5, 3), dtype=np.uint8))


def _folder(root: Path, classes: dict[str, int], split: str = "train", suffix: str = "png") -> Path:
    number = 0
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            _image(number).save(root / split / name / f"{index}.{suffix}")
            number += 1
    return root


def _pixels(dataset) -> dict[str, int]:
    """Image content -> label: what has to be the same in every layout."""
    return {item["image"].numpy().tobytes(): item["label"] for item in (dataset[i] for i in range(len(dataset)))}


def test_zip_and_shards_hold_what_the_folder_holds(tmp_path):
    root = _folder(tmp_path / "folder", {"b": 3, "a": 2, "c": 4})
    _folder(root, {"a": 1, "b": 1, "c": 1}, split="val")
    expected = _pixels(ImageFolder(root, split="train"))
    read = partial(ImageNet, num_classes=3)
    assert len(expected) == 9
    assert image_zip(root, tmp_path / "zip") == f"{tmp_path / 'zip'}: train: 9 images, val: 3 images"
    assert _pixels(read(tmp_path / "zip", "train", storage="zip")) == expected
    assert len(read(tmp_path / "zip", "val", storage="zip")) == 3
    assert image_shards(root, tmp_path / "shards", per_shard=4) == f"{tmp_path / 'shards'}: 9 images in 3 shards"
    assert _pixels(read(tmp_path / "shards", "train", storage="shards")) == expected
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as shard:
        labels = {shard.extractfile(m).read() for m in shard if m.name.endswith(".cls")}
    assert len(labels) > 1  # shuffled: the first shard is not the first class alone


def test_stopped_tasks_go_on_and_leave_no_half_files(tmp_path, monkeypatch):
    root = _folder(tmp_path / "folder", {"a": 5, "b": 5})
    import core.data.prepare_images as module

    original, calls = module.tarfile.TarFile.addfile, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 18:  # in the second shard
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(module.tarfile.TarFile, "addfile", stops)
    with pytest.raises(KeyboardInterrupt):
        image_shards(root, tmp_path / "shards", per_shard=4)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == ["train-000000.tar", "train-settings.json"]
    written = (tmp_path / "shards" / "train-000000.tar").stat().st_mtime_ns
    image_shards(root, tmp_path / "shards", per_shard=4)
    assert (tmp_path / "shards" / "train-000000.tar").stat().st_mtime_ns == written
    assert _pixels(ImageNet(tmp_path / "shards", "train", storage="shards")) == _pixels(
        ImageFolder(root, split="train")
    )
    with pytest.raises(PreparationError, match="'per_shard': 4"):
        image_shards(root, tmp_path / "shards", per_shard=5)
    monkeypatch.setattr(zipfile.ZipFile, "write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        image_zip(root, tmp_path / "zip")
    assert list((tmp_path / "zip").iterdir()) == []


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    _image(number).save(buffer, "JPEG")
    return buffer.getvalue()


def _archives(folder: Path) -> dict[str, Path]:
    """ImageNet's three archives with three classes of two training images, and four validation images."""
    from scipy.io import savemat

    wnids = ["n03", "n01", "n02"]  # the kit's numbers are not the order of the names
    with tarfile.open(folder / "train.tar", "w") as outer:
        for index, wnid in enumerate(wnids):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(2):
                    _add(archive, f"{wnid}_{number}.JPEG", _jpeg(10 * index + number))
            _add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "val.tar", "w") as archive:
        for number in (3, 1, 4, 2):
            _add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", _jpeg(100 + number))
    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    rows = [(i + 1, wnid, 0) for i, wnid in enumerate(wnids)] + [(4, "n09", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    with tarfile.open(folder / "kit.tar.gz", "w:gz") as archive:
        _add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        _add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n3\n2\n")
    return {"train": folder / "train.tar", "val": folder / "val.tar", "devkit": folder / "kit.tar.gz"}


def test_imagenet_archives_become_folders(tmp_path):
    archives = _archives(tmp_path)
    output = tmp_path / "imagenet"
    assert imagenet(output, **archives) == f"{output}: train: 3 classes, val: 4 images"
    found = sorted(str(p.relative_to(output)) for p in output.rglob("*.JPEG"))
    assert found == [
        *(f"train/{w}/{w}_{n}.JPEG" for w in ("n01", "n02", "n03") for n in range(2)),
        "val/n01/ILSVRC2012_val_00000001.JPEG",
        "val/n01/ILSVRC2012_val_00000004.JPEG",
        "val/n02/ILSVRC2012_val_00000003.JPEG",
        "val/n03/ILSVRC2012_val_00000002.JPEG",
    ]
    assert (output / "val/n02/ILSVRC2012_val_00000003.JPEG").read_bytes() == _jpeg(103)
    assert (output / "train/n03/n03_1.JPEG").read_bytes() == _jpeg(1)
    assert len(ImageNet(output, "train", num_classes=3)) == 6
    kept = (output / "train/n01").stat().st_mtime_ns
    import shutil

    shutil.rmtree(output / "train/n02")
    (output / "train/.n02.tmp").mkdir()  # of a process that was killed
    imagenet(output, train=archives["train"])
    assert (output / "train/n01").stat().st_mtime_ns == kept
    assert sorted(p.name for p in (output / "train").iterdir()) == ["n01", "n02", "n03"]


def test_wrong_archives_are_named(tmp_path):
    archives = _archives(tmp_path)
    with pytest.raises(PreparationError, match="give train="):
        imagenet(tmp_path / "o")
    with pytest.raises(PreparationError, match="val= needs devkit="):
        imagenet(tmp_path / "o", val=archives["val"])
    with pytest.raises(PreparationError, match="is not the training archive"):
        imagenet(tmp_path / "o", train=archives["val"])
    with pytest.raises(PreparationError, match="no file"):
        imagenet(tmp_path / "o", train=tmp_path / "no.tar")
    with pytest.raises(PreparationError, match="is not ImageNet's development kit"):
        imagenet(tmp_path / "o", val=archives["val"], devkit=archives["val"])
    with pytest.raises(PreparationError, match=r"holds 3 images.*classes of 4"):
        imagenet(tmp_path / "o", val=archives["train"], devkit=archives["devkit"])
    with pytest.raises(PreparationError, match="no folder"):
        image_zip(tmp_path / "none", tmp_path / "o")
    with pytest.raises(PreparationError, match="holds no images"):
        image_shards(tmp_path, tmp_path / "o", split=".")


def test_archives_cannot_write_outside_their_folder(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        _add(archive, "../../../outside.JPEG", b"data")
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        _add(outer, "../n01.tar", inner.getvalue())
    imagenet(tmp_path / "deep" / "er" / "output", train=tmp_path / "train.tar")
    written = [p for p in tmp_path.rglob("*.JPEG")]
    assert written == [tmp_path / "deep/er/output/train/n01/outside.JPEG"]
