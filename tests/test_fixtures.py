"""The test libraries themselves: that they build, and that what is committed is what the sources make."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

from fixtures import build

NAMES = {"x86_64": "x64", "i686": "x86", "armv7l": "ARM", "aarch64": "AArch64", "riscv64": "RISC-V"}
NAMES |= {"s390x": "IBM S/390", "ppc": "PowerPC"}


class Shape(NamedTuple):
    """What a loader sees of a library, and what made it."""

    compiler: bytes
    segments: list[tuple[int, ...]]
    code: bytes
    needed: set[str]
    dynamic: list[tuple[str, int]]
    symbols: dict[str, tuple[int, int]]


def shape(path: Path) -> Shape:
    with path.open("rb") as file:
        elf = ELFFile(file)
        segments = [
            (s["p_type"], s["p_flags"], s["p_offset"], s["p_vaddr"], s["p_filesz"], s["p_memsz"])
            for s in elf.iter_segments()
        ]
        code = b"".join(s.data() for s in elf.iter_segments("PT_LOAD") if s["p_flags"] & 1)
        (dynamic,) = elf.iter_segments("PT_DYNAMIC")
        tags = [(tag.entry.d_tag, tag.entry.d_val) for tag in dynamic.iter_tags()]
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")}
        symbols = {
            s.name: (s["st_value"], s["st_size"]) for s in elf.get_section_by_name(".dynsym").iter_symbols()
        }
        return Shape(elf.get_section_by_name(".comment").data(), segments, code, needed, tags, symbols)


@pytest.mark.parametrize("machine", build.LOOPS)
def test_the_committed_loops_are_what_their_sources_make(machine: str, tmp_path: Path) -> None:
    loops, compiler = build.LOOPS[machine], build.MACHINES[machine].compiler
    with loops.open("rb") as file:  # any glibc from 2.14 on, that of 2011; on aarch64 from the first
        elf = ELFFile(file)
        needed = elf.get_section_by_name(".gnu.version_r").iter_versions()
        versions = {version.name for _, every in needed for version in every}
        assert elf.get_machine_arch() == NAMES[machine]
    oldest = {"x86_64": {"GLIBC_2.2.5", "GLIBC_2.4", "GLIBC_2.14"}, "aarch64": {"GLIBC_2.17"}}
    assert versions <= oldest[machine]
    # IBT and SHSTK, BTI and PAC
    assert _properties(loops) == {"x86_64": (0xC0000002, 3), "aarch64": (0xC0000000, 3)}[machine]
    committed = shape(loops)
    assert committed.needed <= {"libc.so.6"}
    if shutil.which(compiler) is None:
        pytest.skip(f"no cross compiler: {compiler}")
    try:
        build.build_loops(tmp_path / "rebuilt.so", machine=machine)
    except build.FixtureError as error:  # a compiler without a C library to go with it
        if "No such file" not in str(error) or machine == "x86_64":
            raise
        pytest.skip(f"no cross compiler: {compiler} finds no headers of a C library: {error}")
    rebuilt = shape(tmp_path / "rebuilt.so")
    assert rebuilt.symbols.keys() == committed.symbols.keys()
    if committed.compiler != rebuilt.compiler:
        pytest.skip(
            f"this machine lacks {committed.compiler!r}: the code could not be compared, its names were"
        )
    assert loops.read_bytes() == (tmp_path / "rebuilt.so").read_bytes()


def _properties(path: Path) -> tuple[int, int]:
    """What the file promises of where its jumps lead: the property's number, its bits (the psABIs)."""
    with path.open("rb") as file:
        note = ELFFile(file).get_section_by_name(".note.gnu.property").data()
    assert note[8:16] == struct.pack("<I4s", 5, b"GNU\0")  # NT_GNU_PROPERTY_TYPE_0
    kind, _, bits = struct.unpack_from("<3I", note, 16)
    return kind, bits


COMMITTED = {("demo", machine): how.prebuilt for machine, how in build.MACHINES.items()}
COMMITTED |= build.CHAPTERS | build.REFERENCES


