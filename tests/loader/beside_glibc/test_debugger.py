"""gdb knows functions and lines of what we mapped, by itself or told; perf names our functions."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

import miniloader
from miniloader import Source
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.beside_glibc import debugger

ROOT = Path(miniloader.__file__).parents[1]

_SOURCE = """\
static int made_inner(int number) {
    return number * 3;
}
int made_outer(int number) {
    int result = made_inner(number) + 1;
    return result;
}
int made_shared = 77;
long made_sum(const char *data, long size) {
    long total = 0;
    for (long at = 0; at < size; at += 4096)
        total += data[at];
    return total;
}
"""


class InChild(Protocol):
    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Any: ...


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with lines, in a directory whose name gdb has to be told with care."""
    directory = tmp_path_factory.mktemp('a "quoted" name')
    source = directory / "made.c"
    source.write_text(_SOURCE)
    subprocess.run(
        ["gcc", "-g", "-O0", "-shared", "-fPIC", source, "-o", directory / "libmade.so"], check=True
    )
    return directory / "libmade.so"


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"this machine lacks {name}")
    return found


def ask_gdb(*commands: str, options: tuple[str, ...] = (), arguments: tuple[str, ...] = ()) -> str:
    """What gdb says, attached to this process unless there are other ``arguments``."""
    words = [word for command in commands for word in ("-ex", command)]
    target = arguments or ("-p", str(os.getpid()))
    # Attached, it stops this process, which then cannot end a gdb that hangs.
    command = [tool("timeout"), "-s", "KILL", "60", tool("gdb"), "-q", "-nx", "-batch"]
    done = subprocess.run(
        [*command, "-ex", "set debuginfod enabled off", *options, *words, *target],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
    )
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("this kernel lacks permission to trace other processes")
    return done.stdout


@pytest.fixture
def shown(library: Path) -> Iterator[miniloader.Library]:
    with miniloader.load(library, gdb=True) as loaded:
        yield loaded


def test_gdb_sees_functions_lines_and_data_by_itself(shown: miniloader.Library) -> None:
    said = ask_gdb(
        "info line made_outer",
        "break made_inner",
        f"info symbol {shown.address('made_sum') + 1:#x}",
        "p made_shared",
    )
    assert re.search(
        rf'Line 4 of ".*made.c" starts at address {shown.address("made_outer"):#x} <made_outer>', said
    )
    assert re.search(r"Breakpoint 1 at 0x[0-9a-f]+: file .*made.c, line 2\.", said)
    assert "made_sum + 1 in section .text of" in said
    assert "$1 = 77" in said


def test_gdb_is_told_what_it_does_not_see(library: Path) -> None:
    with miniloader.load(library) as loaded:
        assert "made.c" not in ask_gdb("info line made_outer")
        said = ask_gdb(*loaded.gdb_commands(), "info line made_outer", "info line made_sum")
        assert re.search(rf'Line 4 of ".*made.c" starts at address {loaded.address("made_outer"):#x}', said)
        assert re.search(rf'Line 9 of ".*made.c" starts at address {loaded.address("made_sum"):#x}', said)


def test_one_command_for_each_that_is_ours(fixture_library: Callable[[str], Path]) -> None:
    with miniloader.load(fixture_library("chain_a")) as loaded:
        address = loaded.address("chain_c")
        commands = loaded.gdb_commands()
        said = ask_gdb(*commands, f"info symbol {address + 1:#x}", f"x/i {address:#x}")
    assert len(commands) == 3  # it, chain_b and chain_c
    assert "chain_c + 1 in section .text of" in said
    assert "<chain_c>" in said


def test_a_breakpoint_set_before_anything_is_loaded_stops_there(library: Path) -> None:
    call = ("load", str(library), "--gdb", "--call", "made_outer(5)->int")
    said = ask_gdb(
        "set breakpoint pending on",
        "set follow-fork-mode child",
        "break made_inner",
        "run",
        "backtrace 2",
        "continue",
        arguments=("--args", sys.executable, "-m", "miniloader", *call),
    )
    assert re.search(r"hit Breakpoint 1(\.1)?, made_inner \(number=5\) at .*made.c:2", said)
    assert re.search(r"#1 .* made_outer \(number=5\) at .*made.c:5", said)
    assert "made_outer(5)->int = 16" in said


def test_a_file_that_has_no_name_or_no_sections(
    library: Path, fixture_library: Callable[[str], Path]
) -> None:
    bare = fixture_library("demo_no_sections")
    with (
        miniloader.load(Source.from_bytes(library.read_bytes()), gdb=True) as unnamed,
        miniloader.load(bare, gdb=True) as sectionless,
    ):
        path = f"/proc/{os.getpid()}/fd/{unnamed.image.source.fd}"
        assert unnamed.gdb_commands() == (f'add-symbol-file "{path}" -o {unnamed.base:#x}',)
        place = sectionless.address("demo_add")
        said = ask_gdb("info line made_outer", f"info symbol {place + 1:#x}")
    assert re.search(r'Line 4 of ".*made.c" starts at address', said)
    assert "demo_add + 1 in section load" in said


