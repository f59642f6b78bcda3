"""The places of a file that a loader writes, against readelf: for each processor whose kinds are known."""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fixtures import build
from miniloader.elf import Source, read_image
from miniloader.elf.dynamic import DT_PLTGOT, DT_SYMTAB
from miniloader.elf.relocations import kind_name
from miniloader.evidence.file_facts import FileFacts
from miniloader.evidence.name_numbers import NameNumbers
from miniloader.evidence.slots import ARGUMENT, COPY, LOADER
from miniloader.machine.relocation import KINDS

COMMITTED = sorted({*build.ROOT.glob("miniloader/**/*.so"), *build.ROOT.glob("fixtures/prebuilt/*.so")})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_each_relocation_is_a_slot_of_its_kind(path: Path) -> None:
    image = read_image(Source.open(path))
    machine = image.header.machine
    facts = FileFacts(image.source, image, NameNumbers())
    if machine not in KINDS:
        assert facts.trouble.startswith(f"the relocation kinds of {machine}")
        assert len(facts.slots) == 0
        return
    relocated = facts.slots[(facts.slots["kind"] >= 0) & (facts.slots["what"] != ARGUMENT)]
    names = Counter(kind_name(machine, code) for code in relocated["kind"].tolist())
    listing = subprocess.run(["readelf", "-rW", path], capture_output=True, text=True, check=True).stdout
    listed = Counter(re.findall(r"^[0-9a-f]{8,} +[0-9a-f]{8,} (R_\w+)", listing, re.MULTILINE))
    unknown = {kind_name(machine, code) for code in set(relocated["kind"].tolist()) - KINDS[machine].keys()}
    assert unknown == set()
    assert names == listed


def test_blocks_of_riscv_are_counted_from_behind_their_beginning() -> None:
    """By 0x800: a word of TLS_DTPREL64 holds that less; two words of the GOT are the loader's."""
    path = build.REFERENCES["references", "riscv64"]
    image = read_image(Source.open(path))
    facts = FileFacts(image.source, image, NameNumbers())
    (table,) = [table for table in image.relocations.tables if table.name == "DT_RELA"]
    rows = table.rows[table.rows["type"] == 9]
    offsets = facts.slots[facts.slots["kind"] == 9]
    assert len(rows)
    assert offsets["addend"].tolist() == (rows["addend"] - 0x800).tolist()
    got = image.dynamic.tags[DT_PLTGOT]
    by_loader = facts.slots["vaddr"][facts.slots["what"] == LOADER]
    assert [got + 8 * word in by_loader for word in range(3)] == [True, True, False]


def test_what_copies_claim_neither_leads_out_of_tables_nor_takes_memory(tmp_path: Path) -> None:
    """A symbol that is not there, words at the end of all addresses, and a variable of 2**62 bytes."""
    path = tmp_path / "copies.so"
    data = bytearray(build.build("demo").read_bytes())
    image = read_image(Source.from_bytes(data))
    table = image.relocations.tables[0]
    assert table.head > 3, "DT_RELACOUNT: symbols of these rows are not counted for the length of the table"
    symbols = image.file_offset(image.dynamic.tags[DT_SYMTAB])
    assert symbols is not None
    struct.pack_into("<Q", data, symbols + 24 + 16, 1 << 62)
    copy = next(code for code, kind in KINDS[image.header.machine].items() if kind.formula == "copy")
    for row, (vaddr, symbol) in enumerate([(2**64 - 4, 1 << 20), (1 << 40, 1), (1 << 41, 1)]):
        struct.pack_into("<QQ", data, table.file_offset + 24 * row, vaddr, symbol << 32 | copy)
    path.write_bytes(data)
    image = read_image(Source.open(path))
    facts = FileFacts(image.source, image, NameNumbers())
    copied = facts.slots[facts.slots["what"] == COPY]
    assert (facts.trouble, 2 < len(copied) < 1 << 20) == ("", True)
    assert int(copied["vaddr"].max()) >= 2**64 - 8
