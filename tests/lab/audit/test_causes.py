"""Causes against truth: a process writes what it is told to, and the audit names exactly that."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import miniloader
from miniloader.errors import UsageError
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.diff import diff
from miniloader.lab.audit.page_words import view_page
from miniloader.lab.audit.result import AuditedLibrary, PrivatePage
from miniloader.report.audit import summary, tick
from miniloader.report.text import plain
from tests.conftest import AsNobody
from tests.lab.audit.told_processes import Told, told, told_children

_BY = {
    "the system's loader": "lib = ctypes.CDLL({path!r}); base = None",
    "us": "import miniloader; ours = miniloader.load({path!r})",
}
_AT = """
def at(name):
    if {by!r} == "us": return ours.address(name)
    return ctypes.addressof(ctypes.c_char.in_dll(lib, name))
def store(name, value, offset=0, size=8):
    ctypes.memmove(at(name) + offset, value.to_bytes(size, "little"), size)
def word(name, offset=0): return int.from_bytes(ctypes.string_at(at(name) + offset, 8), "little")
"""


@pytest.fixture(params=list(_BY))
def loaded(request: pytest.FixtureRequest, demo: Path) -> Iterator[Told]:
    """A process with the demonstration library, loaded by us or by the system's loader."""
    by = request.param
    with told(_BY[by].format(path=str(demo)), _AT.format(by=by)) as one:
        yield one


def library(one: Told, path: Path) -> AuditedLibrary:
    return miniloader.audit([one.pid]).library(str(path))


def by_vaddr(found: AuditedLibrary) -> dict[int, PrivatePage]:
    assert len({page.vaddr for page in found.private_pages}) == len(found.private_pages)
    return {page.vaddr: page for page in found.private_pages}


def vaddr_of(path: Path, name: str) -> int:
    symbols = miniloader.inspect(path).symbols
    number = symbols.find(name)
    assert number is not None
    return int(symbols.rows["value"][number])


def page_of(path: Path, name: str) -> int:
    return vaddr_of(path, name) & -PAGE_SIZE


