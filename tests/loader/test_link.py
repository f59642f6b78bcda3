"""What real libraries do not show: our own, called through our mapping and through dlopen's."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from ctypes import c_int, c_void_p
from pathlib import Path

import numpy as np
import pytest

import miniloader
from fixtures import build
from miniloader.elf.symbols import SHN_ABS
from tests.loader.test_results import Api, InChild, both


@pytest.fixture
def path(request: pytest.FixtureRequest, fixture_library: Callable[[str], Path]) -> str:
    """The fixture that the test is parametrised with."""
    return str(fixture_library(request.param))


def of(*names: str) -> pytest.MarkDecorator:
    """The test's ``path`` is that of each fixture named."""
    return pytest.mark.parametrize("path", names, indirect=True)


def results(in_child: InChild, path: str, *names: str) -> list[int]:
    """What these functions without arguments return, the same with either loader."""
    found: list[int] = both(in_child, path, lambda api: [api(name, c_int)() for name in names])
    return found


# ------------------------------------------------------------------------------- symbols and versions
@of("symbols")
def test_every_binding_and_visibility(in_child: InChild, path: str) -> None:
    names = (
        "weak_function",
        "protected_function",
        "aliased",
        "call_all",
        "absent_is_null",
        "read_interposable",
    )
    assert results(in_child, path, *names) == [3, 5, 6, 18, 1, 7]
    assert results(in_child, path, "read_pointers") == [12 + 13]  # one of them lies unaligned


@of("symbols")
def test_hidden_and_local_symbols_are_not_found(path: str) -> None:
    with miniloader.load(path) as library:
        for name in ("hidden_function", "local_function", "absent_function", "absent_object"):
            with pytest.raises(miniloader.SymbolError, match=f"no symbol {name}"):
                library.address(name)


@of("symbols")
def test_absolute_symbols_do_not_move(in_child: InChild, path: str) -> None:
    def work(api: Api) -> tuple[int, int]:
        pointer = ctypes.cast(api("absolute_pointer", c_int), c_void_p).value
        assert pointer is not None
        absolute = ctypes.cast(api("absolute_symbol", c_int), c_void_p).value
        return c_void_p.from_address(pointer).value or 0, absolute or 0

    assert both(in_child, path, work) == (0x1234, 0x1234)


@of("versions")
def test_versions_bind_each_to_its_own(in_child: InChild, path: str) -> None:
    assert results(in_child, path, "call_old", "call_new") == [1, 2]


@of("symbols")
def test_versions_are_asked_for(path: str) -> None:
    with miniloader.load(path) as library:
        versions = ("OLD_1.0", "NEW_2.0", None)
        assert [library.function("versioned", version=version)() for version in versions] == [1, 2, 2]
        with pytest.raises(miniloader.SymbolError, match=r"OLD_2\.0; it is (?=.*@OLD_1)(?=.*@NEW_2)"):
            library.address("versioned", "OLD_2.0")
        with pytest.raises(miniloader.SymbolError, match=r"version OLD_1\.0"):
            library.address("protected_function", "OLD_1.0")


@of("relocations")
def test_symbolic_relocations(in_child: InChild, path: str) -> None:
    def work(api: Api) -> tuple[int, int, bool, bool]:
        libc = ctypes.CDLL(None)
        environ, puts = (ctypes.cast(libc[name], c_void_p).value for name in ("environ", "puts"))
        pointers = [api(name, c_int) for name in ("environ_pointer", "puts_pointer")]
        found = [c_void_p.from_address(ctypes.cast(p, c_void_p).value or 0).value for p in pointers]
        size = api("read_array_size", ctypes.c_ulong)()
        return api("read_into_array", c_int)(), size, found[0] == environ, found[1] == puts

    assert both(in_child, path, work) == (6, 32, True, True)


# ----------------------------------------------------------------------------------------------- IFUNC
@of("ifunc")
@pytest.mark.parametrize(("wish", "wished"), [(None, 1), ("special", 2), ("something", 1)])
def test_ifunc_chosen_by_the_environment(
    in_child: InChild, path: str, monkeypatch: pytest.MonkeyPatch, wish: str | None, wished: int
) -> None:
    if wish is not None:
        monkeypatch.setenv("MINILOADER_IFUNC", wish)
    names = ("call_chosen", "call_chosen_pointer", "chosen", "call_wished", "call_wished_pointer")
    assert results(in_child, path, *names) == [2, 2, 2, wished, wished]


