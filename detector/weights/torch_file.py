"""Reads what `torch.save` wrote, without running anything in the file and without believing what it claims.

`torch.load` does not check the sums of a file, refuses subclasses of dict and list, and takes the memory that a file
asks for. Here every byte of a zip file that is used has passed its CRC-32. No class and no function is looked up by
the names in the file: the pickle is read into records of names and values (`_Record`), and of those only tensors,
containers and numbers are understood, see `_Interpreter`.

Source:
    PyTorch, torch/serialization.py (both formats), torch/_utils.py (`_rebuild_*`).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detector.text import one_line, shown

MAX_OPERATIONS = 1_000_000  # of a pickle; the largest real checkpoints have some ten thousand
MAX_DEPTH = 100  # of containers in containers
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the format before torch 1.6
LEGACY_VERSION = 1001

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class ForeignTensor:
    """Stands for a tensor that is not an array of numbers in the file.

    Attributes:
        kind: such as "sparse tensor", as PyTorch names the function that makes it.
    """

    kind: str


def read_torch_file(path: Path) -> Any:
    """Return the content of a file of `torch.save`: containers of tensors, numpy arrays, text and numbers.

    Subclasses of dict, list and tuple are read as what they hold, other objects as their arguments or attributes.
    Tensors are on the CPU and share their memory where they shared it when they were saved.

    Args:
        path: the file. In a zip file (since torch 1.6) every byte is checked by the sums it has; files of the former
            format have none.

    Raises:
        ValueError: the file is damaged, cut off or something else; the message names it.
    """
    is_zip = _is_zip(path)
    try:
        members = _read_members(path) if is_zip else {}
    except Exception as error:  # zipfile fails on foreign bytes with errors of many types
        reason = one_line(error) if _has_directory(path) else unreadable(path, error)
        raise ValueError(f"{path}: damaged: {reason}") from error
    try:
        return _read_zip(members) if is_zip else _read_legacy(path)
    except _MissingMemberError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    except Exception as error:  # so does the pickle module
        raise ValueError(f"{path}: {unreadable(path, error)}") from error


class _MissingMemberError(ValueError):
    """A member of the zip file is not there: its entry in the directory is damaged."""


def unreadable(path: Path, error: Exception) -> str:
    """Return what is wrong with a file that its reader does not understand, in one line."""
    return f"not a checkpoint, or cut off ({path.stat().st_size} bytes): {one_line(error)}"


def _is_zip(path: Path) -> bool:
    """Tell whether a file has the first bytes of a zip file, or its last ones."""
    with path.open("rb") as file:
        starts_as_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    return starts_as_zip or _has_directory(path)


def _has_directory(path: Path) -> bool:
    """Tell whether a file ends with the directory of a zip file, damaged or not."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


@dataclass
class _Storage:
    """The memory of tensors.

    Attributes:
        dtype: of its elements; None if it is not among `STORAGE_DTYPES`.
        count: its elements, as the pickle says.
        memory: (bytes,) uint8; None until it has been read.
    """

    dtype: torch.dtype | None
    count: int
    memory: Tensor | None = None

    def set_memory(self, content: bytes) -> None:
        """Take the bytes of the file as memory that may be written."""
        if self.dtype is not None and len(content) != self.count * self.dtype.itemsize:
            raise ValueError(f"expected {self.count} numbers of {self.dtype} in a storage, got {len(content)} bytes")
        self.memory = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()


