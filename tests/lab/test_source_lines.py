"""Lines of source code against binutils' addr2line: in the file, in one split off it, in broken tables."""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from miniloader import cli
from miniloader.elf import inspect
from miniloader.lab import source_lines
from miniloader.lab.disassembly import Disassembly, disassembly_of
from miniloader.lab.line_program import LineRow, line_rows
from miniloader.machine.names_at import Landmarks

SOURCE = """\
#include "twice.h"
int table[100];
static int inner(int a)
{
  int sum = 0;
  for (int i = 0; i < a; i++)
    sum += table[i] * i;
  return twice(sum);
}
int outer(int a, int b)
{
  if (a > b)
    return inner(a);
  return inner(b) + 1;
}
"""


def made(directory: Path, *options: str) -> Path:
    (directory / "lines.c").write_text(SOURCE)
    (directory / "twice.h").write_text("static inline int twice(int x)\n{\n  return x * 2 + 1;\n}\n")
    output = directory / "lines.so"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O2",
        "-Wl,--build-id",
        *options,
        "-o",
        output,
        directory / "lines.c",
    ]
    subprocess.run(command, check=True)
    return output


def listing(path: Path, name: str = "outer") -> Disassembly:
    return disassembly_of(Landmarks(inspect(path)), name, lines=True)


