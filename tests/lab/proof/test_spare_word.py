"""The word that workers write: what is chosen from which library, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from miniloader.elf.plan import Span
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.proof.spare_word import Word, choose_word


def chosen(path: Path | str, fresh: str = "", *, idle: bool = True) -> Word | None:
    """For a library whose pages (numbers separated by spaces) are still the file's own."""
    image = miniloader.inspect(path)
    plan = image.plan(PAGE_SIZE)
    pages = [plan.start + int(page) * PAGE_SIZE for page in fresh.split()]
    return choose_word(image, plan, pages, idle=idle)


def test_a_fresh_page_comes_first(demo: Path) -> None:
    assert chosen(demo, "0 1 5 9 10") == Word(0x9000, fresh=True, padding=False, section=".data")
    assert chosen(demo, "11 9") == Word(0xB008, fresh=True, padding=True, section=".data")


def test_padding_comes_before_the_library_s_own(demo: Path) -> None:
    assert chosen(demo) == Word(0xB008, fresh=False, padding=True, section=".data")
    assert chosen(demo, "9", idle=False) == Word(0xB008, fresh=False, padding=True, section=".data")


def test_without_section_headers_only_the_end_of_a_segment_is_padding(
    fixture_library: Callable[[str], Path],
) -> None:
    assert chosen(fixture_library("demo_no_sections"), "9") == Word(0x9000, True, False, "")
    word = chosen(fixture_library("demo_no_sections"), idle=False)
    assert word == Word(0xE020, fresh=False, padding=True, section="")
    assert word.place == "padding"


def test_places_in_words(demo: Path) -> None:
    assert Word(1, True, False, ".data").place == "in .data"
    assert Word(1, True, True, ".data").place == "padding after .data"
    assert Word(1, True, False, "").place == "data"


@pytest.mark.parametrize(
    "name", ["demo", "demo_relr", "demo_norelro", "misbehaves", "cxx", "bss", "tls_general"]
)
def test_padding_is_described_by_nothing(fixture_library: Callable[[str], Path], name: str) -> None:
    """No section, no symbol, and writable once RELRO is protected."""
    path = fixture_library(name)
    image = miniloader.inspect(path)
    word = chosen(path)
    assert word is not None
    assert word.padding
    assert word.vaddr % 8 == 0
    spans = [Span(section.vaddr, section.end) for section in image.sections if section.allocated]
    assert not any(span.start < word.vaddr + 8 and word.vaddr < span.end for span in spans)
    assert image.symbols.at(word.vaddr) is None
    plan = image.plan(PAGE_SIZE)
    mapping = plan.at(word.vaddr)
    assert mapping is not None
    assert mapping.protection == "rw-"
    assert not plan.relro.start <= word.vaddr < plan.relro.end