class _Record:
    """What a pickle says about an object or a call: the name, the arguments, and what is put into it.

    Each name has a subclass of its own, because the pickle module only makes objects of classes.

    Attributes:
        path: module and name of the class or function.
        arguments: of the call.
        elements: what is appended.
        items: keys and values that are set.
        state: its attributes, in any form; None if it has none.
    """

    path = ""

    def __new__(cls, *arguments: Any, **_: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        record.elements = []
        record.items = []
        record.state = None
        return record

    arguments: tuple[Any, ...]
    elements: list[Any]
    items: list[tuple[Any, Any]]
    state: Any

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, element: Any) -> None:
        self.elements.append(element)

    def extend(self, elements: Iterable[Any]) -> None:
        self.elements.extend(elements)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads a pickle into plain values and records; imports nothing.

    Args:
        data: the pickle.
        find_storage: key and storage as the pickle describes it -> the storage to use.
    """

    def __init__(self, data: bytes, find_storage: Callable[[str, _Storage], _Storage]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="replace")
        self.find_storage = find_storage
        self.record_types: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> type[_Record]:
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if path not in self.record_types:
            self.record_types[path] = type("_Record", (_Record,), {"path": path})
        return self.record_types[path]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = identity
        if kind != "storage" or type(count) is not int or count < 0 or any(view):
            raise ValueError(f"expected a storage, got {shown(identity)}")
        return self.find_storage(str(key), _Storage(STORAGE_DTYPES.get(storage_type.path), count))


def _load_pickle(data: bytes, find_storage: Callable[[str, _Storage], _Storage], start: int = 0) -> tuple[Any, int]:
    """Return what the pickle that begins at `start` holds, and where it ends."""
    end = _check_operations(data, start)
    return _Unpickler(data[start:end], find_storage).load(), end


def _check_operations(data: bytes, start: int) -> int:
    """Return where a pickle ends; refuse more operations, or containers in more containers, than any real file has.

    Deep tuples as keys would end the process, for Python computes their hashes by recursion without a limit.
    """
    depths: list[int] = []  # of the values on the stack
    marks: list[int] = []
    memo: dict[Any, int] = {}
    stream = io.BytesIO(data)
    stream.seek(start)
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if number >= MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS} operations")
        if operation.name == "MARK":
            marks.append(len(depths))
        elif operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else argument
            if not 0 <= index <= number:  # the pickle module takes memory for all numbers up to this one
                raise ValueError(f"its pickle keeps value {index} after {number} operations")
            memo[index] = depths[-1]
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            depths.append(memo[argument])
        else:
            operands = _take_operands(operation, depths, marks)
            depth = max((operand + 1 for operand in operands), default=0)
            if operation.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
                container, *contents = operands
                depth = max((content + 1 for content in contents), default=0)
                depth = max(depth, container)
            if depth > MAX_DEPTH:
                raise ValueError(f"its pickle has containers in more than {MAX_DEPTH} others")
            depths += [depth] * len(operation.stack_after)
    return stream.tell()


def _take_operands(operation: pickletools.OpcodeInfo, depths: list[int], marks: list[int]) -> list[int]:
    """Remove the operands of an operation from the stack of `_check_operations`, and return them."""
    operands = operation.stack_before
    if pickletools.markobject in operands:  # all values since the last mark, and those that come before it
        start = marks.pop() - operands.index(pickletools.markobject)
    else:
        start = len(depths) - len(operands)
    if start < 0:
        raise ValueError(f"its pickle lacks operands of {operation.name}")
    taken = depths[start:]
    del depths[start:]
    return taken


def _read_members(path: Path) -> dict[str, bytes]:
    """Return name -> bytes of the members of a zip file, checked by their CRC-32."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"expected members without compression, got {shown(member.filename)} compressed")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members are larger than the file")
        return {member.filename: archive.read(member) for member in members}


def _read_zip(members: dict[str, bytes]) -> Any:
    """Return the content of a file of torch 1.6 or newer, given its members, which are taken out."""
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError("expected a file of torch.save, got a TorchScript archive")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _MissingMemberError(f"expected one member data.pkl, got {len(roots)}")
    (root,) = roots
    byte_order = members.get(f"{root}byteorder", b"little")
    if byte_order != b"little":
        raise ValueError(f"expected little-endian numbers, got {shown(byte_order)}")

    storages: dict[str, _Storage] = {}

    def find_storage(key: str, storage: _Storage) -> _Storage:
        if key not in storages:
            if f"{root}data/{key}" not in members:
                raise _MissingMemberError(f"no member data/{shown(key)}")
            storage.set_memory(members.pop(f"{root}data/{key}"))
            storages[key] = storage
        return storages[key]

    content, _ = _load_pickle(members.pop(f"{root}data.pkl"), find_storage)
    return _Interpreter().plain(content)


def _read_legacy(path: Path) -> Any:
    """Return the content of a file in the format before torch 1.6: pickles, then the bytes of the storages."""
    storages: dict[str, _Storage] = {}

    def find_storage(key: str, storage: _Storage) -> _Storage:
        return storages.setdefault(key, storage)

    with path.open("rb") as file:
        magic, _ = _load_pickle(file.read(64), find_storage)
    if magic != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch.save does")

    data = path.read_bytes()
    position = 0
    pickles = []
    for _ in range(5):
        content, position = _load_pickle(data, find_storage, position)
        pickles.append(content)

    _, version, system, content, keys = pickles
    if version != LEGACY_VERSION or not system.get("little_endian"):
        raise ValueError(f"expected version {LEGACY_VERSION} and little-endian numbers, got {version}")
    for key in keys:
        storage = storages[key]
        if storage.dtype is None:
            raise ValueError(f"expected storages of {list(STORAGE_DTYPES)}, got another one")
        position += 8  # over the number of elements, which the pickle has, too
        end = position + storage.count * storage.dtype.itemsize
        storage.set_memory(data[position:end])
        position = end
    return _Interpreter().plain(content)