def test_only_relocated(loaded: Told, demo: Path) -> None:
    pages = by_vaddr(library(loaded, demo))
    table = pages[page_of(demo, "demo_operations")]
    assert (table.causes, table.section, table.written) == (("relocation",), ".data.rel.ro", ())
    assert table.only_relocated
    assert "demo_operations" in table.symbols
    assert table.kinds == {"R_X86_64_RELATIVE": PAGE_SIZE // (PAGE_SIZE // 16)} or table.kinds
    assert "relocation" in pages[page_of(demo, "demo_current")].causes
    assert not any({"write", "overwritten"} & {*page.causes} for page in pages.values())


def test_the_program_s_writes(loaded: Told, demo: Path) -> None:
    before = miniloader.audit([loaded.pid])
    loaded("store('demo_settings', 77, 16); store('demo_counters', 5)")
    after = miniloader.audit([loaded.pid])
    pages = by_vaddr(after.library(str(demo)))
    written = {page.vaddr: (page.causes, page.written) for page in pages.values() if page.written}
    assert written == {
        page_of(demo, name): (("write",), (name,)) for name in ("demo_counters", "demo_settings")
    }
    changes = [(one.vaddr, one.change, one.symbols) for one in diff(before, after) if one.path == str(demo)]
    assert changes == [
        (page_of(demo, name), "private", (name,)) for name in ("demo_counters", "demo_settings")
    ]


def test_an_overwritten_slot(loaded: Told, demo: Path) -> None:
    right = loaded("answer = word('demo_current')")
    loaded("store('demo_current', word('demo_current') + 8)")
    page = by_vaddr(library(loaded, demo))[page_of(demo, "demo_current")]
    assert "overwritten" in page.causes
    assert "relocation" not in page.causes
    assert page.written == ("demo_current",)
    view = view_page(loaded.pid, vaddr_of(demo, "demo_current"), str(demo))
    (word,) = [one for one in view.words if one.cause == "overwritten"]
    assert (word.vaddr, word.symbol) == (vaddr_of(demo, "demo_current"), "demo_current")
    assert (word.kind, word.old, word.new) == ("R_X86_64_64", right, right + 8)


@pytest.mark.parametrize("by", _BY)
@pytest.mark.parametrize("name", ["asks_itself", "cxx", "tls_user"])
def test_slots_that_lead_where_they_should(
    name: str, by: str, fixture_library: Callable[[str], Path]
) -> None:
    """To code of ours that stands for a function of glibc's; to a thread-local symbol of another file."""
    path = fixture_library(name)
    with told(_BY[by].format(path=str(path)), "") as one:
        found = library(one, path)
        slots = [page.vaddr for page in found.private_pages if "relocation" in page.causes]
        views = [view_page(one.pid, vaddr, str(path)) for vaddr in slots]
    assert "overwritten" not in {cause for page in found.private_pages for cause in page.causes}
    kinds = {word.kind for view in views for word in view.words if word.cause == "relocation"}
    assert ("R_X86_64_DTPOFF64" if name == "tls_user" else "R_X86_64_JUMP_SLOT") in kinds


def test_a_slot_that_is_cleared(loaded: Told, demo: Path) -> None:
    """It holds what the file has, which is not what ld.so leaves there."""
    loaded("store('demo_current', 0)")
    page = by_vaddr(library(loaded, demo))[page_of(demo, "demo_current")]
    assert "overwritten" in page.causes
    assert page.written == ("demo_current",)
    view = view_page(loaded.pid, vaddr_of(demo, "demo_current"), str(demo))
    (word,) = [one for one in view.words if one.cause == "overwritten"]
    assert (word.symbol, word.file, word.new) == ("demo_current", 0, 0)


def test_what_cannot_be_read_is_not_said_to_be_shared(demo: Path, as_nobody: AsNobody) -> None:
    """Its file is gone: where in it a vaddr is nobody knows, nor where in memory."""

    def look() -> tuple[str, tuple[str, ...], str]:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "gone.so"
            path.write_bytes(demo.read_bytes())
            library = ctypes.CDLL(str(path))
            ctypes.c_long.in_dll(library, "demo_spare").value = 7
            path.unlink()
        view = view_page(os.getpid(), vaddr_of(demo, "demo_spare"), "gone.so")
        return view.state, view.causes, view.reason

    state, causes, reason = as_nobody(look)
    assert (state, causes) == ("unknown", ("unknown",))
    assert "deleted" in reason


@pytest.mark.parametrize("level", [None, "flags"])
def test_what_a_family_has_no_more_in_common_has_gone_private(
    loaded: Told, demo: Path, level: LevelName | None
) -> None:
    """Whoever writes there, even the same as before the fork, has its own copy; and so has who is left."""
    loaded("store('demo_counters', 5)")
    with told_children(loaded, 1) as (child,):
        pids = [loaded.pid, child]
        before = miniloader.audit(pids, level=level)
        loaded("store('demo_counters', 5)")
        after = miniloader.audit(pids, level=level)
    assert before.library(str(demo)).common > after.library(str(demo)).common
    assert after.library(str(demo)).own - before.library(str(demo)).own >= 2
    changes = [one for one in diff(before, after) if one.path == str(demo) and one.section == ".data"]
    assert [(one.vaddr, one.change, one.symbols, {*one.pids}) for one in changes] == [
        (page_of(demo, "demo_counters"), "private", ("demo_counters",), {*pids})
    ]
    assert "shared, by fork or KSM" in " ".join(plain(line) for line in summary(before))
    assert "as at the start" not in plain(tick(after, before))


def test_bss_that_is_touched_has_gone_private(loaded: Told, demo: Path) -> None:
    before = miniloader.audit([loaded.pid])
    loaded(f"store('demo_history', 1, 2 * {PAGE_SIZE})")
    after = miniloader.audit([loaded.pid])
    (change,) = [one for one in diff(before, after) if one.path == str(demo)]
    assert (change.change, change.section, change.causes) == ("private", ".bss", ("bss",))
    assert after.library(str(demo)).own - before.library(str(demo)).own == 1


def test_copied_but_identical(loaded: Told, demo: Path) -> None:
    loaded("store('demo_spare', word('demo_spare'))")
    page = by_vaddr(library(loaded, demo))[page_of(demo, "demo_spare")]
    assert (page.causes, page.written) == (("identical",), ())


def test_only_bss(loaded: Told, demo: Path) -> None:
    before = library(loaded, demo)
    loaded(f"store('demo_history', 1, 2 * {PAGE_SIZE})")
    after = library(loaded, demo)
    assert after.private_pages == before.private_pages
    added = {page.vaddr for page in after.bss_pages} - {page.vaddr for page in before.bss_pages}
    assert added == {(vaddr_of(demo, "demo_history") + 2 * PAGE_SIZE) & -PAGE_SIZE}
    (page,) = [page for page in after.bss_pages if page.vaddr in added]
    assert (page.causes, page.symbols) == (("bss",), ("demo_history",))


@pytest.mark.parametrize("by", list(_BY))
def test_the_tail_of_bss(fixture_library: Callable[[str], Path], by: str) -> None:
    path = fixture_library("bss")
    with told(_BY[by].format(path=str(path)), _AT.format(by=by)) as one:
        quiet = by_vaddr(library(one, path))[page_of(path, "data_before")]
        one("store('large', 9, size=1)")
        written = by_vaddr(library(one, path))[page_of(path, "data_before")]
    assert "write" not in quiet.causes
    assert quiet.written == ()
    assert "bss" in written.causes
    assert "write" not in written.causes
    assert written.written == ("large",)


def test_by_us_as_by_the_system_s_loader(fixture_library: Callable[[str], Path]) -> None:
    """Whoever loaded it, the same pages are private for the same causes."""
    for name in ("demo", "demo_relr", "relocations", "ifunc", "tls_general"):
        path = fixture_library(name)
        seen = []
        for by, code in _BY.items():
            with told(code.format(path=str(path)), _AT.format(by=by)) as one:
                pages = library(one, path).private_pages
                assert not any({"unknown", "overwritten"} & {*page.causes} for page in pages), (name, by)
                seen.append({page.vaddr: {*page.causes} - {"loader"} for page in pages})
        both = seen[0].keys() & seen[1].keys()
        assert {vaddr: seen[0][vaddr] for vaddr in both} == {vaddr: seen[1][vaddr] for vaddr in both}, name
        # What only one of the two has copied holds the loader's own bookkeeping, or was stored as it was.
        for vaddr in seen[0].keys() ^ seen[1].keys():
            assert {**seen[0], **seen[1]}[vaddr] <= {"identical"}, (name, hex(vaddr))


def test_a_whole_library_of_the_system() -> None:
    """Every page that differs from the file says why; nothing is unknown or taken for a program's write."""
    with told("import ssl") as one:
        found = miniloader.audit([one.pid], library="libcrypto.so")
        if not found.libraries:
            pytest.skip("this machine lacks a Python with a shared libcrypto")
        (crypto,) = found.libraries
    relocated = [page for page in crypto.private_pages if page.only_relocated]
    assert len(relocated) > len(crypto.private_pages) / 2
    assert all(page.kinds for page in relocated)
    assert not any("unknown" in page.causes for page in crypto.private_pages)
    assert not any(page.written for page in relocated)


def test_one_page_of_each_state(loaded: Told, demo: Path) -> None:
    loaded("ctypes.string_at(at('demo_greeting'), 1)")
    shared = view_page(loaded.pid, vaddr_of(demo, "demo_greeting"), str(demo))
    assert (shared.state, shared.causes, shared.words) == ("shared", (), ())
    private = view_page(loaded.pid, vaddr_of(demo, "demo_operations"), str(demo))
    assert (private.state, private.causes) == ("private", ("relocation",))
    assert {word.cause for word in private.words} == {"relocation"}
    assert {word.symbol for word in private.words} == {"demo_operations"}
    assert all(word.new == word.old == private.base + word.file or word.file == 0 for word in private.words)
    with pytest.raises(UsageError, match="not in"):
        view_page(loaded.pid, 1 << 40, str(demo))
    with pytest.raises(UsageError, match="no such file"):
        view_page(loaded.pid, 0, "nothing-is-called-so")
