"""A program at a fixed address that has PLT entries for functions: what ld.so binds others to, and we."""

from __future__ import annotations

import subprocess
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.symbols import SHN_UNDEF, SymbolTable
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.memory import Memory, map_plan
from miniloader.loader.scope import Bindings, bind
from miniloader.loader.spans import open_names, readable
from miniloader.loader.symbol_lookup import MappedSymbols

_SOURCES = {
    "given.c": "int given(int n) { return n + 1; }\nint other(int n) { return n + 2; }\n",
    "user.c": """
        int given(int), other(int);
        int (*pointer)(int) = given;
        int (*address(void))(int) { return given; }
        int (*another(void))(int) { return other; }
        int call(int n) { return given(n) + other(n); }
    """,
    "program.c": """
        #include <dlfcn.h>
        #include <stdio.h>
        int given(int);
        int main(int argc, char **argv) {
            int (*volatile entry)(int) = given; /* an address in the code, known when it is linked */
            void *user = dlopen(argv[1], RTLD_NOW);
            unsigned long *pointer = dlsym(user, "pointer"), (*address)(void) = dlsym(user, "address");
            printf("%lu %lu\\n", *pointer, address());
            return entry(1) != 2;
        }
    """,
}


@dataclass(frozen=True)
class At:
    """A library as it would be in a process."""

    name: str
    bias: int
    image: ElfImage
    names: MappedSymbols
    build_id: str | None = None

    @property
    def symbols(self) -> SymbolTable:
        return self.image.symbols


@pytest.fixture
def at(built: Path) -> Iterator[Callable[[str, int], At]]:
    """A library whose bytes are mapped somewhere, and that is said to lie at a bias."""
    mapped: list[Memory] = []

    def make(name: str, bias: int) -> At:
        image = read_image(Source.open(built / name))
        mapped.append(map_plan(image.plan(PAGE_SIZE), image.source))
        return At(name, bias, image, open_names(image, readable(image, mapped[-1].plan), mapped[-1].bias))

    yield make
    for memory in mapped:
        memory.unmap()


def number(table: SymbolTable, name: str) -> int:
    return table.names(np.arange(len(table))).index(name.encode())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("entries")
    for name, text in _SOURCES.items():
        (directory / name).write_text(text)
    with_given = ["-L.", "-lgiven", "-Wl,-rpath,$ORIGIN"]
    for command in (
        ["-shared", "-fPIC", "given.c", "-o", "libgiven.so"],
        ["-shared", "-fPIC", "-O1", "user.c", "-o", "libuser.so", *with_given],
        ["-no-pie", "-fno-pie", "program.c", "-o", "program", *with_given],
    ):
        subprocess.run(["gcc", *command], cwd=directory, check=True)
    return directory


def test_only_calls_go_past_the_entry(built: Path, at: Callable[[str, int], At]) -> None:
    command = [built / "program", built / "libuser.so"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (entry,) = set(map(int, printed.split()))  # ld.so has bound the pointer and the address to the same

    high = 0x7000_0000_0000
    program, user, given = at("program", 0), at("libuser.so", 1), at("libgiven.so", high)
    rows = given.symbols.rows
    function, other = (rows["value"][number(given.symbols, name)] for name in ("given", "other"))
    index = number(program.symbols, "given")
    assert program.symbols.rows[["shndx", "value"]][index].item() == (SHN_UNDEF, entry)

    symbols = [number(user.symbols, name) for name in ("given", "other")]
    wanted = array("q", sorted(symbols))

    def bound(bindings: Bindings, *, call: bool = False) -> list[int]:
        places, addresses = bindings.places(call=call), bindings.addresses()
        return [addresses[places[symbol]] for symbol in symbols]

    for scope, own in (([program, user, given], 1), ([user, program, given], 0)):
        bindings = bind(wanted, scope, own)
        assert bound(bindings) == [entry, high + other]
        assert bound(bindings, call=True) == [high + function, high + other]
    # An earlier library's own definition comes first, as for everything else.
    assert bound(bind(wanted, [given, program, user], 2)) == [high + function, high + other]
