"""What a file asks for besides its words, as dlopen(3) has it: stacks, arguments of constructors, odd tables.

Each library is tried in two new processes: by dlopen and by miniloader.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Final

import pytest
from elftools.elf import enums

import miniloader
from fixtures import build
from miniloader.elf import dynamic as dt
from miniloader.elf.asked import OUTCOMES, asked_for
from miniloader.elf.checks import problems_of
from miniloader.elf.packed_relocations import unpack
from miniloader.errors import ElfError, LoadError
from miniloader.loader.beside_glibc import stack
from miniloader.native import gate
from tests.loader.conftest import InChild

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


def _skip_where_glibc_refuses() -> None:
    version = os.confstr("CS_GNU_LIBC_VERSION") or ""
    if tuple(map(int, version.removeprefix("glibc ").split("."))) >= (2, 41):
        pytest.skip(f"this machine lacks a libc that makes stacks executable: {version} refuses")


def test_an_executable_stack_is_made_where_it_is_allowed(tmp_path: Path) -> None:
    _skip_where_glibc_refuses()
    path = gcc(tmp_path / "nested.so", NESTED, "-O0")
    assert by_both(path, executable_stack=True) == ("42", "42")
    assert by_both(path, STACK, executable_stack=True) == ("['rwxp']", "['rwxp']")
    assert "['rw-p']" in by_both(path, STACK, executable_stack=True, init=False)[1]
    assert "found an executable stack" in by_both(path)[1]


REFUSED = "cannot enable executable stack as shared object requires"


@pytest.mark.parametrize("what", ["executable", "none"])
def test_a_refusal_of_executable_stacks_is_said_as_dlopen_says_it(
    tmp_path: Path, in_child: InChild, what: str
) -> None:
    """The kernel forbids it here, from now on; glibc refuses with the same words from 2.41 on, always."""
    path = gcc(tmp_path / "nested.so", NESTED, "-O0")
    if what == "none":
        without_stack_header(path)

    def story() -> list[str]:
        set_mdwe, refuse_exec_gain = 65, ctypes.c_ulong(1)
        if ctypes.CDLL(None).prctl(set_mdwe, refuse_exec_gain, 0, 0, 0) != 0:
            return []
        with pytest.raises(OSError, match=REFUSED) as theirs:
            ctypes.CDLL(str(path))
        with pytest.raises(LoadError) as ours:
            miniloader.load(path, executable_stack=True)
        assert str(path) not in Path("/proc/self/maps").read_text()
        return [str(theirs.value), ours.value.ld_so or "", str(ours.value), ours.value.hint or ""]

    said = in_child(story)
    if not said:
        pytest.skip("this kernel lacks PR_SET_MDWE")
    theirs, as_theirs, ours, hint = said
    assert as_theirs == theirs
    assert theirs.startswith(f"{path}: {REFUSED}: ")
    assert f"PT_GNU_STACK: needs an executable stack, which glibc refuses: {REFUSED}: " in ours
    assert "/fd/" not in ours
    assert hint


def test_from_glibc_2_41_on_stacks_are_made_executable_at_the_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a glibc need not be at hand: what it says, from its elf/dl-load.c, is put in its place."""
    path = gcc(tmp_path / "nested.so", NESTED, "-O0")

    def refusing(name: str, data: bytes) -> tuple[int, int]:
        raise LoadError("made up", ld_so=f"/proc/1/fd/4: {REFUSED}: Invalid argument")

    monkeypatch.setattr(stack, "open_bytes", refusing)
    monkeypatch.setattr(gate, "glibc_version", lambda: (2, 41))
    with pytest.raises(LoadError, match=f"{REFUSED}: Invalid argument") as raised:
        miniloader.load(path, executable_stack=True)
    assert raised.value.hint is not None
    assert "GLIBC_TUNABLES=glibc.rtld.execstack=2" in raised.value.hint


def test_no_stack_header_means_an_executable_stack(tmp_path: Path) -> None:
    _skip_where_glibc_refuses()
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
    preload = "import os, sys; os.environ['LD_PRELOAD'] = sys.argv[1].replace('user.so', 'split.so'); "
    for how in (f"{DLOPEN}; {ANSWER['dlopen']}", f"{LOAD.format(options={})}; {ANSWER['load']}"):
        code = f"{preload}os.execv(sys.executable, [sys.executable, '-c', {how!r}, sys.argv[1]])"
        assert run(code, user) == "9"


