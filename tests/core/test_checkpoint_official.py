"""Official pickles: every known container is read as plain data, and nothing in a file can execute."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import struct
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import PosixPath

import numpy as np
import pytest
import torch

from core.checkpoint import OFFICIAL_GLOBALS, CheckpointReadError, UnsafeCheckpointError, load_official

FORMATS = ["zip", "legacy", *range(6)]


def _write(content: object, path: os.PathLike, form: str | int) -> os.PathLike:
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        with open(path, "wb") as file:
            pickle.dump(content, file, protocol=form)
    return path


@pytest.fixture
def foreign(monkeypatch):
    """Makes a class in a module that exists only while the file is written."""
    made = []

    def make(module: str, name: str, base: type = object) -> type:
        cls = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                sys.modules[package] = types.ModuleType(package)
                made.append(package)
        setattr(sys.modules[module], name, cls)
        return cls

    def forget() -> None:
        while made:
            del sys.modules[made.pop()]

    make.forget = forget
    yield make
    forget()


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_in_every_format(tmp_path, form):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "model": OrderedDict(
            whole=base,
            column=base[:, 2],
            half=torch.ones(3, dtype=torch.float16),
            count=torch.tensor(5),
            none=torch.zeros(0, 3),
        ),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "complex": torch.tensor([1 + 2j]),
        "epoch": 7,
    }
    loaded = load_official(_write(content, tmp_path / "a.pth", form))
    for key in ("brain", "flags", "complex", "parameter"):
        assert torch.equal(loaded[key], content[key]) and loaded[key].dtype == content[key].dtype
    for key, value in content["model"].items():
        assert torch.equal(loaded["model"][key], value) and loaded["model"][key].shape == value.shape
    assert isinstance(loaded["parameter"], torch.nn.Parameter) and loaded["epoch"] == 7
    if isinstance(form, str):  # torch's own formats keep shared memory shared
        loaded["model"]["whole"][1, 2] = 99.0
        assert loaded["model"]["column"][1] == 99.0


@pytest.mark.parametrize("form", FORMATS)
def test_numpy_arrays_in_every_format(tmp_path, form):
    content = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.float64(0.25),
        "text": np.array(["a", "bcd"]),
        "objects": np.array([{"x": 1}, None], dtype=object),
        "zero_d": np.array(3, dtype=np.uint8),
        "dtype": np.dtype("float32"),
    }
    loaded = load_official(_write(content, tmp_path / "a.pkl", form))
    for key in ("c", "fortran", "big", "bool", "empty", "text", "zero_d"):
        np.testing.assert_array_equal(loaded[key], content[key])
        assert loaded[key].dtype == content[key].dtype and loaded[key].shape == content[key].shape
    assert loaded["scalar"] == 0.25 and loaded["dtype"] == np.float32
    assert loaded["objects"].tolist() == [{"x": 1}, None]
    loaded["c"][0, 0] = 5  # writable, as numpy's own are


def test_numpy_1_names(tmp_path):
    data = pickle.dumps({"a": np.arange(3), "b": np.float32(2)}, protocol=2)
    assert b"numpy._core" in data
    (tmp_path / "a.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    loaded = load_official(tmp_path / "a.pkl")
    assert loaded["a"].tolist() == [0, 1, 2] and loaded["b"] == 2


def test_python_2_pickles(tmp_path):
    """8-bit strings hold both names and array contents there."""
    data = (
        b"\x80\x02}q\x00(U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + struct.pack("<2f", 1.5, -3.25) + b"tbU\x01bc__builtin__\nset\n]K\x01a\x85Ru."
    )
    (tmp_path / "a.pkl").write_bytes(data)
    loaded = load_official(tmp_path / "a.pkl")
    assert loaded["a"].tolist() == [1.5, -3.25] and loaded["b"] == {1}


@pytest.mark.parametrize("form", FORMATS)
def test_plain_containers_in_every_format(tmp_path, form):
    nested = defaultdict(list, {"x": [1]})
    shared = [1, 2]
    content = {
        "counter": Counter("aab"),
        "default": nested,
        "deque": deque([1, 2], maxlen=5),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "bytes": b"\x00\xff\n",
        "bytearray": bytearray(b"ab"),
        "complex": 1 + 2j,
        "path": PosixPath("/data/imagenet"),
        "range": range(2, 9, 3),
        "slice": slice(1, None, 2),
        "big": 1 << 5000,
        "negative": -(1 << 40),
        "text": "grün",
        "tuple": (1, (2, 3), ()),
        "float": 1e-300,
        "shared": [shared, shared],
        "class": dict,
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cuda", 1),
    }
    loaded = load_official(_write(content, tmp_path / "a.pkl", form))
    expected = {
        **content,
        "counter": {"a": 2, "b": 1},
        "deque": [1, 2],
        "path": "/data/imagenet",
        "class": "builtins.dict",
    }
    assert loaded == expected
    assert type(loaded["default"]) is dict and type(loaded["size"]) is torch.Size
    assert loaded["shared"][0] is loaded["shared"][1]


@pytest.mark.parametrize("form", FORMATS)
def test_configs_come_out_as_plain_dictionaries(tmp_path, form, foreign):
    omegaconf = pytest.importorskip("omegaconf")
    node = foreign("yacs.config", "CfgNode", dict)
    attribute = foreign("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    callback = foreign("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    easy = foreign("easydict", "EasyDict", dict)
    config = node(MODEL=node(NAME="swin", DEPTHS=[2, 2]), EMPTY=node())
    config.__dict__["__immutable__"] = True
    pretend = easy(lr=0.1)
    pretend.__dict__["lr"] = 0.1
    content = {
        "args": argparse.Namespace(lr=0.1, output=PosixPath("runs/a"), nested=argparse.Namespace(a=1)),
        "config": config,
        "omega": omegaconf.OmegaConf.create({"a": {"b": [1, "x", None, 2.5, True]}, "ref": "${a.b}"}),
        "hyper_parameters": attribute(dim=8),
        "callbacks": {callback: {"best": torch.tensor(0.5)}},
        "easy": pretend,
        "model": {"w": torch.ones(2)},
    }
    path = _write(content, tmp_path / "a.pth", form)
    foreign.forget()
    loaded = load_official(path)
    assert loaded["args"] == {"lr": 0.1, "output": "runs/a", "nested": {"a": 1}}
    assert loaded["config"] == {"MODEL": {"NAME": "swin", "DEPTHS": [2, 2]}, "EMPTY": {}}
    assert loaded["omega"] == {"a": {"b": [1, "x", None, 2.5, True]}, "ref": "${a.b}"}
    assert loaded["hyper_parameters"] == {"dim": 8} and loaded["easy"] == {"lr": 0.1}
    assert loaded["callbacks"] == {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": {"best": torch.tensor(0.5)}
    }
    assert torch.equal(loaded["model"]["w"], torch.ones(2))
    for value in (loaded["args"], loaded["config"]["MODEL"], loaded["omega"], loaded["hyper_parameters"]):
        assert type(value) is dict
    assert not any(name.startswith(("yacs", "pytorch_lightning", "easydict")) for name in sys.modules)


def test_a_further_class_is_read_as_data_when_it_is_allowed(tmp_path, foreign):
    layer = foreign("somebody.model", "Layer")
    items = foreign("somebody.model", "Items", list)
    content = layer()
    content.weight, content.children, content.parent = torch.ones(2), items([1, 2]), content
    path = _write({"m": content}, tmp_path / "a.pth", "zip")
    foreign.forget()
    with pytest.raises(UnsafeCheckpointError, match=r"'somebody.model.Layer'.*allow=OFFICIAL_GLOBALS"):
        load_official(path)
    loaded = load_official(path, allow=OFFICIAL_GLOBALS | {"somebody.model.Layer", "somebody.model.Items"})
    assert torch.equal(loaded["m"]["weight"], torch.ones(2)) and loaded["m"]["children"] == [1, 2]
    assert loaded["m"]["parent"] is loaded["m"]
    assert "somebody" not in sys.modules


def test_safetensors_and_npz_go_the_safe_way(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    assert torch.equal(load_official(tmp_path / "a.npz")["x"], torch.ones(2, dtype=torch.float64))


def test_state_dict_versions_survive(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    loaded = load_official(_write(state, tmp_path / "a.pth", "zip"))
    assert loaded._metadata == state._metadata
    torch.nn.BatchNorm1d(2).load_state_dict(loaded)


# --- files that would execute code ---------------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def _attacks(marker: str) -> dict[str, object]:
    import functools
    import operator
    import subprocess

    code = f"open({marker!r}, 'w').close()"
    return {
        "os.system": _Calls(os.system, f"touch {marker}"),
        "eval": _Calls(eval, code),
        "exec": _Calls(exec, code),
        "open": _Calls(open, marker, "w"),
        "subprocess": _Calls(subprocess.check_output, ["touch", marker]),
        "partial": _Calls(functools.partial, os.system, f"touch {marker}"),
        "getattr": _Calls(getattr, "text", "upper"),
        "methodcaller": _Calls(operator.methodcaller, "system"),
        "import": _Calls(__import__, "os"),
        "torch.load": _Calls(torch.load, marker),
        "hub": _Calls(torch.hub.load, "a", "b"),
        "deep": {"model": [OrderedDict(a=_Calls(os.system, f"touch {marker}"))]},
        "key": {_Hashable(os.system, f"touch {marker}"): 1},
        "default_factory": defaultdict(os.getcwd, {}),
    }


class _Hashable(_Calls):
    __hash__ = object.__hash__


@pytest.mark.child
@pytest.mark.parametrize("form", ["zip", "legacy", 0, 2, 4])
@pytest.mark.parametrize("attack", _attacks("").keys())
def test_a_file_that_would_execute_code_is_refused(tmp_path, attack, form):
    marker = tmp_path / "executed"
    path = _write(_attacks(str(marker))[attack], tmp_path / "a.pth", form)
    with pytest.raises(UnsafeCheckpointError, match=r"(?s)outside the allow-list.*Nothing in it was executed"):
        load_official(path)
    assert not marker.exists()


@pytest.mark.child
def test_what_would_run_when_trusted_does_run(tmp_path):
    """The attack above is real: Python's own unpickler executes it."""
    marker = tmp_path / "executed"
    path = _write(_attacks(str(marker))["os.system"], tmp_path / "a.pth", 2)
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_even_an_allowed_name_never_runs(tmp_path):
    marker = tmp_path / "executed"
    path = _write({"a": _Calls(os.system, f"touch {marker}")}, tmp_path / "a.pth", 2)
    names = {f"{os.system.__module__}.system"}
    assert load_official(path, allow=OFFICIAL_GLOBALS | names) == {"a": {"arguments": (f"touch {marker}",)}}
    assert not marker.exists()


