"""A safe reader of the pickle in TorchScript archives: it runs none of the code that a pickle names.

A pickle is a program for a stack machine. Python's unpickler imports and calls any function that the
program names. The machine in this file knows only the opcodes that torch writes. It builds lists,
dicts, tuples, strings, numbers, records (the class name and the attributes of an object) and
references to tensors. It refuses every other opcode and every other name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lumos.errors import shown

MAX_NAME_BYTES = 1000  # for the module and for the name of a global
MAX_DIMENSIONS = 64  # as in torch
INT64_END = 2**63

STORAGES = {
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
}
LISTS = tuple(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor"))
FUNCTIONS = {
    "torch._utils._rebuild_tensor_v2",
    "torch.jit._pickle.restore_type_tag",
    "torch.device",
    "collections.OrderedDict",
    *LISTS,
}


class Refused(ValueError):
    """Raised for an archive that torch would not write for a model's weights; the message says why."""


# These classes generate no __repr__ and no __eq__: both would recurse without end in a structure that contains itself.
@dataclass(frozen=True, slots=True, repr=False, eq=False)
class StorageReference:
    """A reference to `numel` numbers of one dtype in the entry `key` of the archive."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TensorReference:
    """A view of a storage, known to lie within it. Offset and strides count numbers, not bytes."""

    storage: StorageReference
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True, repr=False, eq=False)
class Record:
    """An object in the archive: the name of its class, which is never imported, and its attributes."""

    class_name: str
    attributes: dict[Any, Any] | None = None  # None until the opcode BUILD sets them


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Class:
    name: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Function:
    name: str


def read_pickled(data: bytes) -> Any:
    """Return the value of a pickle of protocol 2, the protocol that torch writes.

    Raises Refused if the pickle is damaged or holds anything that torch does not write. The value
    takes at most a few hundred times the memory of `data`, even if the pickle is hostile. It may
    contain itself, so code that walks through it must limit the depth and the number of steps.
    """
    if data[:2] != b"\x80\x02":
        raise Refused("its structure is no pickle of protocol 2")
    machine = _Machine(data)
    while (opcode := machine.take(1)) != b".":
        if opcode not in OPCODES:
            raise Refused(f"its structure uses the opcode {REFUSED_OPCODES.get(opcode, f'0x{opcode.hex()}')}")
        OPCODES[opcode](machine)
    if machine.marks or len(machine.stack) != 1 or machine.position != len(data):
        raise Refused("its structure does not end with one value")
    return machine.stack[0]


class _Machine:
    """The state of the stack machine: position in the data, stack, marks (heights of the stack) and memo."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 2
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, length: int) -> bytes:
        taken = self.data[self.position : self.position + length]
        if len(taken) < length:
            raise Refused("its structure is cut off")
        self.position += length
        return taken

    def take_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_NAME_BYTES)
        if end < 0:
            raise Refused(f"its structure names something in over {MAX_NAME_BYTES} bytes")
        return _text(self.take(end + 1 - self.position)[:-1])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self, *kinds: type) -> Any:
        """Return the value on top of the stack. Raises Refused if `kinds` are given and its type is not among them."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("its structure takes a value where there is none")
        value = self.stack[-1]
        if kinds and type(value) not in kinds:
            expected = " or ".join(kind.__name__.strip("_") for kind in kinds)
            raise Refused(f"its structure has a {type(value).__name__.strip('_')} where a {expected} belongs")
        return value

    def pop(self, *kinds: type) -> Any:
        value = self.top(*kinds)
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("its structure lacks a mark")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def push_tuple(self, length: int) -> None:
        self.push(tuple([self.pop() for _ in range(length)][::-1]))

    def put(self, index: int) -> None:
        if index in self.memo:
            raise Refused(f"its structure stores the value {index} twice")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"its structure takes the value {index}, which it never stored")
        self.push(self.memo[index])

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise Refused("its structure has a dict with a key that lacks its value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int, float, bool):
                raise Refused(f"its structure has a dict with a {type(key).__name__.strip('_')} as key")
            if key in target:
                raise Refused(f"its structure has a dict with two entries {shown(key)}")
            target[key] = value

    def push_text(self) -> None:
        self.push(_text(self.take(self.number("<I"))))

    def push_long(self) -> None:
        length = self.number("<B")
        if length > 8:
            raise Refused(f"its structure has a number of {length} bytes")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def push_global(self) -> None:
        module, name = self.take_line(), self.take_line()
        full = f"{module}.{name}"
        if full in STORAGES:
            self.push(STORAGES[full])
        elif full in FUNCTIONS:
            self.push(_Function(full))
        elif module == "__torch__" or module.startswith("__torch__."):
            self.push(_Class(full))
        else:
            raise Refused(f"its structure names {shown(full)}")

    def push_storage(self) -> None:
        match self.pop(tuple):
            case ("storage", torch.dtype() as dtype, str(key), str(), numel) if _is_size(numel):  # the string: the device
                self.push(StorageReference(dtype, key, numel))
            case _:
                raise Refused("its structure has a reference to something else than a storage")

    def push_record(self) -> None:
        if self.pop(tuple):
            raise Refused("its structure makes an object from arguments")
        self.push(Record(self.pop(_Class).name))

    def build(self) -> None:
        state = self.pop()
        record = self.top(Record)
        if type(state) is not dict:
            raise Refused(f"it has an object of {shown(record.class_name)} that only the archive's own code could restore")
        if record.attributes is not None:
            raise Refused(f"it sets the attributes of an object of {shown(record.class_name)} twice")
        record.attributes = state

    def call(self) -> None:
        """Replace a function and its arguments on the stack by the result.

        The real function is never called: this method does what each of the known functions would do.
        """
        arguments = self.pop(tuple)
        name = self.pop(_Function).name
        match name, arguments:
            case "torch._utils._rebuild_tensor_v2", (StorageReference() as storage, offset, tuple(size), tuple(stride), bool(), {}):
                if arguments[5]:
                    raise Refused("its structure has a tensor with hooks")
                self.push(_view(storage, offset, size, stride))
            case "collections.OrderedDict", ():
                self.push({})
            case "torch.device", (str(device),):
                self.push(device)
            case "torch.jit._pickle.restore_type_tag", (list() | dict() as value, str()):
                self.push(value)
            case _, (list() as value,) if name in LISTS:
                self.push(value)
            case _:
                raise Refused(f"its structure calls {name} with arguments that torch does not write")


def _view(storage: StorageReference, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> TensorReference:
    """Return a view of the storage; raises Refused unless all of its numbers lie in the storage.

    Python's integers do not overflow, so hostile sizes cannot pass the check.
    """
    if not all(map(_is_size, (offset, *size, *stride))) or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise Refused("its structure has a tensor with an impossible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    empty = 0 in size
    if math.prod(size) >= INT64_END or (offset > storage.numel if empty else last >= storage.numel):
        raise Refused(f"its structure has a tensor that reaches beyond its storage {shown(storage.key)}")
    return TensorReference(storage, offset, size, stride)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < INT64_END


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("its structure has text that is not UTF-8") from error


OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"(": lambda m: m.marks.append(len(m.stack)),  # MARK
    b"N": lambda m: m.push(None),  # NONE
    b"\x88": lambda m: m.push(True),  # NEWTRUE
    b"\x89": lambda m: m.push(False),  # NEWFALSE
    b"K": lambda m: m.push(m.number("<B")),  # BININT1
    b"M": lambda m: m.push(m.number("<H")),  # BININT2
    b"J": lambda m: m.push(m.number("<i")),  # BININT
    b"\x8a": _Machine.push_long,  # LONG1
    b"G": lambda m: m.push(m.number(">d")),  # BINFLOAT
    b"X": _Machine.push_text,  # BINUNICODE
    b")": lambda m: m.push(()),  # EMPTY_TUPLE
    b"\x85": lambda m: m.push_tuple(1),  # TUPLE1
    b"\x86": lambda m: m.push_tuple(2),  # TUPLE2
    b"\x87": lambda m: m.push_tuple(3),  # TUPLE3
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b"a": lambda m: m.extend([m.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.pop_to_mark()),  # APPENDS
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b"s": lambda m: m.update([m.pop(), m.pop()][::-1]),  # SETITEM
    b"u": lambda m: m.update(m.pop_to_mark()),  # SETITEMS
    b"q": lambda m: m.put(m.number("<B")),  # BINPUT
    b"r": lambda m: m.put(m.number("<I")),  # LONG_BINPUT
    b"h": lambda m: m.get(m.number("<B")),  # BINGET
    b"j": lambda m: m.get(m.number("<I")),  # LONG_BINGET
    b"c": _Machine.push_global,  # GLOBAL
    b"Q": _Machine.push_storage,  # BINPERSID
    b"\x81": _Machine.push_record,  # NEWOBJ
    b"b": _Machine.build,  # BUILD
    b"R": _Machine.call,  # REDUCE
}

REFUSED_OPCODES = {
    code.to_bytes(1, "little"): name
    for code, name in {
        0x80: "PROTO", 0x30: "POP", 0x31: "POP_MARK", 0x32: "DUP", 0x46: "FLOAT", 0x49: "INT", 0x4C: "LONG", 0x50: "PERSID",
        0x53: "STRING", 0x54: "BINSTRING", 0x55: "SHORT_BINSTRING", 0x56: "UNICODE", 0x64: "DICT", 0x67: "GET", 0x69: "INST",
        0x6C: "LIST", 0x6F: "OBJ", 0x70: "PUT", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x42: "BINBYTES",
        0x43: "SHORT_BINBYTES", 0x8C: "SHORT_BINUNICODE", 0x8D: "BINUNICODE8", 0x8E: "BINBYTES8", 0x8F: "EMPTY_SET",
        0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX", 0x93: "STACK_GLOBAL", 0x94: "MEMOIZE", 0x95: "FRAME",
        0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
    }.items()
}  # fmt: skip
"""Names of the opcodes of all protocols that torch does not write, for error messages."""
