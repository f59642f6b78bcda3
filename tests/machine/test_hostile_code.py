"""Numbers that lead out of a file's tables, and files that would take hours: what names and finds code."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from fixtures.build import build
from miniloader.elf import ElfImage, Source
from miniloader.elf.kinds.opening import open_image
from miniloader.elf.unwind_table import unwind_entries
from miniloader.errors import SymbolError
from miniloader.machine.decoding import Decoder
from miniloader.machine.find_code import locate
from miniloader.machine.names_at import Landmarks
from miniloader.machine.processors import PROCESSORS

_EM_386 = 3
_PT_GNU_EH_FRAME = 0x6474E550


@pytest.fixture
def demo() -> bytearray:
    return bytearray(build("demo").read_bytes())


def image_of(data: bytes) -> ElfImage:
    return open_image(Source.from_bytes(bytes(data)))


def segment(data: bytes, kind: str) -> int:
    """Where the program header of that type lies."""
    index = next(part.index for part in image_of(data).segments if part.type == kind)
    return 64 + 56 * index


def test_a_slot_whose_symbol_the_table_does_not_have_has_no_name(demo: bytearray) -> None:
    table = image_of(demo).relocations.tables[0]
    assert table.head > 0, "DT_RELACOUNT: symbols of these rows are not counted for the length of the table"
    vaddr, info = struct.unpack_from("<QQ", demo, table.file_offset)
    struct.pack_into("<Q", demo, table.file_offset + 8, 1 << 62 | info)
    slot = Landmarks(image_of(demo)).slot_at(vaddr)
    assert slot is not None
    assert (slot.relocation, slot.symbol) == ("R_X86_64_RELATIVE", None)


@pytest.mark.parametrize("encoding", [0x00, 0x04, 0x0B, 0x0C])
def test_an_unwind_table_that_ends_before_its_count_lists_nothing(demo: bytearray, encoding: int) -> None:
    header = segment(demo, "PT_GNU_STACK")
    place = image_of(demo).loads[1].file_offset
    demo[place : place + 4] = bytes([1, encoding, 0x03, 0x3B])  # 8 of 12 bytes: the pointer
    struct.pack_into("<IIQQQQQQ", demo, header, _PT_GNU_EH_FRAME, 4, place, place, place, 12, 12, 4)
    assert unwind_entries(image_of(demo)).tolist() == []


def test_a_got_that_no_386_can_have(demo: bytearray) -> None:
    """A file of 64 bits that says it is for one: its GOT may be said to be anywhere."""
    struct.pack_into("<H", demo, 18, _EM_386)
    names = image_of(demo).elffile.get_section(image_of(demo).header.shstrndx).data()
    at = demo.index(names) + names.index(b".text\0")
    demo[at : at + 5] = b".plt\0"  # where stubs are looked for
    dynamic = image_of(demo).segment("PT_DYNAMIC")
    assert dynamic is not None
    last = dynamic.file_offset + 16 * len(image_of(demo).dynamic.entries)
    struct.pack_into("<QQQQ", demo, last, 3, 2**64 - 8, 0, 0)  # DT_PLTGOT, DT_NULL
    image = image_of(demo)
    assert any(section.name == ".plt" for section in image.sections)
    assert list(Landmarks(image).stubs()) == []


def test_a_length_is_decimal_whatever_it_begins_with(demo: bytearray) -> None:
    landmarks = Landmarks(image_of(demo))
    start = landmarks.image.loads[1].vaddr
    assert locate(landmarks, f"{start:#x}:010").size == 10
    with pytest.raises(SymbolError, match="no symbol"):
        locate(landmarks, f"{start:#x}:{'9' * 5000}")


class Counted(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(part, bytes):
            Counted.copied += len(part)
            return Counted(part)
        return part


def test_data_among_code_is_copied_once_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the whole of it is not copied again for every word."""
    monkeypatch.setattr(Counted, "copied", 0)
    decoder = Decoder(PROCESSORS["AARCH64", 64], Counted(4099), 4096)
    assert [item.mnemonic for item in decoder.all([(4096, 8195, "data")])] == [".word"] * 1024 + [
        ".short", ".byte",
    ]  # fmt: skip
    assert Counted.copied <= 3 * 4099
