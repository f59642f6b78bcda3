"""The call syntax: what parses to what, what does not, and that calls give what ctypes gives."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import miniloader
from miniloader.errors import LoadError, SymbolError, UsageError
from miniloader.kernel import syscalls
from miniloader.kernel.pagemap import EXCLUSIVE, PRESENT, read_pagemap
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.call import TYPES, Outcome, parse_call, run_call


@pytest.fixture(scope="module")
def libz() -> Iterator[miniloader.Library]:
    """A library whose scope has libc, too."""
    with miniloader.load("libz.so.1") as library:
        yield library


def value(text: str) -> tuple[str, Any]:
    """How one argument parses."""
    (argument,) = parse_call(f"f({text})->void").arguments
    assert argument.text == text
    return argument.kind, argument.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("long", 0)),
        ("-5", ("long", -5)),
        ("+5", ("long", 5)),
        ("0x7F", ("long", 127)),
        ("18446744073709551615", ("long", 2**64 - 1)),
        ("1.5", ("double", 1.5)),
        ("-.5", ("double", -0.5)),
        ("2.", ("double", 2.0)),
        ("1e3", ("double", 1000.0)),
        ("-inf", ("double", -math.inf)),
        ("1.5f", ("float", 1.5)),
        ("NULL", ("long", 0)),
        ("true", ("long", 1)),
        ("false", ("long", 0)),
        ('""', ("bytes", b"\0")),
        ('"a, b) \\"c\\""', ("bytes", b'a, b) "c"\0')),
        (r'"\n\t\\\x1b\0\101\'"', ("bytes", b"\n\t\\\x1b\0A'\0")),
        ('"ä€"', ("bytes", "ä€".encode() + b"\0")),
        (r'b"\xff\x00"', ("bytes", b"\xff\0")),
        ('b""', ("bytes", b"")),
        ("out[32]", ("out", 32)),
        ("out[ 0x10 ]", ("out", 16)),
        ("&64", ("&long", 64)),
        ("&-1.5", ("&double", -1.5)),
        ("& 1.0f", ("&float", 1.0)),
    ],
)
def test_values(text: str, expected: tuple[str, Any]) -> None:
    assert value(text) == expected


def test_not_a_number() -> None:
    kind, number = value("nan")
    assert kind == "double"
    assert math.isnan(number)


@given(st.binary(max_size=40))
def test_any_bytes_can_be_written(data: bytes) -> None:
    assert value('b"' + "".join(f"\\x{byte:02x}" for byte in data) + '"') == ("bytes", data)


@given(st.text(st.characters(exclude_characters='"\\', exclude_categories=("Cs",)), max_size=40))
def test_any_text_can_be_written(text: str) -> None:
    assert value(f'"{text}"') == ("bytes", text.encode() + b"\0")


@given(st.floats(allow_nan=False))
def test_any_double_can_be_written(number: float) -> None:
    assert value(repr(number)) == ("double", number)


def test_the_parts_of_a_call() -> None:
    call = parse_call('  memcpy@@GLIBC_2.14 ( out[4] , "abc",3 ) -> ptr ')
    assert (call.name, call.version, call.result) == ("memcpy", "GLIBC_2.14", "ptr")
    assert [argument.text for argument in call.arguments] == ["out[4]", '"abc"', "3"]
    assert parse_call("_ZN1a1bEv()->int").name == "_ZN1a1bEv"
    assert parse_call("f()->int").arguments == ()


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("", "<here>", "expected the name of a function"),
        ("f", "f <here>", "expected ( and the arguments"),
        ("f(", "f( <here>", "expected a number"),
        ("f(1", "f(1 <here>", "expected , or )"),
        ("f(1,)->int", "f(1, <here> )->int", "expected a number"),
        ("f(1 2)->int", "f(1  <here> 2)->int", "expected , or )"),
        ("f('a')->int", "f( <here> 'a')->int", "double quotes"),
        ('f("a)->int', 'f( <here> "a)->int', "the closing quote is missing"),
        ('f("\\q")->int', 'f(" <here> \\q")->int', "unknown escape \\q"),
        ("f(1)", "f(1) <here>", "expected ->TYPE"),
        ("f(1)->integer", "f(1)-> <here> integer", "expected one of void, bool,"),
        ("f(1)->int;", "f(1)->int <here> ;", "expected nothing more"),
        ("f(01)->int", "f( <here> 01)->int", "expected a number"),
        ("f(18446744073709551616)->int", "f( <here> 18446744073709551616)->int", "64 bits"),
        ("f(out[0])->int", "f( <here> out[0])->int", "a buffer has 1 to"),
        ('f(&"a")->int', 'f(& <here> "a")->int', "expected a number"),
        ("f@(1)->int", "f@ <here> (1)->int", "the version of the symbol"),
    ],
)
def test_what_does_not_parse_is_shown_on_one_line(text: str, where: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_call(text)
    message = str(caught.value)
    assert where in message
    assert why in message
    assert "\n" not in message


@given(st.text(max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_call(text)


def run(library: miniloader.Library, text: str) -> Outcome:
    return run_call(library, parse_call(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('crc32(0, "hello", 5)->ulong', zlib.crc32(b"hello")),
        (r'crc32(0, b"\x00\xff", 2)->ulong', zlib.crc32(b"\0\xff")),
        ("zlibVersion()->str", zlib.ZLIB_RUNTIME_VERSION),
        ('atoi("-7")->int', -7),
        ('atoi("-7")->uint', 2**32 - 7),
        ("abs(-300)->int8", 44),
        ("abs(-300)->uint16", 300),
        ("labs(-9223372036854775807)->long", 2**63 - 1),
        ('strtoull("18446744073709551615", NULL, 10)->uint64', 2**64 - 1),
        ('getenv("MINILOADER_NO_SUCH_VARIABLE")->str', None),
        ('strchr("abc", 122)->ptr', 0),
        ('strlen("äb\\n")->size_t', 4),
        ("toupper(97)->char", 65),
        ("labs(1)->bool", True),
        ("labs(0)->bool", False),
        ('strtod("2.5", NULL)->double', 2.5),
        ('strtof("2.5", NULL)->float', 2.5),
        ("srand(1)->void", None),
        ("ldexp(0.75, 4)->double", 12.0),
    ],
)
def test_results(libz: miniloader.Library, text: str, expected: object) -> None:
    found = run(libz, text).value
    assert found == expected
    assert type(found) is type(expected)


def test_a_text_is_read_where_it_is_and_its_page_stays_what_it_was(libz: miniloader.Library) -> None:
    """It is shared with a child: whoever pins it (process_vm_readv) is given a copy."""
    page = syscalls.mmap(0, PAGE_SIZE, 3, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(page, b"text\0", 5)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        assert run(libz, f"labs({page})->str").value == "text"
        (entry,) = read_pagemap(None, page, page + PAGE_SIZE).tolist()
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)
        syscalls.munmap(page, PAGE_SIZE)
    assert entry & int(PRESENT)
    assert not entry & int(EXCLUSIVE)


def test_output_buffers_and_variables_are_read_after_the_call(libz: miniloader.Library) -> None:
    outcome = run(libz, 'compress(out[64], &64, "hello", 5)->int')
    buffer, length = (written.value for written in outcome.written)
    assert outcome.value == 0
    assert isinstance(buffer, bytes)
    assert isinstance(length, int)
    assert zlib.decompress(buffer[:length]) == b"hello"
    assert buffer[length:] == bytes(64 - length)
    assert [written.argument.text for written in outcome.written] == ["out[64]", "&64"]
    assert [written.value for written in run(libz, "modf(-3.5, &0.0)->double").written] == [-3.0]
    assert [written.value for written in run(libz, "modff(-3.5f, &0.0f)->float").written] == [-3.0]


def test_floats_and_many_arguments_arrive_where_the_abi_wants_them(libz: miniloader.Library) -> None:
    form, values = "%d %s %.2f %ld %g %g %g %x %d %d", '-5, "x", 2.5, -1, 1.0, 2.0, 3.0, 255, 8, 9'
    (written,) = run(libz, f'snprintf(out[99], 99, "{form}", {values})->int').written
    assert isinstance(written.value, bytes)
    assert written.value.rstrip(b"\0") == b"-5 x 2.50 -1 1 2 3 ff 8 9"


def test_a_digest() -> None:
    with miniloader.load("libcrypto.so.3") as library:
        (written,) = run(library, 'SHA256("abc", 3, out[32])->ptr').written
    assert written.value == hashlib.sha256(b"abc").digest()


def test_a_version_is_looked_up(libz: miniloader.Library) -> None:
    old, new = (libz.address("memcpy", version) for version in ("GLIBC_2.2.5", "GLIBC_2.14"))
    assert old != new
    assert run(libz, 'memcpy@GLIBC_2.2.5(out[4], "abc", 4)->ptr').written[0].value == b"abc\0"
    with pytest.raises(SymbolError, match="version GLIBC_0"):
        run(libz, "memcpy@GLIBC_0()->int")


def test_data_is_not_called() -> None:
    with miniloader.load("libm.so.6") as libm, pytest.raises(SymbolError, match="signgam is no function"):
        run(libm, "signgam()->int")


def test_a_text_that_is_not_there_is_an_error_and_no_crash(libz: miniloader.Library) -> None:
    with pytest.raises(LoadError, match="returned 0x2a, where no text can be read"):
        run(libz, "labs(42)->str")


def test_a_text_may_end_at_the_end_of_what_is_mapped(libz: miniloader.Library) -> None:
    import mmap

    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
        assert libc.mprotect(start + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
        memory[mmap.PAGESIZE - 4 : mmap.PAGESIZE] = b"end\0"
        try:
            assert run(libz, f"labs({start + mmap.PAGESIZE - 4})->str").value == "end"
        finally:
            assert libc.mprotect(start + mmap.PAGESIZE, mmap.PAGESIZE, 3) == 0


def test_every_type_can_be_returned(libz: miniloader.Library) -> None:
    for name in TYPES.keys() - {"str", "float", "double"}:
        found = run(libz, f"labs(1)->{name}").value
        assert found == (None if name == "void" else 1)


@pytest.mark.parametrize(
    ("words", "result"),
    [
        ("unsigned long", "ulong"),
        ("long unsigned int", "ulong"),
        ("unsigned", "uint"),
        ("long long", "int64"),
        ("unsigned char", "uint8"),
        ("signed char", "int8"),
        ("short int", "int16"),
        ("uint32_t", "uint32"),
        ("size_t", "size_t"),
        ("const char *", "str"),
        ("char*", "str"),
        ("char **", "ptr"),
        ("const struct tm *", "ptr"),
        ("void *", "ptr"),
        ("enum color", "uint"),
    ],
)
def test_types_are_called_as_in_c(words: str, result: str) -> None:
    assert parse_call(f"f()->{words}").result == result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("struct tm", "struct tm is not returned in a register: use ctypes"),
        ("long double", "long double is not returned in a register"),
        ("union u", "union u is not returned in a register"),
        ("long char", "'long char' is no type"),
        ("unsigned unsigned", "'unsigned unsigned' is no type"),
        ("* char", "is no type"),
        ("colour", "expected one of void, bool"),
        ("int) x", "expected nothing more"),
    ],
)
def test_what_no_register_holds_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_call(f"f()->{words}")
