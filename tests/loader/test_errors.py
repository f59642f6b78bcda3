"""What cannot be loaded: said in one line, and nothing of it stays, whenever it fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import termios  # noqa: F401 - pytest imports it while tests run: it would count as left behind
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures import build
from miniloader import native
from miniloader.errors import ElfError, LoadError, SymbolError, UsageError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.native import Reason
from tests.failing_calls import Footprint, failing

Build = Callable[[Path], Path]
SOURCE = "int value = 1; int function(void) { return value; }\n"


def gcc(directory: Path, *options: str, source: str = SOURCE, name: str = "made.so") -> Path:
    """Compile ``source`` with ``options``."""
    (directory / "made.c").write_text(source)
    output = directory / name
    subprocess.run(["gcc", "-w", *options, directory / "made.c", "-o", output], check=True)
    return output


def cut(directory: Path) -> Path:
    """The demonstration library without its second half."""
    output = directory / "cut.so"
    data = build.build("demo").read_bytes()
    output.write_bytes(data[: len(data) // 2])
    return output


def empty(directory: Path) -> Path:
    output = directory / "empty.so"
    output.touch()
    return output


def text(directory: Path) -> Path:
    output = directory / "text.so"
    output.write_text("/* GNU ld script */\nINPUT(libz.so.1)\n" * 10)
    return output


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "fifo")
    return directory / "fifo"


def alone(directory: Path) -> Path:
    """A library without what it needs beside it."""
    return Path(shutil.copy(build.build("chain_a"), directory))


def other_version(directory: Path) -> Path:
    """A library beside an old one, that lacks a version it needs."""
    (directory / "map").write_text("OLD_1.0 { versioned; };\n")
    script = f"-Wl,--version-script={directory / 'map'},-soname,libsymbols.so"
    gcc(
        directory,
        "-shared",
        "-fPIC",
        script,
        source="int versioned(void) { return 1; }",
        name="libsymbols.so",
    )
    return Path(shutil.copy(build.build("versions"), directory))


def unknown_relocation(directory: Path) -> Path:
    """The demonstration library with the kind of its last relocation changed to one that does not exist."""
    return changed_relocation(directory, -1)


def changed_relocation(directory: Path, row: int) -> Path:
    image = miniloader.inspect(build.build("demo"))
    data = bytearray(Path(image.path).read_bytes())
    (table,) = (table for table in image.relocations.tables if table.name == "DT_RELA")
    offset = image.file_offset(table.vaddr + row % table.count * 24)
    assert offset is not None
    data[offset + 8] = 99
    output = directory / "unknown.so"
    output.write_bytes(data)
    return output


#: Name, how it is made, the kind of error, what its message says.
CASES: tuple[tuple[str, Build, type[Exception], str], ...] = (
    ("missing", lambda d: d / "none.so", ElfError, "No such file or directory"),
    ("directory", lambda d: d, ElfError, "found a directory, expected a regular file"),
    ("fifo", fifo, ElfError, "found a pipe, expected a regular file"),
    ("device", lambda _: Path("/dev/null"), ElfError, "found a character device"),
    ("empty", empty, ElfError, "found 0 bytes, expected an ELF file"),
    ("text", text, ElfError, "found a linker script, expected an ELF file; see .*libz"),
    (
        "program",
        lambda d: gcc(d, "-pie", "-fPIE", source="int main() {}"),
        ElfError,
        "DF_1_PIE, an executable",
    ),
    ("static", lambda d: gcc(d, "-no-pie", source="int main() {}"), ElfError, "ET_EXEC, an executable"),
    ("object", lambda d: gcc(d, "-c"), ElfError, "ET_REL, an object file"),
    ("truncated", cut, ElfError, "expected"),
    ("arm", lambda _: build.MACHINES["armv7l"].prebuilt, ElfError, r"32-bit little-endian ARM.*X86_64"),
    ("i386", lambda _: build.MACHINES["i686"].prebuilt, ElfError, r"32-bit little-endian 386.*X86_64"),
    ("ppc", lambda _: build.MACHINES["ppc"].prebuilt, ElfError, r"32-bit big-endian PPC.*X86_64"),
    ("undefined", lambda _: build.build("cycle_stand_in"), SymbolError, "undefined symbol cycle_b"),
    ("dependency", alone, LoadError, r"needs libchain_b.so, which is in none of the \d+ places searched"),
    ("version", other_version, SymbolError, "needs version NEW_2.0, which .*libsymbols.so does not define"),
    ("relocation", unknown_relocation, LoadError, "relocation kind .*99|0x63"),
    (
        "relative",
        lambda d: changed_relocation(d, 0),
        ElfError,
        r"DT_RELACOUNT: found \d+ rows, 0x63 among them, expected R_\*_RELATIVE alone",
    ),
    ("text relocations", lambda _: build.build("textrel"), ElfError, "--allow-text-relocations"),
    (
        "executable stack",
        lambda d: gcc(d, "-shared", "-fPIC", "-Wl,-z,execstack"),
        ElfError,
        "--allow-executable-stack",
    ),
    (
        "writable code",
        lambda d: gcc(d, "-shared", "-fPIC", "-nostdlib", "-Wl,-N"),
        ElfError,
        "--allow-writable-code",
    ),
    ("libc", lambda _: Path("libc.so.6"), LoadError, "only once"),
    ("name", lambda _: Path("libnosuchthing.so.1"), LoadError, "no library of that name"),
)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Have everything imported and opened that stays."""
    for name in ("libz.so.1", build.build("cxx"), build.build("lazy")):
        miniloader.load(name, bind="lazy").close()
    with pytest.raises(ElfError):
        miniloader.load("/")


