"""Kinds of relocation that compilers leave for ld.so to do once in a blue moon, and what none can do."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import miniloader
from miniloader.elf import ElfImage
from tests.oracle.comparer import Comparer

LOW = 0x6000_0000  # below 2 GiB, above the heap of a program at a fixed address, such as Debian's Python

_SOURCE = """
extern int getdate_err; /* of libc, and nobody has a copy of it that lies low */
char *target[3] = {(char *)target};
void *slot = &target[1];
void *far_slot = &getdate_err;
unsigned long guard = 0x1122334455667788;
int function(void) { return 5; }
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both slots have R_X86_64_64; ``patched`` gives one of them another kind."""
    directory = tmp_path_factory.mktemp("kinds")
    (directory / "made.c").write_text(_SOURCE)
    command: list[str | Path] = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-fno-toplevel-reorder",
        directory / "made.c",
    ]
    subprocess.run([*command, "-Wl,-z,now", "-o", directory / "libplain.so"], check=True)
    return directory / "libplain.so"


@pytest.fixture
def patched(plain: Path, tmp_path: Path) -> Callable[[str, int], Path]:
    def patch(slot: str, kind: int) -> Path:
        image = miniloader.inspect(plain)
        data = bytearray(plain.read_bytes())
        at = _row(image, _vaddr(image, slot))
        data[at + 8 : at + 12] = kind.to_bytes(4, "little")
        output = tmp_path / f"libpatched{kind}.so"
        output.write_bytes(data)
        return output

    return patch


def _vaddr(image: ElfImage, name: str) -> int:
    index = image.symbols.find(name)
    assert index is not None
    return int(image.symbols.rows["value"][index])


def _row(image: ElfImage, vaddr: int) -> int:
    """The file offset of the relocation of the word at ``vaddr``."""
    table = next(table for table in image.relocations.tables if table.name == "DT_RELA")
    number = int(np.flatnonzero(table.rows["offset"] == vaddr)[0])
    start = image.file_offset(image.dynamic.tags[7])  # DT_RELA
    assert start is not None
    return start + 24 * number


def word(library: miniloader.Library, name: str, size: int = 8) -> int:
    return int.from_bytes(ctypes.string_at(library.address(name), size), "little")


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        (1, 8, lambda target, slot: target + 8),  # 64
        (2, 4, lambda target, slot: (target + 8 - slot) % 2**32),  # PC32
        (4, 4, lambda target, slot: (target + 8 - slot) % 2**32),  # PLT32
        (10, 4, lambda target, slot: target + 8),  # 32
        (11, 4, lambda target, slot: target + 8),  # 32S
        (24, 8, lambda target, slot: (target + 8 - slot) % 2**64),  # PC64
        (32, 4, lambda target, slot: 24 + 8),  # SIZE32
        (33, 8, lambda target, slot: 24 + 8),  # SIZE64
        (6, 8, lambda target, slot: target),  # GLOB_DAT: no addend
        (7, 8, lambda target, slot: target),  # JUMP_SLOT
        (0, 8, lambda target, slot: 0),  # NONE: what the file has
    ],
)
def test_each_kind_below_four_gigabytes(
    patched: Callable[[str, int], Path], kind: int, size: int, expected: Callable[[int, int], int]
) -> None:
    with miniloader.load(patched("slot", kind), address=LOW) as library:
        assert word(library, "slot", size) == expected(library.address("target"), library.address("slot"))
        assert word(library, "guard") == 0x1122334455667788
        assert library.function("function")() == 5


@pytest.mark.parametrize("kind", [6, 7, 33])
def test_and_dlopen_does_the_same(patched: Callable[[str, int], Path], kind: int) -> None:
    with Comparer() as comparer:
        comparison = comparer.compare(str(patched("slot", kind)))
    assert comparison.both_load, comparison
    assert comparison.alike, comparison


@pytest.mark.parametrize("kind", [2, 10, 11])
def test_what_does_not_fit_32_bits_says_so(patched: Callable[[str, int], Path], kind: int) -> None:
    with pytest.raises(miniloader.LoadError, match=r"does not fit 32 bits.*rebuild it with -fPIC"):
        miniloader.load(patched("far_slot", kind), address=LOW if kind == 2 else None)


def test_a_copy_is_refused_with_its_reason(patched: Callable[[str, int], Path]) -> None:
    with pytest.raises(miniloader.LoadError, match=r"COPY of target: a library cannot ask for one"):
        miniloader.load(patched("slot", 5))
