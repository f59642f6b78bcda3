"""Every library of the machine, as readelf reads it and as we do."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from miniloader.elf import ElfImage, Source, read_image
from miniloader.errors import ElfError
from miniloader.report.symbols import symbol_list

SEGMENT = re.compile(
    r"^  (\S+|<unknown>: \w+) +(0x\w+) (0x\w+) 0x\w+ (0x\w+) (0x\w+) ([R ])([W ])([E ]) (\w+)$", re.MULTILINE
)
FIELDS = {"needed": "NEEDED", "soname": "SONAME", "runpath": "RUNPATH", "rpath": "RPATH"}
MACHINES = {
    "Advanced Micro Devices X86-64": "X86_64",
    "Intel 80386": "386",
    "AArch64": "AARCH64",
    "ARM": "ARM",
    "IBM S/390": "S390",
    "PowerPC": "PPC",
    "PowerPC64": "PPC64",
    "RISC-V": "RISCV",
    "Alpha": "ALPHA",
    "MIPS R3000": "MIPS",
    "Sparc v9": "SPARCV9",
}


def image_of(path: Path) -> ElfImage:
    return read_image(Source.open(path))


def header_field(said: str, name: str) -> str:
    found = re.search(rf"^  {re.escape(name)}: +(.*)$", said, re.MULTILINE)
    assert found, name
    return found[1]


def segments_of(said: str) -> list[tuple[Any, ...]]:
    rows = []
    for kind, offset, vaddr, filesz, memsz, r, w, x, align in SEGMENT.findall(said):
        flags = "".join(sign if shown != " " else "-" for sign, shown in (("r", r), ("w", w), ("x", x)))
        name = kind.removeprefix("<unknown>: ")
        rows.append((name, flags, *(int(value, 16) for value in (offset, vaddr, filesz, memsz, align))))
    return rows


def our_segments(image: ElfImage) -> list[tuple[Any, ...]]:
    # readelf leaves out the processor's name and all but 14 letters.
    prefix = f"PT_({image.header.machine}_(?!ATTRIBUTES))?"
    return [
        (
            re.sub(prefix, "", s.type)[:14], s.flags, s.file_offset, s.vaddr, s.filesz, s.memsz, s.align
        )
        for s in image.segments
    ]  # fmt: skip


def dynamic_of(said: str) -> dict[str, list[str]]:
    return {
        field: re.findall(rf"^ 0x\w+ \({tag}\) .*\[(.*)\]$", said, re.MULTILINE)
        for field, tag in FIELDS.items()
    }


def our_dynamic(image: ElfImage) -> dict[str, list[str]]:
    return {
        "needed": list(image.needed),
        "soname": [image.soname] if image.soname is not None else [],
        "runpath": [":".join(image.runpath)] if image.runpath else [],
        "rpath": [":".join(image.rpath)] if image.rpath else [],
    }


def has_dynamic(image: ElfImage) -> bool:
    """Whether the dynamic section is in the file; files of debugging information only have its header."""
    segment = image.segment("PT_DYNAMIC")
    if segment is None:
        return False
    return any(section.type == "SHT_DYNAMIC" for section in image.sections) or not image.sections


def test_headers_segments_and_dynamic_sections(every_library, readelf) -> None:
    compared = Counter[str]()
    different = []
    for path, answer in readelf("-hldnW", every_library):
        said = answer.decode(errors="replace")
        if "Number of program headers:         0" in said:
            continue  # an object file
        image = image_of(path)
        header = image.header
        theirs: dict[str, Any] = {
            "class": header_field(said, "Class"),
            "little": "little" in header_field(said, "Data"),
            "type": header_field(said, "Type").split()[0],
            "machine": MACHINES[header_field(said, "Machine")],
            "entry": int(header_field(said, "Entry point address"), 16),
            "segments": segments_of(said),
            "build_id": next(iter(re.findall(r"Build ID: (\w+)", said)), None),
        }
        ours: dict[str, Any] = {
            "class": f"ELF{header.elf_class}",
            "little": header.byte_order == "little",
            "type": header.type,
            "machine": header.machine,
            "entry": header.entry,
            "segments": our_segments(image),
            "build_id": image.build_id,
        }
        if has_dynamic(image):
            theirs |= dynamic_of(said)
            ours |= our_dynamic(image)
            compared["dynamic"] += 1
        compared[f"{header.machine} {header.elf_class}"] += 1
        different += [(path, key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]
        image.source.close()
    assert not different, different[:5]
    assert sum(compared.values()) > 100
    print(dict(compared))


#: Not the second and third kind of a MIPS relocation, which has up to three.
KIND = re.compile(rb"\n[0-9a-f]+ +[0-9a-f]+ (R_[A-Za-z0-9_]+|unrecognized: [0-9a-f]+) ")
RELR = re.compile(
    rb"(?:\n +|which relocate )(\d+) (?:offset|location)s?[:\n]"
)  # binutils before 2.43, and from it on


def test_relocations_by_kind(every_library, readelf) -> None:
    different = []
    total = 0
    for path, said in readelf("-rW", every_library, 25):
        image = image_of(path)
        if image.header.type != "DYN" or not has_dynamic(image):
            continue
        theirs = Counter(kind.decode().replace("unrecognized: ", "0x") for kind in KIND.findall(said))
        theirs["RELR"] += sum(map(int, RELR.findall(said)))
        try:
            ours = Counter(image.relocations.by_kind())
        except ElfError as error:
            different.append((path, error))
            continue
        total += ours.total()
        if +ours != +theirs:
            different.append((path, ours - theirs, theirs - ours))
        image.source.close()
    assert not different, different[:5]
    assert total > 10_000


SYMBOL = re.compile(
    r"^ +(\d+): ([0-9a-f]+) +(\d+|0x[0-9a-f]+) (\S+) +(\S+) +(\S+) +(?:\[.*?\] +)?(\w+)(?: (.*?))?$",
    re.MULTILINE,
)


def symbols_of(said: str) -> list[tuple[Any, ...]]:
    rows = []
    said = said.replace("<OS specific>: 10", "UNIQUE")  # in files whose EI_OSABI is not GNU's
    for index, value, size, kind, bind, visibility, section, name in SYMBOL.findall(said):
        plain = "" if kind == "SECTION" else re.sub(r" \(\d+\)$", "", name)
        kind = {"REGISTER": "13"}.get(kind, kind)  # of SPARC only
        rows.append((int(index), int(value, 16), int(size, 0), kind, bind, visibility, section, plain))
    return rows[1:]


def our_symbols(image: ElfImage) -> list[tuple[Any, ...]]:
    return [
        (
            index, symbol.value, symbol.size, symbol.type.upper(), symbol.bind.upper(),
            symbol.visibility.upper(), {"undefined": "UND", "absolute": "ABS"}.get(symbol.section),
            symbol.versioned_name,
        )
        for index, symbol in enumerate(symbol_list(image), 1)
    ]  # fmt: skip


def test_symbols_and_their_versions(every_library, readelf) -> None:
    sample = every_library[::12]
    different = []
    compared = Counter[str]()
    for path, answer in readelf("--dyn-syms -W", sample, 20):
        image = image_of(path)
        if image.header.type != "DYN" or not has_dynamic(image):
            continue
        theirs = symbols_of(answer.decode(errors="backslashreplace"))
        for ours, one in zip(our_symbols(image), theirs, strict=False):
            if ours != (*one[:6], one[6] if ours[6] else None, one[7]):
                different.append((path, ours, one))
        if len(image.symbols) - 1 != len(theirs):
            different.append((path, len(image.symbols) - 1, len(theirs)))
        compared[image.header.machine] += len(theirs)
        image.source.close()
    print(dict(compared))
    assert not different, different[:5]
    assert compared.total() > 1000
