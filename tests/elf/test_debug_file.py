"""Symbols of a stripped library from its separate debug file, as ``objcopy`` makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from miniloader.elf import debug_file, inspect
from miniloader.elf.debug_file import read_all_symbols
from miniloader.elf.symtab import read_symtab

_SOURCE = """
static long secret_counter = 3;
static void __attribute__((noinline)) hidden(long n) { secret_counter += n; }
void bump(long n) { hidden(n); }
"""


def _run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def split(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A stripped library and its debug file beside it; with a build-id where the test wants one."""
    if shutil.which("objcopy") is None:
        pytest.skip("this machine lacks objcopy")
    source, whole = tmp_path / "lib.c", tmp_path / "whole.so"
    library, debug = tmp_path / "lib.so", tmp_path / "lib.so.debug"
    source.write_text(_SOURCE)
    _run("gcc", "-g", "-shared", "-fPIC", f"-Wl,--build-id={request.param}", "-o", whole, source)
    _run("objcopy", "--only-keep-debug", whole, debug)
    _run("objcopy", "--strip-unneeded", f"--add-gnu-debuglink={debug}", whole, library)
    whole.unlink()
    return library, debug


def _names(library: Path) -> set[str]:
    table = read_all_symbols(inspect(library))
    return {table.name(row) for row in range(len(table))} - {""}


def _by_readelf(file: Path) -> set[str]:
    lines = _run("readelf", "-sW", file).partition("'.symtab'")[2].splitlines()
    return {
        line.split()[7] for line in lines if len(line.split()) == 8 and line.split()[3] in ("OBJECT", "FUNC")
    }


with_either = pytest.mark.parametrize("split", ["sha1", "none"], indirect=True)


@with_either
def test_beside_the_library(split: tuple[Path, Path]) -> None:
    library, debug = split
    assert len(read_symtab(inspect(library))) == 0
    assert {"hidden", "secret_counter"} <= _by_readelf(debug) <= _names(library)
    (library.parent / ".debug").mkdir()
    debug.rename(library.parent / ".debug" / debug.name)
    assert "hidden" in _names(library)


@pytest.mark.parametrize("split", ["sha1"], indirect=True)
def test_by_the_build_id(split: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file has no link to it, and was opened by the kernel's name."""
    library, debug = split
    monkeypatch.setattr(debug_file, "DEBUG_DIRECTORY", str(tmp_path / "debug"))
    _run("objcopy", "--remove-section=.gnu_debuglink", library)
    assert "hidden" not in _names(library)
    build_id = inspect(library).build_id
    assert build_id is not None
    place = tmp_path / "debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    place.parent.mkdir(parents=True)
    debug.rename(place)
    assert "hidden" in _names(library)


@with_either
def test_anothers_debug_file_is_not_believed(split: tuple[Path, Path], tmp_path: Path) -> None:
    """Another build, other content, a directory, nothing: the library has the names that it has itself."""
    library, debug = split
    other = tmp_path / "other.c"
    other.write_text(_SOURCE.replace("hidden", "hiddem") + "long more[9];")
    _run("gcc", "-g", "-shared", "-fPIC", "-Wl,--build-id=0x1234", "-o", debug, other)
    assert _names(library) == set()
    debug.write_bytes(b"\x7fELF" + os.urandom(100))
    assert _names(library) == set()
    debug.unlink()
    debug.mkdir()
    assert _names(library) == set()


@pytest.mark.parametrize("split", ["none"], indirect=True)
def test_a_checksum_that_differs(split: tuple[Path, Path]) -> None:
    library, debug = split
    with debug.open("ab") as file:
        file.write(b"x")
    assert _names(library) == set()
