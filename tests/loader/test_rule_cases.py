"""Trees that differed from ld.so once, each cut down to what it takes: see tests/oracle/rules.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.oracle.rule_library import Definition, NewLibrary, Reference, letters
from tests.oracle.rule_trees import Call, RuleTree
from tests.oracle.rules import Host

NOW, LAZY = os.RTLD_NOW, os.RTLD_LAZY
NODELETE: Final = 0x8


def refers(symbols: str) -> tuple[Reference, ...]:
    return tuple(map(Reference, symbols))


def needs(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple(("needed", name) for name in names)


def opens(*names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, NOW) for name in names)


def version(symbol: str, number: str, file: str) -> Reference:
    return Reference(symbol, number, file)


CASES: Final[dict[str, tuple[dict[str, NewLibrary], list[Call]]]] = {
    "a version is needed of a library by the name that it was asked for, not its SONAME": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so"), refers=(version("s", "2", "./b.so"),)),
            "b.so": NewLibrary("B", soname="libb.so", defines=letters("s", "1"), versions="1"),
        },
        [Call("./a.so")],
    ),
    "dlsym finds the base version, though it is hidden": (
        {"a.so": NewLibrary("A", defines=(Definition("s", "", True),), versions="1")},
        [Call("./a.so"), Call(None)],
    ),
    "of two that are called so, the filtee is first, since it comes before its filter": (
        {
            "a.so": NewLibrary("A", needs=needs("b/libq.so", "./c.so"), refers=refers("s")),
            "b/libq.so": NewLibrary(
                "B", soname="libp.so", needs=(("filter", "./d.so"),), defines=letters("s")
            ),
            "c.so": NewLibrary("C", needs=needs("libp.so")),
            "d.so": NewLibrary("D", soname="libp.so", needs=needs("./c.so"), refers=refers("s")),
        },
        [Call("./a.so"), Call(None)],
    ),
    "a filtee stays where a load has moved it, though that fails": (
        {
            "a.so": NewLibrary("A", needs=(("auxiliary", "./b.so"),)),
            "b.so": NewLibrary("B", needs=needs("./a.so")),
            "c.so": NewLibrary("C", needs=needs("./d.so", "./e.so")),
            "d.so": NewLibrary("D", needs=(("filter", "./b.so"),)),
            "e.so": NewLibrary("E", needs=(("filter", "./gone.so"),)),
        },
        [Call("./a.so"), Call("./c.so")],
    ),
    "no constructor sees that what it is of becomes global": (
        {
            "a.so": NewLibrary("A", defines=letters("s"), opens=opens("./b.so")),
            "b.so": NewLibrary("B", refers=refers("s")),
            "c.so": NewLibrary("C", refers=refers("s")),
        },
        [Call("./a.so", NOW | os.RTLD_GLOBAL), Call("./c.so")],
    ),
    "what a constructor opens is initialised, though its turn would come later": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so", "./c.so")),
            "b.so": NewLibrary("B", needs=needs("./d.so")),
            "c.so": NewLibrary("C", opens=opens("./b.so", "./e.so"), closes=True),
            "d.so": NewLibrary("D"),
            "e.so": NewLibrary("E", needs=needs("./a.so")),
        },
        [Call("./a.so"), Call(None)],
    ),
    "what a constructor opens may need what waits": (
        {
            "a.so": NewLibrary("A", needs=needs("./c.so", "./b.so")),
            "b.so": NewLibrary("B", needs=needs("./d.so")),
            "c.so": NewLibrary("C", opens=opens("./e.so")),
            "d.so": NewLibrary("D", needs=needs("./c.so")),
            "e.so": NewLibrary("E", needs=needs("./d.so")),
        },
        [Call("./a.so"), Call(None)],
    ),
    "what the kernel gives can be needed, and asked for": (
        {"a.so": NewLibrary("A", needs=needs("linux-vdso.so.1"), refers=refers("s"))},
        [Call("./a.so"), Call("linux-vdso.so.1"), Call("linux-vdso.so.1", NOW | os.RTLD_NOLOAD)],
    ),
    "lazy and now together are lazy": (
        {"a.so": NewLibrary("A", unbound=True)},
        [Call("./a.so", LAZY | NOW), Call("./a.so", LAZY)],
    ),
    "what was asked for first comes before DT_SYMBOLIC where it is bound deeply": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so"), defines=letters("s")),
            "b.so": NewLibrary("B", defines=letters("s"), refers=refers("s"), symbolic=True),
        },
        [Call("./a.so", NOW | os.RTLD_DEEPBIND), Call(None)],
    ),
    "what loses nobody who has asked for it sees all as before": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so")),
            "b.so": NewLibrary("B", needs=needs("./c.so")),
            "c.so": NewLibrary("C", needs=needs("./d.so")),
            "d.so": NewLibrary("D", defines=letters("s")),
        },
        [Call("./a.so"), Call("./d.so"), Call(None, number=1), Call("./b.so")],
    ),
    "what outlives who loaded it sees only what it needs itself": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so")),
            "b.so": NewLibrary("B", needs=needs("./c.so"), flags_1=NODELETE),
            "c.so": NewLibrary("C", needs=needs("./d.so")),
            "d.so": NewLibrary("D", defines=letters("s")),
        },
        [Call("./a.so"), Call(None, number=0), Call("./b.so"), Call(None, number=2)],
    ),
    "a library is called as it was asked for while what it needs is found": (
        {
            "a/x.so": NewLibrary("A", defines=letters("s")),
            "b/x.so": NewLibrary("B", needs=needs("x.so"), rpath="a", refers=refers("s")),
        },
        [Call("x.so"), Call(None), Call("a/x.so")],
    ),
    "what two libraries were bound to counts in the order of relocations": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so", "./c.so"), refers=refers("s")),
            "b.so": NewLibrary("B", defines=letters("u"), refers=refers("s")),
            "c.so": NewLibrary("C", needs=needs("./d.so"), defines=letters("st")),
            "d.so": NewLibrary("D", needs=needs("./e.so"), refers=refers("stu")),
            "e.so": NewLibrary("E", refers=refers("tu")),
        },
        [Call("./a.so"), Call(None)],
    ),
    "what waits for its constructors sees nothing of who is opened meanwhile, and outlives that unchanged": (
        {
            "f.so": NewLibrary("F", needs=needs("./c.so"), defines=letters("suv")),
            "c.so": NewLibrary("C", needs=needs("./g.so"), refers=refers("su")),
            "g.so": NewLibrary(
                "G",
                needs=needs("./d.so", "./c.so"),
                refers=refers("sv"),
                opens=opens("./b.so"),
                closes_at_once=True,
            ),
            "d.so": NewLibrary("D", needs=needs("./g.so"), refers=refers("u")),
            "b.so": NewLibrary("B", needs=needs("./g.so")),
        },
        [Call("./f.so"), Call("./d.so"), Call(None, number=1), Call(None, number=0)],
    ),
    "a filtee comes right before its filter again when that is opened by itself": (
        {
            "a.so": NewLibrary("A", needs=needs("./f.so")),
            "f.so": NewLibrary("F", needs=needs("./e.so"), opens=opens("./c.so")),
            "e.so": NewLibrary("E", needs=(("auxiliary", "./l.so"),)),
            "l.so": NewLibrary("L", needs=needs("./c.so")),
            "c.so": NewLibrary("C", needs=needs("./b.so"), opens=opens("./e.so")),
            "b.so": NewLibrary("B", needs=needs("./f.so"), opens=opens("./d.so"), closes_at_once=True),
            "d.so": NewLibrary("D", needs=(("auxiliary", "./l.so"),)),
        },
        [Call("./a.so")],
    ),
    "what is never unmapped need not be held": (
        {
            "a.so": NewLibrary("A", needs=needs("./b.so", "./c.so")),
            "b.so": NewLibrary("B", defines=letters("s"), refers=refers("u"), flags_1=NODELETE),
            "c.so": NewLibrary("C", defines=letters("u"), refers=refers("s")),
        },
        [Call("./a.so"), Call(None)],
    ),
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    started = Host(library_path="b")
    yield started
    started.close()


@pytest.mark.parametrize("name", CASES)
def test_case(host: Host, tmp_path: Path, name: str) -> None:
    libraries, calls = CASES[name]
    made = RuleTree(tuple(libraries.items()), (), (), (), tuple(calls)).write(tmp_path)
    theirs, ours = host.answers(tmp_path, made)
    assert theirs[0] in ("loaded", "refused"), theirs
    assert ours[:2] == theirs[:2], (theirs, ours)
