"""What names in a pickle stand for: builders of arrays, tensors and containers, and inert stand-ins for the rest."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from core.checkpoint.files import CheckpointReadError, UnsafeCheckpointError
from core.checkpoint.official.limits import CALL, TENSOR, Budget, sequence, sizes


class Record(dict):
    """What stands in for an object whose class is never imported: its items and attributes as a dictionary.

    Attributes:
        type_name: the name that the pickle gave for the class.
        arguments: positional arguments that the class would have been called with.
        attributes: the object's attribute dictionary (``__dict__``), private names included.
        elements: the elements, when the class is a list.
    """

    def __init__(self, type_name: str, arguments: tuple = ()) -> None:
        super().__init__()
        self.type_name, self.arguments = type_name, arguments
        self.attributes: dict[str, Any] = {}
        self.elements: list[Any] = []

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes the state that pickle would have given to ``__setstate__`` or ``__dict__``."""
        slots = None
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | None):
            state, slots = state
        for part in (state, slots):
            if isinstance(part, dict):
                pairs = budget.pairs(part)
                self.attributes.update(pairs)
                self.update((k, v) for k, v in pairs if not (isinstance(k, str) and k.startswith("__")))
            elif part is not None:
                self.attributes["__state__"] = part


class Reference:
    """A name that a pickle mentions; calling it is an error unless `build` is given.

    Args:
        name: ``module.name``.
        build: makes the value from the budget of the file and the arguments in it.
    """

    def __init__(self, name: str, build: Callable[..., Any] | None = None) -> None:
        self.name, self.build = name, build

    def __call__(self, arguments: Any, budget: Budget) -> Any:
        budget.work(CALL)
        if self.build is None:
            raise UnsafeCheckpointError(f"it calls '{self.name}', which is read as a name only")
        if not isinstance(arguments, tuple):
            raise UnsafeCheckpointError(f"it calls '{self.name}' with something that is no argument list")
        try:
            return self.build(budget, *arguments)
        except CheckpointReadError:
            raise
        except Exception as error:
            raise UnsafeCheckpointError(
                f"it calls '{self.name}' with arguments that cannot be meant: {error}"
            ) from None


class Storage:
    """The memory of tensors in a file: flat bytes and the element type they are read as.

    Args:
        data: uint8 tensor (bytes,), filled before or after the tensors are made.
        dtype: element type.
        start: first element that belongs to this storage.
        count: number of elements from there on; up to the end of `data` when None.
    """

    def __init__(self, data: torch.Tensor, dtype: torch.dtype, start: int = 0, count: int | None = None) -> None:
        self.data, self.dtype, self.start = data, dtype, start
        available = data.numel() // dtype.itemsize - start
        self.count = available if count is None else count
        if min(start, self.count) < 0 or self.count > available:
            raise ValueError("a storage outside its memory")

    def tensor(self, offset: Any, size: Any, stride: Any, budget: Budget) -> torch.Tensor:
        """The view of `size` and `stride` from element `offset` on; anything outside the memory is refused."""
        (offset,), size, stride = sizes([offset]), sizes(size), sizes(stride)
        budget.work(TENSOR + len(size))
        if len(size) != len(stride):
            raise ValueError("size and stride must have one length")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and last >= self.count:
            raise ValueError(f"a tensor of size {size} does not fit its storage")
        place = (self.start + offset, size, stride, self.dtype)
        budget.view(self.data, place, math.prod(size) * self.dtype.itemsize)
        whole = torch.empty(0, dtype=self.dtype)
        return whole.set_(self.data.untyped_storage(), self.start + offset, size, stride)


class ArrayType:
    """A numpy element type; pickle gives the name first and the byte order later."""

    def __init__(self, budget: Budget, code: Any, align: Any = False, copy: Any = True) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or re.fullmatch(r"[<>|=]?[biufcSUO?]\d*", code) is None:
            raise ValueError(f"array type {code!r} is not read")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes the byte order; every other field must be what the type has anyway (structured types are refused)."""
        own = self.dtype.__reduce__()[2]
        same = isinstance(state, tuple) and len(state) == len(own) and state[2:] == own[2:]
        if not same or state[1] not in ("<", ">", "|", "="):
            raise UnsafeCheckpointError("it holds a structured array type, which is not read")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A numpy array; pickle makes it empty first and fills it later."""

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = np.empty(0) if value is None else value

    @classmethod
    def shell(cls, budget: Budget, subtype: Any, shape: Any, typecode: Any) -> Array:
        """What ``numpy.core.multiarray._reconstruct`` makes."""
        if not isinstance(subtype, Reference) or subtype.name != "numpy.ndarray":
            raise ValueError("only plain arrays are read")
        return cls()

    @classmethod
    def from_buffer(cls, budget: Budget, data: Any, kind: Any, shape: Any, order: Any = "C", *unused: Any) -> Array:
        """What numpy's protocol-5 pickles call."""
        array = cls()
        array.set_state((1, shape, kind, order == "F", data), budget)
        return array

    def set_state(self, state: Any, budget: Budget) -> None:
        """Takes (version, shape, element type, Fortran order, content)."""
        if not isinstance(state, tuple) or len(state) not in (4, 5) or not isinstance(state[-3], ArrayType):
            raise UnsafeCheckpointError("it holds an array without content")
        shape, kind, fortran, data = state[-4:]
        dtype = kind.dtype
        data = _bytes(data, budget) if isinstance(data, str) else data
        try:
            shape = sizes(shape)
            sound = isinstance(data, list if dtype.hasobject else bytes | bytearray)
            sound = sound and len(data) == math.prod(shape) * (1 if dtype.hasobject else dtype.itemsize)
        except ValueError:
            sound = False
        if not sound:
            raise UnsafeCheckpointError("it holds an array whose content does not fit its shape")
        budget.take(len(data) * (8 if dtype.hasobject else 1))
        if dtype.hasobject:
            flat = np.empty(len(data), dtype=object)
            flat[:] = data
        else:
            flat = np.frombuffer(bytearray(data), dtype=dtype)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


