"""Lazy binding: PLT slots that are left until their function is first called."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.elf.dynamic import DT_SYMTAB
from miniloader.kernel.cpuinfo import features
from miniloader.loader.policy import Binding
from miniloader.machine.relocation import KINDS
from miniloader.native.gate import processor
from tests.loader.conftest import InChild

JUMP_SLOT = next(
    code for code, kind in KINDS[processor().upper()].items() if kind.name.endswith("_JUMP_SLOT")
)


def _slots(library: miniloader.Library) -> dict[str, int]:
    """What the PLT's slots hold now, by the name of their function."""
    table = next(table for table in library.image.relocations.tables if table.name == "DT_JMPREL")
    rows = table.rows[table.rows["type"] == JUMP_SLOT]
    held = {
        library.image.symbols.name(int(row["symbol"])): ctypes.c_uint64.from_address(
            library.base + int(row["offset"])
        ).value
        for row in rows
    }
    assert held
    return held


def test_slots_lead_into_the_plt_until_called(fixture_library: Callable[[str], Path]) -> None:
    with miniloader.load(fixture_library("lazy"), bind="lazy") as library:
        inside = range(library.base + library.plan.start, library.base + library.plan.end)
        before = _slots(library)
        assert all(address in inside for address in before.values())
        assert all(address != library.address("own") for address in before.values())

        assert library.function("call_strlen", ctypes.c_ulong, [ctypes.c_char_p])(b"hello") == 5
        after = _slots(library)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"strlen"}
        # What dlsym finds, an IFUNC resolved, is what the slot holds now.
        host = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        assert after["strlen"] == host

        assert library.function("call_own", ctypes.c_int, [ctypes.c_int])(3) == 4
        assert _slots(library)["own"] == library.address("own")


@pytest.mark.parametrize("known", [None, frozenset({"xsave"}), frozenset({"sse2"})], ids=str)
def test_arguments_survive_the_first_call(
    fixture_library: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, known: frozenset[str] | None
) -> None:
    """Floating point arguments are in registers that Python uses, too: first and second call agree.

    Also on a processor without XSAVE, as virtual machines are often given.
    """
    if (known is None or "xsave" in known) and "xsave" not in (features() or {"xsave"}):
        pytest.skip("this machine lacks XSAVE")
    monkeypatch.setattr("miniloader.loader.lazy_binding.features", lambda: known)
    with miniloader.load(fixture_library("lazy"), bind="lazy") as library:
        scaled = library.function("call_scaled", ctypes.c_double, [ctypes.c_double] * 3)
        assert scaled(1.5, 2.25, 3.125) == scaled(1.5, 2.25, 3.125) == 150 + 22.5 + 3.125


def test_bound_at_once_all_slots_hold_their_function(fixture_library: Callable[[str], Path]) -> None:
    with miniloader.load(fixture_library("lazy")) as library:
        held = _slots(library)
        assert held["own"] == library.address("own")
        inside = range(library.base + library.plan.start, library.base + library.plan.end)
        assert {name for name, address in held.items() if address in inside} == {"own", "scaled"}


def test_a_library_linked_to_be_bound_at_once_is(fixture_library: Callable[[str], Path]) -> None:
    with miniloader.load(fixture_library("chain_a"), bind="lazy") as library:
        assert library.image.dynamic.bind_now
        assert _slots(library)["chain_b"] == library.address("chain_b")