def theirs(path: Path, vaddrs: list[int]) -> list[tuple[str, int] | None]:
    if shutil.which("addr2line") is None:
        pytest.skip("this machine lacks addr2line")
    command = ["addr2line", "-e", path, *map(hex, vaddrs)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    places = [line.split(" ")[0].rpartition(":") for line in said]
    return [(str(Path(file).resolve()), int(line)) if line.isdigit() else None for file, _, line in places]


def ours(found: Disassembly, vaddrs: list[int]) -> list[tuple[str, int] | None]:
    assert found.lines is not None
    assert found.lines.fault is None
    places = [found.lines.at(vaddr) for vaddr in vaddrs]
    return [place and (str(Path(place[0]).resolve()), place[1]) for place in places]


@pytest.mark.parametrize(
    "options",
    [("-gdwarf-4",), ("-gdwarf-5",), ("-g", "-gz=zlib"), ("-g", "-gno-column-info", "-ffunction-sections")],
    ids=lambda options: " ".join(options),
)
def test_every_instruction_is_of_the_line_that_addr2line_says(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    path = made(tmp_path, *options)
    found = listing(path)
    vaddrs = [instruction.vaddr for instruction in found.instructions]
    assert ours(found, vaddrs) == theirs(path, vaddrs)
    files = {place[0] for place in ours(found, vaddrs) if place}
    assert {Path(file).name for file in files} == {"lines.c", "twice.h"}


def split(path: Path, directory: Path) -> Path:
    """Split the debugging information off ``path``, into ``directory``; what is left names it."""
    debug = directory / "lines.debug"
    directory.mkdir(exist_ok=True)
    subprocess.run(["objcopy", "--only-keep-debug", path, debug], check=True)
    subprocess.run(["strip", "--strip-debug", "--output-target=elf64-x86-64", path], check=True)
    subprocess.run(["objcopy", f"--add-gnu-debuglink={debug}", path], check=True)
    return debug


@pytest.mark.parametrize("place", [".", ".debug"])
def test_a_file_that_was_split_off(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "-g")
    whole = listing(path)
    vaddrs = [instruction.vaddr for instruction in whole.instructions]
    expected = ours(whole, vaddrs)
    debug = split(path, tmp_path / place)
    found = listing(path)
    assert ours(found, vaddrs) == expected
    assert found.lines is not None
    assert Path(found.lines.path).samefile(debug)
    assert cli.main(["disasm", str(path), "outer", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["lines_from"]).samefile(debug)
    assert [row["source"] and row["source"]["line"] for row in said["instructions"]] == [
        place and place[1] for place in expected
    ]
    assert cli.main(["disasm", str(path), "outer"]) == 0
    text = capsys.readouterr().out
    assert "lines.c:12  if (a > b)" in text
    assert cli.main(["disasm", str(path), "outer", "--no-lines"]) == 0
    assert "lines.c" not in capsys.readouterr().out
    build_id = inspect(path).build_id
    assert build_id is not None
    other = bytes.fromhex(build_id)
    debug.write_bytes(debug.read_bytes().replace(other, other[::-1]))  # another file of that name
    assert listing(path).lines is None


def test_a_hole_in_a_file_that_was_split_off_is_not_summed(tmp_path: Path) -> None:
    """Neither has a build-id: then the checksum says whose it is, but 64 GiB of zeros are nobody's."""
    path = made(tmp_path, "-g", "-Wl,--build-id=none")
    debug = split(path, tmp_path)
    assert listing(path).lines is not None
    os.truncate(debug, 64 << 30)
    began = time.process_time()
    assert listing(path).lines is None
    assert time.process_time() - began < 2


def test_a_library_of_the_system_whose_debugging_information_is_installed() -> None:
    path = Path("/lib/x86_64-linux-gnu/libc.so.6")
    if not path.exists() or listing(path, "fclose").lines is None:
        pytest.skip("this machine lacks debugging information of libc")
    for name in ("fclose", "qsort"):
        found = listing(path, name)
        assert found.lines is not None
        vaddrs = [instruction.vaddr for instruction in found.instructions]
        names = [place and (Path(place[0]).name, place[1]) for place in ours(found, vaddrs)]
        said = [place and (Path(place[0]).name, place[1]) for place in theirs(Path(found.lines.path), vaddrs)]
        assert names == said


def test_broken_tables_cost_little_and_the_code_is_shown(tmp_path: Path) -> None:
    data = made(tmp_path, "-gdwarf-5").read_bytes()
    sections = {section.name: section for section in inspect(tmp_path / "lines.so").sections}
    chance, faults = random.Random(5), 0
    began = time.process_time()
    for number in range(12):
        broken = bytearray(data)
        for name in (".debug_line", ".debug_info", ".debug_abbrev", ".debug_aranges"):
            section = sections[name]
            for _ in range(3):
                at = section.file_offset + chance.randrange(min(section.size, 64))
                broken[at] = chance.choice((0, 0xFF, chance.randrange(256)))
        path = tmp_path / f"broken{number}.so"
        path.write_bytes(broken)
        found = listing(path)
        assert len([*found.instructions]) > 5
        faults += found.lines is None or found.lines.fault is not None
        found.landmarks.image.source.close()
    assert faults
    assert time.process_time() - began < 20


def test_tables_that_unpack_to_far_more_than_the_file_are_left(tmp_path: Path) -> None:
    """400 MB of zeros in a file of two: it may take 128 MiB, and some of the file's size."""
    if shutil.which("objcopy") is None:
        pytest.skip("this machine lacks objcopy")
    path, section = made(tmp_path, "-g"), ".debug_str"
    stream = zlib.compressobj(1)
    zeros = b"".join(stream.compress(bytes(1 << 20)) for _ in range(400)) + stream.flush()
    put_compressed(path, section, 400 << 20, zeros)
    found = listing(path)
    assert found.lines is not None
    assert found.lines.fault is not None
    assert re.fullmatch(
        "it takes more than [0-9]+ MiB; lines not found by then are left out", found.lines.fault
    )
    assert len([*found.instructions]) > 5


def put_compressed(path: Path, section: str, size: int, data: bytes) -> None:
    packed = path.with_name("packed")
    packed.write_bytes(struct.pack("<IIQQ", 1, 0, size, 1) + data)  # Elf64_Chdr, ELFCOMPRESS_ZLIB
    subprocess.run(["objcopy", "--update-section", f"{section}={packed}", path], check=True)
    image, content = inspect(path), bytearray(path.read_bytes())
    (number,) = (each.index for each in image.sections if each.name == section)
    content[image.header.shoff + 64 * number + 8 + 1] |= 8  # SHF_COMPRESSED
    path.write_bytes(content)
    image.source.close()


def test_a_program_of_sixty_million_rows_is_run_for_a_second(tmp_path: Path) -> None:
    """In a file of 300 kB: what was found by then is told, and that there may be more."""
    if shutil.which("objcopy") is None:
        pytest.skip("this machine lacks objcopy")
    path, many = made(tmp_path, "-gdwarf-4"), 60 << 20
    table = bytearray(section_of(path, ".debug_line"))
    (length,) = struct.unpack_from("<I", table)
    end = table[: 4 + length].rindex(b"\0\1\1")  # DW_LNE_end_sequence
    struct.pack_into("<I", table, 0, length + many)
    rows = table[:end] + b"\x0d" * many + table[end:]  # a special operation: no address more
    put_compressed(path, ".debug_line", len(rows), zlib.compress(rows, 1))
    assert path.stat().st_size < 1 << 20
    before, peak = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    found = listing(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.lines is not None
    assert found.lines.fault == "it takes more than 1.2 s; lines not found by then are left out"
    assert len(found.lines.rows) > 5
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert after.ru_maxrss - peak.ru_maxrss < 300 << 10 or after.ru_maxrss == before.ru_maxrss


def section_of(path: Path, name: str) -> bytes:
    image = inspect(path)
    (section,) = (each for each in image.sections if each.name == name)
    image.source.close()
    return path.read_bytes()[section.file_offset : section.file_offset + section.size]


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_line_program_has_the_rows_that_pyelftools_has(version: int, tmp_path: Path) -> None:
    dwarf = inspect(made(tmp_path, f"-gdwarf-{version}")).elffile.get_dwarf_info()
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        states = [entry.state for entry in program.get_entries() if entry.state is not None]
        rows = [LineRow(each.address, each.file, each.line, each.end_sequence) for each in states]
        assert [*line_rows(program)] == rows
        assert len(rows) > 10


def test_each_operation_of_a_line_program() -> None:
    """Two operations an instruction of four bytes; numbers of several bytes; what is not known."""
    header = SimpleNamespace(
        opcode_base=14, line_base=-3, line_range=12, minimum_instruction_length=4,
        maximum_operations_per_instruction=2, standard_opcode_lengths=[0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 2],
    )  # fmt: skip
    steps = {
        b"\0\x09\x02\0\x10\0\0\0\0\0\0": None,  # set_address 0x1000
        b"\x03\xe4\0\1": LineRow(0x1000, 1, 101, ends=False),  # advance_line 100, copy
        b"\x03\x7f\x04\x80\x01\1": LineRow(0x1000, 128, 100, ends=False),  # -1, set_file 128
        b"\x02\x03\1": LineRow(0x1004, 128, 100, ends=False),  # three operations
        bytes((14 + 12 + 5,)): LineRow(0x1008, 128, 102, ends=False),  # one more, two lines
        b"\x08\1": LineRow(0x1008 + 4 * 10, 128, 102, ends=False),  # 241 // 12 = 20 operations
        b"\x09\x10\0\1": LineRow(0x1040, 128, 102, ends=False),  # fixed_advance_pc 16
        b"\x05\x81\x01\x06\x07\x0a\x0b\x0c\x05": None,  # column, statement, block, prologue, epilogue, ISA
        b"\x0d\x81\x01\x05\0\x02\x04\x07": None,  # not known, of two numbers; a discriminator
        b"\0\1\1": LineRow(0x1040, 128, 102, ends=True),
        b"\1": LineRow(0, 1, 1, ends=False),
    }
    data = b"".join(steps)
    program = SimpleNamespace(
        header=header, structs=SimpleNamespace(little_endian=True), stream=io.BytesIO(data),
        program_start_offset=0, program_end_offset=len(data),
    )  # fmt: skip
    assert [*line_rows(program)] == [row for row in steps.values() if row is not None]
    program.stream, program.program_end_offset = io.BytesIO(b"\x02\x80"), 2
    with pytest.raises(ValueError, match="cut short"):
        [*line_rows(program)]


def test_a_large_unit_has_its_lines(tmp_path: Path) -> None:
    """300,000 rows of one unit: pyelftools' own reader took more than the five seconds there were."""
    body = "".join(f" .loc 1 {1 + number % 60000}\n nop\n" for number in range(300_000))
    (tmp_path / "large.s").write_text(
        f' .file 1 "large.c"\n .text\n .globl large, outer\n .type large, @function\nlarge:\n{body}'
        " ret\n .size large, . - large\n .type outer, @function\nouter:\n .loc 1 77777\n nop\n .loc 1 77778\n"
        " ret\n .size outer, . - outer\n .section .note.GNU-stack\n"
    )
    path = tmp_path / "large.so"
    subprocess.run(["gcc", "-g", "-shared", "-o", path, tmp_path / "large.s"], check=True)
    found = listing(path)
    assert found.lines is not None
    assert found.lines.fault is None
    assert [row[2] for row in found.lines.rows] == [77777, 77778]


def test_a_table_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that counts 2**56 directories of no bytes each."""
    monkeypatch.setattr(source_lines, "_SECONDS", 1)
    path = made(tmp_path, "-gdwarf-5")
    section = next(section for section in inspect(path).sections if section.name == ".debug_line")
    data = bytearray(path.read_bytes())
    at = (
        section.file_offset + 4 + 2 + 1 + 1 + 4
    )  # unit_length, version, address and selector size, header_length
    formats = at + 6 + 12  # behind the lengths of the standard opcodes
    data[formats : formats + 9] = b"\0" + b"\xff" * 7 + b"\x7f"
    path.write_bytes(data)
    found = listing(path)
    assert found.lines is not None
    assert found.lines.fault is not None
    assert len([*found.instructions]) > 5