@pytest.mark.parametrize(("wish", "wished"), [("special", 2), ("something", 1)])
def test_a_resolver_calls_through_lazy_slots(
    in_child: InChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, wished: int
) -> None:
    """They have to be connected before it runs, though nothing else is bound yet."""
    source = (build.HERE / "ifunc.c").read_text()
    path = gcc(tmp_path / "libifunc_lazy.so", source, "-Wl,-z,lazy")
    monkeypatch.setenv("MINILOADER_IFUNC", wish)

    def work() -> list[int]:
        told: list[str] = []
        library = miniloader.load(path, bind="lazy", on_event=lambda event: told.append(event.text))
        assert any("PLT slots left for their first call" in text for text in told)
        names = ("call_chosen", "call_chosen_pointer", "call_wished", "call_wished_pointer")
        return [library.function(name)() for name in names]

    assert in_child(work) == [2, 2, wished, wished]


@of("ifunc")
@pytest.mark.parametrize(("wish", "wished"), [("special", 2), ("something", 1)])
def test_ifunc_of_a_prepared_library(
    in_child: InChild,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wish: str,
    wished: int,
) -> None:
    """Its resolver calls strcmp, an IFUNC of libc's: whose slot has to be there before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MINILOADER_IFUNC", wish)
    miniloader.prepare(path)

    def work() -> tuple[bool, int, int]:
        library = miniloader.load(path, prepared=True)
        return (
            library.loaded.ready is not None,
            library.function("call_wished")(),
            library.function("call_wished_pointer")(),
        )

    assert in_child(work) == (True, wished, wished)


# ------------------------------------------------------------------------------------------ alignment
@of("overaligned_64k", "overaligned_2m")
def test_data_aligned_beyond_the_page(in_child: InChild, path: str) -> None:
    assert results(in_child, path, "aligned_is_aligned") == [1]


# --------------------------------------------------------------------------------------------- hashing
@of("demo", "demo_sysv_hash", "demo_gnu_hash", "demo_relr", "demo_norelro", "demo_no_sections", "demo_base")
def test_every_symbol_is_found_by_either_hash(path: str) -> None:
    theirs = ctypes.CDLL(path)
    with miniloader.load(path) as library:
        table = library.image.symbols
        names = [table.name(index) for index in np.flatnonzero(table.defined).tolist()]
        assert len(names) > 5
        bias = library.base - _bias(theirs)
        for name in names:
            index = table.find(name)
            assert index is not None
            moved = 0 if table.rows["shndx"][index] == SHN_ABS else bias
            assert library.address(name) == (ctypes.cast(theirs[name], c_void_p).value or 0) + moved


def _bias(library: ctypes.CDLL) -> int:
    link_map = ctypes.POINTER(ctypes.c_uint64)()
    ctypes.CDLL(None).dlinfo(c_void_p(library._handle), 2, ctypes.byref(link_map))
    return int(link_map[0])


#: Two characters each that both hash functions take for the same: 33·a+b (DT_GNU_HASH), 16·a+b (DT_HASH).
ALIKE = {"gnu": ("ab", "bA"), "sysv": ("aq", "ba")}


def colliding(style: str, pairs: int) -> list[str]:
    return ["f" + "".join(parts) for parts in itertools.product(ALIKE[style], repeat=pairs)]


def gcc(output: Path, source: str, *options: str | Path) -> Path:
    (output.parent / "made.c").write_text(source)
    command: list[str | Path] = ["gcc", "-shared", "-fPIC", "-O1", output.parent / "made.c", "-o", output]
    subprocess.run([*command, f"-Wl,-soname,{output.name},-rpath,$ORIGIN", *options], check=True)
    return output


def gnu_hash(name: str) -> int:
    value = 5381
    for character in name.encode():
        value = (value * 33 + character) & 0xFFFFFFFF
    return value


def elf_hash(name: str) -> int:
    value = 0
    for character in name.encode():
        value = (value << 4) + character
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


@pytest.mark.parametrize("pairs", [2, 7])  # few names are looked up one by one, many all at once
@pytest.mark.parametrize("style", ["gnu", "sysv"])
@pytest.mark.parametrize("clash", ["gnu", "sysv"])
def test_names_whose_hashes_collide(
    in_child: InChild, tmp_path: Path, style: str, clash: str, pairs: int
) -> None:
    names = colliding(clash, pairs)
    assert len({(gnu_hash if clash == "gnu" else elf_hash)(name) for name in names}) == 1
    defined = names[::2]
    source = "\n".join(f"int {name}(void) {{ return {number}; }}" for number, name in enumerate(defined))
    needed = gcc(tmp_path / "libnames.so", source, f"-Wl,--hash-style={style}")
    calls = " ".join(f"total = total * 7 + {name}();" for name in defined)
    declared = "\n".join(f"int {name}(void);" for name in defined)
    absent = "\n".join(f"extern int {name}(void) __attribute__((weak));" for name in names[1::2])
    none = " && ".join(f"!{name}" for name in names[1::2])
    user = gcc(
        tmp_path / "libuser.so",
        f"{declared}\n{absent}\n"
        f"unsigned ask(void) {{ unsigned total = 1; {calls} return total; }}\n"
        f"int none(void) {{ return {none}; }}\n",
        "-Wl,--no-as-needed",
        needed,
    )

    def work(api: Api) -> tuple[int, int, list[int]]:
        total, none = api("ask", ctypes.c_uint)(), api("none", c_int)()
        return total, none, [api(name, c_int)() for name in defined]

    total = 1
    for number in range(len(defined)):
        total = (total * 7 + number) & 0xFFFFFFFF
    assert both(in_child, str(user), work) == (total, 1, list(range(len(defined))))


# --------------------------------------------------------------------------------------- interposition
def interposed(in_child: InChild, libraries: Sequence[Path], ask: Path) -> list[int]:
    """What ``ask`` answers with either loader, when ``libraries`` came before, for everybody."""

    def load(ours: bool) -> list[int]:
        for library in libraries:
            ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL)
        api = Api(str(ask), ours=ours)
        return [api(name, c_int)() for name in ("ask_function", "ask_weak", "ask_protected", "ask_data")]

    ours, theirs = in_child(load, True), in_child(load, False)
    assert ours == theirs
    return list(ours)


_ASK = """
int function(void) {{ return {0}; }}
__attribute__((weak)) int weak(void) {{ return {0}; }}
__attribute__((visibility("protected"))) int protected(void) {{ return {0}; }}
int data = {0};
int ask_function(void) {{ return function(); }}
int ask_weak(void) {{ return weak(); }}
int ask_protected(void) {{ return protected(); }}
int ask_data(void) {{ return data; }}
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), [1, 1, 2, 1]), (("-Wl,-Bsymbolic",), [2, 2, 2, 2])],
    ids=["plain", "symbolic"],
)
def test_the_process_s_global_scope_comes_first(
    in_child: InChild, tmp_path: Path, options: tuple[str, ...], expected: list[int]
) -> None:
    first = gcc(tmp_path / "libfirst.so", _ASK.format(1), "-fno-inline", "-fsemantic-interposition")
    second = gcc(
        tmp_path / "libsecond.so", _ASK.format(2), "-fno-inline", "-fsemantic-interposition", *options
    )
    assert interposed(in_child, [first], second) == expected
    assert interposed(in_child, [], second) == [2, 2, 2, 2]


