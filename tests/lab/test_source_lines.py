"""Lines of source code against binutils' addr2line: in the file, in one split off it, in broken tables."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path

import pytest

from miniloader import cli
from miniloader.elf import inspect
from miniloader.lab import source_lines
from miniloader.lab.disassembly import Disassembly, disassembly_of
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
    """400 MB of zeros in a file of two: it may take 256 MiB, and some of the file's size."""
    if shutil.which("objcopy") is None:
        pytest.skip("this machine lacks objcopy")
    path, packed, section = made(tmp_path, "-g"), tmp_path / "packed", ".debug_str"
    stream = zlib.compressobj(1)
    zeros = b"".join(stream.compress(bytes(1 << 20)) for _ in range(400)) + stream.flush()
    packed.write_bytes(struct.pack("<IIQQ", 1, 0, 400 << 20, 1) + zeros)  # Elf64_Chdr, ELFCOMPRESS_ZLIB
    subprocess.run(["objcopy", "--update-section", f"{section}={packed}", path], check=True)
    image, data = inspect(path), bytearray(path.read_bytes())
    (number,) = (each.index for each in image.sections if each.name == section)
    flags = image.header.shoff + 64 * number + 8
    data[flags + 1] |= 8  # SHF_COMPRESSED
    path.write_bytes(data)
    found = listing(path)
    assert found.lines is not None
    assert found.lines.fault is not None
    assert len([*found.instructions]) > 5


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
