"""What a program or library needs: against ``ldd``, inside made roots, and of hostile files."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import miniloader
from miniloader.cli import main
from miniloader.elf.dynamic import DF_1_PIE
from miniloader.errors import ElfError, LoadError
from miniloader.lab.check.tree import Files, Tree, tree
from miniloader.loader.root import Root
from miniloader.loader.surroundings import of_process
from tests.oracle.rule_trees import FLAGS_1, NewLibrary, library_bytes

_STEP = 5  # of the system's files every fifth, so that it takes seconds


@pytest.fixture(autouse=True)
def long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pipe: no line is broken, whatever pytest says of the terminal."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


# ------------------------------------------------------------------------------------------ the system
def _programs() -> list[str]:
    paths = {os.path.realpath(entry.path) for entry in os.scandir("/usr/bin") if entry.is_file()}
    return sorted(path for path in paths if _is_elf(path))


def _is_elf(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def _of_ldd(path: str) -> dict[str, str | None]:
    """Name and real path of each library, None for one that ldd does not find; the vDSO is left out."""
    environment = {"PATH": "/usr/bin"}
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False, env=environment)
    found: dict[str, str | None] = {}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"\t(.*?) => (.*?)(?: \(0x[0-9a-f]+\))?", line)
        if match is not None:
            found[match[1]] = None if match[2] == "not found" else os.path.realpath(match[2])
        elif match := re.fullmatch(r"\t(/\S+) \(0x[0-9a-f]+\)", line):
            found[match[1]] = os.path.realpath(match[1])
    return found


def _of_ours(found: Tree) -> dict[str, str | None]:
    """As :func:`_of_ldd` has it; ldd calls what was there before, ld.so, by its path."""
    return {
        (library.path if library.found_by == "loaded" and library.path else library.name): (
            os.path.realpath(library.path) if library.path else None
        )
        for library in found.libraries
    }


def test_programs_and_libraries_need_what_ldd_says(system_libraries: list[Path]) -> None:
    paths = [*_programs()[::_STEP], *map(str, system_libraries[:: 4 * _STEP])]
    paths = [path for path in paths if "/ld-linux" not in path and not path.startswith("/usr/aarch64")]
    files = Files(Root("/"))
    different = {}
    for path in paths:
        ours, theirs = _of_ours(tree(path, library_path="", files=files)), _of_ldd(path)
        if ours != theirs:
            different[path] = (ours, theirs)
    assert len(paths) > 50
    assert not different


def test_surroundings_are_what_ld_so_says_of_itself() -> None:
    interpreter = tree("/proc/self/exe").interpreter
    assert interpreter is not None
    done = subprocess.run([interpreter, "--list-diagnostics"], capture_output=True, text=True, check=True)
    said = dict(re.findall(r'^(\S+?)(?:\[\S+\])?="(.*)"$', done.stdout, re.MULTILINE))
    directories = tuple(re.findall(r'^path.system_dirs\[\S+\]="(.*)"$', done.stdout, re.MULTILINE))
    surroundings = of_process()
    assert surroundings.directories == directories
    assert surroundings.library_token == said["dl_dst_lib"]
    assert surroundings.platform == said["dl_platform"]


def test_a_static_program_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/sbin/ldconfig"):
        pytest.skip("this machine lacks a static program")
    assert main(["tree", "/sbin/ldconfig"]) == 0
    assert "linked statically" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- made files
@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """``make(path, needed=…, **fields of NewLibrary)``: a library below ``tmp_path``."""

    def make(path: str, needed: Sequence[str] = (), **fields: object) -> Path:
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(
            library_bytes(NewLibrary("A", needs=tuple(("needed", name) for name in needed), **fields))
        )  # type: ignore[arg-type]
        return place

    return make


def test_what_is_missing_is_told_with_every_place(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    top = make("top.so", needed=("libp.so", "libgone.so"), rpath="$ORIGIN/sub:$ORIGIN")
    below = make("libp.so", needed=("libgone.so", "top.so"), runpath="/nowhere")
    assert main(["tree", str(top), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["interpreter"]) == (str(top), None)
    found, gone, _ = said["libraries"]
    assert (found["path"], found["found_by"], found["found_in"]) == (str(below), "rpath", str(top))
    assert (gone["path"], gone["found_by"]) == (None, None)
    assert gone["needed_by"] == [str(top), str(below)]
    directories = (f"{top.parent}/sub/", f"{top.parent}/", *of_process().directories, "/nowhere/")
    places = [directory + "libgone.so" for directory in directories]
    assert [path for path in gone["searched"] if path in places] == places
    assert main(["tree", str(top)]) == 1
    text = capsys.readouterr().out
    assert "missing: libgone.so" in text
    assert all(place in text for place in places)
    assert main(["tree", "--paths", str(top)]) == 1
    assert capsys.readouterr().out.splitlines() == [str(below)]


def test_each_library_is_shown_once_and_upside_down(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make("libq.so", needed=("libr.so",), runpath="$ORIGIN")
    make("libr.so", needed=("libtop.so",))
    top = make("top.so", soname="libtop.so", needed=("libq.so", "libr.so", "libq.so"), runpath="$ORIGIN")
    assert main(["tree", str(top)]) == 0
    lines = [line.split()[0:3:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["libq.so", "libr.so", "libtop.so", "libr.so", "libq.so"]
    assert main(["tree", str(top), "--reverse", "libr.so"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"  {top}", f"  {top.parent}/libq.so", f"    {top}"]
    assert main(["tree", str(top), "--reverse", "libqq.so"]) == 1
    assert "did you mean libq.so?" in capsys.readouterr().err


def test_origin_of_a_program_is_where_the_kernel_finds_it(make: Callable[..., Path], tmp_path: Path) -> None:
    make("real/libp.so")
    make("real/prog", needed=("libp.so",), runpath="$ORIGIN", flags_1=DF_1_PIE)
    make("lib.so", needed=("libp.so",), runpath="$ORIGIN/link/../..")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prog").symlink_to("../real/prog")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    make("libp.so")
    assert tree(tmp_path / "bin" / "prog").libraries[0].path == f"{tmp_path}/real/libp.so"
    assert tree(tmp_path / "lib.so").libraries[0].path == f"{tmp_path}/link/../../libp.so"  # not "/libp.so"


def test_no_default_library_directory(make: Callable[..., Path]) -> None:
    assert not tree(make("with.so", needed=("libc.so.6",))).missing
    assert tree(make("without.so", needed=("libc.so.6",), flags_1=FLAGS_1["NODEFLIB"])).missing


# ------------------------------------------------------------------------------------------ another root
@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
@pytest.mark.parametrize("name", ["etc/ld.so.cache", "etc/ld-musl-x86_64.path"])
def test_what_another_root_has_for_a_cache_is_neither_waited_for_nor_read_for_ever(
    name: str, kind: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    needed = "libc.musl-x86_64.so.1" if "musl" in name else "libp.so"
    make("root/top.so", needed=(needed,))
    root, path = tmp_path / "root", tmp_path / "root" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        (root / "dev").mkdir()
        path.symlink_to("/dev/zero")
        try:
            os.mknod(root / "dev/zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        except PermissionError:
            os.mkfifo(root / "dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 36)
    assert [library.path for library in tree("/top.so", root=root).libraries] == [None]


def _cache(entries: dict[str, str]) -> bytes:
    """An ``/etc/ld.so.cache`` (glibc's dl-cache.h)."""
    header = struct.pack("<17s3s2I20x", b"glibc-ld.so.cache", b"1.1", len(entries), 0)
    start = len(header) + 24 * len(entries)
    table, strings = b"", b""
    for name, path in sorted(entries.items(), reverse=True):
        place = start + len(strings)
        table += struct.pack("<iIIIQ", 0x0303, place, place + len(name) + 1, 0, 0)
        strings += f"{name}\0{path}\0".encode()
    return header + table + strings


def test_another_root_has_its_own_cache_links_and_directories(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, up = tmp_path / "root", "../" * 20
    make("root/opt/app/top.so", needed=("libp.so", "libq.so", "libr.so", "libs.so"), runpath="/linked")
    make("root/opt/real/libp.so")
    (root / "linked").symlink_to("/opt/real")  # which would lead out, if it were followed from here
    make("root/usr/lib/libq.so")
    (root / "usr/lib/libs.so").symlink_to(up + str(make("outside/libs.so")))
    make("root/cached/libr.so")
    (root / "etc").mkdir()
    (root / "etc/ld.so.cache").write_bytes(_cache({"libr.so": "/cached/libr.so", "libs.so": "/gone/libs.so"}))
    printed = subprocess.run(
        ["ldconfig", "-p", "-C", root / "etc/ld.so.cache"], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/sbin:/sbin"},
    ).stdout  # fmt: skip
    assert "libr.so (libc6,x86-64) => /cached/libr.so" in printed
    found = tree("/opt/app/top.so", root=root)
    assert [(library.path, library.found_by) for library in found.libraries] == [
        ("/linked/libp.so", "runpath"),
        ("/usr/lib/libq.so", "default"),
        ("/cached/libr.so", "cache"),
        (None, None),  # a link that leads out of the root, or would
    ]
    assert tree(root / "opt/app/top.so", root=root).libraries == found.libraries, "as a path from here"
    assert main(["tree", "--root", str(root), "/opt/app/top.so", "--flat"]) == 1
    assert "/cached/libr.so  the cache" in capsys.readouterr().out
    assert main(["tree", "--root", str(root / "nowhere"), "/opt/app/top.so"]) == 2


# ----------------------------------------------------------------------------------------------- hostile
def test_loops_of_links_and_a_file_that_needs_itself(make: Callable[..., Path], tmp_path: Path) -> None:
    make("root/top.so", needed=("/loop/libp.so", "/top.so", "top.so", ""), runpath="/loop:/")
    (tmp_path / "root/loop").symlink_to("loop")
    found = tree("/top.so", root=tmp_path / "root")
    assert [library.path for library in found.libraries] == [None]
    assert "symbolic links" in found.libraries[0].searched[0].outcome


def test_thousands_of_needs_along_a_path_of_five_kilobytes(make: Callable[..., Path]) -> None:
    names = tuple(f"lib{number}.so" for number in range(4000))
    path = ":".join(f"/d{number}" for number in range(800))
    start = time.process_time()
    few = tree(make("few.so", needed=names))
    assert len(few.missing) == 4000
    with pytest.raises(ElfError, match="more libraries and directories"):
        tree(make("many.so", needed=names, runpath=path))
    with pytest.raises(ElfError, match="more entries"):
        tree(make("most.so", needed=tuple(f"lib{number}.so" for number in range(10_000))))
    assert time.process_time() - start < 20


def test_what_is_no_file_or_no_library_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no library\n")
    for path in (tmp_path, tmp_path / "text", tmp_path / "nothing", "nothing-of-that-name"):
        assert main(["tree", str(path)]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(LoadError, match="neither a library of that name"):
        miniloader.tree("nothing-of-that-name")


def test_a_file_that_ld_so_refuses_ends_the_search_there(make: Callable[..., Path], tmp_path: Path) -> None:
    make("b/libp.so")
    top = make("top.so", needed=("libp.so",), runpath="$ORIGIN/a:$ORIGIN/b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/libp.so").write_text(
        "INPUT(libp.so.1), and more until it is as long as a header has to be"
    )
    (refused,) = tree(top).libraries
    assert refused.is_missing
    assert refused.fault == "not an ELF file"
    assert len(refused.searched) == 1
