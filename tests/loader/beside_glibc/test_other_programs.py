"""Whoever we are in: under LD_PRELOAD and LD_AUDIT, in a program with libpython in it, in a rewritten one.

In each of them libraries are loaded by ld.so and by us, in children of their own, and each word that holds a
symbol's address must lead to the same place of the same file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[3]
SOURCES: Final = {
    "given.c": "int given(int n) { return n + 1; }\nint data = 7;\n",
    "user.c": """
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        extern int given(int), data;
        int *pointer = &data, (*function)(int) = given;
        int use(int n) {
            errno = 0;
            return given(n) + data + (int)strlen(getenv("HOME") ? "y" : "n") + printf("%s", "");
        }
    """,
    "preloaded.c": "int given(int n) { return n + 100; }\n",
    "audit.c": """
        #define _GNU_SOURCE
        #include <link.h>
        unsigned la_version(unsigned version) { return LAV_CURRENT; }
        unsigned la_objopen(struct link_map *map, Lmid_t id, uintptr_t *cookie) { return FLAGS; }
        #if FLAGS
        uintptr_t la_symbind64(Elf64_Sym *symbol, unsigned index, uintptr_t *from, uintptr_t *to,
                               unsigned *flags, const char *name) { return symbol->st_value; }
        #endif
    """,
    "embedder.c": """
        #include <Python.h>
        int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
    """,
}
#: Words by the symbols that they hold the addresses of, as places in files: of libraries named as arguments.
SCRIPT: Final = r"""
import ctypes, json, os, struct, sys

HOW = {1: 8, 6: 8, 7: 8}  # R_X86_64_64, GLOB_DAT, JUMP_SLOT

def words(path, base):
    data = open(path, "rb").read()
    offset, size, count = struct.unpack_from("<Q14xHH", data, 32)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + size * number) for number in range(count)]
    dynamic = next(header[3] for header in headers if header[0] == 2)
    def word(vaddr):
        return ctypes.c_uint64.from_address(base + vaddr).value
    def at(vaddr):  # in the file: glibc adds the bias to what is in memory
        return next(h[2] + vaddr - h[3] for h in headers if h[0] == 1 and h[3] <= vaddr < h[3] + h[5])
    tags = dict(struct.unpack_from("<QQ", data, at(dynamic) + 16 * n) for n in reversed(range(60)))
    for table, length in ((7, 8), (23, 2)):
        for place in range(0, tags.get(length, 0) if table in tags else 0, 24):
            slot, info, _ = struct.unpack_from("<QQq", data, at(tags[table]) + place)
            if info & 0xffffffff in HOW:
                name, = struct.unpack_from("<I", data, at(tags[6]) + 24 * (info >> 32))
                start = at(tags[5]) + name
                yield data[start : data.index(b"\0", start)].decode(), slot, word(slot)

def place(address, files):
    if not address:
        return "nothing"
    for start, end, name, bias in files:
        if start <= address < end:
            return f"{name}+{address - bias:#x}"
    return "nowhere"

def mapped():
    files, biases = [], {}
    for line in open("/proc/self/maps"):
        fields = line.split(None, 5)
        start, end = (int(each, 16) for each in fields[0].split("-"))
        name = os.path.basename(fields[5].strip()) if len(fields) > 5 else ""
        files.append((start, end, name, biases.setdefault(name, start) if name else start))
    return files

def by_ld_so(path):
    library = ctypes.CDLL(path, os.RTLD_NOW)
    return library, ctypes.c_uint64.from_address(library._handle).value

def by_us(path):
    import miniloader
    library = miniloader.load(path)
    return library, library.base

answers = []
for load in (by_ld_so, by_us):
    there, back = os.pipe()
    child = os.fork()
    if not child:
        found = {}
        for path in sys.argv[1:]:
            library, base = load(path)
            files = mapped()
            found[path] = [(name, hex(slot), place(value, files)) for name, slot, value in words(path, base)]
            if hasattr(library, "use"):
                found[path].append(library.use(3))
        os.write(back, json.dumps(found).encode())
        os.close(back)
        os._exit(0)
    os.close(back)
    with open(there) as answer:
        answers.append(answer.read())
    os.waitpid(child, 0)