def test_an_undefined_function_ends_the_program_as_in_ld_so(
    fixture_library: Callable[[str], Path], tmp_path: Path
) -> None:
    """There is nobody to raise to: the caller is machine code."""
    library = tmp_path / "libmissing.so"
    data = bytearray(fixture_library("lazy").read_bytes())
    image = miniloader.inspect(fixture_library("lazy"))
    symbols = image.symbols
    index = next(index for index in range(len(symbols)) if symbols.name(index) == "strlen")
    row = image.file_offset(image.dynamic.tags[DT_SYMTAB] + 24 * index)
    assert row is not None
    data[row : row + 4] = (int(symbols.rows["name"][index]) + 1).to_bytes(4, "little")
    library.write_bytes(data)
    path, root = str(library), Path(miniloader.__file__).parents[1]

    def dies(load: str) -> tuple[int, str, str]:
        program = (
            "import ctypes, io, sys, miniloader\n"
            f"lib = {load}\n"
            "sys.stderr = io.StringIO()\n"  # which ld.so does not know of
            "print(lib.call_own(1), flush=True)\n"
            "lib.call_strlen(b'1')\n"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    theirs = dies(f"ctypes.CDLL({path!r}, 1)")
    assert theirs[:2] == (127, "2\n")
    assert f"symbol lookup error: {library}: undefined symbol: trlen" in theirs[2]
    assert dies(f"miniloader.load({path!r}, bind='lazy')") == theirs


# ---------------------------------------------------------------------------- what is closed meanwhile
_FUNCTION = "int f(void) { return 42; }"
_RESOLVED = "static int real(void) { return 42; }\nvoid *pick(void) { return real; }\n" + (
    'int f(void) __attribute__((ifunc("pick")));'
)


def linked(output: Path, source: str, *options: str | Path) -> Path:
    """A library of this source, whose PLT may be bound lazily."""
    written = output.with_suffix(".c")
    written.write_text(source)
    given = ["-Wl,-z,lazy,-rpath,$ORIGIN", f"-Wl,-soname,{output.name}", *options]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", written, "-o", output, *given], check=True)
    return output


@pytest.mark.parametrize("bind", ["now", "lazy"])
@pytest.mark.parametrize("source", [_FUNCTION, _RESOLVED], ids=["function", "IFUNC"])
def test_what_a_slot_is_bound_to_stays(in_child: InChild, tmp_path: Path, bind: Binding, source: str) -> None:
    """Also without being needed: libr needs both, liba calls libb without naming it."""
    b = linked(tmp_path / "libb.so", source)
    a = linked(tmp_path / "liba.so", "int f(void); int a(void) { return f() + 1; }")
    r = linked(tmp_path / "libr.so", "int a(void); int r(void) { return a(); }", "-Wl,--no-as-needed", a, b)

    def work() -> tuple[int, int]:
        root = miniloader.load(r, bind=bind)
        first = root.function("r")()
        held = miniloader.load(a, bind=bind)
        root.close()
        return first, held.function("a")()

    assert in_child(work) == (43, 43)


@pytest.mark.parametrize("bind", ["now", "lazy"])
def test_a_slot_is_bound_after_another_library_has_gone(
    in_child: InChild, tmp_path: Path, bind: Binding
) -> None:
    """It was in the scope when the slots were made; glibc looks only in what is left, too."""
    source = "#include <stdlib.h>\nint a(int x) { return labs(x); }\nint own(void) { return 7; }\n"
    a = linked(tmp_path / "liba.so", source + "int other(void) { return own(); }")
    r = linked(tmp_path / "libr.so", "int a(int); int r(int x) { return a(x); }", a)

    def work() -> tuple[int, int]:
        root = miniloader.load(r, bind=bind)
        held = miniloader.load(a, bind=bind)
        root.close()
        return held.function("a")(-5), held.function("other")()

    assert in_child(work) == (5, 7)


def test_a_library_that_exports_nothing_binds_what_it_needs(tmp_path: Path, in_child: InChild) -> None:
    """Its hash table reaches no symbol: only the slots say how many there are."""
    source, library = tmp_path / "silent.c", tmp_path / "libsilent.so"
    source.write_text(
        "#include <stdlib.h>\n"
        '__attribute__((constructor)) static void begin(void) { setenv("SILENT", "heard", 1); }\n'
    )
    options = ["-shared", "-fPIC", "-nostartfiles", "-Wl,-z,lazy", "-Wl,--hash-style=gnu"]
    subprocess.run(["gcc", *options, source, "-o", library], check=True)

    def heard() -> bytes:
        with miniloader.load(library, bind="lazy"):
            getenv = ctypes.CDLL(None).getenv
            getenv.restype = ctypes.c_char_p
            return getenv(b"SILENT")  # type: ignore[no-any-return]

    assert in_child(heard) == b"heard"


_OURS = "import miniloader; kept = miniloader.load({!r}, bind='lazy')"
_THEIRS = "import ctypes, os; kept = ctypes.CDLL({!r}, os.RTLD_LAZY)"


def test_a_destructor_at_exit_calls_what_nobody_has_called_yet(tmp_path: Path) -> None:
    """Python has gone by then; a function that there is not, and that nobody calls, does no harm."""
    library = linked(
        tmp_path / "libbye.so",
        "#include <stdio.h>\nint missing(void);\nint never(void) { return missing(); }\n"
        '__attribute__((destructor)) static void bye(void) { dprintf(1, "bye\\n"); }\n',
    )
    for program in (_THEIRS, _OURS):
        command = [sys.executable, "-c", program.format(str(library))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")
