"""Files of data sets that are broken, in another encoding, or may not be read: errors that name them and the remedy."""

import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from core.config.files import check_records, read_json, read_lines, read_text
from core.data import (
    DataFileError,
    ImageFolder,
    ImageZip,
    MissingDataError,
    TarShards,
    VideoError,
    VideoList,
    VideoReader,
    load_image,
)
from core.data.errors import data_root
from core.data.sources.files import files_below, read_arrays, read_labels
from core.errors import VitrineError

TEXT = "grün\nzwei\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_read_in_the_encoding_of_their_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT
    assert read_lines(tmp_path / "a.txt") == [(1, "grün"), (2, "zwei")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("eins\ngrün\n".encode("latin-1"), r"is not UTF-8 text: byte 0xfc in line 2\. .*iconv -f latin1 -t utf-8"),
        (TEXT.encode("utf-16-le"), r"is not UTF-8 text.*|.*holds zero bytes.*iconv -f utf-16le"),
        ("eins\nzwei".encode("utf-16-le"), r"holds zero bytes.*iconv -f utf-16le"),
        (TEXT.encode("utf-16")[:-1], "is not UTF-16 text"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text: byte 0x89 in line 1"),
    ],
)
def test_texts_in_other_encodings_name_file_line_and_remedy(tmp_path, data, reason):
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(DataFileError, match=rf"list\.txt.*{reason}"):
        read_text(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"images": [1, 2', r"not whole JSON .*line 1 column 17.*Copy or download it again"),
        ("", "it is empty"),
        ("[1, 2]", "holds a list, not a dict"),
        ('{"images": []}', r"lacks annotations \(it has images\)"),
        ("[" * 100_000, "not whole JSON"),
        ("<html>", "not whole JSON"),
    ],
)
def test_broken_json_names_file_and_place(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataFileError, match=rf"a\.json.*{reason}"):
        read_json(tmp_path / "a.json", keys=("images", "annotations"))


def test_json_with_a_mark_is_read_and_records_are_checked(tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps({"a": [{"id": 1}, {"id": "x"}]}).encode("utf-8-sig"))
    records = read_json(tmp_path / "a.json")["a"]
    check_records("a.json", "a", records, {"id": (int, str)})
    for wrong, reason in (
        ({}, "a is a dict, not a list"),
        ([3], r"a\[0\] is a int"),
        ([{}], r"id of a\[0\] is missing"),
        (records, r"id of a\[1\] is 'x'"),
    ):
        with pytest.raises(DataFileError, match=rf"a\.json.*{reason}"):
            check_records("a.json", "a", wrong, {"id": int})


