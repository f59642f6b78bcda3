"""Segments that share a page, or do not fit pages: loaded where dlopen(3) does and works, else refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures.mutate import map_of
from miniloader.errors import ElfError
from tests.loader.conftest import call_in_child

SOURCE = """
__attribute__((section(".early"))) int early = 5;
__attribute__((section(".constant"))) const int constant = 6;
int counter = 30, zeros[1200];
int answer(void)
{
    for (int i = 0; i < 1200; i++)
        if (zeros[i])
            return -1;
    return ++counter + ++early + constant;
}
"""
RIGHT = 31 + 6 + 6
#: What each segment has in it, and its rights.
PARTS = {
    "text": ("5", ".text : {*(.text*)} :text"),
    "data": (
        "6",
        ".dynamic : {*(.dynamic)} :data :dynamic .got : {*(.got .got.*)} :data .data : {*(.data*)} :data",
    ),
    "bss": ("6", ".bss : {*(.bss .bss.* COMMON)} :bss"),
    "early": ("6", ".early : {*(.early)} :early"),
    "constant": ("4", ".constant : {*(.constant)} :constant"),
}
HEAD = "".join(f".{name} : {{*(.{name}*)}} :head " for name in ("hash", "dynsym", "dynstr", "rela"))


def compiled(directory: Path, *options: str) -> Path:
    """The library, as linked with ``options``."""
    source, library = directory / "parts.c", directory / "parts.so"
    source.write_text(SOURCE)
    command = ["gcc", "-shared", "-fPIC", "-O0", "-nostdlib", "-o", library, source, "-Wl,--hash-style=sysv"]
    subprocess.run([*command, "-Wl,--build-id=none", *options], check=True, capture_output=True)
    return library


def laid_out(directory: Path, **vaddrs: int) -> Path:
    """The library, whose segments are at these vaddrs, in this order; the first has its headers."""
    segments = " ".join(f"{name} PT_LOAD FLAGS({PARTS[name][0]});" for name in vaddrs)
    parts = " ".join(f". = {vaddr}; {PARTS[name][1]}" for name, vaddr in vaddrs.items())
    (directory / "script").write_text(
        f"PHDRS {{ head PT_LOAD FILEHDR PHDRS FLAGS(4); {segments}"
        f" dynamic PT_DYNAMIC; stack 0x6474e551 FLAGS(6); }}"
        f"SECTIONS {{ . = SIZEOF_HEADERS; {HEAD} {parts} /DISCARD/ : {{*(.comment .note* .eh_frame*)}} }}"
    )
    return compiled(directory, f"-Wl,-T,{directory}/script,-z,max-page-size=0x1000")


def bss_of_same_page(directory: Path) -> Path:
    """Its bss is a segment of its own, for which the file's page is mapped that the data has, too."""
    library = laid_out(directory, text=0x1000, data=0x2000, bss=0x2800, early=0x5000, constant=0x6000)
    data = bytearray(library.read_bytes())
    segments = map_of(bytes(data)).regions["segments"]
    row = segments.offset + 3 * segments.size
    assert int.from_bytes(data[row + 16 : row + 24], "little") == 0x2800  # p_vaddr
    data[row + 8 : row + 16] = (0x2800).to_bytes(8, "little")  # p_offset
    library.write_bytes(data)
    return library


def script(vaddrs: dict[str, int]) -> Callable[[Path], Path]:
    return lambda directory: laid_out(directory, **vaddrs)


def linked(*options: str) -> Callable[[Path], Path]:
    return lambda directory: compiled(directory, *options)


def dlopened(library: Path) -> int | str:
    """What who opens the library with ld.so and calls it gets: its answer, an error, or a death."""
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    if child.returncode < 0:
        return "dies"
    return int(child.stdout) if child.returncode == 0 else child.stderr.splitlines()[-1]


