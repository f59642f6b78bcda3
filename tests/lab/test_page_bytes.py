"""What pages hold in memory, beside what the file has."""

from __future__ import annotations

from pathlib import Path

import miniloader
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.library_study import LibraryStudy
from miniloader.lab.page_bytes import Contents, changed_pages, file_page


def test_words_that_differ_are_told_by_step_and_process(demo: Path) -> None:
    image = miniloader.inspect(demo)
    plan = image.plan()
    start = next(mapping.start for mapping in plan.mappings if mapping.kind == "file")
    original = file_page(image, plan, start)
    assert original == demo.read_bytes()[:PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
    copy = original[:16] + b"\xff" * 8 + original[24:]
    (page,) = changed_pages(image, plan, [Contents("now", (start,), ((original,), (copy,), (None,)))])
    assert (page.vaddr, page.in_file) == (start, original)
    assert page.words == {"now": [[], [(16, b"\xff" * 8)], None]}


def test_a_page_of_no_file_is_zeros(demo: Path) -> None:
    image = miniloader.inspect(demo)
    plan = image.plan()
    bss = next(mapping.start for mapping in plan.mappings if mapping.kind == "zero")
    assert file_page(image, plan, bss) == bytes(PAGE_SIZE)


def test_a_proof_of_a_file_that_has_changed_has_no_study(demo: Path, tmp_path: Path) -> None:
    library = tmp_path / "libdemo.so"
    library.write_bytes(demo.read_bytes())
    proof = miniloader.prove(library, 2)
    library.unlink()
    assert proof.study is None
    library.write_bytes(demo.read_bytes())
    assert isinstance(miniloader.prove(library, 2).study, LibraryStudy)
