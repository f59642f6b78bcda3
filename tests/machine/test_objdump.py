"""Disassembly against objdump's: where instructions begin, their bytes, references, every PLT stub."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fixtures import build
from miniloader.elf import inspect
from miniloader.elf.symbols import STT_FUNC, STT_GNU_IFUNC
from miniloader.errors import LoadError
from miniloader.loader.surroundings import find_path
from miniloader.machine.disassembly import disassemble
from miniloader.machine.find_code import CodeRange, locate
from miniloader.machine.names_at import Landmarks

LIBRARIES = ("libz.so.1", "libm.so.6", "libcrypto.so.3", "libsqlite3.so.0")
#: How many functions of each library, at equal distances, are compared.
SAMPLE = 80
OTHERS = {machine: path for (_, machine), path in build.REFERENCES.items()}

#: What objdump calls differently.
ALIASES = {
    ("xchg", "nop"), ("fucomip", "fucompi"), ("fcomip", "fcompi"), ("fwait", "wait"), ("pushf", "pushfq"),
    ("popf", "popfq"), ("movs", "movsq"), ("movs", "movsb"), ("movs", "movsd"), ("stos", "stosq"),
    ("stos", "stosb"), ("stos", "stosd"), ("cmps", "cmpsb"), ("scas", "scasb"),
}  # fmt: skip
PREFIXES = {"bnd", "notrack", "rep", "repz", "repnz", "lock", "data16", "cs", "rex.W"}


@cache
def landmarks_of(name: str) -> Landmarks:
    try:
        path = find_path(name)
    except LoadError:
        pytest.skip(f"this machine lacks {name}")
    return Landmarks(inspect(path))


def tool_of(machine: str) -> str:
    """The objdump that knows ``machine``."""
    return build.MACHINES[machine].compiler.removesuffix("gcc") + "objdump"


def functions(landmarks: Landmarks) -> list[CodeRange]:
    """The functions of the dynamic symbol table that say how long they are, each place once."""
    table, found = landmarks.image.symbols, {}
    for index in np.flatnonzero(table.defined & np.isin(table.type, (STT_FUNC, STT_GNU_IFUNC))).tolist():
        version = table.version(index)
        name = table.name(index) + (f"@{version.name}" if version is not None else "")
        if table.rows["size"][index]:
            span = locate(landmarks, name)
            found[span.vaddr] = span
    return [found[vaddr] for vaddr in sorted(found)]


def sample(landmarks: Landmarks) -> list[CodeRange]:
    every = functions(landmarks)
    return every[:: max(len(every) // SAMPLE, 1)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_instructions_are_objdumps(library: str, objdump) -> None:
    landmarks = landmarks_of(library)
    lines = objdump(landmarks.image.path).lines
    compared = 0
    for span in sample(landmarks):
        instructions = disassemble(landmarks, span)
        theirs = sorted(vaddr for vaddr in range(span.vaddr, span.end) if vaddr in lines)
        # objdump takes FWAIT for a prefix of the x87 instruction after it.
        merged = {one.vaddr + 1 for one in instructions if one.mnemonic == "wait"}
        assert [one.vaddr for one in instructions if one.vaddr not in merged] == theirs, span.name
        assert b"".join(one.bytes for one in instructions) == landmarks.image.read(span.vaddr, span.size)
        for one in instructions:
            if one.vaddr in merged or one.mnemonic == "wait":
                continue
            line = lines[one.vaddr]
            assert one.bytes.hex() == line.octets, hex(one.vaddr)
            words = line.text.split()
            while len(words) > 1 and words[0] in PREFIXES:
                words.pop(0)
            mine = one.mnemonic.split()[-1]
            assert mine == words[0] or (words[0], mine) in ALIASES, hex(one.vaddr)
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_reference_is_where_objdump_sees_it(library: str, objdump) -> None:
    landmarks = landmarks_of(library)
    dump = objdump(landmarks.image.path)
    plt = {vaddr for vaddr, name in dump.heads.items() if name.endswith("@plt")}
    stubs = 0
    for span in sample(landmarks):
        for one in disassemble(landmarks, span):
            line = dump.lines.get(one.vaddr)
            if line is None or one.mnemonic == "nop":
                continue
            assert line.refers_to == (None if one.target is None else one.target.vaddr), hex(one.vaddr)
            if line.refers_to in plt:
                assert one.target is not None
                assert (one.target.kind, one.target.slot is not None) == ("plt", True)
                if not line.name.startswith("*ABS*"):  # an IFUNC's, which objdump does not name
                    assert one.target.name == line.name
                stubs += 1
    assert stubs > 10


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_plt_stub_is_objdumps(library: str, objdump) -> None:
    landmarks = landmarks_of(library)
    heads = objdump(landmarks.image.path).heads
    theirs = {vaddr: name for vaddr, name in heads.items() if name.endswith("@plt")}
    ours = {stub.vaddr: stub.slot for stub in landmarks.stubs()}
    assert ours.keys() == theirs.keys()
    for vaddr, name in theirs.items():
        slot = ours[vaddr]
        if slot.symbol is None:
            assert (slot.relocation, name) == ("R_X86_64_IRELATIVE", f"*ABS*+{slot.addend:#x}@plt")
        else:
            assert f"{slot.symbol}@plt" == name
            assert slot.relocation in ("R_X86_64_JUMP_SLOT", "R_X86_64_GLOB_DAT")


def same_octets(ours: bytes, theirs: str) -> bool:
    """Whether objdump's ``theirs`` are our bytes: for some processors it writes numbers, not bytes."""
    octets = bytes.fromhex(theirs)
    halves = b"".join(octets[at : at + 2][::-1] for at in range(0, len(octets), 2))
    return ours in (octets, octets[::-1], halves)


