"""What a file asks for besides its words, as dlopen(3) has it: stacks, arguments of constructors, odd tables.

Each library is tried in two new processes: by dlopen and by miniloader.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import miniloader
from miniloader.elf import dynamic as dt
from miniloader.elf.checks import problems_of
from miniloader.errors import ElfError

DLOPEN: Final = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])"
LOAD: Final = "import miniloader, sys; library = miniloader.load(sys.argv[1], **{options})"
ANSWER: Final = {
    "dlopen": "print(library.answer())",
    "load": "import ctypes; print(library.function('answer', ctypes.c_int, [])())",
}
STACK: Final = "print([line.split()[1] for line in open('/proc/self/maps') if '[stack]' in line])"


def gcc(path: Path, source: str, *options: str) -> Path:
    """Compile ``source`` as the library ``path``."""
    text = path.with_suffix(".c")
    text.write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", text, "-o", path, *options], check=True, cwd=path.parent)
    return path


def run(code: str, path: Path, *interpreter: str) -> str:
    """What Python ``code`` prints with ``path`` as its argument, or the last line of what it complains of."""
    command = [*(interpreter or [sys.executable]), "-c", code, str(path), "second"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout if done.returncode == 0 else f"{done.returncode}: {done.stderr.splitlines()[-1:]}"
    return said.strip()


def by_both(path: Path, then: str | None = None, **options: bool) -> tuple[str, str]:
    """What dlopen and what miniloader make of ``path``: what ``answer()`` gives, or ``then`` prints."""
    dlopen = run(f"{DLOPEN}; {then or ANSWER['dlopen']}", path)
    ours = run(f"{LOAD.format(options=options)}; {then or ANSWER['load']}", path)
    return dlopen, ours


# ------------------------------------------------------------------------------------ constructors
WALKS: Final = """
#include <elf.h>
#include <stdint.h>
#include <string.h>
extern char **_dl_argv;
static int found;
__attribute__((constructor)) static void begin(int argc, char **argv, char **envp) {
    char **at = argv + argc + 1;
    if (argv != _dl_argv || argv[argc] || strcmp(argv[argc - 1], "second")) return;
    found = argc;
    while (*at) at++;
    for (Elf64_auxv_t *auxv = (Elf64_auxv_t *)(at + 1); auxv->a_type; auxv++)
        if (auxv->a_type == AT_PAGESZ) found += 10 * auxv->a_un.a_val;
}
int answer(void) { return found; }
"""


def test_constructors_find_the_auxiliary_vector_behind_their_arguments(tmp_path: Path) -> None:
    dlopen, ours = by_both(gcc(tmp_path / "walks.so", WALKS))
    assert ours == dlopen == str(5 + 10 * 4096)


# ------------------------------------------------------------------------------------------ stacks
NESTED: Final = """
static int apply(int (*function)(int), int x) { return function(x); }
int (*volatile keep)(int (*)(int), int) = apply;
int answer(void) { int base = 40; int add(int x) { return base + x; } return keep(add, 2); }
"""


def without_stack_header(path: Path) -> Path:
    """The library without its PT_GNU_STACK, as tcc and old assemblers leave it out."""
    data = bytearray(path.read_bytes())
    offset, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<H", data, 56)
    for at in range(offset, offset + 56 * count, 56):
        if struct.unpack_from("<I", data, at)[0] == 0x6474E551:
            struct.pack_into("<I", data, at, 0)
    path.write_bytes(data)
    return path


def test_an_executable_stack_is_made_where_it_is_allowed(tmp_path: Path) -> None:
    path = gcc(tmp_path / "nested.so", NESTED, "-O0")
    assert by_both(path, executable_stack=True) == ("42", "42")
    assert by_both(path, STACK, executable_stack=True) == ("['rwxp']", "['rwxp']")
    assert "['rw-p']" in by_both(path, STACK, executable_stack=True, init=False)[1]
    assert "found an executable stack" in by_both(path)[1]


def test_no_stack_header_means_an_executable_stack(tmp_path: Path) -> None:
    path = without_stack_header(gcc(tmp_path / "plain.so", "int answer(void) { return 7; }"))
    assert by_both(path, STACK, executable_stack=True) == ("['rwxp']", "['rwxp']")
    with pytest.raises(ElfError, match="found none: the stack is executable"):
        miniloader.load(path)
    assert [problem.rule for problem in problems_of(miniloader.inspect(path))] == ["executable-stack"]


# ------------------------------------------------------------------------------------- odd tables
def entry_of(image: miniloader.ElfImage, tag: int) -> int:
    """Where in the file the value of the first entry ``tag`` is."""
    segment = image.segment("PT_DYNAMIC")
    assert segment is not None
    place = next(place for place, entry in enumerate(image.dynamic.entries) if entry[0] == tag)
    return segment.file_offset + 16 * place + 8


def with_string_table_of(path: Path, size: int) -> Path:
    """The library with another DT_STRSZ."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, entry_of(miniloader.inspect(path), dt.DT_STRSZ), size)
    path.write_bytes(data)
    return path


