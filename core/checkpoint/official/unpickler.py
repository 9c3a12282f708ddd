"""An unpickler that can only build data: every name in a pickle resolves to one of our own builders, or is refused.

Python's pickle format is a small program: it may import any name and call it. Here the program still runs, but

- a name never imports anything; it is looked up in a table of builders (arrays, tensors, plain containers) or becomes
  an inert `Record`, and a name outside the allow-list is an error;
- only builders can be called, each checks its arguments itself, and attributes are set on nothing but `Record`;
- every instruction, every copy and every key of a dictionary is paid from the file's `Budget`, so that no small file
  fills the memory or runs for hours.

So the worst that a hostile file can do is to be refused.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from core.checkpoint.files import UnsafeCheckpointError
from core.checkpoint.official.builders import Array, ArrayType, Record, Reference, Storage, reference
from core.checkpoint.official.limits import NAME, SLOW, STORAGE, Budget

# Names that Python 2, protocols 0 to 2 and old torch versions use -> today's.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
_LEAVES = (str, int, float, bool, type(None), torch.Tensor, torch.nn.Parameter, bytes)
_NAMES = {"builtins.xrange": "range", "builtins.long": "int", "builtins.unicode": "str"}
_QUANTIZED = re.compile(r"torch\.(Q\w+Storage|per_\w+_(affine|symmetric)\w*)")


# Instructions that take several times as long, or as much memory, as the others.
_SLOW = (pickle.EMPTY_SET, pickle.STRING, pickle.UNICODE, pickle.INT, pickle.LONG, pickle.FLOAT, pickle.LONG1)


def _costly(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    def paid(unpickler: AllowListUnpickler) -> None:
        unpickler.budget.work(SLOW)
        instruction(unpickler)

    return paid


class AllowListUnpickler(pickle._Unpickler):
    """Reads one pickle with the rules of this module.

    Args:
        file: positioned at the pickle.
        allow: names (``module.name``) that may occur.
        budget: what reading the file may cost.
        persistent: what a persistent id (a tensor storage) stands for.
        nested: reads a torch file that lies inside the pickle as bytes (tensors pickled by plain `pickle`).
        encoding: of 8-bit strings written by Python 2.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        allow: Collection[str],
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[Budget, Any], Any] | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__(file, encoding=encoding)
        self.allow, self.budget, self.persistent, self.nested = allow, budget, persistent, nested
        self.references: dict[str, Any] = {}

    def load(self) -> Any:
        """The content: pickle's loop with every instruction counted, and read without frames, which only save calls."""
        self.read, self.readline = self._file_read, self._file_readline
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch, budget = self.read, self.dispatch, self.budget
        try:
            while code := read(1):
                budget.steps -= 1
                if budget.steps < 0:
                    budget.work(0)
                if code[0] not in dispatch:
                    raise pickle.UnpicklingError(f"byte {code[0]:#04x} is not an instruction of a pickle")
                dispatch[code[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise EOFError

    def find_class(self, module: str, name: str) -> Any:
        """The builder, element type or inert stand-in of a name; never an import."""
        if type(module) is not str or type(name) is not str:
            raise UnsafeCheckpointError("it asks for a name that is no text")
        self.budget.work(NAME)
        module = _MODULES.get(module, module)
        name = _NAMES.get(f"{module}.{name}", name)
        full = f"{module}.{name}"
        if _QUANTIZED.fullmatch(full):
            raise UnsafeCheckpointError(
                "it holds a quantized tensor, which is not read: save its numbers (tensor.dequantize())"
            )
        if "." in name or full not in self.allow:
            raise UnsafeCheckpointError(f"it asks for '{full}', which is outside the allow-list")
        if full not in self.references:
            self.references[full] = reference(full, self.nested)
        return self.references[full]

    def persistent_load(self, pid: Any) -> Any:
        """A tensor storage."""
        if self.persistent is None:
            raise UnsafeCheckpointError("it refers to data outside itself")
        self.budget.work(STORAGE)
        return self.persistent(pid)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Reference):
            raise UnsafeCheckpointError(f"it calls a {type(function).__name__}")
        return function(arguments, self.budget)

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
            made.set_state(keywords, self.budget)
        self.append(made)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record | Array | ArrayType):
            target.set_state(state, self.budget)
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
        keys = items[::2]
        for key in keys:
            self.budget.key(key)
        target.update(zip(keys, items[1::2], strict=True))

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
        self.stack[-1].update(self.budget.elements(items))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(self.budget.elements(items)))

    def load_binunicode(self) -> None:
        (count,) = struct.unpack("<I", self.read(4))
        self._text(count)

    def load_binunicode8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self._text(min(count, self.budget.size))

    def _text(self, count: int) -> None:
        text = str(self.read(count), "utf-8", "surrogatepass")
        if count > 1 << 12:
            self.budget.take(max(0, sys.getsizeof(text) - count))  # one wide character makes all take four bytes
        self.append(text)

    def load_put(self) -> None:
        index = int(self.readline()[:-1])
        if not 0 <= index < 1 << 32:  # what fits the other instructions; larger numbers can be made to collide
            raise pickle.UnpicklingError(f"memo index {index} is out of range")
        self.memo[index] = self.stack[-1]

    def load_frame(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        if count > self.budget.size:
            raise pickle.UnpicklingError(f"a frame of {count} bytes is longer than the file")

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(count, self.budget.size))))  # never more than there is to read

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
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BINUNICODE[0]] = load_binunicode
    dispatch[pickle.BINUNICODE8[0]] = load_binunicode8
    dispatch[pickle.PUT[0]] = load_put
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = load_extension
    for _code in _SLOW:
        dispatch[_code[0]] = _costly(dispatch[_code[0]])


def plain(value: Any, budget: Budget) -> Any:
    """Turns stand-ins into plain dictionaries, lists and strings, in place where a container can be kept.

    omegaconf nodes become their content, a list class its elements, a class that was only mentioned its name.
    """
    return _Plain(budget)(value)


class _Plain:
    """One pass over a loaded content; remembers what it has seen, because objects point back at each other."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.done: dict[int, tuple[Any, Any]] = {}  # the original is kept alive, so that its id stays its own

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _LEAVES:
            return value
        if id(value) in self.done:
            return self.done[id(value)][1]
        if kind in (dict, OrderedDict):
            return self._dictionary(value)
        if kind is list:
            self._remember(value, value)
            value[:] = [self(v) for v in value]
            return value
        if kind in (tuple, set, frozenset):
            return self._remember(value, kind([self(v) for v in value]))
        if isinstance(value, Record):
            return self._record(value)
        if isinstance(value, Reference):
            return value.name
        if isinstance(value, Storage):
            return value.tensor(0, (value.count,), (1,), self.budget)
        if isinstance(value, ArrayType):
            return value.dtype
        if isinstance(value, Array):
            return self._remember(value, self._array(value.value))
        return value

    def _remember(self, value: Any, result: Any) -> Any:
        self.done[id(value)] = (value, result)
        return result

    def _dictionary(self, value: dict[Any, Any]) -> dict[Any, Any]:
        self._remember(value, value)
        keys = [self(k) for k in value]
        if all(new is old for new, old in zip(keys, value, strict=True)):
            for key, item in value.items():
                value[key] = self(item)
        else:
            items = [self(v) for v in value.values()]
            value.clear()
            value.update(zip(keys, items, strict=True))
        return value

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
