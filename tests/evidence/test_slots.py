"""The places of a file that a loader writes, against readelf: for each processor whose kinds are known."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fixtures import build
from miniloader.elf import Source, read_image
from miniloader.elf.dynamic import DT_PLTGOT
from miniloader.elf.relocations import kind_name
from miniloader.evidence.slots import ARGUMENT, LOADER, FileFacts, NameNumbers
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