@pytest.mark.parametrize("label", ["²", "-1", "1.5", "x", "", "99999999999", "9" * 5000])
def test_labels_are_whole_numbers(tmp_path, label):
    (tmp_path / "list.txt").write_text(f"good name.mp4 3\nfilm.mp4 {label}\n")
    with pytest.raises(MissingDataError, match=r"list\.txt, line 2: expected 'path label'"):
        read_labels(tmp_path / "list.txt", None, "'path label'", "video")
    (tmp_path / "list.txt").write_text("good name.mp4 3\n")
    names, labels = read_labels(tmp_path / "list.txt", None, "'path label'", "video")
    assert names == ["good name.mp4"] and labels.tolist() == [3] and labels.dtype == np.int32


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    for name in ("a/1.png", "a/deeper/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_files_are_found_below_links_but_a_link_loop_ends(images):
    (images / "b" / "more").symlink_to(images / "a")
    found = ["a/1.png", "a/deeper/2.png", "b/3.png", "b/more/1.png", "b/more/deeper/2.png"]
    assert files_below(images, (".png",)) == found and len(ImageFolder(images)) == 5
    (images / "a" / "deeper" / "loop").symlink_to(images)
    for read in (lambda: files_below(images, (".png",)), lambda: ImageFolder(images)):
        with pytest.raises(DataFileError, match=r"/loop.*' is a link to a folder that it lies in.*remove it"):
            read()


def test_a_link_to_itself_is_named(images):
    (images / "a" / "self").symlink_to(images / "a" / "self")
    with pytest.raises(DataFileError, match=r"a/self' cannot be read: Too many levels.*Remove or mend the link"):
        ImageFolder(images)
    (images / "a" / "self").unlink()
    (images / "self").symlink_to(images / "self")
    with pytest.raises(DataFileError, match=r"self' cannot be read"):
        ImageFolder(images)


def test_names_that_are_not_utf8_are_named(images):
    place = os.fsencode(images / "a") + b"/gr\xfcn.png"
    with open(place, "wb"):
        pass
    with pytest.raises(DataFileError, match=r"gr\\xfcn\.png' is not UTF-8.*convmv"):
        ImageFolder(images)


def denied(name):
    real = getattr(os, name)

    def call(path=".", *arguments, **options):
        if os.fspath(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *arguments, **options)

    return call


@pytest.mark.parametrize("name", ["scandir", "stat"])
def test_folders_without_rights_are_named(images, monkeypatch, name):
    monkeypatch.setattr(os, name, denied(name))
    with pytest.raises(DataFileError, match=r"a/deeper' cannot be .*: Permission denied.*[Cc]heck"):
        ImageFolder(images)


def test_a_root_without_rights_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.is_dir", refuse)
    with pytest.raises(DataFileError, match=r"faces: .* cannot be looked at: Permission denied"):
        data_root(tmp_path, what="faces", layout="root/*.png")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY"])
def test_a_broken_index_is_made_anew(images, content):
    index = images / "index.npz"
    index.write_bytes(content)
    assert read_arrays(index) is None
    assert len(ImageFolder(images, index_file=index)) == 3
    assert read_arrays(index) is not None and len(ImageFolder(images, index_file=index)) == 3
    arrays = read_arrays(index)
    np.savez(index, **{**arrays, "changed": arrays["changed"][:1]})
    assert len(ImageFolder(images, index_file=index)) == 3


# --- readers ---------------------------------------------------------------------------------------------------------


def test_lists_with_a_mark_are_read_and_others_are_named(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(images / "a/1.png", "1.png")
    (tmp_path / "train_map.txt").write_text("1.png\t0\r\n", encoding="utf-8-sig")
    assert list(ImageZip(tmp_path, "train").files) == ["1.png"]
    (tmp_path / "videos.txt").write_text("grün.mp4 2\n", encoding="utf-16")
    assert list(VideoList(tmp_path / "videos.txt").files) == ["grün.mp4"]
    for path in (tmp_path / "train_map.txt", tmp_path / "videos.txt"):
        path.write_bytes("grün\t2\n".encode("latin-1"))
    with pytest.raises(DataFileError, match=r"train_map\.txt' is not UTF-8 text"):
        ImageZip(tmp_path, "train")
    with pytest.raises(DataFileError, match=r"videos\.txt' is not UTF-8 text"):
        VideoList(tmp_path / "videos.txt")


def test_broken_archives_and_files_are_errors_of_ours(images, tmp_path):
    (tmp_path / "train_map.txt").write_text("1.png\t0\n")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(images / "a/1.png", "1.png")
    data = (tmp_path / "train.zip").read_bytes()
    for broken in (b"", data[:50], data.replace(b"PK\x01\x02", b"PK\x09\x09")):
        (tmp_path / "train.zip").write_bytes(broken)
        with pytest.raises(DataFileError, match=r"train\.zip' cannot be read: .* Copy or make the archive again"):
            ImageZip(tmp_path, "train")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(images / "a/1.png", "1.png")
    shard = (tmp_path / "a.tar").read_bytes()
    for broken in (b"", b"x" * 1024, b"\xff" * 600 + shard[600:]):
        (tmp_path / "a.tar").write_bytes(broken)
        with pytest.raises(VitrineError, match=r"a\.tar"):
            TarShards("a.tar", root=tmp_path)
    for read, name, kind in (
        (load_image, "none.png", MissingDataError),
        (load_image, "train.zip", DataFileError),
        (VideoReader, "none.mp4", MissingDataError),
        (VideoReader, "train.zip", VideoError),
    ):
        with pytest.raises(kind, match=name):
            read(tmp_path / name)


def coco(root, content):
    for name in ("annotations", "train2017"):
        (root / name).mkdir(exist_ok=True)
    path = root / "annotations" / "instances_train2017.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


GOOD = {
    "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 8}],
    "categories": [{"id": 7, "name": "disc"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
}
ENTRY = GOOD["annotations"][0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(GOOD).encode()[:-9], "is not whole JSON"),
        ([GOOD], "holds a list, not a dict"),
        ({**GOOD, "images": {}}, "images is a dict, not a list"),
        ({"images": []}, "lacks categories"),
        ({**GOOD, "images": [{"id": 1, "file_name": "1.jpg"}]}, r"height of images\[0\] is missing"),
        ({**GOOD, "annotations": [{**ENTRY, "image_id": 3}]}, r"annotations\[0\] belongs to image 3"),
        ({**GOOD, "annotations": [{**ENTRY, "category_id": 3}]}, r"annotations\[0\] is of category 3"),
        ({**GOOD, "annotations": [{**ENTRY, "bbox": [1, 2]}]}, r"annotations\[0\] has the bbox \[1, 2\]"),
        ({**GOOD, "annotations": [ENTRY, ENTRY]}, r"annotations\[1\] has the id 1 of another"),
        ({**GOOD, "annotations": [{"id": 1}]}, r"image_id of annotations\[0\] is missing"),
    ],
)
def test_a_broken_annotation_file_is_named_with_the_place_in_it(tmp_path, content, reason):
    from core.data.coco import CocoInstances

    with pytest.raises(DataFileError, match=rf"instances_train2017\.json.*{reason}"):
        CocoInstances(str(coco(tmp_path, content)), metainfo={"classes": ("disc",)}, pipeline=[])


def test_an_annotation_file_with_a_mark_is_read(tmp_path):
    from core.data.coco import CocoInstances

    root = coco(tmp_path, json.dumps(GOOD).encode("utf-8-sig"))
    data = CocoInstances(str(root), metainfo={"classes": ("disc",)}, pipeline=[])
    assert len(data) == 1 and data.get_data_info(0)["instances"][0]["bbox"] == [0, 0, 4, 4]