def test_the_first_of_several_weak_or_not_is_taken(in_child: InChild, tmp_path: Path) -> None:
    """As ld.so without LD_DYNAMIC_WEAK: a weak definition that comes first beats a strong one behind."""
    weak = _ASK.format(3).replace("int function", "__attribute__((weak)) int function")
    first = gcc(tmp_path / "libweak.so", weak, "-fno-inline")
    second = gcc(tmp_path / "libstrong.so", _ASK.format(4), "-fno-inline")
    ask = gcc(tmp_path / "libask.so", _ASK.format(5), "-fno-inline")
    assert interposed(in_child, [first, second], ask) == [3, 3, 5, 3]


def test_what_stays_does_not_keep_the_file_of_who_needed_it(in_child: InChild, tmp_path: Path) -> None:
    stays = gcc(tmp_path / "libstays.so", "int f(void) { return 1; }", "-Wl,-z,nodelete")
    root = gcc(tmp_path / "libroot.so", "int f(void); int g(void) { return f(); }", stays)

    def work() -> list[str]:
        with miniloader.load(root) as library:
            assert library.function("g")() == 1
        gc.collect()
        names = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        opened = [os.readlink(name) for name in names if name.is_symlink()]
        return sorted(name for name in opened if name.startswith(str(tmp_path)))

    assert in_child(work) == [str(stays)]