# -------------------------------------------------------------------- Android's packed relocations
def sleb128(number: int) -> bytes:
    octets = bytearray()
    while True:
        low, number = number & 0x7F, number >> 7
        if number == (-1 if low & 0x40 else 0):
            return bytes([*octets, low])
        octets.append(low | 0x80)


def packed(rows: list[tuple[int, int, int]]) -> bytes:
    """Rows of offset, info and addend as Android packs them: a group for each run of one info."""
    offset, addend = rows[0][0] - 8, 0
    numbers = [len(rows), offset]
    for info, members in groupby(rows, key=lambda row: row[1]):
        run = list(members)
        steps = [
            row[0] - before for before, row in zip([offset, *(row[0] for row in run)], run, strict=False)
        ]
        same_step, adds = len(set(steps)) == 1, any(row[2] for row in run)
        same_addend = adds and len({row[2] for row in run}) == 1
        numbers += [len(run), 1 | 2 * same_step | 4 * same_addend | 8 * adds, *steps[:1] * same_step, info]
        numbers += [run[0][2] - addend] * same_addend
        addend = run[0][2] if same_addend else addend
        for step, row in zip(steps, run, strict=True):
            numbers += [step] * (not same_step) + [row[2] - addend] * (adds and not same_addend)
            addend = row[2]
        offset = run[-1][0]
    return b"APS2" + b"".join(map(sleb128, numbers))


def pack(path: Path, output: Path) -> Path:
    """The library with its DT_RELA or DT_REL packed in its place, under Android's tags."""
    image = miniloader.inspect(path)
    data, word = bytearray(path.read_bytes()), image.header.word
    addends = dt.DT_RELA in image.dynamic.tags
    kind, size_tag = (dt.DT_RELA, dt.DT_RELASZ) if addends else (dt.DT_REL, dt.DT_RELSZ)
    table = next(table for table in image.relocations.tables if table.name == dt.tag_name(kind))
    shift = 32 if word == 8 else 8
    rows = [(offset, symbol << shift | code, addend) for offset, code, symbol, addend in table.rows.tolist()]
    content = packed(rows)
    assert len(content) <= table.count * table.entry_size
    data[table.file_offset : table.file_offset + len(content)] = content
    segment = image.segment("PT_DYNAMIC")
    assert segment is not None
    android = {
        kind: dt.DT_ANDROID_RELA if addends else dt.DT_ANDROID_REL,
        size_tag: dt.DT_ANDROID_RELASZ if addends else dt.DT_ANDROID_RELSZ,
    }
    for place, (tag, value) in enumerate(image.dynamic.entries):
        entry = android.get(tag, tag), len(content) if tag == size_tag else value
        layout = image.header.order + ("QQ" if word == 8 else "II")
        struct.pack_into(layout, data, segment.file_offset + place * 2 * word, *entry)
    output.write_bytes(data)
    return output


MANY_POINTERS: Final = """
int a = 1, b = 2; static int h = 39; static int *volatile table[9] = {&h, &h, &h, &h, &h, &h};
int *first = &a, *second = &b; extern int puts(const char *); int (*volatile put)(const char *) = puts;
int answer(void) { return *table[5] + *first + *second + !put; }
"""


def test_android_packed_relocations_are_applied(tmp_path: Path) -> None:
    path = gcc(tmp_path / "plain.so", MANY_POINTERS)
    android = pack(path, tmp_path / "android.so")
    assert by_both(path) == ("42", "42")
    assert by_both(android)[1] == "42"
    plain, image = miniloader.inspect(path), miniloader.inspect(android)
    assert image.relocations.by_kind() == plain.relocations.by_kind()
    assert image.relocations.targets().tolist() == plain.relocations.targets().tolist()


