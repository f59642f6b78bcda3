"""What the disassembler does not know is said to be unknown, and nothing behind it is made up."""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import capstone
import numpy as np
import pytest
from numpy._core import _multiarray_umath

from miniloader.elf import inspect
from miniloader.elf.symbols import STT_FUNC
from miniloader.elf.unwind_table import unwind_entries
from miniloader.lab.disassembly import disassembly_of
from miniloader.machine.disassembly import Instruction, disassemble
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmarks
from miniloader.machine.x86_length import vector_length
from miniloader.report.disasm import as_json, page
from miniloader.report.text import plain

#: 0f 04 is no instruction: nothing says how long it is.  What follows it begins as a long instruction would,
#: so that whoever guesses swallows the call.
UNKNOWN = """
    .text
    .globl resumes, follows
    .type resumes, @function
    .type follows, @function
resumes:
    .cfi_startproc
    test %edi, %edi
    je 1f
    .byte 0x0f, 0x04
    .byte 0x48
1:  call follows@plt
    .byte 0x62, 0xf5, 0x6c, 0x18, 0x5d, 0xc2
    ret
    .byte 0x0f, 0x04, 0x48, 0xb8
    .size resumes, .-resumes
    .cfi_endproc
follows:
    ret
    .size follows, .-follows
"""


def made(directory: Path) -> Landmarks:
    output = directory / "unknown.so"
    command = ["gcc", "-shared", "-x", "assembler", "-", "-o", output]
    subprocess.run(command, input=UNKNOWN, text=True, check=True)
    return Landmarks(inspect(output))


def test_it_goes_on_where_an_instruction_is_known_to_begin(tmp_path: Path) -> None:
    landmarks = made(tmp_path)
    listing = disassembly_of(landmarks, "resumes")
    rows = [(one.mnemonic, one.bytes.hex()) for one in listing.instructions]
    start = listing.span.vaddr
    assert rows[2:3] == [("(unknown)", "0f0448")]  # up to the branch's target
    assert [mnemonic for mnemonic, _ in rows] == [
        "test",
        "je",
        "(unknown)",
        "call",
        "(unknown)",
        "ret",
        "(unknown)",
    ]
    assert rows[4][1] == "62f56c185dc2"  # as long as its encoding says
    assert rows[6][1] == "0f0448b8"  # up to the end of the function
    call = next(one for one in listing.instructions if one.mnemonic == "call")
    assert call.target is not None
    assert call.target.name == "follows@plt"
    whole = CodeRange("both", start, listing.span.size + 1, whole=False)
    assert [one.mnemonic for one in disassemble(landmarks, whole)][-2:] == ["(unknown)", "ret"]
    said = [plain(line) for line in page(listing, 80)]
    assert any("3 places, 13 bytes in all, that the disassembler does not know" in line for line in said)
    assert [row["known"] for row in as_json(listing)["instructions"]] == [
        row[0] != "(unknown)" for row in rows
    ]


@pytest.mark.parametrize(
    ("code", "bits", "length"),
    [
        ("62f56c185dc2", 64, 6),
        ("62b57e08104c7420", 64, 8),  # with SIB and one byte of displacement
        ("62f57608580d8d621100", 64, 10),  # relative to rip
        ("62f36c48c2c000", 64, 7),  # with an immediate
        ("c5f877", 64, 3),  # vzeroupper
        ("c4e3fd00c04e", 64, 6),
        ("c5fb10", 64, None),  # cut
        ("c50102", 32, None),  # lds
        ("0f04", 64, None),
        ("62f47c18", 64, None),  # a map that may have immediates or not
    ],
)
def test_the_length_that_the_encoding_settles(code: str, bits: int, length: int | None) -> None:
    assert vector_length(bytes.fromhex(code), bits) == length