def test_a_library_inside_a_larger_file(library: Path, tmp_path: Path) -> None:
    """gdb cannot read it there: it has the functions' names, but no lines."""
    archive = tmp_path / "archive"
    archive.write_bytes(bytes(PAGE_SIZE) + library.read_bytes())
    with (
        open(archive, "rb") as file,
        miniloader.load(Source.from_fd(file.fileno(), start=PAGE_SIZE), gdb=True) as loaded,
    ):
        assert loaded.gdb_commands() == ()
        said = ask_gdb(f"info symbol {loaded.address('made_outer') + 1:#x}", "info address made_inner")
    assert "made_outer + 1 in section .text of" in said
    assert 'Symbol "made_inner" is at 0x' in said


def entries() -> list[int]:
    """The list that gdb reads, forwards; it is checked to be the same backwards."""
    descriptor, _ = debugger._interface()
    assert descriptor.version == 1
    found: list[int] = []
    before, at = None, descriptor.first
    while at:
        entry = debugger._Entry.from_address(at)
        assert entry.previous == before
        assert ctypes.string_at(entry.symfile, 4) == b"\x7fELF"
        found.append(at)
        before, at = at, entry.following
    return found


def test_what_is_closed_is_taken_from_the_list(library: Path, fixture_library: Callable[[str], Path]) -> None:
    others = entries()
    chain = miniloader.load(fixture_library("chain_a"), gdb=True)
    assert len(entries()) == len(others) + 3
    made = miniloader.load(library)
    assert len(entries()) == len(others) + 3
    again = miniloader.load(library, gdb=True)  # it is there already, and is shown now
    assert len(entries()) == len(others) + 4
    made.close()
    chain.close()
    assert len(entries()) == len(others) + 1
    again.close()
    assert entries() == others


def test_a_failed_load_leaves_nothing_in_the_list(tmp_path: Path) -> None:
    before = entries()
    source = tmp_path / "made.c"
    source.write_text("void nobody_has_this(void); void call(void) { nobody_has_this(); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", tmp_path / "made.so"], check=True)
    with pytest.raises(miniloader.SymbolError):
        miniloader.load(tmp_path / "made.so", gdb=True)
    assert entries() == before


def test_gdb_off_means_off(demo: Path, in_child: InChild) -> None:
    def work() -> bool:
        debugger._interface.cache_clear()
        miniloader.load(demo).close()
        return debugger._interface.cache_info().currsize == 0

    assert in_child(work)


def test_what_gdb_finds_is_a_sound_library(tmp_path: Path, shown: miniloader.Library) -> None:
    """readelf complains of whatever is wrong with what we make of bytes."""
    made = tmp_path / "made"
    made.write_bytes(debugger.symbol_file(shown.image, shown.base))
    done = subprocess.run(
        [tool("readelf"), "-W", "-h", "-l", "-S", "-s", "-d", made],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Warning" not in done.stderr + done.stdout
    assert "Error" not in done.stderr + done.stdout


def test_gdb_reads_a_thread_local_carrier_as_we_do(fixture_library: Callable[[str], Path]) -> None:
    """Its path must not lead gdb to gdb's own descriptor of that number: that may be a pipe."""
    with miniloader.load(fixture_library("tls_general"), gdb=True) as loaded:
        said = ask_gdb("info sharedlibrary", f"info symbol {loaded.address('tls_next') + 1:#x}")
    assert f"/proc/{os.getpid()}/fd/" in said
    assert "tls_next + 1 in section .text" in said


def test_the_command_line_says_how(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miniloader", "load", "--json", str(library), "--gdb"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.startswith("{")
    assert re.search(r"^gdb -p \d+ ", done.stderr)
    assert re.search(r'^add-symbol-file ".*libmade.so" -o 0x[0-9a-f]+$', done.stderr, re.MULTILINE)


_PERF = """
import ctypes, mmap, sys, miniloader
with miniloader.load(sys.argv[1]) as library, mmap.mmap(-1, 4 << 20) as memory:
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library.function("made_sum", ctypes.c_long, [ctypes.c_size_t, ctypes.c_long])(start, 4 << 20)
"""


def test_perf_names_our_functions(library: Path, tmp_path: Path) -> None:
    """Each page that ``made_sum`` touches first is a page fault, which perf counts: no clock is needed."""
    perf, data = tool("perf"), tmp_path / "perf.data"
    record = [perf, "record", "-q", "-e", "page-faults:u", "-c", "1", "-o", str(data), "--"]
    recorded = subprocess.run(
        [*record, sys.executable, "-c", _PERF, str(library)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if recorded.returncode != 0 and re.search(r"[Pp]ermission|not permitted", recorded.stderr):
        pytest.skip("this kernel lacks permission to count page faults")
    assert recorded.returncode == 0, recorded.stderr
    script = [perf, "script", "-i", str(data), "-F", "ip,sym,dso"]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bmade_sum \(.*libmade\.so\)", said)) >= (4 << 20) // PAGE_SIZE // 2
