"""A program at a fixed address that has PLT entries for functions: what ld.so binds others to, and we."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from miniloader.elf import Source, read_image
from miniloader.elf.symbols import SHN_UNDEF, SymbolTable
from miniloader.loader.scope import bind

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
    symbols: SymbolTable
    build_id: str | None = None


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


def test_only_calls_go_past_the_entry(built: Path) -> None:
    command = [built / "program", built / "libuser.so"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (entry,) = set(map(int, printed.split()))  # ld.so has bound the pointer and the address to the same

    program, user, given = (
        read_image(Source.open(built / name)).symbols for name in ("program", "libuser.so", "libgiven.so")
    )
    function = given.rows["value"][number(given, "given")]
    other = given.rows["value"][number(given, "other")]
    index = number(program, "given")
    assert program.rows[["shndx", "value"]][index].item() == (SHN_UNDEF, entry)

    high = 0x7000_0000_0000
    wanted = np.sort([number(user, "given"), number(user, "other")])
    for scope, own in (
        ([At("program", 0, program), At("user", 1, user), At("given", high, given)], 1),
        ([At("user", 1, user), At("program", 0, program), At("given", high, given)], 0),
    ):
        bindings = bind(user, wanted, scope, own)
        addresses = bindings.addresses()
        symbols = np.array([number(user, "given"), number(user, "other")], np.uint32)
        assert addresses[bindings.place(symbols)].tolist() == [entry, high + other]
        assert addresses[bindings.place(symbols, call=True)].tolist() == [high + function, high + other]
    # An earlier library's own definition comes first, as for everything else.
    earlier = [At("given", high, given), At("program", 0, program), At("user", 1, user)]
    bindings = bind(user, wanted, earlier, 2)
    assert bindings.addresses()[bindings.place(symbols)].tolist() == [high + function, high + other]
