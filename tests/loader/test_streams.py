"""libstdc++ at work inside our mapping, and exceptions across its edge: all as through dlopen."""

from __future__ import annotations

import ctypes
import locale
import os
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import pytest

import miniloader
from tests.loader.test_results import Api, InChild, both

ROOT = Path(miniloader.__file__).parents[1]


@pytest.fixture(scope="module")
def streams(fixture_library: Callable[[str], Path]) -> str:
    return str(fixture_library("streams"))


def text(api: Api, name: str, *arguments: Any, types: tuple[Any, ...]) -> str:
    """What a function of the fixture writes into the buffer that it is given last."""
    out = ctypes.create_string_buffer(500)
    length = api(name, c_int, *types, c_char_p, c_int)(*arguments, out, len(out))
    assert length == len(out.value)
    return out.value.decode("utf-8", "replace")


def test_streams_format_and_parse(in_child: InChild, streams: str) -> None:
    def work(api: Api) -> list[str]:
        numbers = (c_double, c_long)
        return [
            text(api, "format_numbers", 1234567.875, 7654321, types=numbers),
            text(api, "format_numbers", float("-inf"), 0, types=numbers),
            text(api, "format_numbers", 5e-324, -1, types=numbers),
            text(api, "parse_numbers", b"2.5 ff word  and the rest", types=(c_char_p,)),
            text(api, "parse_numbers", b"no number", types=(c_char_p,)),
            text(api, "match_words", b"one-1, two-22; three 3 four-4", types=(c_char_p,)),
        ]

    found = both(in_child, streams, work)
    assert found[0].startswith("1234567.875 1.235e+06 0x1.2d687ep+20 0x74cbb1 ")
    assert found[0].endswith(" *****7654321 true 1.234.567,875 7.654.321")
    assert found[3:] == ["2.5|255|word|  and the rest|10", "0|0|||01", "1one;22two;4four;"]


def test_locales(in_child: InChild, streams: str) -> None:
    names = ("C", "POSIX", "C.UTF-8", "de_DE.UTF-8", "no_such_locale")

    def work(api: Api) -> list[str]:
        locale.setlocale(locale.LC_ALL, "C")
        return [text(api, "locale_facts", name.encode(), types=(c_char_p,)) for name in names]

    found = both(in_child, streams, work)
    assert found[0] == "C . true -1 1 1 Monday 23 November 2026"
    assert found[-1] == "?"


def test_what_libstdcxx_throws_is_caught(in_child: InChild, streams: str) -> None:
    def work(api: Api) -> list[int]:
        catch = api("catch_what", c_int, c_int)
        return [catch(which) for which in range(6)]

    assert both(in_child, streams, work) == [0, 101, 102, 103, 44, 105]


@pytest.mark.parametrize("thrower", ["ours", "host"])
@pytest.mark.parametrize("catcher", ["ours", "host"])
def test_exceptions_cross_the_edge(in_child: InChild, streams: str, thrower: str, catcher: str) -> None:
    """From our mapping into code that ld.so loaded, the other way, and through our own."""

    def work() -> list[int]:
        apis = {who: Api(streams, ours=who == "ours") for who in (thrower, catcher)}
        throw = ctypes.cast(apis[thrower]("throw_number", None, c_int), c_void_p)
        catch = apis[catcher]("call_and_catch", c_int, c_void_p, c_int)
        return [catch(throw, number) for number in (7, 0, -3)]

    assert in_child(work) == [7, -1, -3]


def test_both_use_one_cout(streams: str) -> None:
    """The stream object is libstdc++'s, of which a process has one: what is said comes in order."""
    program = (
        "import ctypes, sys, miniloader\n"
        "theirs = ctypes.CDLL(sys.argv[1])\n"
        "with miniloader.load(sys.argv[1]) as ours:\n"
        "    say = ours.function('say', None, [ctypes.c_char_p])\n"
        "    for number in range(3):\n"
        "        say(b'ours %d' % number)\n"
        "        theirs.say(b'theirs %d' % number)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, streams],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.stdout.split("\n") == [
        f"{who} {number}" for number in range(3) for who in ("ours", "theirs")
    ] + [""]
