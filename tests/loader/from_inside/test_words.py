"""What dlerror(3) says of files that are refused: ld.so's words, which programs look for."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import struct
import subprocess
from contextlib import nullcontext
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Final

import pytest

import miniloader
from miniloader.elf.symbols import sysv_hash
from tests.loader.conftest import InChild

NOW: Final = os.RTLD_NOW
#: What is put into a library that is all right, and where: a part of its ELF header.
EDITS: Final = {
    "magic": (0, b"\x7eELF"),
    "class": (4, b"\1"),
    "order": (5, b"\2"),
    "ident version": (6, b"\2"),
    "OS ABI": (7, b"\x09"),
    "OS ABI of GNU, and a version": (7, b"\3\2"),
    "ABI version": (8, b"\1"),
    "padding": (9, b"\1"),
    "object": (16, struct.pack("<H", 1)),
    "program": (16, struct.pack("<H", 2)),
    "core": (16, struct.pack("<H", 4)),
    "machine": (18, struct.pack("<H", 40)),
    "version": (20, struct.pack("<I", 2)),
    "size of program headers": (54, struct.pack("<H", 55)),
    "no program headers": (56, struct.pack("<H", 0)),
    "an odd version of an odd ABI": (6, b"\2\x09\1\1"),
    "object for another machine": (16, struct.pack("<HH", 1, 40)),
}


LOAD: Final = 1  # PT_LOAD
#: The same of a row of its program headers: the last one of this type, where in it, and what.
SEGMENTS: Final = {
    "odd offset": (LOAD, 8, struct.pack("<Q", 0x1010)),
    "no dynamic section": (2, 0, struct.pack("<I", 0)),
}
POINTERS: Final = '#include <stdio.h>\nint a; int *p = &a; void f(void) { puts(""); }'


def _kinds(library: bytes) -> list[int]:
    (count,) = struct.unpack_from("<H", library, 56)
    return [struct.unpack_from("<I", library, 64 + 56 * number)[0] for number in range(count)]


def _with_segment(library: bytes, kind: int, place: int, data: bytes) -> bytes:
    rows = [64 + 56 * number for number, each in enumerate(_kinds(library)) if each == kind]
    at = rows[-1] + place
    return library[:at] + data + library[at + len(data) :]


def _hashes(*names: bytes) -> tuple[bytes, ...]:
    return tuple(struct.pack("<I", sysv_hash(name)) for name in names)


def gcc(directory: Path, output: str, source: str, *options: str) -> None:
    command = ["gcc", "-w", "-x", "c", "-", "-x", "none", *options, "-o", output]
    subprocess.run(command, input=source, text=True, cwd=directory, check=True)


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A directory of files that dlopen(3) refuses, each in its way."""
    gcc(tmp_path, "flags.so", "", "-shared")
    good = (tmp_path / "flags.so").read_bytes()
    for name, (place, data) in EDITS.items():
        (tmp_path / f"{name}.so").write_bytes(good[:place] + data + good[place + len(data) :])
    (tmp_path / "empty.so").touch()
    (tmp_path / "text.so").write_text("INPUT(libz.so)" * 9)
    (tmp_path / "short.so").write_bytes(good[:63])
    (tmp_path / "directory.so").mkdir()
    (tmp_path / "dangling.so").symlink_to("nowhere")
    (tmp_path / "loop.so").symlink_to("loop.so")
    for name in ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/proc/self/mem"):
        (tmp_path / f"{os.path.basename(name)}.so").symlink_to(name)
    with socket(AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.so"))
    main = "int main(void) { return 0; }"
    gcc(tmp_path, "pie.so", main, "-fPIE", "-pie")
    gcc(tmp_path, "fixed.so", main, "-fno-pie", "-no-pie")
    gcc(tmp_path, "no dlopen.so", "", "-shared", "-Wl,-z,nodlopen")
    (tmp_path / "apart").mkdir()
    for name in ("class", "machine", "order"):
        (tmp_path / "apart" / f"lib{name}.so").hardlink_to(tmp_path / f"{name}.so")
        gcc(tmp_path, f"lib{name}.so", "", "-shared", f"-Wl,-soname,lib{name}.so")
        needs = "-Wl,--no-as-needed", f"./lib{name}.so", "-Wl,--enable-new-dtags,-rpath,$ORIGIN/apart"
        gcc(tmp_path, f"needs {name}.so", "", "-shared", *needs)
        (tmp_path / f"lib{name}.so").unlink()
    subprocess.run(["objcopy", "--only-keep-debug", "flags.so", "debug.so"], cwd=tmp_path, check=True)
    for name, (kind, place, data) in SEGMENTS.items():
        (tmp_path / f"{name}.so").write_bytes(_with_segment(good, kind, place, data))
    empty = (tmp_path / "no dynamic section.so").read_bytes()
    while LOAD in _kinds(empty):
        empty = _with_segment(empty, LOAD, 0, struct.pack("<I", 0))
    (tmp_path / "no segments.so").write_bytes(empty)
    gcc(tmp_path, "relr.so", POINTERS, "-shared", "-fPIC", "-Wl,-z,pack-relative-relocs")
    relr, marker = (tmp_path / "relr.so").read_bytes(), b"GLIBC_ABI_DT_RELR"
    other = b"GLIBC_2.2.5" if os.uname().machine == "x86_64" else b"GLIBC_2.17"
    for old, new in ((marker, other.ljust(len(marker), b"\0")), *[_hashes(marker, other)]):
        assert relr.count(old) == 1
        relr = relr.replace(old, new)
    (tmp_path / "relr.so").write_bytes(relr)
    gcc(tmp_path, "undefined.so", "int nobody(void); int call(void) { return nobody(); }", "-shared", "-fPIC")
    return tmp_path


def _words(directory: Path, ours: bool) -> list[str]:
    os.chdir(directory)
    names = [f"./{path.name}" for path in sorted(directory.glob("*.so"))]
    names += ["libclass.so", "./no such.so", "./flags.so/x", "x" * 300, "./" + "x" * 300, "/", "\1"]
    calls = [(name, NOW) for name in names]
    calls += [("./flags.so", flags) for flags in (0x20 | NOW, 0x40, 0x2000 | NOW, -0x80000000 | NOW)]
    if not ours:
        return [_word(*call) for call in calls]
    with miniloader.importing(strict=True):
        return [_word(*call) for call in calls]


def _word(name: str, flags: int) -> str:
    try:
        _ctypes.dlopen(name, flags)
    except OSError as error:
        return f"{name} {flags:#x}: {error}"
    return f"{name} {flags:#x}"


def test_dlerror_says_what_ld_so_says(refused: Path, in_child: InChild) -> None:
    theirs, ours = (in_child(_words, refused, by_us) for by_us in (False, True))
    assert ours == theirs
    assert "./class.so 0x2: ./class.so: wrong ELF class: ELFCLASS32" in theirs
    loaded = [each for each in theirs if ": " not in each]
    assert loaded == ["./OS ABI of GNU, and a version.so 0x2", "./flags.so 0x2"]


NAMESPACES: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
static char text[9999];
const char *ask(void) {
    long spaces[] = {LM_ID_BASE, 1, 15, 16, 99, -2, -9, LM_ID_NEWLM};
    const char *names[] = {0, "", "libc.so.6", "/no/such.so"};
    int flags[] = {RTLD_NOW, RTLD_NOW | RTLD_GLOBAL, 0};
    char *end = text;
    for (int space = 0; space < 8; space++)
        for (int name = 0; name < 4; name++)
            for (int flag = 0; flag < 3; flag++) {
                if (spaces[space] == LM_ID_NEWLM && names[name] && !(flags[flag] & RTLD_GLOBAL))
                    continue;  /* refused by name */
                void *handle = dlmopen(spaces[space], names[name], flags[flag]);
                const char *error = dlerror();
                end += sprintf(end, "%ld %s %x: %s\\n", spaces[space], names[name] ? names[name] : "-",
                               flags[flag], error ? error : handle ? "opened" : "");
            }
    return text;
}
"""


def test_dlmopen_says_what_ld_so_says(tmp_path: Path, in_child: InChild) -> None:
    """Of namespaces that are not there, and of what has none of its own."""
    gcc(tmp_path, "asks.so", NAMESPACES, "-shared", "-fPIC")

    def said(ours: bool) -> list[str]:
        with miniloader.importing(strict=True) if ours else nullcontext():
            handle = _ctypes.dlopen(str(tmp_path / "asks.so"), NOW)
            text = ctypes.CFUNCTYPE(ctypes.c_char_p)(_ctypes.dlsym(handle, "ask"))()
        return text.decode().splitlines()  # type: ignore[no-any-return]  # what a function of C returns

    theirs, ours = (in_child(said, by_us) for by_us in (False, True))
    assert ours == theirs
    assert "99 libc.so.6 2: libc.so.6: invalid target namespace in dlmopen(): Invalid argument" in theirs
    assert "-1 - 2: invalid namespace: Invalid argument" in theirs


LARGE: Final = "__thread char large[100000];"
WANTS: Final = """
extern __thread char large[100000] __attribute__((tls_model("initial-exec")));
char *at(void) { return large; }
"""


def test_who_has_no_room_is_whose_storage_it_is(tmp_path: Path, in_child: InChild) -> None:
    """Not who needs it in the static block."""
    gcc(tmp_path, "large.so", LARGE, "-shared", "-fPIC")
    gcc(tmp_path, "wants.so", WANTS, "-shared", "-fPIC", "./large.so", "-Wl,-rpath,$ORIGIN")

    def said(ours: bool) -> list[str]:
        os.chdir(tmp_path)
        with miniloader.importing(strict=True) if ours else nullcontext():
            return [_word(name, NOW) for name in ("./wants.so", "./large.so", "./wants.so")]

    theirs, ours = (in_child(said, by_us) for by_us in (False, True))
    assert ours == theirs
    text = "./wants.so 0x2: ./large.so: cannot allocate memory in static TLS block"
    assert theirs == [text, "./large.so 0x2", text]
