"""Names that are looked up in Python, as on a processor without loops, are bound as the loops bind them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fixtures import build
from miniloader.elf.symbols import SymbolTable, SysvHash
from miniloader.lab.check.check import Checker
from miniloader.lab.check.names import NamesInPython, definitions_of, is_defined
from miniloader.lab.check.shared_object import SharedObject, Shelf
from miniloader.loader.root import Root
from miniloader.native import Reason, Stopped

FIXTURES = (
    *("demo", "demo_relr", "demo_sysv_hash", "demo_gnu_hash", "demo_no_sections"),
    *("symbols", "versions", "references", "ifunc", "unique", "streams", "tls_user", "relocations"),
)


def in_python(item: SharedObject) -> NamesInPython:
    return NamesInPython(item.reopened().symbols, item.rows)


def assert_bound_alike(scope: Sequence[SharedObject]) -> int:
    """Look every symbol up in every way, by the loops and in Python; how many had an owner."""
    loops, python = [item.names for item in scope], [in_python(item) for item in scope]
    owned = 0
    for place, item in enumerate(scope):
        wanted = np.arange(len(item.rows))
        for versioned, plt_entries, home in itertools.product((True, False), (True, False), (place, None)):
            how = {"versioned": versioned, "plt_entries": plt_entries}
            expected = definitions_of(loops[place], wanted, loops, home, **how)
            rows = definitions_of(python[place], wanted, python, home, **how)
            assert np.flatnonzero(rows != expected).tolist() == [], (item.path, how, home)
            owned += int((rows["owner"] >= 0).sum())
    return owned


@pytest.mark.parametrize("program", ["python3", "ls"])
def test_programs_and_all_they_need(program: str) -> None:
    path = os.path.realpath(f"/usr/bin/{program}")
    if not os.path.exists(path):
        pytest.skip(f"this machine lacks {program}")
    assert assert_bound_alike(Checker().situation(path).scope) > 1000


def test_fixtures_and_libraries_of_other_machines() -> None:
    shelf = Shelf(Root("/"))
    for name in FIXTURES:
        assert assert_bound_alike(
            [shelf.take(str(build.build(name))), shelf.take(str(build.build("symbols")))]
        )
    for how in build.MACHINES.values():
        assert assert_bound_alike([shelf.take(str(how.prebuilt))])


def test_a_name_is_defined_or_not() -> None:
    item = Shelf(Root("/")).take(str(build.build("symbols")))
    texts = {item.names.name(symbol) for symbol in range(1, len(item.rows))} | {b"no_such_name", b""}
    defined = {text for text in texts if is_defined(item.names, text)}
    assert defined
    assert {text for text in texts if is_defined(in_python(item), text)} == defined


def test_a_chain_that_goes_in_a_circle_ends() -> None:
    item = Shelf(Root("/")).take(str(build.build("demo_sysv_hash")))
    symbols: SymbolTable = item.reopened().symbols
    table = symbols.hash
    assert isinstance(table, SysvHash)
    first = int(table.buckets[table.buckets > 0][0])
    chains = table.chains.copy()
    chains[first] = first
    names = NamesInPython(replace(symbols, hash=SysvHash(table.buckets, chains)), item.rows)
    with pytest.raises(Stopped) as stopped:
        is_defined(names, b"demo_add")
    assert stopped.value.reason is Reason.TOO_MUCH


def test_a_symbol_that_there_is_not() -> None:
    names = in_python(Shelf(Root("/")).take(str(build.build("demo"))))
    with pytest.raises(Stopped) as stopped:
        definitions_of(names, np.array([len(names)]), [names], 0)
    assert stopped.value.reason is Reason.NO_TABLE
