"""Every reader of users' files against every way in which a file breaks: it is read, or the error is ours.

A reader's case makes files that are good and tells which one breaks and how it is read. `_breakages` makes the broken
ones: missing, a folder, a link loop, empty, cut off, other encodings, a mark, and for JSON and YAML each value of the
wrong kind and each key left out; for lists, lines of other lengths and words.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from itertools import islice

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from core.errors import VitrineError

_WRONG = (None, -1, "", "x", [], [3], {"x": 3})


def _picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def _text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- readers ---------------------------------------------------------------------------------------------------------


def _video_list(root):
    from core.data import VideoList

    (root / "train").mkdir()
    (root / "train/film.mp4").write_bytes(b"")
    path = _text(root / "train.txt", "film.mp4 3\n")
    return path, lambda: VideoList(path)


def _image_zip(root):
    from core.data import ImageZip

    with contextlib.ExitStack() as stack:
        import zipfile

        archive = stack.enter_context(zipfile.ZipFile(root / "train.zip", "w"))
        archive.writestr("a/1.jpg", b"")
    return _text(root / "train_map.txt", "a/1.jpg\t0\n"), lambda: ImageZip(root, "train")


def _birds(name):
    def case(root):
        from slot_walks.data import Birds

        lines = {"images": "1 a.jpg", "bounding_boxes": "1 0 0 4 4", "train_val_test_split": "1 0"}
        paths = {key: _text(root / f"{key}.txt", line + "\n") for key, line in lines.items()}
        return paths[name], lambda: Birds(root)

    return case


def _dogs(root):
    from slot_walks.data import Dogs

    np.save(root / "data_tr_sel.npy", np.arange(3))
    return root / "data_tr_sel.npy", lambda: Dogs(root)


def _flowers(root):
    from scipy.io import savemat

    from slot_walks.data import Flowers

    (root / "jpg").mkdir()
    savemat(root / "setid.mat", {"tstid": np.arange(3), "valid": np.arange(2), "trnid": np.arange(2)})
    return root / "setid.mat", lambda: Flowers(root)


def _voc(root):
    from slot_walks.data import VOC

    base = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "SegmentationClassAug"):
        (base / name).mkdir(parents=True)
    for name in ("train", "trainaug", "val"):
        path = _text(base / "ImageSets/Segmentation" / f"{name}.txt", "2007_000001\n")
    return path, lambda: VOC(root, "val")


def _tfrecord(root):
    from slot_walks.data.tfrecord import read_records

    (root / "a.tfrecord").write_bytes(bytes(40))
    return root / "a.tfrecord", lambda: list(read_records(root / "a.tfrecord"))


def _curves(root):
    from slot_walks.inference.curves import read_log

    path = _text(root / "log.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return path, lambda: read_log(path)


def _ffhq(root):
    from seqgan.data import FFHQ

    _picture(root / "faces/00000.png")
    path = _text(root / "list.txt", "00000.png\n")
    return path, lambda: FFHQ(root / "faces", count=None, list_file=path)


def _lmdb(root):
    from seqgan.data import LSUN

    (root / "church_outdoor_train_lmdb").mkdir()
    (root / "church_outdoor_train_lmdb/data.mdb").write_bytes(bytes(10_000))
    return root / "church_outdoor_train_lmdb/data.mdb", lambda: LSUN(root)


def _statistics(root):
    from core.metrics.frechet import read_statistics

    np.savez(root / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    return root / "a.npz", lambda: read_statistics(root / "a.npz")


def _request(name, content):
    def case(root):
        from seqgan.inference.files import SampleRequest, read_request

        path = _text(root / name, content)
        return path, lambda: read_request(path, SampleRequest()).classes(10)

    return case


def _tokenizer(root):
    from seqgan.inference.files import tokenizer_of

    _text(root / "checkpoints/step_00000001.pt", "")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "a/b", "model": {"network": {"type": "seqgan.Tokenizer"}}}))
    return path, lambda: tokenizer_of(root / "checkpoints/step_00000001.pt")


def _captions(suffix):
    def case(root):
        from tune_a_video.data import ClipFolder

        _picture(root / "clips/clip/0.png")
        path = _text(root / f"captions{suffix}", {"clip": "a bear"} if suffix == ".json" else "clip a bear\n")
        return path, lambda: ClipFolder(root / "clips", path)

    return case


def _davis(root):
    from tune_a_video.data import DAVIS

    _picture(root / "JPEGImages/480p/bear/0.png")
    return _text(root / "ImageSets/2017/val.txt", "bear\n"), lambda: DAVIS(root, "val")


def _tgve(root):
    from tune_a_video.data.tgve import read_table

    (root / "inside").mkdir()
    path = _text(root / "LOVEU-TGVE-2023_Dataset.csv", "Video name,Our GT caption\na,b\n")
    return path, lambda: read_table(root / "inside")


def _pipeline(root):
    from tune_a_video.interop.folders import _index

    path = _text(root / "model_index.json", {"_class_name": "A", "unet": ["diffusers", "UNet2DConditionModel"]})
    return path, lambda: _index(root)


def _adapter(root):
    from tune_a_video.interop.lora_files import _settings

    save_file({"a": np.zeros(1, np.float32)}, root / "adapter_model.safetensors")
    path = _text(root / "adapter_config.json", {"r": 4, "lora_alpha": 4, "rank_pattern": {"a": 2}})
    return path, lambda: _settings(root / "adapter_model.safetensors")


def _table(root):
    from core.tables.table_file import load_table

    path = root / "tables/a.yaml"
    path.parent.mkdir()
    content = {
        "title": "t",
        "source": "s",
        "columns": {"parameters": {"label": "p", "needs": "none", "better": "none", "digits": 0}},
        "rows": [{"label": "a", "experiment": "stvit/digits", "overrides": ["seed=1"], "paper": {"parameters": 3}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path, lambda: load_table(path)


def _claim(root):
    from core.tables.claim_file import load_claim

    path = root / "tables/claim.yaml"
    path.parent.mkdir()
    content = {
        "statement": "s",
        "metric": "top1",
        "direction": "higher",
        "seeds": [0, 1],
        "rows": [
            {"label": "a", "role": "ours", "experiment": "stvit/digits"},
            {"label": "b", "role": "baseline", "experiment": "stvit/digits", "overrides": ["seed=1"]},
        ],
        "comparisons": [{"better": "a", "than": "b"}],
        "setting": ["x"],
    }
    path.write_text(yaml.safe_dump(content))
    return path, lambda: load_claim(path)


def _claim_store(root):
    from core.tables.claim_store import ClaimStore

    rows = [{"runs": [{"config": "a"}]}]
    path = _text(root / "a.json", {"definition_hash": "a", "row_configs": {}, "figures": {}, "rows": rows})
    store = ClaimStore(path)
    return path, lambda: (store.runs(), store.figures("a", {}))


def _run_config(root):
    from core.checkpoint import latest, run_folder
    from core.engine.run import config as run_config
    from core.engine.run import rerun

    path = root / "config.yaml"
    content = {"name": "a/b", "seed": 0, "model": {"type": "a"}, "checkpoint": {}}
    path.write_text(yaml.safe_dump(content))
    return (
        path,
        lambda: run_folder.read_config(root),
        lambda: latest._is_run(root),
        lambda: run_config.stored_config(root),
        lambda: rerun.rerun_config([], [f"rerun={root}"]),
        lambda: run_folder._selection(root),
    )


def _result(root):
    from core.checkpoint.run_folder import finished

    return _text(root / "result.json", {"status": "finished", "metrics": {}}), lambda: finished(root)


def _results(root):
    from core.config import composer
    from core.tables.runs import Results

    content = {"status": "finished", "name": "a/b", "seed": 0, "metrics": {"top1": 1.0}, "overrides": []}
    return _text(root / "a/b/run/result.json", content), lambda: Results(root, composer(None))


def _cache(root):
    from core.data.cache import DerivedCache

    DerivedCache(root / "cache", {"a": 1})
    return root / "cache/provenance.json", lambda: DerivedCache(root / "cache", {"a": 1})


def _experiment(root):
    from core.config import compose, experiments, to_dict

    path = root / "experiment/a/b.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# A purpose.\nname: a/b\n")
    return path, lambda: (experiments(root), to_dict(compose(["experiment=a/b"], root)))


READERS = {
    "a list of videos": _video_list,
    "the map of a zip": _image_zip,
    **{f"birds: {name}": _birds(name) for name in ("images", "bounding_boxes", "train_val_test_split")},
    "dogs": _dogs,
    "flowers": _flowers,
    "VOC": _voc,
    "tfrecord": _tfrecord,
    "a log of curves": _curves,
    "FFHQ": _ffhq,
    "LSUN": _lmdb,
    "statistics": _statistics,
    "a request": _request("a.json", {"count": 2, "labels": [1, 2], "temperature": 1.0, "seed": 3}),
    "a request of labels": _request("a.txt", "1 2\n"),
    "a run's tokenizer": _tokenizer,
    "captions": _captions(".txt"),
    "captions in JSON": _captions(".json"),
    "DAVIS": _davis,
    "TGVE": _tgve,
    "a pipeline": _pipeline,
    "an adapter": _adapter,
    "a table": _table,
    "a claim": _claim,
    "a claim's evidence": _claim_store,
    "a run's config": _run_config,
    "a run's result": _result,
    "all results": _results,
    "a cache": _cache,
    "an experiment": _experiment,
}


_WHOLE = ("an experiment",)  # whose values test_config_kinds tries


# --- breakages -------------------------------------------------------------------------------------------------------


def _mutations(content):
    """The content with one value of another kind, or without one key or element; the places, too."""
    for wrong in _WRONG:
        yield f"{wrong!r} for all", wrong

    def places(node, path=()):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield (*path, key)
            yield from places(value, (*path, key))

    for *above, last in places(content):
        for wrong in (*_WRONG, ...):
            changed = copy.deepcopy(content)
            node = changed
            for key in above:
                node = node[key]
            if wrong is ...:
                del node[last]
            else:
                node[last] = wrong
            yield f"{'without' if wrong is ... else repr(wrong) + ' for'} {[*above, last]}", changed


def _breakages(path, good, whole):
    """Name and bytes of broken files; with `whole`, no single value changes."""
    yield "empty", b""
    yield "cut in half", good[: len(good) // 2]
    yield "one byte short", good[:-1]
    yield "noise", bytes(range(256)) * 8
    with contextlib.suppress(UnicodeDecodeError):
        text = good.decode()
        yield "utf-16", text.encode("utf-16")
        yield "utf-16 without a mark", text.encode("utf-16-le")
        yield "latin-1", good + "grün\n".encode("latin-1")
        yield "a mark", text.encode("utf-8-sig")
        yield "zero bytes", bytes(100)
        yield "deep", b"[" * 1_200
        if path.suffix in (".json", ".jsonl", ".yaml"):
            dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
            read = yaml.safe_load if path.suffix == ".yaml" else json.loads
            changed = _mutations(read(text.splitlines()[0] if path.suffix == ".jsonl" else text))
            for name, content in islice(changed, 4 if whole else None):
                yield name, dump(content).encode()
        else:
            words = text.split()
            for count in range(len(words) + 2):
                yield f"{count} words", " ".join([*words, "x"][:count]).encode()
            yield "words in place of numbers", " ".join(["x"] * len(words)).encode()
            yield "twice", good * 2


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_named(tmp_path, name):
    path, *readers = READERS[name](tmp_path)
    good, faults = path.read_bytes(), []

    def attempt(what):
        for read in readers:
            try:
                read()
            except VitrineError:
                continue
            except Exception as error:
                if type(error) is not ValueError or path.name not in str(error):  # of readers without the engine
                    faults.append(f"{what}: {type(error).__name__}: {str(error)[:120]}")

    for what, data in _breakages(path, good, whole=name in _WHOLE):
        path.write_bytes(data)
        attempt(what)
    path.unlink()
    attempt("missing")
    path.unlink(missing_ok=True)
    path.mkdir()
    attempt("a folder")
    shutil.rmtree(path)
    path.symlink_to(path)
    attempt("a link to itself")
    assert not faults, "\n".join(faults)
