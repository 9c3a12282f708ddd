"""An unpickler that can only build data: every name in a pickle resolves to one of our own builders, or is refused.

Python's pickle format is a small program: it may import any name and call it. Here the program still runs, but

- a name never imports anything; it is looked up in a table of builders (arrays, tensors, plain containers) or becomes an
  inert `Record`, and a name outside the allow-list is an error;
- only builders can be called, each checks its arguments itself, and attributes are set on nothing but `Record`.

So the worst that a hostile file can do is to be refused.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

from core.checkpoint.files import UnsafeCheckpointError


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

    def set_state(self, state: Any) -> None:
        """Takes the state that pickle would have given to ``__setstate__`` or ``__dict__``."""
        slots = None
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | None):
            state, slots = state
        for part in (state, slots):
            if isinstance(part, dict):
                self.attributes.update(part)
                self.update((k, v) for k, v in part.items() if not str(k).startswith("__"))
            elif part is not None:
                self.attributes["__state__"] = part


class Reference:
    """A name that a pickle mentions; calling it is an error unless `build` is given."""

    def __init__(self, name: str, build: Callable[..., Any] | None = None) -> None:
        self.name, self.build = name, build

    def __call__(self, arguments: Any) -> Any:
        if self.build is None:
            raise UnsafeCheckpointError(f"it calls '{self.name}', which is read as a name only")
        if not isinstance(arguments, tuple):
            raise UnsafeCheckpointError(f"it calls '{self.name}' with something that is no argument list")
        try:
            return self.build(*arguments)
        except UnsafeCheckpointError:
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

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        """The view of `size` and `stride` from element `offset` on; anything outside the memory is refused."""
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("offset, size and stride must be whole numbers of one length")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and last >= self.count:
            raise ValueError(f"a tensor of size {tuple(size)} does not fit its storage")
        whole = torch.empty(0, dtype=self.dtype)
        return whole.set_(self.data.untyped_storage(), self.start + offset, tuple(size), tuple(stride))


class ArrayType:
    """A numpy element type; pickle gives the name first and the byte order later."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or re.fullmatch(r"[<>|=]?[biufcSUO?]\d*", code) is None:
            raise ValueError(f"array type {code!r} is not read")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
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
    def shell(cls, subtype: Any, shape: Any, typecode: Any) -> Array:
        """What ``numpy.core.multiarray._reconstruct`` makes."""
        if not isinstance(subtype, Reference) or subtype.name != "numpy.ndarray":
            raise ValueError("only plain arrays are read")
        return cls()

    @classmethod
    def from_buffer(cls, data: Any, kind: Any, shape: Any, order: Any = "C", *unused: Any) -> Array:
        """What numpy's protocol-5 pickles call."""
        array = cls()
        array.set_state((1, shape, kind, order == "F", data))
        return array

    def set_state(self, state: Any) -> None:
        """Takes (version, shape, element type, Fortran order, content)."""
        if not isinstance(state, tuple) or len(state) not in (4, 5) or not isinstance(state[-3], ArrayType):
            raise UnsafeCheckpointError("it holds an array without content")
        shape, kind, fortran, data = state[-4:]
        dtype = kind.dtype
        data = data.encode("latin1") if isinstance(data, str) else data
        sound = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if sound and dtype.hasobject:
            sound = isinstance(data, list) and len(data) == math.prod(shape)
        elif sound:
            sound = isinstance(data, bytes | bytearray) and len(data) == math.prod(shape) * dtype.itemsize
        if not sound:
            raise UnsafeCheckpointError("it holds an array whose content does not fit its shape")
        if dtype.hasobject:
            flat = np.empty(len(data), dtype=object)
            flat[:] = data
        else:
            flat = np.frombuffer(bytearray(data), dtype=dtype)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
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
    storage: Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    if not isinstance(storage, Storage) or metadata:
        raise ValueError("no tensor storage, or conjugate/negative views, which are not read")
    tensor = storage.tensor(offset, tuple(size), tuple(stride))
    return tensor.requires_grad_() if requires_grad and tensor.is_floating_point() else tensor


def _rebuild_tensor_of_dtype(
    storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any, dtype: Any, *rest: Any
) -> torch.Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("no tensor storage or no element type")
    return _rebuild_tensor(Storage(storage.data, dtype), offset, size, stride, requires_grad, hooks, *rest)


def _rebuild_parameter(data: torch.Tensor, requires_grad: bool = True, *unused: Any) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor):
        raise ValueError("no tensor")
    return torch.nn.Parameter(data.detach(), requires_grad=bool(requires_grad) and data.is_floating_point())