def test_lengths_are_capstones_for_what_it_knows() -> None:
    """Every vector instruction of numpy's that capstone knows is as long as its encoding says."""
    image = inspect(_multiarray_umath.__file__)
    section = next(section for section in image.sections if section.name == ".text")
    code = bytes(image.read(section.vaddr, section.size))
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    compared = set()
    for match in re.finditer(rb"[\xc4\xc5\x62]", code):
        at = match.start()
        insn = next(engine.disasm_lite(code[at : at + 15], 0, 1), None)
        if insn is not None and insn[2].startswith("v") and len(compared) < 20_001:
            assert vector_length(code[at : at + 15], 64) == insn[1], code[at : at + 15].hex()
            compared.add(code[at : at + insn[1]])
    assert len(compared) > 20_000


def functions(landmarks: Landmarks) -> Iterator[CodeRange]:
    """The functions of ``.symtab`` or of the unwinder's table: all that are not too long."""
    static = landmarks.tables[1]
    index = np.flatnonzero((static.type == STT_FUNC) & (static.rows["size"] > 0) & (static.rows["shndx"] > 0))
    if len(index):
        for vaddr, size in sorted(
            set(zip(static.rows["value"][index].tolist(), static.rows["size"][index].tolist(), strict=True))
        ):
            yield CodeRange(hex(vaddr), vaddr, size)


def test_numpys_newest_instructions(objdump) -> None:
    """Where each instruction begins is objdump's; no call and no ret is made up, and none is missing."""
    landmarks = Landmarks(inspect(_multiarray_umath.__file__))
    every = [*functions(landmarks)]
    if not every:
        pytest.skip("this machine lacks a numpy with symbols")
    section = next(section for section in landmarks.image.sections if section.name == ".text")
    code = bytes(landmarks.image.read(section.vaddr, section.size))
    newest = [section.vaddr + match.start() for match in re.finditer(rb"\x62.[\x7c\x6c]\x18[\x5d\x5f]", code)]
    starts = [span.vaddr for span in every]
    hit = {every[bisect_right(starts, vaddr) - 1] for vaddr in newest[::20]}
    if not hit:
        pytest.skip("this machine lacks a numpy with AVX512-FP16")
    unknown = compared = 0
    for span in [*sorted(hit, key=lambda span: span.size)[:30], *every[:: max(len(every) // 12, 1)]]:
        ours = disassemble(landmarks, span)
        lines = objdump(landmarks.image.path, start=span.vaddr, stop=span.end).lines
        assert [one.vaddr for one in ours] == sorted(lines), span.name
        theirs = [at for at, line in lines.items() if re.match(r"(bnd |notrack )?(ret|call)", line.text)]
        assert leaving(ours) == theirs
        unknown += sum(not one.known for one in ours)
        compared += len(ours)
    assert compared > 2000
    assert unknown > 10


def leaving(instructions: tuple[Instruction, ...]) -> list[int]:
    return [one.vaddr for one in instructions if one.mnemonic.split()[-1] in ("ret", "call")]


def test_the_unwinders_table_is_readelfs(readelf_frames) -> None:
    for path in ("/lib/x86_64-linux-gnu/libc.so.6", _multiarray_umath.__file__):
        if Path(path).exists():
            image = inspect(path)
            assert unwind_entries(image).tolist() == sorted(readelf_frames(path))


def test_megabytes_of_code_come_one_by_one(tmp_path: Path) -> None:
    output = tmp_path / "large.so"
    source = ".text\n.globl large\n.type large, @function\nlarge: .fill 3000000, 3, 0x00c08548\n ret\n"
    source += ".size large, .-large\n"
    command = ["gcc", "-shared", "-x", "assembler", "-", "-o", output]
    subprocess.run(command, input=source, text=True, check=True)
    landmarks = Landmarks(inspect(output))
    assert locate(landmarks, "large").size == 9_000_001
    listing = disassembly_of(landmarks, "large")
    lines = page(listing, None)
    said = [plain(next(lines)) for _ in range(6000)]  # the end is not waited for
    assert said[-1].split()[-3:] == ["test", "rax,", "rax"]