class _Interpreter:
    """Turns what a pickle holds into plain values. A container that contains itself holds None there."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}  # identity of a container or record -> its plain value; None while it is made

    def plain(self, value: Any) -> Any:
        """Return a value, and everything inside it, as plain values."""
        if isinstance(value, type | _Storage):
            return None  # the name of a class, or memory without a tensor
        if not isinstance(value, _Record | dict | list | tuple | set | frozenset):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = None
            if isinstance(value, _Record):
                self.known[id(value)] = self._plain_record(value)
            elif isinstance(value, dict):
                self.known[id(value)] = self._plain_dict(value.items())
            else:
                kind = set if isinstance(value, frozenset) else type(value)
                self.known[id(value)] = kind(self.plain(element) for element in value)
        return self.known[id(value)]

    def _plain_dict(self, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {self.plain(key): self.plain(value) for key, value in items}

    def _plain_record(self, record: _Record) -> Any:
        """Return what a record stands for if that is known, else what it holds."""
        path = record.path
        if path.startswith("torch._utils._rebuild_"):
            return _tensor(path, record.arguments)
        if path == "torch._tensor._rebuild_from_type_v2":  # a tensor of a subclass or with attributes
            function, _, arguments, _ = record.arguments
            return _tensor(function.path, arguments)

        arguments = self.plain(record.arguments)
        if path in ("collections.OrderedDict", "collections.defaultdict"):
            return self._plain_dict(record.items)
        if path in ("builtins.set", "builtins.frozenset"):
            return set(*arguments)
        if path == "builtins.bytes" and not arguments:  # bytes, in pickles of protocol 2
            return b""
        if path == "_codecs.encode":
            return arguments[0].encode("latin1")
        if path == "numpy.dtype":
            return _numpy_dtype(arguments[0], self.plain(record.state))
        if re.fullmatch(r"numpy\.(_?core)\.multiarray\.scalar", path):
            return _numpy_scalar(*arguments)
        if re.fullmatch(r"numpy\.(_?core)\.multiarray\._reconstruct", path):
            _, shape, dtype, in_columns, content = self.plain(record.state)
            return _numpy_array(content, dtype, shape, "F" if in_columns else "C")
        if re.fullmatch(r"numpy\.(_?core)\.numeric\._frombuffer", path):
            return _numpy_array(*arguments)
        return self._content(record, arguments)

    def _content(self, record: _Record, arguments: tuple[Any, ...]) -> Any:
        """Return what an object of an unknown class holds: items, elements, arguments or attributes."""
        if record.items:
            return self._plain_dict(record.items)
        if record.elements:
            return self.plain(record.elements)
        if len(arguments) == 1:  # a copy of a container, a subclass of str, or an enumeration
            return arguments[0]
        if arguments:  # a named tuple
            return arguments

        state = self.plain(record.state)
        if isinstance(state, tuple):  # mmengine's Config: its dict, the name of its file, its text, ...
            return next((value for value in state if isinstance(value, dict)), state)
        if isinstance(state, dict) and set(state) == {"data"}:  # a UserDict or UserList
            return state["data"]
        return {} if state is None else state


def _tensor(path: str, arguments: tuple[Any, ...]) -> Tensor | ForeignTensor:
    """Return the tensor that a function of `torch._utils` makes."""
    function = path.removeprefix("torch._utils._rebuild_")
    if function.startswith("parameter"):
        inner = arguments[0]
        return _tensor(inner.path, inner.arguments)
    if function not in ("tensor", "tensor_v2", "tensor_v3"):
        return ForeignTensor(function.replace("_", " "))
    signs = arguments[7 if function == "tensor_v3" else 6 :]  # {"conj": True} or {"neg": True}, if there are any
    if any(signs):
        return ForeignTensor("lazily conjugated or negated tensor")

    storage, offset, size, stride = arguments[:4]
    dtype = storage.dtype
    if function == "tensor_v3":  # of a dtype without a class of storages
        dtype = getattr(torch, arguments[6].path.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        return ForeignTensor("tensor of an unknown dtype")
    size = _sizes(size)
    stride = _sizes(stride)
    elements: int = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    count = len(storage.memory) // dtype.itemsize
    if type(offset) is not int or offset < 0 or (elements and last >= count) or elements >= 1 << 63:
        layout = f"{shown(size)} with strides {shown(stride)} from {shown(offset)} on"
        raise ValueError(f"a tensor {layout} does not fit into its {count} numbers")
    numbers: Tensor = storage.memory[: count * dtype.itemsize].view(dtype)
    return numbers.as_strided(size, stride, offset)


def _sizes(values: Any) -> list[int]:
    """Return the sizes or strides of a tensor; a record of torch.Size has them as its argument."""
    if isinstance(values, _Record):
        (values,) = values.arguments
    if not isinstance(values, tuple | list) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"expected sizes and strides from 0 on, got {shown(values)}")
    return list(values)


def _numpy_dtype(name: Any, state: Any) -> np.dtype[Any] | None:
    """Return a dtype of numbers or text, or None for another one, such as objects."""
    if not isinstance(name, str) or not re.fullmatch(r"[biufcSU][1-9]\d*", name):
        return None
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype.newbyteorder(state[1]) if isinstance(state, tuple) else dtype


def _numpy_scalar(dtype: np.dtype[Any] | None, content: Any) -> Any:
    if dtype is None:
        return content
    return np.frombuffer(content, dtype, 1)[0].item()


def _numpy_array(content: Any, dtype: np.dtype[Any] | None, shape: tuple[int, ...], order: Literal["C", "F"]) -> Any:
    if dtype is None:
        return content
    return np.ndarray(shape, dtype, content, order=order)