def _global(module: str, name: str) -> bytes:
    """STACK_GLOBAL: the only instruction that can carry dotted names."""
    parts = [b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)]
    return b"".join(parts) + b"\x93"


RAW = {
    "nested name": (b"\x80\x04" + _global("collections", "OrderedDict.fromkeys") + b"]\x85R.", "OrderedDict.fromkeys"),
    "nested name of an allowed module": (b"\x80\x04" + _global("torch", "serialization.os.system") + b".", "os.system"),
    "call of data": (b"\x80\x02]]\x85R.", "calls a list"),
    "call of a mentioned class": (b"\x80\x02c__builtin__\nstr\nU\x01a\x85R.", "read as a name only"),
    "arguments that are no tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "no argument list"),
    "attributes of a class": (b"\x80\x02ctorch\nTensor\n}U\x03addK\x01sb.", "sets the state of a Reference"),
    "attributes of a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__K\x01sb.",
        "sets the state of a Reference",
    ),
    "attributes of a list": (b"\x80\x02]}U\x01aK\x01sb.", "sets the state of a list"),
    "items of a class": (b"\x80\x02ctorch\nTensor\nK\x01K\x01s.", "sets items"),
    "elements of a number": (b"\x80\x02K\x01K\x02a.", "appends to a int"),
    "old instance instruction": (b"(U\x01acposix\nsystem\n(U\x01aiposix\nsystem\n.", "posix.system"),
    "extension code": (b"\x80\x02\x82\x01.", "extension"),
    "storage without file": (b"\x80\x02U\x01aQ.", "outside itself"),
    "tensor from nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00)\x85)\x85\x89NtR.",
        "cannot be meant",
    ),
    "array of a foreign type": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nstr\nK\x00\x85U\x01btR.",
        "cannot be meant",
    ),
    "array with too little content": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01M\xff\xff\x85cnumpy\ndtype\nU\x02f8\x85R\x89U\x01atb.",
        "does not fit its shape",
    ),
    "array of pointers from bytes": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02O8\x85R\x89U\x08AAAAAAAAtb.",
        "does not fit its shape",
    ),
    "structured type": (b"\x80\x02cnumpy\ndtype\nU\x05f4,f4\x85R.", "cannot be meant"),
    "type with forged fields": (
        b"\x80\x02cnumpy\ndtype\nU\x02f4\x85R(K\x03U\x01<NNNK\x40K\x08K\x00tb.",
        "structured array type",
    ),
    "encode with another codec": (b"\x80\x02c_codecs\nencode\n(U\x01aU\x06rot_13tR.", "cannot be meant"),
    "object rebuilt from a foreign base": (
        b"\x80\x02ccopy_reg\n_reconstructor\n(cposix\nsystem\nc__builtin__\nobject\nNtR.",
        "posix.system",
    ),
}