@pytest.mark.parametrize(
    "name", ["references-aarch64", "demo-riscv64", "demo-i686", "demo-armv7l", "demo-s390x", "demo-ppc"]
)
def test_android_packed_relocations_are_read_on_every_machine(name: str, tmp_path: Path) -> None:
    path = build.ROOT / "fixtures" / "prebuilt" / f"lib{name}.so"
    android = pack(path, tmp_path / "android.so")
    kinds = miniloader.inspect(path).relocations.by_kind()
    assert miniloader.inspect(android).relocations.by_kind() == kinds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"APS1" + bytes(9), "found b'APS1'"),
        (b"APS2" + sleb128(1 << 40) + bytes(9), "found 1099511627776 relocations"),
        (b"APS2" + sleb128(3) + b"\0" + sleb128(4), "found 2 numbers|found [0-9]+ numbers|a group of 4"),
        (b"APS2" + sleb128(3) + b"\0\3\3\0", "numbers, expected"),
        (b"APS2" + b"\xff" * 12 + b"\0", "a number of 13 bytes"),
        (b"APS2", "found 0 numbers"),
    ],
)
def test_android_packed_relocations_that_are_not(content: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        unpack(content, 64, 1000, "DT_ANDROID_RELA", "made.so")


def test_relr_under_android_s_tags(tmp_path: Path) -> None:
    path = gcc(tmp_path / "relr.so", MANY_POINTERS, "-Wl,-z,pack-relative-relocs")
    data, image = bytearray(path.read_bytes()), miniloader.inspect(path)
    for tag, android in (
        (dt.DT_RELR, dt.DT_ANDROID_RELR),
        (dt.DT_RELRSZ, dt.DT_ANDROID_RELRSZ),
        (dt.DT_RELRENT, dt.DT_ANDROID_RELRENT),
    ):
        struct.pack_into("<Q", data, entry_of(image, tag) - 8, android)
    (tmp_path / "android.so").write_bytes(data)
    assert by_both(tmp_path / "android.so")[1] == by_both(path)[0] == "42"
    assert miniloader.inspect(tmp_path / "android.so").relocations.by_kind() == image.relocations.by_kind()


# ---------------------------------------------------------- what a process may have only once
@pytest.mark.parametrize("name", ["libc++.so.1", "libutil.so", "libnss_mine.so", "libm.software.so"])
def test_a_private_library_is_found_along_the_needer_s_path(name: str, tmp_path: Path) -> None:
    gcc(tmp_path / name, "int bundled(void) { return 7; }", f"-Wl,-soname,{name}")
    source = "int bundled(void); int answer(void) { return bundled(); }"
    user = gcc(tmp_path / "user.so", source, f"./{name}", "-Wl,-rpath,$ORIGIN")
    maps = "print({line.split()[-1] for line in open('/proc/self/maps') if '%s' in line})"
    assert by_both(user) == ("7", "7")
    dlopen, ours = by_both(user, maps % name)
    assert ours == dlopen == f"{{'{tmp_path / name}'}}"


def test_a_runtime_under_another_name_comes_from_the_system_s_loader(tmp_path: Path) -> None:
    gcc(tmp_path / "mine.so", "int bundled(void) { return 7; }", "-Wl,-soname,libc++.so.1")
    (tmp_path / "libc++.so.1").symlink_to("mine.so")
    source = "int bundled(void); int answer(void) { return bundled(); }"
    user = gcc(tmp_path / "user.so", source, "./mine.so", "-Wl,-rpath,$ORIGIN")
    again = f"{ANSWER['load']}; print(ctypes.CDLL('libc++.so.1', mode=os.RTLD_NOLOAD).bundled())"
    assert run(f"import os; {LOAD.format(options={})}; {again}", user) == "7\n7"


# ------------------------------------------------------------------------------------------ filters
MEMBER: Final = """
#include <unistd.h>
__attribute__((constructor)) static void come(void) { write(1, "+%(letter)s ", 3); }
__attribute__((destructor)) static void go(void) { write(1, "-%(letter)s ", 3); }
int %(own)s(void) { return '%(letter)s'; }
%(common)s
int call_%(letter)s(void) { return common(); }
int answer(void) { return common(); }
"""
FILTERS: Final = {  # who needs whom; F: filter of, f: auxiliary filter of, ?: missing, x: lacks ``common``
    "filter": {"a": "Fb", "b": ""},
    "auxiliary": {"a": "fb", "b": ""},
    "auxiliary missing": {"a": "f? c", "c": ""},
    "chain": {"a": "Fb", "b": "Fc", "c": ""},
    "chain of both": {"a": "fb", "b": "Fc d", "c": "", "d": ""},
    "two": {"a": "Fb fc", "b": "", "c": ""},
    "below": {"a": "b c", "b": "Fd", "c": "", "d": ""},
    "needed before": {"a": "b c d", "b": "Fd", "c": "", "d": ""},
    "needed earlier": {"a": "b c", "b": "", "c": "Fb"},
    "of what lacks it": {"a": "Fb", "b": "x c", "c": ""},
    "filtee needs more": {"a": "b Fc", "b": "", "c": "d", "d": ""},
    "of itself": {"a": "Fa b", "b": ""},
    "of who needs it": {"a": "b", "b": "Fa"},
    "filter missing": {"a": "b", "b": "F?"},
}
BOTH_WAYS: Final = {
    "dlopen": f"{DLOPEN}; call = lambda name: getattr(library, name)()",
    "load": f"{LOAD.format(options={})}; call = lambda name: library.function(name)()",
}


def members(graph: dict[str, str], directory: Path) -> Path:
    """Build the libraries of ``graph``; the first is the one to be loaded."""
    for letter in graph:  # what they are linked with
        gcc(directory / f"lib{letter}.so", f"int stub_{letter};", f"-Wl,-soname,lib{letter}.so")
    for letter, needs in graph.items():
        words = needs.split()
        options = [f"-Wl,-{word[0]},lib{word[1]}.so" for word in words if word[0] in "fF"]
        options += [str(directory / f"lib{word}.so") for word in words if word in graph]
        common = "int common(void);" if "x" in words else f"int common(void) {{ return '{letter}'; }}"
        source = MEMBER % {"letter": letter, "own": f"own_{letter}", "common": common}
        name = f"lib{letter}.so"
        options = [f"-Wl,-soname,{name}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", *options]
        gcc(directory / f"new-{name}", source, *options)
    for letter in graph:
        (directory / f"new-lib{letter}.so").replace(directory / f"lib{letter}.so")
    return directory / f"lib{next(iter(graph))}.so"


@pytest.mark.parametrize("name", FILTERS)
def test_filters_come_after_their_filtees(name: str, tmp_path: Path) -> None:
    path = members(FILTERS[name], tmp_path)
    calls = [f"call_{letter}" for letter in FILTERS[name]]
    ask = f"print([chr(call(name)) for name in ['answer', 'common', *{calls}]], flush=True)"
    dlopen, ours = (run(f"{way}; {ask}", path) for way in BOTH_WAYS.values())
    if name == "filter missing":
        assert "lib?.so: cannot open shared object file" in dlopen
        assert "needs lib?.so" in ours
    else:
        assert ours == dlopen
        assert ours.count("+") == ours.count("-") > 0


# ------------------------------------------------------------------------------- tags and flags
def with_entry(path: Path, tag: int, new_tag: int, value: int | None = None) -> None:
    """Change the first entry ``tag`` of the dynamic section."""
    data, place = bytearray(path.read_bytes()), entry_of(miniloader.inspect(path), tag)
    struct.pack_into("<Q", data, place - 8, new_tag)
    if value is not None:
        struct.pack_into("<Q", data, place, value)
    path.write_bytes(data)


def both_say(path: Path) -> list[str]:
    return [run(f"{way}; print('loaded', flush=True)", path) for way in BOTH_WAYS.values()]


@pytest.mark.parametrize("first", ["b", "c", "bc", "abc"])
def test_who_asks_to_be_first_is_initialised_first(first: str, tmp_path: Path) -> None:
    path = members({"a": "b c", "b": "c d", "c": "", "d": ""}, tmp_path)
    for letter in first:
        member = tmp_path / f"lib{letter}.so"
        with_entry(member, dt.DT_RELACOUNT, dt.DT_FLAGS_1, dt.DF_1_INITFIRST)
    dlopen, ours = both_say(path)
    assert ours == dlopen
    assert ours.startswith({"b": "+b", "c": "+c", "bc": "+c", "abc": "+c"}[first])


def test_preinit_arrays_are_called_before_constructors_of_what_is_needed(tmp_path: Path) -> None:
    path = members({"a": "b", "b": ""}, tmp_path)
    with_entry(path, dt.DT_INIT_ARRAY, dt.DT_PREINIT_ARRAY)
    with_entry(path, dt.DT_INIT_ARRAYSZ, dt.DT_PREINIT_ARRAYSZ)
    dlopen, ours = both_say(path)
    assert ours == dlopen
    assert ours.startswith("+a +b")


def test_preinit_arrays_of_what_is_needed_are_not_called(tmp_path: Path) -> None:
    path = members({"a": "b", "b": ""}, tmp_path)
    with_entry(tmp_path / "libb.so", dt.DT_INIT_ARRAY, dt.DT_PREINIT_ARRAY)
    with_entry(tmp_path / "libb.so", dt.DT_INIT_ARRAYSZ, dt.DT_PREINIT_ARRAYSZ)
    dlopen, ours = both_say(path)
    assert ours == dlopen
    assert "+b" not in ours


@pytest.mark.parametrize("flag", ["now", "origin", "interpose", "nodelete", "global"])
def test_flags_that_change_nothing_a_caller_sees(flag: str, tmp_path: Path) -> None:
    source = "int answer(void) { return 7; }"
    assert by_both(gcc(tmp_path / "flagged.so", source, f"-Wl,-z,{flag}")) == ("7", "7")


def test_what_must_not_be_opened_is_refused(tmp_path: Path) -> None:
    dlopen, ours = by_both(gcc(tmp_path / "no.so", "int answer(void) { return 7; }", "-Wl,-z,nodlopen"))
    assert "shared object cannot be dlopen()ed" in dlopen
    assert "DF_1_NOOPEN" in ours


WITHOUT_LIBC: Final = """
static int h = 40; static int *volatile table[4] = {&h, &h, &h, &h};
int answer(void) { return *table[2] + 2; }
"""
RELR: Final = {
    "libc with its marker": (MANY_POINTERS, []),
    "libc without": (MANY_POINTERS, []),
    "libc without versions": (WITHOUT_LIBC, ["-nostdlib", "-Wl,--no-as-needed", "-lc"]),
    "nothing": (WITHOUT_LIBC, ["-nostdlib"]),
}


@pytest.mark.parametrize("needs", RELR)
def test_relr_without_its_marker_is_refused_where_dlopen_does(needs: str, tmp_path: Path) -> None:
    source, options = RELR[needs]
    path = gcc(tmp_path / "relr.so", source, "-Wl,-z,pack-relative-relocs", *options)
    data = path.read_bytes()
    assert dt.DT_RELR in miniloader.inspect(path).dynamic.tags
    if needs == "libc without":  # the record of the marker is made one of a version that there is
        old, new = (b"GLIBC_ABI_DT_RELR\0", b"GLIBC_2.2.5\0")
        marker, other = data.index(old), data.index(new)
        start = miniloader.inspect(path).dynamic.tags[dt.DT_STRTAB]
        record = struct.pack("<I", marker - start)
        first = miniloader.inspect(path).dynamic.tags[dt.DT_VERNEED]
        places = {bytes(data[at + 8 : at + 12]): at for at in range(first + 16, first + 64, 16)}
        at, source_at = places[record], places[struct.pack("<I", other - start)]
        data = b"".join([data[:at], data[source_at : source_at + 4], data[at + 4 : at + 8],
                         data[source_at + 8 : source_at + 12], data[at + 12 :]])  # fmt: skip
        path.write_bytes(data)
    dlopen, ours = by_both(path)
    if needs == "libc without":
        assert "DT_RELR without GLIBC_ABI_DT_RELR dependency" in dlopen
        assert "no need of GLIBC_ABI_DT_RELR beside DT_RELR" in ours
    else:
        assert ours == dlopen == "42"


def test_each_tag_and_flag_has_an_outcome() -> None:
    marks = {"NULL", "ENCODING", "NUM", "LOOS", "HIOS", "LOPROC", "HIPROC", "PROCNUM", "VALRNGLO"}
    tags = {name for name, value in enums.ENUM_D_TAG_COMMON.items() if isinstance(value, int)}
    flags = {*enums.ENUM_DT_FLAGS, *enums.ENUM_DT_FLAGS_1}
    assert set(OUTCOMES) == {name for name in tags | flags if name[3:] not in marks}


def test_inspect_names_what_a_file_asks_for(tmp_path: Path) -> None:
    source = "int answer(void) { return 7; }"
    options = ["-Wl,-f,libother.so", "-Wl,-z,nodlopen", "-Wl,-z,interpose", "-Wl,--audit,audit.so"]
    path = gcc(tmp_path / "asks.so", source, *options)
    asked = {entry.name: entry for entry in asked_for(miniloader.inspect(path))}
    assert (asked["DT_AUXILIARY"].text, asked["DT_AUXILIARY"].outcome) == ("libother.so", "honoured")
    assert asked["DF_1_NOOPEN"].outcome == "refused"
    assert [asked[name].outcome for name in ("DF_1_INTERPOSE", "DT_AUDIT")] == ["ignored", "ignored"]
    command = [sys.executable, "-m", "miniloader", "inspect", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in ("DT_AUXILIARY", "libother.so", "DF_1_INTERPOSE", "DT_AUDIT"))
