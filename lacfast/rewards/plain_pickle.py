"""Plain data in a pickle, read without running it: numbers, text, lists, dicts, NumPy's numbers and arrays.

An unpickler does what the bytes say, and one that knows only NumPy's constructors still calls them with
arguments of the sender's choice, which is enough to follow an address or to fill the memory. Here nothing is
called: opcodes are tokens, and the few names that NumPy writes are taken for what they stand for.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lacfast.rewards.reward import BadAnswerError

MAX_PICKLE_BYTES = 2**18
"""GenEval's answer for 64 images has about 10,000."""
_MAX_OPEN = 32
"""Containers that may be open at once; nothing that reads the result descends deeper than one."""
_MAX_AXES = 2
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_NUMERIC = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = {
    "PROTO", "FRAME", "STOP", "MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_KNOWN = {*_CONSTANTS, *_EMPTY, *_LITERALS, *_TUPLES, *_OTHERS}
"""What Python writes for plain data, protocols 2 to 5."""
_READERS: dict[bytes, tuple[str, Callable[[io.BytesIO], Any] | None]] = {
    # pickletools would interpret escapes in the names of GLOBAL.
    byte: (opcode.name, None if opcode.arg is None or opcode.name == "GLOBAL" else opcode.arg.reader)
    for byte, opcode in _OPCODES.items()
    if opcode.name in _KNOWN
}
"""Byte -> the known opcode and what reads its argument."""


def read_plain_pickle(body: bytes) -> Any:
    """The numbers, text, lists, dicts and numeric NumPy arrays of a pickle; arrays are read as lists.

    Time and memory are bounded by `MAX_PICKLE_BYTES`. Keys are strings: numbers can be chosen to collide.

    Raises:
        BadAnswerError: for anything else in it, with the opcode or name, and for what is no pickle.
    """
    if len(body) > MAX_PICKLE_BYTES:
        raise BadAnswerError(
            f"the answer has {len(body)} bytes; at most {MAX_PICKLE_BYTES} are read: lower batch_size"
        )
    try:
        return _Reader(body).value()
    # So pickletools says that an argument is cut short; text in a wrong encoding is one, too.
    except ValueError as error:
        raise BadAnswerError(f"the answer is no plain pickle: {str(error)[:200]}") from error


@dataclass(frozen=True)
class _Name:
    """A global, which is not imported."""

    text: str


@dataclass
class _DType:
    """A numeric dtype; its byte order comes later than itself."""

    code: str
    order: str = "|"


class _Array(list[Any]):
    """An array as the list of its numbers, or of its rows; they come later than itself."""


class _Reader:
    """The stack machine of pickles, as far as plain data need it."""

    def __init__(self, body: bytes) -> None:
        self.file = io.BytesIO(body)
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # The memo lets a few bytes be used many times; what is made of them is counted each time.
        self.left = 2 * len(body)
        self.argument: Any = None

    def value(self) -> Any:
        while (opcode := self._opcode()) != "STOP":
            self._read(opcode)
        return self._pop()

    def _opcode(self) -> str:
        byte = self.file.read(1)
        found = _READERS.get(byte)
        if found is None:
            unknown = _OPCODES.get(byte)
            if unknown is not None:
                raise BadAnswerError(f"opcode {unknown.name} is not of plain data")
            raise BadAnswerError(f"byte {byte!r} is no opcode" if byte else "it ends too early")
        name, reader = found
        self.argument = None if reader is None else reader(self.file)
        return name

    def _read(self, opcode: str) -> None:
        if opcode in _LITERALS:
            self.stack.append(self.argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _TUPLES:
            size = _TUPLES[opcode]
            if len(self.stack) < size:
                raise BadAnswerError("it takes from an empty stack")
            self.stack[-size:] = (tuple(self.stack[-size:]),)
        else:
            self._read_other(opcode)

    def _read_other(self, opcode: str) -> None:
        match opcode:
            case "MARK":
                if len(self.outer) == _MAX_OPEN:
                    raise BadAnswerError(f"it is nested deeper than {_MAX_OPEN}")
                self.outer.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self._pop_to_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [self._pop()] if opcode == "APPEND" else self._pop_to_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self._pop(), self._pop()][::-1] if opcode == "SETITEM" else self._pop_to_mark()
                if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
                    raise BadAnswerError("a dict has a key that is no text")
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[self.argument] = self._top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if self.argument not in self.memo:
                    raise BadAnswerError(f"memo {self.argument} is empty")
                self.stack.append(self.memo[self.argument])
            case "GLOBAL":
                module, name = (self.file.readline().decode().removesuffix("\n") for _ in range(2))
                self.stack.append(_known(module, name))
            case "STACK_GLOBAL":
                name, module = self._pop(str), self._pop(str)
                self.stack.append(_known(module, name))
            case "REDUCE":
                arguments, name = self._pop(tuple), self._pop(_Name)
                self.stack.append(self._made(name.text, arguments))
            case "BUILD":
                state = self._pop()
                self._build(self._top(), state)

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a call would return."""
        match name, arguments:
            case "_codecs.encode", (str() as text, "latin1"):
                self._count(len(text))
                return text.encode("latin1")
            case "__builtin__.bytes", ():
                return b""
            case "collections.OrderedDict", ():
                return {}
            case "numpy.dtype", (str() as code, _, _) if code in _NUMERIC:
                return _DType(code)
            case "numpy._core.multiarray._reconstruct", (_Name(text="numpy.ndarray"), _, _):
                return _Array()
            case "numpy._core.multiarray.scalar", (_DType() as dtype, bytes() as data):
                return self._numbers(data, dtype, ())
            case (
                "numpy._core.numeric._frombuffer",
                (bytes() | bytearray() as data, _DType() as dtype, tuple() as shape, "C" | "F" as order),
            ):
                return self._numbers(data, dtype, shape, order)
        raise BadAnswerError(f"{name} has other arguments than plain data give it")

    def _build(self, target: Any, state: Any) -> None:
        match target, state:
            case _DType(), (_, "<" | ">" | "|" as order, None, None, None, _, _, _):
                target.order = order
            case _Array(), (_, (_, *_) as shape, _DType() as dtype, bool() as fortran, bytes() as data):
                target[:] = self._numbers(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise BadAnswerError(f"BUILD gives a {_kind(target)} a state that plain data do not have")

    def _numbers(self, data: bytes | bytearray, dtype: _DType, shape: Any, order: Any = "C") -> Any:
        """The number, list or list of lists in the buffer of an array."""
        kind = np.dtype(dtype.order + dtype.code)
        if shape == (0,) and not data:
            return []
        if len(shape) > _MAX_AXES or not all(type(length) is int and length > 0 for length in shape):
            raise BadAnswerError("an array has an unusable shape")
        if math.prod(shape) * kind.itemsize != len(data):
            raise BadAnswerError(f"an array's {len(data)} bytes do not fit its shape and dtype")
        # Rows are lists of their own.
        self._count(math.prod(shape) * max(1, len(shape)))
        return np.frombuffer(data, kind).reshape(shape, order=order).tolist()

    def _count(self, made: int) -> None:
        self.left -= made
        if self.left < 0:
            raise BadAnswerError("it would take more memory than its size allows")

    def _pop(self, kind: type = object) -> Any:
        self._top(kind)
        return self.stack.pop()

    def _top(self, kind: type = object) -> Any:
        if not self.stack:
            raise BadAnswerError("it takes from an empty stack")
        if not isinstance(self.stack[-1], kind):
            raise BadAnswerError(f"it has a {_kind(self.stack[-1])} where a {_kind(kind)} belongs")
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self.outer:
            raise BadAnswerError("it takes from an empty stack")
        items, self.stack = self.stack, self.outer.pop()
        return items


def _known(module: str, name: str) -> _Name:
    """A global that plain data name; numpy.core is its place before NumPy 2."""
    text = f"{module}.{name}"
    current = text.replace("numpy.core.", "numpy._core.")
    if current not in _GLOBALS:
        raise BadAnswerError(f"{text} is not of plain data; pickles may run code, so it is refused")
    return _Name(current)


_GLOBALS = {
    # How bytes were pickled before protocol 3.
    "__builtin__.bytes",
    "_codecs.encode",
    "collections.OrderedDict",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
}


def _kind(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__.strip("_").lower()