@pytest.mark.parametrize("case", RAW)
def test_hand_made_instructions_are_refused(tmp_path, case):
    data, reason = RAW[case]
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(UnsafeCheckpointError, match=reason) as caught:
        load_official(tmp_path / "a.pkl")
    assert "a.pkl" in str(caught.value)


def test_classes_are_as_they_were_after_an_attack_on_them(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02ctorch.nn.parameter\nParameter\nN}U\x05forwardK\x01s\x86b.")
    with pytest.raises(UnsafeCheckpointError):
        load_official(tmp_path / "a.pkl")
    assert not hasattr(torch.nn.Parameter, "forward")


def test_an_attack_inside_pickled_tensor_bytes_is_refused(tmp_path):
    marker = tmp_path / "executed"
    inner = io.BytesIO()
    torch.save(_Calls(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    outer = _Calls(torch.storage._load_from_bytes, inner.getvalue())
    with pytest.raises(UnsafeCheckpointError, match="system"):
        load_official(_write(outer, tmp_path / "a.pkl", 2))
    assert not marker.exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, form):
    tensor = torch.zeros(4)
    path = _write({"w": tensor}, tmp_path / "a.pth", form)
    data = path.read_bytes()
    old, new = b"K\x04\x85", b"K\x7f\x85"  # the size (4,) becomes (127,)
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(CheckpointReadError, match=r"does not fit its storage|Bad CRC-32"):
        load_official(path)


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load_official(tmp_path / "a.pt")


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_are_explained(tmp_path, form):
    path = _write({"w": torch.arange(1000.0), "n": np.arange(100)}, tmp_path / "a.pth", form)
    data = path.read_bytes()
    for size in (1, 50, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointReadError, match=r"a\.pth"):
            load_official(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointReadError):
        load_official(path)
    if form == "zip":
        position = data.index(torch.arange(1000.0).numpy().tobytes())
        path.write_bytes(data[: position + 8] + b"\xff\xff" + data[position + 10 :])
        with pytest.raises(CheckpointReadError, match="CRC"):
            load_official(path)


def test_random_bytes_never_raise_anything_else(tmp_path):
    """Fuzzing: whatever is in the file, the answer is data or one of the two errors."""
    generator = np.random.default_rng(0)
    seeds = [pickle.dumps({"a": np.arange(3), "b": torch.ones(2), "c": argparse.Namespace(x=1)}, p) for p in range(6)]
    path = tmp_path / "a.pkl"
    for index in range(600):
        data = bytearray(seeds[index % 6])
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(CheckpointReadError):
            load_official(path)