@pytest.mark.parametrize("machine", OTHERS)
def test_other_processors_are_objdumps(machine: str, objdump) -> None:
    landmarks = Landmarks(inspect(str(OTHERS[machine])))
    dump = objdump(OTHERS[machine], tool_of(machine))
    for span in functions(landmarks):
        instructions = disassemble(landmarks, span)
        theirs = [vaddr for vaddr in sorted(dump.lines) if span.vaddr <= vaddr < span.end]
        assert [one.vaddr for one in instructions] == theirs, span.name
        for one in instructions:
            line = dump.lines[one.vaddr]
            assert same_octets(one.bytes, line.octets), hex(one.vaddr)
            is_branch = re.match(r"\S+\s+(\S+, ?)*[0-9a-f]+ <", line.text) and "adrp" not in line.text
            if is_branch and not one.mnemonic.startswith((".", "ldr")):
                assert one.target is not None, hex(one.vaddr)
                assert one.target.vaddr == line.refers_to, hex(one.vaddr)
                if "@plt" in line.name:
                    assert one.target.name == line.name
    theirs_plt = {vaddr: name for vaddr, name in dump.heads.items() if name.endswith("@plt")}
    assert {stub.vaddr: f"{stub.slot.symbol}@plt" for stub in landmarks.stubs()} == theirs_plt


def test_the_cross_libraries_own_c_libraries(objdump) -> None:
    """Where Debian's cross compilers are: every PLT stub of libm of that processor."""
    looked = 0
    for machine in OTHERS:
        path = Path("/usr", build.MACHINES[machine].compiler.removesuffix("-gcc"), "lib", "libm.so.6")
        if not path.exists():
            continue
        landmarks = Landmarks(inspect(str(path)))
        heads = objdump(path, tool_of(machine)).heads
        stubs = {stub.vaddr for stub in landmarks.stubs()}
        assert stubs == {vaddr for vaddr, name in heads.items() if name.endswith("@plt")}
        looked += 1
    if not looked:
        pytest.skip("no cross compiler: no C library of another processor")