def loaded(library: Path) -> int:
    def call() -> int:
        with miniloader.load(library) as mapped:
            answer: Any = mapped.function("answer")
            return int(answer())

    return call_in_child(call)


def refusal(library: Path) -> str:
    """Why it is not loaded; nobody is killed by trying."""
    with pytest.raises(ElfError) as refused:
        miniloader.load(library, init=False)
    return str(refused.value)


PLAIN = {"text": 0x1000, "data": 0x2000, "bss": 0x3000, "early": 0x5000, "constant": 0x6000}
SAME_RIGHTS = {"text": 0x1000, "data": 0x2000, "early": 0x2800, "bss": 0x3000, "constant": 0x5000}
MORE_RIGHTS = {"text": 0x1000, "constant": 0x2000, "data": 0x2800, "early": 0x4000, "bss": 0x5000}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(linked(), id="as the linker does it"),
        pytest.param(script(PLAIN), id="a page of its own for each"),
        pytest.param(script(SAME_RIGHTS), id="two with the same rights in a page"),
        pytest.param(script(MORE_RIGHTS), id="the second has more rights"),
        pytest.param(bss_of_same_page, id="bss in the page of data"),
    ],
)
def test_what_works_with_ld_so_is_loaded(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    library = make(tmp_path)
    assert dlopened(library) == RIGHT
    assert loaded(library) == RIGHT


@pytest.mark.parametrize(
    ("field", "vaddrs"),
    [
        ("PT_LOAD[2].p_vaddr: .* its right to run is lost", {**PLAIN, "data": 0x1800}),
        (
            "PT_LOAD[3].p_vaddr: .* its right to be written is lost",
            {"text": 0x1000, "data": 0x2000, "constant": 0x2800, "early": 0x3000, "bss": 0x4000},
        ),
        ("PT_LOAD[3].p_vaddr: .* its content is lost", {**PLAIN, "bss": 0x2800}),
        ("PT_LOAD[4].p_vaddr: .* the zeros of its bss are lost", {**PLAIN, "bss": 0x3000, "early": 0x4c00}),
    ],
    ids=["code under data", "data under constants", "data under zeros", "zeros under data"],
)  # fmt: skip
def test_pages_that_cannot_be_of_both_are_refused(tmp_path: Path, field: str, vaddrs: dict[str, int]) -> None:
    library = laid_out(tmp_path, **vaddrs)
    assert re.search(field.replace("[", r"\["), refusal(library))
    assert dlopened(library) != RIGHT  # ld.so maps it all the same, and this comes of it


@pytest.mark.parametrize("layout", ["-z,separate-code", "-z,noseparate-code", "-z,norelro"])
@pytest.mark.parametrize("size", [0x10, 0x100, 0x800])
def test_segments_for_smaller_pages_are_refused_as_by_ld_so(tmp_path: Path, size: int, layout: str) -> None:
    library = compiled(tmp_path, f"-Wl,-z,max-page-size={size:#x},{layout}")
    refused = dlopened(library)
    assert isinstance(refused, str)
    assert "not page-aligned" in refused or refused == "dies"  # before glibc 2.35
    assert ": PT_LOAD[" in refusal(library)


def test_the_last_segment_in_a_page_of_the_first_is_refused_as_ld_so_does(tmp_path: Path) -> None:
    library = laid_out(tmp_path, early=0xC00, text=0x1000, data=0x2000, bss=0x3000, constant=0x5000)
    data = bytearray(library.read_bytes())
    segments = map_of(bytes(data)).regions["segments"]
    assert dlopened(library) == loaded(library) == RIGHT
    first = segments.offset + segments.size  # that of `early` becomes the last of them
    last = first + 4 * segments.size
    row = bytes(data[first : first + segments.size])
    data[first:last] = data[first + segments.size : last + segments.size]
    data[last : last + segments.size] = row
    library.write_bytes(data)
    assert "not page-aligned" in str(dlopened(library))
    assert ": PT_LOAD[5].p_vaddr" in refusal(library)