def test_a_string_table_may_end_in_the_middle_of_what_no_name_is(tmp_path: Path) -> None:
    script = tmp_path / "v.map"
    script.write_text("{ global: answer; local: *; };")
    options = "-nostdlib", f"-Wl,--version-script={script}", "-Wl,-soname,zzzz"
    path = gcc(tmp_path / "cut.so", "int answer(void) { return 7; }", *options)
    image = miniloader.inspect(path)
    size = image.dynamic.tags[dt.DT_STRSZ]
    assert image.soname == "zzzz"
    struct.pack_into("<Q", data := bytearray(path.read_bytes()), entry_of(image, dt.DT_SONAME), 1)
    offset = image.dynamic.tags[dt.DT_SONAME]
    assert offset + 5 == size  # the last name: it is cut in two
    path.write_bytes(data)
    assert by_both(with_string_table_of(path, size - 2)) == ("7", "7")
    struct.pack_into("<Q", data, entry_of(image, dt.DT_SONAME), offset)
    path.write_bytes(data)
    with pytest.raises(ElfError, match="DT_SONAME: found string offset"):
        miniloader.load(with_string_table_of(path, size - 2))


def split(source: Path, output: Path) -> Path:
    """``source`` with its first PT_LOAD cut in two inside ``.dynstr``, as patchelf 0.14 leaves programs."""
    data = bytearray(source.read_bytes())
    offset, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<H", data, 56)
    rows = [list(struct.unpack_from("<IIQQQQQQ", data, offset + 56 * index)) for index in range(count)]
    rows.remove(next(row for row in rows if row[0] == 4))  # a PT_NOTE, for the room
    place = next(place for place, row in enumerate(rows) if row[0] == 1)
    first = rows[place]
    assert first[5] > 4096
    rest = [1, first[1], first[2] + 4096, *[first[3] + 4096] * 2, *[first[5] - 4096] * 2, 4096]
    rows[place : place + 1] = [[*first[:5], 4096, 4096, first[7]], rest]
    for index, row in enumerate(rows):
        struct.pack_into("<IIQQQQQQ", data, offset + 56 * index, *row)
    output.write_bytes(data)
    output.chmod(0o755)
    return output


def many_names(path: Path) -> Path:
    """A library whose ``.dynstr`` lies across the end of its first page."""
    source = "".join(f"int {'name' * 9}{number}(void) {{ return {number}; }}\n" for number in range(200))
    path = gcc(path, source + "int answer(void) { return 7; }")
    tags = miniloader.inspect(path).dynamic.tags
    assert (
        tags[dt.DT_STRTAB] < 4096 * (tags[dt.DT_STRTAB] // 4096 + 1) < tags[dt.DT_STRTAB] + tags[dt.DT_STRSZ]
    )
    return path


def test_tables_may_lie_across_segments_that_touch(tmp_path: Path) -> None:
    path = split(many_names(tmp_path / "names.so"), tmp_path / "split.so")
    assert by_both(path) == ("7", "7")
    user = gcc(
        tmp_path / "user.so", f"int {'name' * 9}9(void); int answer(void) {{ return {'name' * 9}9(); }}"
    )
    preload = "import os, sys; os.environ['LD_PRELOAD'] = sys.argv[1].replace('user', 'split'); "
    for how in (f"{DLOPEN}; {ANSWER['dlopen']}", f"{LOAD.format(options={})}; {ANSWER['load']}"):
        code = f"{preload}os.execv(sys.executable, [sys.executable, '-c', {how!r}, sys.argv[1]])"
        assert run(code, user) == "9"
