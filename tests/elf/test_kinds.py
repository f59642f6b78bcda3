"""Files that are no libraries, each against who knows it: readelf, ar, ld, the kernel's maps of a process."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import miniloader
from miniloader.elf import inspect, kind_of
from miniloader.elf.image import ElfImage
from miniloader.elf.kinds.archive import Archive
from miniloader.elf.kinds.core_dump import read_core
from miniloader.elf.kinds.linker_script import LinkerScript
from miniloader.elf.kinds.object_file import ObjectImage, section_relocations
from miniloader.elf.kinds.opening import open_file
from miniloader.elf.kinds.program import kernel_calls, kernel_mappings
from miniloader.elf.layout import PHDR
from miniloader.elf.writer import elf_header
from miniloader.errors import ElfError
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.disassembly import disassembly_of
from miniloader.machine.names_at import Landmarks
from miniloader.report import inspect as inspect_report
from miniloader.report import inspect_kinds, inspect_view
from miniloader.report.text import laid_out

SOURCE = """
#include <unistd.h>
char bss[0x20000]; int written = 3; const char *const names[] = {"one", "two"};
static int twice(int x) { return 2 * x; }
int main(int argc, char **argv) {
  if (argc > 1) return twice(argc) + bss[argc] + names[argc][0];
  pause(); return written;
}
__asm__(".section .left_out,\\"e\\",@progbits\\n .long 1\\n .section .kept,\\"awR\\",@progbits\\n .long 2\\n"
        ".section .large,\\"awl\\",@progbits\\n .long 3\\n .text\\n");
"""
LINKED = {
    "program": ("-no-pie",),
    "pie": ("-pie", "-fPIE"),
    "static-program": ("-static", "-no-pie"),
    "static-pie": ("-static-pie", "-fPIE"),
    "library": ("-shared", "-fPIC"),
    "object": ("-c", "-ffunction-sections"),
}
DOS = b"MZ" + bytes(58) + struct.pack("<I", 64)
PROGRAMS = ("program", "pie", "static-program", "static-pie")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``made("pie")``: a file of that kind, made of SOURCE."""
    directory = tmp_path_factory.mktemp("kinds")
    (directory / "kinds.c").write_text(SOURCE)

    def make(kind: str) -> Path:
        output = directory / kind
        if not output.exists():
            command = ["gcc", "-O1", "-g", *LINKED[kind], "-o", str(output), str(directory / "kinds.c")]
            subprocess.run(command, check=True)
        return output

    return make


@pytest.mark.parametrize("kind", LINKED)
def test_each_is_called_what_it_is(made: Callable[[str], Path], kind: str) -> None:
    image = inspect(made(kind))
    assert kind_of(image).name == kind
    assert inspect_report.to_json(image, PAGE_SIZE)["kind"] == kind
    if kind != "library":
        with pytest.raises(ElfError, match=re.escape(str(kind_of(image).instead))):
            miniloader.load(made(kind))