@pytest.mark.parametrize(("name", "machine"), COMMITTED)
def test_the_committed_library_is_what_its_source_makes(name: str, machine: str, tmp_path: Path) -> None:
    compiler = build.MACHINES[machine].compiler
    if shutil.which(compiler) is None:
        pytest.skip(f"no cross compiler: {compiler}")
    build.build_for(machine, name, tmp_path / "rebuilt.so")
    committed, rebuilt = shape(COMMITTED[name, machine]), shape(tmp_path / "rebuilt.so")
    if committed.compiler == rebuilt.compiler:
        assert rebuilt == committed
        return
    # Another compiler may choose other instructions, but not another library.
    assert [(s[0], s[1]) for s in rebuilt.segments] == [(s[0], s[1]) for s in committed.segments]
    assert [tag for tag, _ in rebuilt.dynamic] == [tag for tag, _ in committed.dynamic]
    assert rebuilt.symbols.keys() == committed.symbols.keys()
    pytest.skip(f"this machine lacks {committed.compiler!r}: its code could not be compared, its shape was")


@pytest.mark.parametrize("machine", build.MACHINES)
def test_the_committed_library_shows_every_kind_of_page(machine: str) -> None:
    how = build.MACHINES[machine]
    with how.prebuilt.open("rb") as file:
        elf = ELFFile(file)
        assert elf.get_machine_arch() == NAMES[machine]
        assert elf.little_endian == (machine not in ("s390x", "ppc"))
        size = {section.name: section["sh_size"] / how.page_size for section in elf.iter_sections()}
        assert size[".text"] > 2
        assert size[".rodata"] >= 1
        assert size[".data.rel.ro"] >= 2
        assert size[".data"] >= 3
        assert size[".bss"] >= 3
        assert not any(segment.header.p_type == "PT_INTERP" for segment in elf.iter_segments())
        assert all(
            "NEEDED" not in str(tag.entry.d_tag) for tag in elf.get_section_by_name(".dynamic").iter_tags()
        )


def test_the_shipped_library_runs() -> None:
    machine = build.MACHINES.get(build.os.uname().machine)
    if machine is None or machine.prebuilt.parent.name != "demo":
        pytest.skip("this machine lacks a shipped demonstration library")
    library = ctypes.CDLL(str(machine.prebuilt))
    library.demo_message.restype = ctypes.c_char_p
    assert library.demo_message() == b"hello from a library that was mapped by hand"
    assert [library.demo_apply(which, 7) for which in (0, 16)] == [21, -7]
    assert [library.demo_next(), library.demo_next()] == [100, 101]
    assert [library.demo_remember(3, 5), library.demo_remember(3, 6)] == [0, 5]


@pytest.mark.parametrize("name", build.FIXTURES)
def test_every_fixture_builds_once(name: str) -> None:
    library = build.build(name)
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert library.stat().st_mode & 0o755 == 0o755
    before = library.stat()
    assert build.build(name) == library
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_changed_source_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("bss.c", "symbols.map"):
        shutil.copy(build.HERE / name, sources)
    monkeypatch.setattr(build, "HERE", sources)
    first = build.build("bss", tmp_path).stat().st_ino
    with (sources / "bss.c").open("a") as file:
        file.write("int one_more;\n")
    assert build.build("bss", tmp_path).stat().st_ino != first


def test_sources_say_what_they_show() -> None:
    sources = [path for path in build.HERE.iterdir() if path.suffix in (".c", ".cpp")]
    by_hand = {path.name for path in sources if "Committed as prebuilt/" in path.read_text()}
    assert {path.name for path in sources} == by_hand | {
        name for how in build.FIXTURES.values() for name in how.sources
    }
    for path in sources:
        assert re.match(r"(/\*|//) \S.{20,}", path.read_text()), path.name


def test_without_a_compiler_one_line_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name, package in (("bss", "gcc"), ("cxx", "g++")):
        assert build.main([name]) == 1
        assert capsys.readouterr().err == (
            f"no compiler {package} to build the test libraries with: apt install {package}\n"
        )
    with pytest.raises(build.FixtureError, match=r"apt install gcc-aarch64-linux-gnu$"):
        build.build_demo("aarch64", tmp_path / "x.so")


def test_a_source_that_does_not_compile_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build.FIXTURES, "bad", build.Fixture(("bss.c",), ("-Wl,--nonsense",)))
    assert build.main(["bad"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("libbad.so: ")
    assert err.count("\n") == 1