_UNTYPED, _NESTED = "torch.storage.UntypedStorage", "torch.storage._load_from_bytes"
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
# Of these tensors are made; the others (quantized, bits, parts of a byte) are no numbers that torch computes with.
_NUMBERS = re.compile(r"torch\.(bool|u?int(8|16|32|64)|float(16|32|64)|bfloat16|float8_\w+|complex\d+)")
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class StorageKind(Reference):
    """The name of a storage class: gives the element type of a `Storage`."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.dtype = dtype


def _rebuild_tensor(
    budget: Budget,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    marks = metadata or {}
    if not isinstance(storage, Storage) or not isinstance(marks, dict) or not set(marks) <= {"conj", "neg"}:
        raise ValueError("not a tensor's storage, or marks of a view other than conj and neg")
    tensor = storage.tensor(offset, size, stride, budget)
    tensor = tensor.conj() if marks.get("conj") else tensor
    tensor = torch._neg_view(tensor) if marks.get("neg") else tensor
    return tensor.requires_grad_() if requires_grad and tensor.is_floating_point() else tensor


def _rebuild_tensor_of_dtype(
    budget: Budget,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> torch.Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or not _NUMBERS.fullmatch(str(dtype)):
        raise ValueError(f"not a tensor's storage, or elements of type {dtype}, which are not read")
    return _rebuild_tensor(budget, Storage(storage.data, dtype), offset, size, stride, requires_grad, hooks, *rest)


def _rebuild_parameter(budget: Budget, data: Any, requires_grad: Any = True, *unused: Any) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor):
        raise ValueError("no tensor")
    return torch.nn.Parameter(data.detach(), requires_grad=bool(requires_grad) and data.is_floating_point())


def _rebuild_from_type(budget: Budget, function: Any, kind: Any, arguments: Any, state: Any) -> torch.Tensor:
    if not isinstance(function, Reference) or not isinstance(kind, Reference):
        raise ValueError("no tensor builder")
    return function(arguments, budget)


def _not_read(kind: str, remedy: str) -> Callable[..., Any]:
    """The builder of a kind of tensor that is data, but not read."""

    def refuse(budget: Budget, *unused: Any) -> None:
        raise UnsafeCheckpointError(f"it holds a {kind} tensor, which is not read: {remedy}")

    return refuse


def _scalar(budget: Budget, kind: Any, data: Any = b"") -> Any:
    data = _bytes(data, budget) if isinstance(data, str) else data
    if not isinstance(kind, ArrayType) or kind.dtype.hasobject or len(data) != kind.dtype.itemsize:
        raise ValueError("no plain number")
    return np.frombuffer(data, dtype=kind.dtype, count=1)[0]


def _bytes(data: Any, budget: Budget, encoding: Any = "latin1") -> bytes:
    """Text, bytes or a list of numbers as bytes of its own."""
    budget.take(len(sequence(data)) if not isinstance(data, str) else len(data))
    if not isinstance(data, str):
        return bytes(data)
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise ValueError(f"encoding {encoding!r} is not read")
    return data.encode("latin1")


def _list(budget: Budget, content: Any = (), *unused: Any) -> list[Any]:
    budget.work(len(sequence(content)))
    return list(content)


def _dict(budget: Budget, content: Any = ()) -> dict[Any, Any]:
    return dict(budget.pairs(content))


def _path(budget: Budget, *parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a part of a path is not a text")
    budget.take(sum(map(len, parts)))
    return str(PurePosixPath(*parts))


def _device(budget: Budget, kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or len(kind) > 64:
        raise ValueError("the device is not a short text")
    return torch.device(kind) if index is None else torch.device(kind, int(index))


def _reconstruct_object(budget: Budget, kind: Any, base: Any, state: Any) -> Any:
    if not isinstance(kind, Reference):
        raise ValueError("no class")
    made = kind((), budget)
    if isinstance(state, dict) and isinstance(made, dict):
        made.update(budget.pairs(state))
    elif isinstance(state, list) and isinstance(made, Record):
        made.elements.extend(_list(budget, state))
    elif state is not None:
        raise ValueError("a base that is neither dictionary nor list")
    return made


# What a file of nothing but weights mentions.
_PLAIN_BUILDERS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": lambda budget, pairs=(): OrderedDict(budget.pairs(pairs)),
    "collections.Counter": _dict,
    "_codecs.encode": lambda budget, text, encoding="latin1": _bytes(text, budget, encoding),
    "builtins.set": lambda budget, content=(): set(budget.elements(content)),
    "builtins.frozenset": lambda budget, content=(): frozenset(budget.elements(content)),
    "builtins.bytearray": lambda budget, data=b"", encoding="latin1": bytearray(_bytes(data, budget, encoding)),
    "builtins.bytes": lambda budget, data=b"": _bytes(data, budget),
    "builtins.complex": lambda budget, real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "torch.Size": lambda budget, numbers=(): torch.Size(sizes(numbers)),
    "torch.device": _device,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.serialization._get_layout": lambda budget, name: name,
    "torch._utils._rebuild_sparse_tensor": _not_read("sparse", "save its dense form (tensor.to_dense())"),
    "torch._utils._rebuild_nested_tensor": _not_read("nested", "save its parts as a list of tensors"),
    "torch._utils._rebuild_qtensor": _not_read("quantized", "save its numbers (tensor.dequantize())"),
    "torch._utils._rebuild_meta_tensor_no_storage": _not_read(
        "meta", "it has a shape but no numbers; save the model after its weights were loaded"
    ),
}
_BUILDERS: dict[str, Callable[..., Any] | None] = {
    **_PLAIN_BUILDERS,
    "collections.defaultdict": lambda budget, factory=None, content=(): _dict(budget, content),
    "collections.deque": _list,
    "copyreg._reconstructor": _reconstruct_object,
    "builtins.slice": lambda budget, *arguments: slice(*arguments),
    "builtins.range": lambda budget, *arguments: range(*arguments),
    **dict.fromkeys(f"builtins.{n}" for n in ("object", "dict", "list", "tuple", "str", "int", "float", "bool")),
    **dict.fromkeys(("typing.Any", "typing.Union", "typing.Optional", "types.NoneType")),
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "Path", "PurePath", "WindowsPath", "PureWindowsPath")
    },
    "numpy.ndarray": None,
    "numpy.dtype": ArrayType,
    **{
        f"numpy.{package}.{name}": builder
        for package in ("core", "_core")
        for name, builder in (
            ("multiarray._reconstruct", Array.shell),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", Array.from_buffer),
        )
    },
    _NESTED: None,  # tensors pickled by plain `pickle`: see `reference`
}

# Classes of official checkpoints that become a `Record`: configs and hyper-parameters beside the weights.
_OMEGACONF = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")
_OMEGACONF_NODES = ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Path", "Bytes")
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
_RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    *(f"omegaconf.{name}" for name in _OMEGACONF),
    *(f"omegaconf.nodes.{name}Node" for name in _OMEGACONF_NODES),
    *(f"{package}.utilities.parsing.AttributeDict" for package in _LIGHTNING),
    *(f"{package}.callbacks.model_checkpoint.ModelCheckpoint" for package in _LIGHTNING),
    *(f"{package}.callbacks.early_stopping.EarlyStopping" for package in _LIGHTNING),
    *(f"{package}.callbacks.lr_monitor.LearningRateMonitor" for package in _LIGHTNING),
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)

#: Names that `load` reads.
PLAIN_GLOBALS: frozenset[str] = frozenset(
    [*_PLAIN_BUILDERS, *_DTYPES, *(f"torch.{name}" for name in _STORAGE_DTYPES), _UNTYPED]
)
#: Names that `load_official` reads unless told otherwise.
OFFICIAL_GLOBALS: frozenset[str] = PLAIN_GLOBALS | {*_BUILDERS, *_RECORDS}


def reference(full: str, nested: Callable[[Budget, Any], Any] | None) -> Any:
    """What an allowed name stands for: an element type, a storage kind, a builder, or a maker of `Record`.

    Args:
        full: ``module.name``.
        nested: reads a torch file that lies inside a pickle as bytes.
    """
    if full in _DTYPES:
        return _DTYPES[full]
    if full == _UNTYPED:
        return StorageKind(full, torch.uint8)
    name = full.removeprefix("torch.")
    if name != full and name in _STORAGE_DTYPES:
        return StorageKind(full, _STORAGE_DTYPES[name])
    if full == _NESTED:
        return Reference(full, nested)
    if full in _BUILDERS:
        return Reference(full, _BUILDERS[full])
    return Reference(full, lambda budget, *arguments: Record(full, arguments))