def _rebuild_from_type(function: Reference, kind: Reference, arguments: tuple, state: Any) -> torch.Tensor:
    if not isinstance(function, Reference) or not isinstance(kind, Reference):
        raise ValueError("no tensor builder")
    return function(arguments)


def _scalar(kind: ArrayType, data: Any = b"") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, ArrayType) or kind.dtype.hasobject or len(data) != kind.dtype.itemsize:
        raise ValueError("no plain number")
    return np.frombuffer(data, dtype=kind.dtype, count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise ValueError(f"encoding {encoding!r} is not read")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: str = "latin-1") -> bytearray:
    return bytearray(data.encode("latin-1") if isinstance(data, str) else bytes(_items(data)))


def _items(values: Any = ()) -> Any:
    """Guards constructors that would iterate or repeat: only ready containers count as their argument."""
    if not isinstance(values, list | tuple | set | frozenset | bytes | dict):
        raise ValueError("no container")
    return values


def _reconstruct_object(kind: Reference, base: Any, state: Any) -> Any:
    if not isinstance(kind, Reference):
        raise ValueError("no class")
    made = kind(())
    if isinstance(state, dict) and isinstance(made, dict):
        made.update(state)
    elif isinstance(state, list) and isinstance(made, Record):
        made.elements.extend(state)
    elif state is not None:
        raise ValueError("a base that is neither dictionary nor list")
    return made


_BUILDERS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": lambda pairs=(): OrderedDict(_items(pairs)),
    "collections.defaultdict": lambda factory=None, content=(): dict(_items(content)),
    "collections.Counter": lambda content=(): dict(_items(content)),
    "collections.deque": lambda content=(), limit=None: list(_items(content)),
    "copyreg._reconstructor": _reconstruct_object,
    "_codecs.encode": _encode,
    "builtins.set": lambda content=(): set(_items(content)),
    "builtins.frozenset": lambda content=(): frozenset(_items(content)),
    "builtins.bytearray": _bytearray,
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "builtins.slice": slice,
    "builtins.range": range,
    **dict.fromkeys(f"builtins.{n}" for n in ("object", "dict", "list", "tuple", "str", "bytes")),
    **dict.fromkeys(f"builtins.{n}" for n in ("int", "float", "bool")),
    **dict.fromkeys(("typing.Any", "typing.Union", "typing.Optional", "types.NoneType")),
    **{
        f"{module}.{name}": lambda *parts: str(PurePosixPath(*(str(p) for p in parts)))
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
    "torch.Size": lambda sizes=(): torch.Size(int(n) for n in _items(sizes)),
    "torch.device": lambda kind, index=None: torch.device(*([str(kind)] if index is None else [str(kind), int(index)])),
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.serialization._get_layout": lambda name: str(name),
    "torch.storage._load_from_bytes": None,  # the reader replaces it: see `AllowListUnpickler.nested`
}

# Classes of official checkpoints that become a `Record`: configs and hyper-parameters beside the weights.
_OMEGACONF = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")
_OMEGACONF_NODES = (
    "AnyNode",
    "StringNode",
    "IntegerNode",
    "FloatNode",
    "BooleanNode",
    "EnumNode",
    "PathNode",
    "BytesNode",
)
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
    *(f"omegaconf.nodes.{name}" for name in _OMEGACONF_NODES),
    *(f"{package}.utilities.parsing.AttributeDict" for package in _LIGHTNING),
    *(f"{package}.callbacks.model_checkpoint.ModelCheckpoint" for package in _LIGHTNING),
    *(f"{package}.callbacks.early_stopping.EarlyStopping" for package in _LIGHTNING),
    *(f"{package}.callbacks.lr_monitor.LearningRateMonitor" for package in _LIGHTNING),
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)

#: Names that `load_official` reads unless told otherwise.
OFFICIAL_GLOBALS: frozenset[str] = frozenset(
    [
        *_BUILDERS,
        *_RECORDS,
        *_DTYPES,
        *(f"torch.{name}" for name in _STORAGE_DTYPES),
        "torch.storage.UntypedStorage",
    ]
)

_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED = {"torch.tensor": "torch._tensor"}


