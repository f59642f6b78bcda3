"""Calling a function by what one writes at the command line: ``crc32(0, "hello", 5)->ulong``.

::

    call   = name [ "@" version ] "(" [ value { "," value } ] ")" "->" type

    value  = integer             10, -1, 0x7f; passed in a whole register, so that it serves
                                 for char to unsigned long, and for an address
           | float               1.0, -2.5e-3, inf, nan (double); 1.0f (float)
           | "text"              a pointer to its UTF-8 bytes and a NUL
           | b"bytes"            a pointer to exactly these bytes
           | NULL | true | false
           | out[N]              a pointer to N zero bytes; shown after the call
           | &integer | &float   a pointer to a long (or double, float) that begins as this; shown after it

    type   = void, bool, char, int, uint, long, ulong, size_t, int8 … uint64, float, double, str, ptr
           | what C calls it      uint32_t, unsigned long, const char * (str), struct tm * (ptr)

Texts and bytes know C's escapes (``\\n``, ``\\x1b``, ``\\0``, ``\\"``) and lie in writable memory.
``str`` is a NUL-terminated text.  What a function expects is not known here: 2 goes where integers go, and
only 2.0 where doubles do.  A type without a name here fits none of this: structures by value, long
double, callbacks.  Those are what ``Library.function`` and :mod:`ctypes` are for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from typing import Any, Final, Literal, Protocol

from miniloader.errors import LoadError, SymbolError, UsageError
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.values import dataclass

__all__ = ["TYPES", "Argument", "Call", "HasSymbols", "Outcome", "Written", "parse_call", "run_call"]

#: What a call may return, by name.
TYPES: Final[dict[str, Any]] = {
    "void": None,
    "bool": ctypes.c_bool,
    "char": ctypes.c_byte,
    "int": ctypes.c_int,
    "uint": ctypes.c_uint,
    "long": ctypes.c_long,
    "ulong": ctypes.c_ulong,
    "size_t": ctypes.c_size_t,
    "int8": ctypes.c_int8,
    "uint8": ctypes.c_uint8,
    "int16": ctypes.c_int16,
    "uint16": ctypes.c_uint16,
    "int32": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "str": ctypes.c_void_p,
    "ptr": ctypes.c_void_p,
}

Kind = Literal["long", "double", "float", "bytes", "out", "&long", "&double", "&float"]
Value = int | float | str | bool | None

# An integer of either sign: ctypes takes it modulo 2 to the 64th.
_PLAIN: Final[dict[Kind, Any]] = {"long": ctypes.c_ulong, "double": ctypes.c_double, "float": ctypes.c_float}
_POINTED: Final[dict[Kind, Any]] = {
    "&long": ctypes.c_long,
    "&double": ctypes.c_double,
    "&float": ctypes.c_float,
}
_POINTER_TO: Final[dict[Kind, Kind]] = {"long": "&long", "double": "&double", "float": "&float"}
_NAMED: Final = {"NULL": 0, "true": 1, "false": 0}
_MOST: Final = 1 << 30  # bytes of an output buffer


@dataclass(frozen=True)
class Argument:
    """One value to pass, and its ``text`` as written.  The ``value`` of ``out`` is its size in bytes."""

    text: str
    kind: Kind
    value: int | float | bytes


@dataclass(frozen=True)
class Call:
    """A parsed call; ``result`` is a name of :data:`TYPES`."""

    text: str
    name: str
    version: str | None
    arguments: tuple[Argument, ...]
    result: str


@dataclass(frozen=True)
class Written:
    """What a pointer argument points to after the call: a buffer's bytes, or a variable's value."""

    argument: Argument
    value: bytes | int | float


@dataclass(frozen=True)
class Outcome:
    """What a call returned (``None``: nothing, or a NULL ``str``) and wrote."""

    call: Call
    value: Value
    written: tuple[Written, ...]


# ------------------------------------------------------------------------------------------- parsing
def parse_call(text: str) -> Call:
    """The call that ``text`` describes; :class:`UsageError` shows where it does not follow the grammar.

    >>> call = parse_call('crc32(0, "hello", 5)->ulong')
    >>> call.name, [argument.value for argument in call.arguments], call.result
    ('crc32', [0, b'hello\\x00', 5], 'ulong')
    """
    return _Parser(text).call()


#: What C calls the types that go by another name in TYPES, but for int and its kin.
_C_NAMES: Final = {
    "_Bool": "bool",
    "ssize_t": "long",
    "ptrdiff_t": "long",
    "intptr_t": "long",
    "uintptr_t": "ulong",
    "off_t": "long",
    "off64_t": "int64",
    "time_t": "long",
    "clock_t": "long",
    "pid_t": "int",
    "uid_t": "uint",
    "gid_t": "uint",
    "mode_t": "uint",
    "socklen_t": "uint",
    "wchar_t": "int32",
    **{f"{sign}int{bits}_t": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_OF_INT: Final = {"signed", "unsigned", "short", "long", "char", "int"}
_QUALIFIERS: Final = {"const", "volatile", "restrict", "register", "static", "extern", "inline"}


def _of_c(words: str) -> str:
    """The name in TYPES of the C type that ``words`` spell; UsageError for one that no register holds.

    >>> _of_c("unsigned long int"), _of_c("const char *"), _of_c("struct tm*"), _of_c("uint32_t")
    ('ulong', 'str', 'ptr', 'uint32')
    """
    tokens = [token for token in re.findall(r"\w+|\S", words) if token not in _QUALIFIERS]
    named = " ".join(token for token in tokens if token != "*")
    if "*" in tokens:
        if not named or tokens.index("*") < len(tokens) - tokens.count("*"):
            raise UsageError(f"{words!r} is no type")
        return "str" if tokens == ["char", "*"] else "ptr"
    if (tokens and tokens[0] in ("struct", "union")) or named == "long double":
        raise UsageError(f"{named} is not returned in a register: use ctypes, with Library.function, for it")
    if tokens and tokens[0] == "enum":
        return "uint"
    if tokens and set(tokens) <= _OF_INT:
        return _integer(tokens, words)
    c_type = _C_NAMES.get(named, named)
    if c_type not in TYPES:
        raise UsageError(
            f"expected one of {', '.join(TYPES)}, or what C calls it, such as uint32_t or char *"
        )
    return c_type


def _integer(tokens: list[str], words: str) -> str:
    """The name in TYPES of what ``unsigned``, ``long``, ``int`` and their kin spell together.

    >>> _integer(["long", "unsigned", "long"], "long unsigned long")
    'uint64'
    """
    sizes = sorted(token for token in tokens if token not in ("signed", "unsigned", "int"))
    names = {(): "int", ("short",): "int16", ("char",): "int8", ("long",): "long", ("long", "long"): "int64"}
    signs = [token for token in tokens if token in ("signed", "unsigned")]
    if len(signs) > 1 or tokens.count("int") > 1 or tuple(sizes) not in names:
        raise UsageError(f"{words!r} is no type")
    if tokens == ["char"]:
        return "char"
    return "u" * (signs == ["unsigned"]) + names[tuple(sizes)]


def _number_in(text: str) -> int | None:
    """A decimal or hexadecimal number; None where it has a zero before it, or thousands of digits."""
    try:
        return int(text, 0)
    except ValueError:
        return None


_SPACE: Final = re.compile(r"\s*")
_NAME: Final = re.compile(r"[^\s()@,\"]+")
_STRING: Final = re.compile(r'(b?)"((?:[^"\\]|\\.)*)"', re.DOTALL)
_FLOAT: Final = re.compile(
    r"([-+]?(?:inf|nan|(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+))(f?)(?![\w.])"
)
_INTEGER: Final = re.compile(r"([-+]?)(0[xX][0-9a-fA-F]+|0|[1-9]\d*)(?![\w.])")
_BUFFER: Final = re.compile(r"out\s*\[\s*(0[xX][0-9a-fA-F]+|\d+)\s*\]")
_TYPE: Final = re.compile(r"[\w\s*]+")
_WORD: Final = re.compile(r"[A-Za-z_]\w*")
_ESCAPE: Final = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES: Final = {
    b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v",
    b"\\": b"\\", b'"': b'"', b"'": b"'",
}  # fmt: skip


class _Parser:
    """Reads one call from left to right; ``at`` is how far it has come."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fault(self, why: str, at: int | None = None) -> UsageError:
        """The error to raise: ``why``, and where in the text."""
        place = self.at if at is None else at
        shown = f"{self.text[:place]} <here> {self.text[place:]}".strip()
        return UsageError(f"call: {why}: {shown}", hint='write it like crc32(0, "hello", 5)->ulong')

    def skip(self, sign: str) -> bool:
        """Pass over ``sign``, if it is next."""
        self.take(_SPACE)
        stands = self.text.startswith(sign, self.at)
        self.at += len(sign) if stands else 0
        return stands

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Pass over ``pattern``, if it is next."""
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def call(self) -> Call:
        self.take(_SPACE)
        name, version = self.name("the name of a function"), None
        if self.skip("@"):
            self.skip("@")
            version = self.name("the version of the symbol")
        if not self.skip("("):
            raise self.fault("expected ( and the arguments")
        arguments: list[Argument] = []
        if not self.skip(")"):
            arguments.append(self.argument())
            while self.skip(","):
                arguments.append(self.argument())
            if not self.skip(")"):
                raise self.fault("expected , or )")
        if not self.skip("->"):
            raise self.fault("expected ->TYPE, what it returns")
        return Call(self.text.strip(), name, version, tuple(arguments), self.type())

    def type(self) -> str:
        """The name in :data:`TYPES` of the type that all that is left spells."""
        self.take(_SPACE)
        start, match = self.at, self.take(_TYPE)
        words = match[0].strip() if match else ""
        try:
            result = words if words in TYPES else _of_c(words)
        except UsageError as error:
            raise self.fault(error.message, start) from None
        if self.at != len(self.text):
            raise self.fault("expected nothing more")
        return result

    def name(self, what: str) -> str:
        match = self.take(_NAME)
        if match is None:
            raise self.fault(f"expected {what}")
        return match[0]

    def argument(self) -> Argument:
        self.take(_SPACE)
        start = self.at
        kind, value = self.value()
        return Argument(self.text[start : self.at], kind, value)

    def value(self) -> tuple[Kind, int | float | bytes]:
        start = self.at
        if match := self.take(_STRING):
            data = self.unescape(match[2], match.start(2))
            return "bytes", data if match[1] else data + b"\0"
        if self.text.startswith(('"', 'b"'), self.at):
            raise self.fault("the closing quote is missing")
        if self.text.startswith("'", self.at):
            raise self.fault('texts are written in double quotes, "like this"')
        if self.skip("&"):
            self.take(_SPACE)
            kind, value = self.number()
            return _POINTER_TO[kind], value
        if match := self.take(_BUFFER):
            size = _number_in(match[1])
            if size is None or not 0 < size <= _MOST:
                raise self.fault(f"a buffer has 1 to {_MOST} bytes", start)
            return "out", size
        word = _WORD.match(self.text, self.at)
        if word and word[0] in _NAMED:
            self.at = word.end()
            return "long", _NAMED[word[0]]
        return self.number()

    def number(self) -> tuple[Kind, int | float]:
        start = self.at
        if match := self.take(_FLOAT):
            return ("float" if match[2] else "double"), float(match[1])
        if match := self.take(_INTEGER):
            value = _number_in(match[1] + match[2])
            if value is None or not -(1 << 63) <= value < 1 << 64:
                raise self.fault("an integer has 64 bits", start)
            return "long", value
        raise self.fault('expected a number, a "text", b"bytes", out[N], &NUMBER, NULL, true or false')

    def unescape(self, text: str, start: int) -> bytes:
        def plain(match: re.Match[bytes]) -> bytes:
            code = match[1]
            if code[:1] == b"x" and len(code) == 3:
                return bytes([int(code[1:], 16)])
            if code[:1] in b"01234567" and int(code, 8) < 256:
                return bytes([int(code, 8)])
            if code in _ESCAPES:
                return _ESCAPES[code]
            raise self.fault(f"unknown escape \\{os.fsdecode(code)}", start)

        return _ESCAPE.sub(plain, text.encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------------------------------- calling
class HasSymbols(Protocol):
    """A library in this process, whoever has loaded it, such as :class:`miniloader.loader.Library`."""

    def address(self, name: str, version: str | None = None) -> int:
        """The address of a defined symbol."""


def run_call(library: HasSymbols, call: Call) -> Outcome:
    """Call the function in this thread.

    Raises :class:`~miniloader.errors.SymbolError` when there is no such function, or it is data, and
    :class:`LoadError` when it returns a ``str`` that is not readable.  What else a wrong call does is up to
    the code that is called: it can crash the process.
    """
    address = library.address(call.name, call.version)
    if not any("x" in mapping.protection for mapping in read_maps(start=address, end=address + 1)):
        raise SymbolError(f"{call.name} is no function: the memory at {address:#x} is not executable")
    passed = [_pass(argument) for argument in call.arguments]
    function = ctypes.CFUNCTYPE(TYPES[call.result], *(type(value) for value in passed))(address)
    returned = function(*passed)
    written = tuple(
        Written(argument, _contents(argument, value))
        for argument, value in zip(call.arguments, passed, strict=True)
        if argument.kind == "out" or argument.kind in _POINTED
    )
    return Outcome(call, _value(call, returned), written)


def _pass(argument: Argument) -> Any:
    """The argument as ctypes passes it.  A pointer keeps what it points to alive."""
    kind, value = argument.kind, argument.value
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if kind in _POINTED:
        return ctypes.pointer(_POINTED[kind](value))
    if isinstance(value, bytes):
        return ctypes.pointer(ctypes.create_string_buffer(value, max(len(value), 1)))
    return ctypes.pointer(ctypes.create_string_buffer(int(value)))


def _contents(argument: Argument, pointer: Any) -> bytes | int | float:
    target = pointer.contents
    return bytes(target.raw) if argument.kind == "out" else target.value


def _value(call: Call, returned: Any) -> Value:
    if call.result == "str":
        return None if returned is None else _text(call, returned)
    return 0 if call.result == "ptr" and returned is None else returned


def _text(call: Call, address: int) -> str:
    """The NUL-terminated text at ``address``, read so that a wrong address cannot raise a signal.

    By ``/proc/self/mem``: process_vm_readv(2) pins pages, and so has the kernel copy those that are shared
    since a fork.
    """
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # forbidden here: read it the plain way
        return ctypes.string_at(address).decode("utf-8", "backslashreplace")
    try:
        return b"".join(_pieces(memory, address)).decode("utf-8", "backslashreplace")
    except (OSError, OverflowError):
        raise LoadError(
            f"{call.text}: returned {address:#x}, where no text can be read", hint="is its type str?"
        ) from None
    finally:
        os.close(memory)


def _pieces(memory: int, address: int) -> Iterator[bytes]:
    """The bytes from ``address`` to the first NUL, page by page; OSError or OverflowError where none are."""
    end = b""
    while not end:
        data = os.pread(memory, PAGE_SIZE - address % PAGE_SIZE, address)
        if not data:
            raise OSError(errno.EIO, "no memory any more")
        address += len(data)
        data, end, _ = data.partition(b"\0")
        yield data