@pytest.fixture
def unchanged() -> Iterator[None]:
    """Nothing more is mapped or open after the test."""
    before = Footprint.now()
    yield
    before.check()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("name", "make", "kind", "message"), CASES, ids=[case[0] for case in CASES])
def test_refused_in_one_line(
    tmp_path: Path, name: str, make: Build, kind: type[Exception], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        miniloader.load(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or name in ("undefined", "dependency", "version")


@pytest.mark.parametrize("name", ["text", "object", "arm", "truncated", "undefined", "missing"])
def test_the_command_line_says_it_and_ends_with_1(tmp_path: Path, name: str) -> None:
    make, _, message = next(case[1:] for case in CASES if case[0] == name)
    command = [sys.executable, "-m", "miniloader", "load", str(make(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    ("option", "made", "symbol"),
    [
        ("text_relocations", lambda _: build.build("textrel"), "call_other"),
        ("writable_code", lambda d: gcc(d, "-shared", "-fPIC", "-nostdlib", "-Wl,-N"), "function"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_allowed_by_name(tmp_path: Path, option: str, made: Build, symbol: str) -> None:
    path = made(tmp_path)
    with miniloader.load(path, **{option: True}) as library:  # type: ignore[arg-type]  # any of the options
        assert library.function(symbol)() == {"call_other": 23, "function": 1}[symbol]
        protections = {vma.split()[1] for vma in Footprint.now().files if str(path) in vma}
    if option == "text_relocations":  # what was made writable is not any more
        assert "rwxp" not in protections
        assert "r-xp" in protections


@pytest.mark.usefixtures("unchanged")
def test_wrong_requests(demo: Path) -> None:
    with pytest.raises(UsageError, match="bind='later'"):
        miniloader.load(demo, bind="later")  # type: ignore[arg-type]  # that is the point
    with (
        miniloader.load(demo) as library,
        pytest.raises(SymbolError, match="no symbol demo_ad; did you mean demo_add"),
    ):
        library.address("demo_ad")
    with (
        miniloader.load(build.build("symbols")) as library,
        pytest.raises(SymbolError, match="no symbol versioned, version NONE_1"),
    ):
        library.function("versioned", version="NONE_1")


def test_a_failure_does_not_spoil_the_next_load(tmp_path: Path, demo: Path) -> None:
    for path in (cut(tmp_path), alone(tmp_path), build.build("cycle_stand_in"), demo, demo):
        with contextlib.suppress(miniloader.MiniloaderError), miniloader.load(path) as library:
            assert library.function("demo_add", ctypes.c_long, [ctypes.c_long] * 2)(2, 3) == 5
    with miniloader.load(build.build("chain_a")) as library:
        assert library.function("chain_a")() == 123


# ---------------------------------------------------------------------------- failures of system calls
VICTIMS: dict[str, dict[str, Any]] = {
    "demo": {},
    "bss": {},
    "overaligned_64k": {},
    "overaligned_2m": {},
    "chain_a": {},
    "cycle_a": {},
    "textrel": {"text_relocations": True},
    "lazy": {"bind": "lazy"},
    "tls_general": {},
    "cxx": {},
    "ifunc": {},
}


@contextlib.contextmanager
def gone(at: int) -> Iterator[list[str]]:
    """The ``at``-th loop in C meets a page of the file that is gone; the names of those that were run."""
    loops, names = native.functions(), list[str]()
    by_address = {native.address_of(name): name for name in native._ARGUMENTS}

    def counted(name: str, function: Callable[..., int]) -> Callable[..., int]:
        names.append(name)
        return (lambda *_: Reason.GONE) if len(names) == at else function

    class Counting:
        def __getattr__(self, name: str) -> Callable[..., int]:
            if name == "call_loop":
                return lambda loop, values: counted(by_address[loop], loops.call_loop)(loop, values)
            return counted(name, getattr(loops, name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "functions", Counting)
        yield names


def undone_each_time(victim: str, failure: Callable[[int], Any]) -> int:
    """Load it while the first, the second, … of something fails, until it does not: how many that were."""
    path = build.build(victim)
    miniloader.load(path, **VICTIMS[victim]).close()  # what stays (libstdc++) is there now
    before = Footprint.now()
    for at in range(1, 200):
        try:
            with failure(at):
                library = miniloader.load(path, **VICTIMS[victim])
        except (LoadError, ElfError) as error:
            message = str(error)
        else:
            library.close()
            before.check()
            return at - 1
        assert "\n" not in message
        before.check()
    pytest.fail("it fails more than 200 times")


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize(("call", "number"), [("mmap", errno.ENOMEM), ("mprotect", errno.ENOMEM)])
def test_whichever_call_fails_everything_is_undone(victim: str, call: str, number: int) -> None:
    assert undone_each_time(victim, lambda at: failing(call, number, at)) or call == "mprotect"


@pytest.mark.parametrize("victim", VICTIMS)
def test_wherever_a_page_is_gone_everything_is_undone(victim: str) -> None:
    ran: list[str] = []

    @contextlib.contextmanager
    def failure(at: int) -> Iterator[None]:
        with gone(at) as names:
            yield
            ran[:] = names

    count = undone_each_time(victim, failure)
    assert count == len(ran)
    at_once, by_steps = (
        {"bind_ordinary", "write_ordinary"},
        {"open_table", "survey", "use", "look_up", "relocate"},
    )
    assert at_once <= set(ran) or by_steps <= set(ran)


# ------------------------------------------------------------------------------------- many rounds
def resident() -> int:
    """This process's resident memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        ("libz.so.1", 1000),
        ("demo", 1000),
        ("chain_a", 300),
        ("tls_general", 300),
        ("cxx", 300),
        ("lazy", 300),
    ],
)
def test_nothing_grows(name: str, rounds: int) -> None:
    path = build.build(name) if name in build.FIXTURES else name

    def round_(number: int) -> None:
        with miniloader.load(path, bind="lazy" if name == "lazy" else "now") as library:
            if name == "libz.so.1":
                version = library.function("zlibVersion", ctypes.c_char_p)
                assert version().startswith(b"1.")
            elif name == "cxx":
                assert (
                    library.function("throw_and_catch", ctypes.c_int, [ctypes.c_int])(number + 1)
                    == number + 1
                )
            elif name == "lazy":
                assert library.function("call_own", ctypes.c_int, [ctypes.c_int])(number) == number + 1

    for number in range(50):
        round_(number)
    before, memory = Footprint.now(), resident()
    for number in range(rounds):
        round_(number)
    before.check()
    assert resident() - memory < 2 << 20