print("[" + ",".join(answers) + "]")
"""


def compiled(directory: Path, name: str, *options: str) -> Path:
    source, made = directory / f"{name}.c", directory / f"{name}.so"
    source.write_text(SOURCES[source.name])
    command = ["gcc", "-O1", "-fPIC", "-shared", "-o", made, source, *options]
    subprocess.run(command, check=True)
    return made


def answers(
    program: str | Path, libraries: list[Path], **environment: str
) -> tuple[dict[str, list[object]], dict[str, list[object]]]:
    """What ld.so and what miniloader made of ``libraries`` within ``program``."""
    # LD_BIND_NOW: what the program itself has of them is bound as dlopen binds.
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    done = subprocess.run(
        [str(program), "-c", SCRIPT, *map(str, libraries)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_BIND_NOW": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout.splitlines()[-1])
    return theirs, ours


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that needs another, and one of the system's that Pythons have as well."""
    at = tmp_path_factory.mktemp("libraries")
    given = compiled(at, "given", "-Wl,-soname,given.so")
    user = compiled(at, "user", str(given), "-Wl,-rpath,$ORIGIN")
    libz = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu", "libz.so.1")
    return [user, *([libz] if libz.exists() else [])]


def preload(at: Path) -> tuple[str, dict[str, str]]:
    return sys.executable, {"LD_PRELOAD": str(compiled(at, "preloaded"))}


def quiet_audit(at: Path) -> tuple[str, dict[str, str]]:
    return sys.executable, {"LD_AUDIT": str(compiled(at, "audit", "-DFLAGS=0"))}


def audit_of_bindings(at: Path) -> tuple[str, dict[str, str]]:
    return sys.executable, {"LD_AUDIT": str(compiled(at, "audit", "-DFLAGS=(LA_FLG_BINDTO|LA_FLG_BINDFROM)"))}


def with_libpython_in_it(at: Path) -> tuple[str, dict[str, str]]:
    """Debian's, which has all of libpython in itself, where it is of the version that these tests run in."""
    program, version = "/usr/bin/python3", f"{sys.version_info.major}.{sys.version_info.minor}"
    if os.path.realpath(program) != f"/usr/bin/python{version}":
        pytest.skip(f"this machine lacks a Python {version} of the system's")
    return program, {}


def at_a_fixed_address(at: Path) -> tuple[str, dict[str, str]]:
    directory, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDVERSION")
    if not os.path.exists(f"{directory}/libpython{name}.so"):
        pytest.skip("this machine lacks a libpython to be embedded")
    source, program = at / "embedder.c", at / "embedder"
    source.write_text(SOURCES[source.name])
    options = [f"-I{sysconfig.get_config_var('INCLUDEPY')}", f"-L{directory}", f"-lpython{name}"]
    command = ["gcc", "-no-pie", "-fno-pie", "-o", program, source, *options, f"-Wl,-rpath,{directory}"]
    subprocess.run(command, check=True)
    return str(program), {"PYTHONHOME": sys.base_prefix}


def rewritten(at: Path) -> tuple[str, dict[str, str]]:
    """patchelf has moved the strings, for a longer path and one library more that is needed."""
    patchelf = shutil.which("patchelf")
    if patchelf is None:
        pytest.skip("this machine lacks patchelf")
    program, real = at / "python3", os.path.realpath(sys.executable)
    shutil.copy(real, program)
    earlier = subprocess.run([patchelf, "--print-rpath", real], capture_output=True, text=True, check=True)
    nowhere = [f"/nowhere/{number:099}" for number in range(50)]
    rpath = ":".join(filter(None, [earlier.stdout.strip(), *nowhere]))
    subprocess.run([patchelf, "--set-rpath", rpath, "--add-needed", "libm.so.6", program], check=True)
    return str(program), {"PYTHONHOME": sys.base_prefix}


@pytest.mark.parametrize(
    "made",
    [preload, quiet_audit, audit_of_bindings, with_libpython_in_it, at_a_fixed_address, rewritten],
)
def test_words_lead_where_those_of_dlopen_lead(
    tmp_path: Path, libraries: list[Path], made: Callable[[Path], tuple[str, dict[str, str]]]
) -> None:
    program, environment = made(tmp_path)
    theirs, ours = answers(program, libraries, **environment)
    for path in map(str, libraries):
        assert len(theirs[path]) > 5
        assert not [word for word in theirs[path] if "nowhere" in str(word)]
        assert ours[path] == theirs[path]