class AllowListUnpickler(pickle._Unpickler):
    """Reads one pickle with the rules of this module.

    Args:
        file: positioned at the pickle.
        allow: names (``module.name``) that may occur.
        persistent: what a persistent id (a tensor storage) stands for.
        nested: reads a torch file that lies inside the pickle as bytes (tensors pickled by plain `pickle`).
        encoding: of 8-bit strings written by Python 2.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        allow: Collection[str],
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[bytes], Any] | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__(file, encoding=encoding)
        self.allow, self.persistent, self.nested = allow, persistent, nested
        self.references: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The builder, element type or inert stand-in of a name; never an import."""
        if type(module) is not str or type(name) is not str:
            raise UnsafeCheckpointError("it asks for a name that is no text")
        module = _RENAMED.get(_PYTHON2.get(module, module), _PYTHON2.get(module, module))
        full = f"{module}.{name}"
        if "." in name or full not in self.allow:
            raise UnsafeCheckpointError(f"it asks for '{full}', which is outside the allow-list")
        if full not in self.references:
            self.references[full] = self._reference(full, name)
        return self.references[full]

    def _reference(self, full: str, name: str) -> Any:
        if full in _DTYPES:
            return _DTYPES[full]
        if full == "torch.storage.UntypedStorage":
            return StorageKind(full, torch.uint8)
        if full.startswith("torch.") and name in _STORAGE_DTYPES:
            return StorageKind(full, _STORAGE_DTYPES[name])
        if full == "torch.storage._load_from_bytes":
            return Reference(full, self.nested)
        if full in _BUILDERS:
            return Reference(full, _BUILDERS[full])
        return Reference(full, lambda *arguments: Record(full, arguments))

    def persistent_load(self, pid: Any) -> Any:
        """A tensor storage."""
        if self.persistent is None:
            raise UnsafeCheckpointError("it refers to data outside itself")
        return self.persistent(pid)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Reference):
            raise UnsafeCheckpointError(f"it calls a {type(function).__name__}")
        return function(arguments)

    def _instantiate(self, klass: Any, k: Any) -> None:  # the INST and OBJ instructions of protocols 0 and 1
        self.append(self._call(klass, tuple(k)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(self._call(self.stack.pop(), arguments))

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        made = self._call(self.stack.pop(), arguments)
        if keywords and not isinstance(made, Record):
            raise UnsafeCheckpointError("it builds data with keyword arguments")
        if keywords:
            made.set_state(keywords)
        self.append(made)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record | Array | ArrayType):
            target.set_state(state)
        elif type(target) is OrderedDict and isinstance(state, dict):
            if "_metadata" in state:  # versions of modules in a state dict
                target._metadata = state["_metadata"]
        else:
            raise UnsafeCheckpointError(f"it sets the state of a {type(target).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Record):
            target.elements.extend(items)
        else:
            raise UnsafeCheckpointError(f"it appends to a {type(target).__name__}")

    def load_append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Record):
            raise UnsafeCheckpointError(f"it sets items of a {type(target).__name__}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise UnsafeCheckpointError(f"it adds elements to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(items)

    def load_extension(self) -> None:
        raise UnsafeCheckpointError("it uses copyreg extension codes")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = load_extension


def plain(value: Any) -> Any:
    """Turns stand-ins into plain dictionaries, lists and strings, in place where a container can be kept.

    omegaconf nodes become their content, a list class its elements, a class that was only mentioned its name.
    """
    return _Plain()(value)


class _Plain:
    """One pass over a loaded content; remembers what it has seen, because objects point back at each other."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}  # the original is kept alive, so that its id stays its own

    def __call__(self, value: Any) -> Any:
        if id(value) in self.done:
            return self.done[id(value)][1]
        if isinstance(value, Record):
            return self._record(value)
        if isinstance(value, Reference):
            return value.name
        if isinstance(value, Storage):
            return value.tensor(0, (value.count,), (1,))
        if isinstance(value, ArrayType):
            return value.dtype
        if isinstance(value, Array):
            return self._remember(value, self._array(value.value))
        if type(value) in (dict, OrderedDict):
            self._remember(value, value)
            items = [(self(k), self(v)) for k, v in value.items()]
            value.clear()
            value.update(items)
            return value
        if type(value) is list:
            self._remember(value, value)
            value[:] = [self(v) for v in value]
            return value
        if type(value) in (tuple, set, frozenset):
            return type(value)(self(v) for v in value)
        return value

    def _remember(self, value: Any, result: Any) -> Any:
        self.done[id(value)] = (value, result)
        return result

    def _array(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.hasobject:
            flat = array.reshape(-1)
            for index, item in enumerate(flat.tolist()):
                flat[index] = self(item)
            return flat.reshape(array.shape)
        return array

    def _record(self, record: Record) -> Any:
        state = record.attributes
        if record.type_name.startswith("omegaconf."):
            self._remember(record, None)  # parents point back at their children
            return self._remember(record, self(state.get("_content", state.get("_val"))))
        if record.elements:
            elements = self._remember(record, [])
            elements.extend(self(v) for v in record.elements)
            return elements
        if not record and "__state__" in state:
            return self(state["__state__"])
        result = self._remember(record, {})
        result.update((self(k), self(v)) for k, v in record.items())
        if not result and record.arguments:
            result["arguments"] = self(record.arguments)
        return result