def test_what_is_left_when_the_debugging_information_is_split_off(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    for kind in ("library", "pie", "program"):
        debug = tmp_path / f"{kind}.debug"
        subprocess.run(["objcopy", "--only-keep-debug", made(kind), debug], check=True)
        image = inspect(debug)
        assert kind_of(image).name == "debug-only"
        text = next(
            row for row in inspect_report.to_json(image, PAGE_SIZE)["sections"] if row["name"] == ".text"
        )
        assert (text["type"], text["in_file"]) == ("SHT_NOBITS", False)
        with pytest.raises(ElfError, match="debugging information only"):
            disassembly_of(Landmarks(image), "main")
    for use in (miniloader.load, miniloader.tree):
        with pytest.raises(ElfError, match="debugging information only"):
            use(tmp_path / "library.debug")
    checked = miniloader.check(tmp_path / "pie.debug")
    assert [problem.kind for problem in checked.problems] == ["malformed"]
    assert "debugging information only" in str(checked.problems[0].hint)


def test_a_table_of_packed_words_that_ends_within_one(made: Callable[[str], Path], tmp_path: Path) -> None:
    image = inspect(made("object"))
    section = next(part for part in image.sections if part.size > 8 and part.size % 8)
    data = bytearray(made("object").read_bytes())
    struct.pack_into("<I", data, image.header.shoff + image.header.shentsize * section.index + 4, 19)
    (tmp_path / "packed.o").write_bytes(data)
    packed = inspect(tmp_path / "packed.o")
    assert packed.sections[section.index].type == "SHT_RELR"
    assert section.name in [row.section for row in section_relocations(packed)]
    assert [*inspect_kinds.sections(packed)]


# ------------------------------------------------------------------------------------------- programs
def mapped(pid: int, path: Path) -> dict[int, tuple[str, int | None]]:
    """The pages of the program that ``pid`` runs: protection, and file offset (None: anonymous)."""
    pages: dict[int, tuple[str, int | None]] = {}
    last = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        extent, rights, offset, _, inode, *name = line.split(maxsplit=5)
        start, end = (int(text, 16) for text in extent.split("-"))
        of_program = name == [str(path)]
        if not of_program and (inode != "0" or name or not pages or start != last):
            continue
        last = end
        for at in range(start, end, PAGE_SIZE):
            pages[at] = rights[:3], int(offset, 16) + at - start if of_program else None
    return pages


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_plan_of_a_program_is_what_the_kernel_maps(made: Callable[[str], Path], kind: str) -> None:
    path = made(kind)
    image = inspect(path)
    planned: dict[int, tuple[str, int | None]] = {}
    for mapping in kernel_mappings(image, PAGE_SIZE):
        for at in range(mapping.start, mapping.end, PAGE_SIZE):
            offset = mapping.file_offset + at - mapping.start if mapping.kind == "file" else None
            planned[at] = mapping.protection, offset
    protects = [call for call in kernel_calls(image, PAGE_SIZE) if call.call == "mprotect"]
    assert protects, "a program has RELRO"
    for call in protects:
        for at in range(call.start, call.end, PAGE_SIZE):
            planned[at] = call.protection, planned[at][1]
    process = subprocess.Popen([path])
    try:
        for _ in range(500):  # until it waits in pause(2)
            if Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S":
                break
            time.sleep(0.01)
        theirs = mapped(process.pid, path)
    finally:
        process.kill()
        process.wait()
    bias = min(theirs) - min(planned)
    assert (bias == 0) == (kind in ("program", "static-program"))
    assert {at + bias: page for at, page in planned.items()} == {
        at: theirs.get(at) for at in [page + bias for page in planned]
    }


def every_program() -> list[Path]:
    found: dict[str, Path] = {}
    for path in sorted(Path("/usr/bin").iterdir()):
        real = os.path.realpath(path)
        try:
            with open(real, "rb") as file:
                if file.read(4) == b"\x7fELF":
                    found.setdefault(real, Path(real))
        except OSError:
            continue
    return list(found.values())


def test_every_program_of_the_machine_is_what_readelf_says(readelf) -> None:
    paths = every_program()
    compared = Counter[str]()
    for path, answer in readelf("-hldW", paths):
        said = answer.decode(errors="replace")
        image = inspect(path)
        kind = kind_of(image)
        if "Number of program headers:         0\n" in said:
            continue
        interpreter = re.search(r"Requesting program interpreter: (.*)\]", said)
        assert image.interpreter == (interpreter[1] if interpreter else None), path
        entry = re.search(r"Entry point address: +(0x[0-9a-f]+)", said)
        assert entry, path
        assert image.header.entry == int(entry[1], 16)
        stack = re.search(r"GNU_STACK .* ([R ][W ][E ]) ", said)
        assert image.executable_stack == (stack is None or "E" in stack[1]), path
        theirs = re.search(r"^  Type: +(\w+) \((.*)\)", said, re.MULTILINE)
        assert theirs
        assert kind.is_program == ("xecutable file" in theirs[2]), (path, theirs[2])
        assert kind.is_static == (kind.is_program and interpreter is None), path
        compared[kind.name] += 1
        image.source.close()
    assert compared["pie"] > 20, compared


# --------------------------------------------------------------------------------------- object files
_SECTION = re.compile(
    r"^ +\[ *(\d+)\] (.*?) +([A-Z][A-Z0-9_]+(?:\+0x[0-9a-f]+)?|\w+: \S+) +"
    r"[0-9a-f]+ ([0-9a-f]{6,}) ([0-9a-f]{6,}) "
    r"[0-9a-f]{2,} ([A-Za-z ]*?) +\d+ +\d+ +\d+$",
    re.MULTILINE,
)
_TABLE = re.compile(r"^Relocation section '(.*)' at offset 0x\w+ contains (\d+) entr", re.MULTILINE)


def test_sections_and_relocations_of_object_files_are_readelfs(made: Callable[[str], Path], readelf) -> None:
    started = [path for path in Path("/usr/lib").rglob("*.o") if path.is_file()][:60]
    compared = Counter[str]()
    for path, answer in readelf("-SrW", [made("object"), *started]):
        said = answer.decode(errors="replace")
        if not said:
            continue
        image = inspect(path)
        assert isinstance(image, ObjectImage)
        theirs = [
            (name.strip(), kind, int(offset, 16), int(size, 16), flags.replace(" ", "").rstrip("opx"))
            for index, name, kind, offset, size, flags in _SECTION.findall(said)
            if int(index)
        ]
        ours = [
            (
                section.name, section.type.removeprefix("SHT_"), section.file_offset, section.size,
                inspect_kinds.section_flags(section, image.header.machine),
            )
            for section in image.sections[1:]
        ]  # fmt: skip
        same = [(a, b) for a, b in zip(ours, theirs, strict=True) if (a[0], *a[2:]) != (b[0], *b[2:])]
        assert not same, path
        tables = section_relocations(image)
        assert [(table.section, table.count) for table in tables] == [
            (name, int(number)) for name, number in _TABLE.findall(said)
        ], path
        kinds = Counter(re.findall(r"^[0-9a-f]{8,} +[0-9a-f]{8,} (R_\S+)", said, re.MULTILINE))
        counted = Counter[str]()
        for table in tables:
            counted.update(table.kinds)
        if not any(len(kind) > 21 for kind in counted):  # which readelf cuts
            assert counted == kinds, path
        compared["relocations"] += counted.total()
        compared["files"] += 1
    assert compared["relocations"] >= 8, compared


def test_code_of_an_object_file_names_what_will_be_linked(made: Callable[[str], Path]) -> None:
    image = inspect(made("object"))
    listing = disassembly_of(Landmarks(image), "main")
    names = [instruction.target.name for instruction in listing.instructions if instruction.target]
    assert "pause" in names  # undefined: the linker finds it
    assert {"names", "bss", "written"} <= set(names)
    calls = [one.target.name for one in listing.instructions if one.mnemonic == "call" and one.target]
    assert calls == ["pause"]


def test_an_object_file_of_many_sections(tmp_path: Path) -> None:
    """As compilers make them, with a section for each function."""
    lines = []
    for number in range(3000):
        lines.append(f'.section .text.f{number},"ax",@progbits\nf{number}: call f{(number + 1) % 3000}\n ret')
        lines.append(f'.section .rodata.s{number},"aMS",@progbits,1\n.string "text {number}"')
    command = ["gcc", "-c", "-x", "assembler", "-", "-o", tmp_path / "many.o"]
    subprocess.run(command, input="\n".join([*lines, ""]), text=True, check=True)
    began = time.process_time()
    listing = disassembly_of(Landmarks(inspect(tmp_path / "many.o")), "f77")
    assert [one.target.name for one in listing.instructions if one.target] == ["f78"]
    assert time.process_time() - began < 3


# ------------------------------------------------------------------------------------------- archives
@pytest.fixture
def archives(made: Callable[[str], Path], tmp_path: Path) -> dict[str, Path]:
    """The same three members, one of a long name, in an archive and in a thin one."""
    for name in ("a.o", "b.o", "a_member_whose_name_is_too_long.o"):
        shutil.copy(made("object"), tmp_path / name)
    names = ["a.o", "b.o", "a_member_whose_name_is_too_long.o"]
    subprocess.run(["ar", "rcs", "whole.a", *names], check=True, cwd=tmp_path)
    subprocess.run(["ar", "rcsT", "thin.a", *names], check=True, cwd=tmp_path)
    return {"whole": tmp_path / "whole.a", "thin": tmp_path / "thin.a"}


@pytest.mark.parametrize("kind", ["whole", "thin"])
def test_members_of_an_archive_are_ars(archives: dict[str, Path], kind: str) -> None:
    path = archives[kind]
    held = open_file(path)
    assert isinstance(held, Archive)
    listed = subprocess.run(["ar", "t", path], capture_output=True, text=True, check=True).stdout.split()
    assert [os.path.basename(member.name) for member in held.members] == [os.path.basename(n) for n in listed]
    member = held.members[2].name
    image = miniloader.inspect(f"{path}({member})")
    assert isinstance(image, ObjectImage)
    assert "main" in [image.symbols.name(index) for index in range(len(image.symbols))]
    with pytest.raises(ElfError, match=r"none called b\.p, expected one of its members; did you mean b\.o"):
        miniloader.inspect(f"{path}(b.p)")
    with pytest.raises(ElfError, match="archive"):
        miniloader.load(path)


def test_every_archive_of_the_machine_has_the_members_that_ar_lists() -> None:
    paths = sorted({Path(os.path.realpath(path)) for path in Path("/usr/lib").rglob("*.a")})[:150]
    members, refused = 0, list[str]()
    for path in paths:
        try:
            held = open_file(path)
        except ElfError as error:
            refused.append(str(error))
            continue
        if not path.read_bytes()[:8].startswith((b"!<arch>\n", b"!<thin>\n")):
            assert isinstance(held, LinkerScript | ObjectImage)  # glibc's libmcheck.a is an object file
            continue
        assert isinstance(held, Archive)
        listed = subprocess.run(["ar", "t", path], capture_output=True, text=True, check=False).stdout
        ours = [member.name for member in held.members]
        if any(len(name) == 16 for name in ours):
            continue  # Go fills the field of the name, of which ar shows 15 letters
        assert ours == listed.splitlines(), path
        members += len(held.members)
        if held.members and not held.thin:
            try:
                open_file(f"{path}({held.members[0].name})")
            except ElfError as error:
                refused.append(str(error))
    assert members > 100
    said = ("a linker script", "text", "0 bytes", "magic", "LLVM bitcode", "Go")
    assert [error for error in refused if not any(words in error for words in said)] == []


def test_a_bad_header_of_a_member_is_said_in_one_line(archives: dict[str, Path]) -> None:
    data = bytearray(archives["whole"].read_bytes())
    held = open_file(archives["whole"])
    assert isinstance(held, Archive)
    header = held.members[1].file_offset - 60
    for place, text, what in ((58, b"xx", "last two"), (48, b"-1        ", "a decimal number")):
        broken = bytearray(data)
        broken[header + place : header + place + len(text)] = text
        with pytest.raises(ElfError, match=what) as raised:
            open_file(miniloader.Source.from_bytes(broken))
        assert hex(header) in str(raised.value)


# ------------------------------------------------------------------------------- linker scripts, others
def test_a_linker_script_is_read_as_ld_reads_it(tmp_path: Path) -> None:
    """What ld traces when it is given the script, but members of archives, in order."""
    library = tmp_path / "libthing.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=b"int thing;", check=True
    )
    script = tmp_path / "libthing.so"
    script.write_text("/* GNU ld script */\nINPUT(libthing.so.1 AS_NEEDED(-lm) )\n")
    compared = 0
    for path in (script, *Path("/usr/lib/x86_64-linux-gnu").glob("lib[cm].so")):
        held = open_file(path)
        assert isinstance(held, LinkerScript)
        done = subprocess.run(
            ["ld", "-shared", "-t", path, "-o", tmp_path / "out"], capture_output=True, text=True, check=False
        )
        traced = list(dict.fromkeys(re.sub(r"\(.*\)|^-l\S+ ", "", line) for line in done.stdout.splitlines()))
        ours = [
            os.path.realpath(item.path or item.name) for item in held.inputs if not item.name.startswith("-l")
        ]
        theirs = {os.path.realpath(line) for line in traced}
        assert set(ours) <= theirs | {name for name in ours if name.endswith(".a")}, path
        assert held.library is not None
        assert held.library.path in (str(library), *(item.path for item in held.inputs))
        with pytest.raises(ElfError, match=f"a linker script, expected an ELF file; see {held.library.path}"):
            miniloader.load(path)
        compared += 1
    assert compared


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"#!/usr/bin/env python3\nprint()\n", "a script for /usr/bin/env python3"),
        (struct.pack(">7I", 0xFEEDFACE, 18, 0, 6, 0, 0, 0), "a Mach-O library for macOS"),
        (struct.pack("<7I", 0xFEEDFACF, 18, 0, 2, 0, 0, 0), "a Mach-O program for macOS"),
        (struct.pack(">2I", 0xCAFEBABE, 2), "a fat Mach-O file for macOS, of 2 architectures"),
        (struct.pack(">2I", 0xCAFEBABE, 65), "a Java class"),
        (DOS + b"PE\0\0" + bytes(18) + b"\0\x20", "a PE library for Windows"),
        (DOS + b"PE\0\0" + bytes(20), "a PE program for Windows"),
        (b"MZ" + bytes(100), "a DOS program"),
        (b"\0asm\1\0\0\0", "a WebAssembly module"),
        (b"BC\xc0\xde5\x14", "LLVM bitcode"),
        (b"\x1f\x8b\x08\0", "compressed by gzip, expected an ELF file; unpack it first: gzip -dc"),
        (b"\xfd7zXZ\0\0\4", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd\4", "compressed by zstd"),
        (b"PK\3\4", "a zip archive"),
        (b"hello\n", "found text, expected an ELF file"),
    ],
)  # fmt: skip
def test_what_is_no_elf_file_is_called_by_name(data: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for use in (miniloader.inspect, miniloader.load, open_file, miniloader.tree):
        with pytest.raises(ElfError, match=re.escape(name)):
            use(path)


# ------------------------------------------------------------------------------------------------ cores
CRASH = """
import ctypes, os, sys, threading, time
started = [threading.Event() for _ in range(3)]
for event in started:
    threading.Thread(target=lambda: (event.set(), time.sleep(100)), daemon=True).start()
    event.wait()
print(open("/proc/self/maps").read(), flush=True)
ctypes.string_at(0x10)
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A core dump, the maps of the process shortly before, and its number."""
    directory = tmp_path_factory.mktemp("core")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern != "core":
        pytest.skip("this machine lacks core dumps in the directory of the process")
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    process = subprocess.Popen(
        [shutil.which("python3") or "python3", "-c", CRASH], cwd=directory, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
    )  # fmt: skip
    maps, _ = process.communicate()
    found = list(directory.glob("core*"))
    if process.returncode != -signal.SIGSEGV or not found:
        pytest.skip("this machine lacks core dumps in the directory of the process")
    return found[0], maps, process.pid


def test_a_core_dump_says_whose_it_is_and_why(core: tuple[Path, str, int]) -> None:
    path, maps, pid = core
    image = inspect(path)
    assert kind_of(image).name == "core"
    dump = read_core(image)
    assert (dump.pid, dump.signal, dump.fault) == (pid, signal.SIGSEGV, 0x10)
    assert dump.program is not None
    assert dump.program.startswith("python")
    assert len({thread.tid for thread in dump.threads}) == 4
    assert dump.threads[0].tid == pid
    theirs = [line.split(maxsplit=5) for line in maps.splitlines() if line]
    files = [
        (*(int(text, 16) for text in extent.split("-")), int(offset, 16), name[0])
        for extent, _, offset, _, inode, *name in theirs
        if inode != "0"
    ]
    ours = [(file.start, file.end, file.file_offset, file.path) for file in dump.files]
    assert len(files) > 20
    assert set(files) <= set(ours)  # it may have opened another one since
    said = [*laid_out(inspect_view.page(image, PAGE_SIZE, 80, 80), 80)]
    assert any("SIGSEGV (Segmentation fault)" in str(line) for line in said)


# ----------------------------------------------------------------------------------------------- fuzzing
def mutations(data: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    """``data`` with some bytes changed, mostly at its beginning and in its headers; or cut."""
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            reach = chance.choice((64, 512, len(data)))
            at = chance.randrange(min(reach, len(broken)))
            if chance.random() < 0.3:
                at = max(len(broken) - 1 - at, 0)  # where section headers are
            broken[at] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        yield bytes(broken[: chance.randrange(len(broken))] if chance.random() < 0.1 else broken)


def use_of(data: bytes) -> str:
    """What becomes of a file: all that inspect shows of it, and the code of a function."""
    source = miniloader.Source.from_bytes(data)
    try:
        held = open_file(source)
    except ElfError:
        return "refused"
    if isinstance(held, Archive):
        inspect_kinds.other_json(held)
        return str(len([*laid_out(inspect_kinds.other(held), 80)]))
    if isinstance(held, LinkerScript):
        inspect_kinds.other_json(held)
        return str(len([*laid_out(inspect_kinds.other(held), 80)]))
    inspect_report.to_json(held, PAGE_SIZE)
    lines = [*laid_out(inspect_view.page(held, PAGE_SIZE, 80, 80), 80)]
    try:
        disassembly_of(Landmarks(held), "main")
    except miniloader.MiniloaderError:
        return "no code"
    held.source.close()
    return str(len(lines))


@pytest.mark.parametrize("kind", ["object", "program", "archive", "script", "debug", "core"])
def test_whatever_is_wrong_is_said(
    kind: str,
    made: Callable[[str], Path],
    archives: dict[str, Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "archive":
        data = archives["whole"].read_bytes()
    elif kind == "script":
        data = b"/* GNU ld script */ GROUP ( /lib/libc.so.6 AS_NEEDED ( -lm ) INPUT(x.a) )"
    elif kind == "debug":
        subprocess.run(["objcopy", "--only-keep-debug", made("pie"), tmp_path / "debug"], check=True)
        data = (tmp_path / "debug").read_bytes()
    elif kind == "core":
        path = request.getfixturevalue("core")[0]
        data = path.read_bytes()[: 1 << 17]
    else:
        data = made(kind).read_bytes()
    outcomes = Counter(
        use_of(broken) for broken in mutations(data, random.Random(kind), 25 if kind == "core" else 80)
    )
    assert len(outcomes) > 1, outcomes


# ------------------------------------------------------------------------------ what costs nothing to claim
def _within_two_seconds(path: Path) -> Archive | ElfImage | LinkerScript:
    began = time.process_time()
    opened = open_file(path)
    if isinstance(opened, ElfImage):
        assert read_core(opened).faults
    assert time.process_time() - began < 2
    return opened


def test_notes_of_a_core_dump_that_are_claimed_again_and_again(tmp_path: Path) -> None:
    """Each of its segments is the same two megabytes, a hole: a note in each twelve bytes of it."""
    path = tmp_path / "core"
    row = PHDR.packing.pack(4, 4, 1 << 22, 0, 0, (1 << 21) - 4096, 0, 4)
    header = bytearray(elf_header(segments=60_000))
    struct.pack_into("<H", header, 16, 4)  # ET_CORE
    path.write_bytes(header + row * 60_000)
    os.truncate(path, 1 << 23)
    _within_two_seconds(path)


def test_tables_of_long_names_without_number(tmp_path: Path) -> None:
    """An archive has one; here are thousands, each of megabytes that take no disk."""
    path, size, count = tmp_path / "lib.a", (1 << 21) - 64, 4000
    header = b"//".ljust(48) + b"%-10d`\n" % size
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for number in range(count):
            file.seek(8 + number * (size + len(header)))
            file.write(header)
        file.truncate(8 + count * (size + len(header)))
    opened = _within_two_seconds(path)
    assert isinstance(opened, Archive)
    assert opened.members == ()
