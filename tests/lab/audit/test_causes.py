"""Causes against truth: a process writes what it is told to, and the audit names exactly that."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import miniloader
from fixtures import build
from miniloader.elf import inspect
from miniloader.elf.dynamic import DT_SONAME, DT_SYMTAB
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.diff import diff
from miniloader.lab.audit.explain import NOT_WRITABLE, stand_ins_in
from miniloader.lab.audit.page_words import view_page
from miniloader.lab.audit.result import AuditedLibrary, PrivatePage
from miniloader.native import STAND_INS
from miniloader.native.gate import processor
from miniloader.report.audit import sentence
from miniloader.report.text import plain
from tests.lab.audit.told_processes import (
    AT_SYMBOLS,
    LOADED_BY,
    Told,
    page_of,
    told,
    vaddr_of,
    wait_until_at_rest,
)
from tests.memory import map_file


def library(one: Told, path: Path) -> AuditedLibrary:
    return miniloader.audit([one.pid]).library(str(path))


def by_vaddr(found: AuditedLibrary) -> dict[int, PrivatePage]:
    assert len({page.vaddr for page in found.private_pages}) == len(found.private_pages)
    return {page.vaddr: page for page in found.private_pages}


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
    assert page.kinds["R_X86_64_64"] >= 1  # which relocation the program has written over


def test_a_breakpoint_is_not_the_programs_doing(loaded: Told, demo: Path) -> None:
    """Written past the protection, as debuggers and uprobes do; and put back, by a page made writable."""
    place = vaddr_of(demo, "demo_add")
    address = loaded("answer = at('demo_add')")
    try:
        with open(f"/proc/{loaded.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            code = memory.read(1)
            memory.seek(address)
            memory.write(b"\xcc")
    except OSError as error:
        pytest.skip(f"this kernel lacks writing to /proc/PID/mem for us: {error}")
    page = by_vaddr(library(loaded, demo))[place & -PAGE_SIZE]
    assert (page.causes, page.reason) == (("write",), NOT_WRITABLE)
    said = plain(sentence(library(loaded, demo), {}))
    assert "1 written though not writable" in said
    loaded(
        f"libc = ctypes.CDLL(None); page = ctypes.c_void_p({address & -PAGE_SIZE})\n"
        f"assert libc.mprotect(page, {PAGE_SIZE}, 7) == 0\n"
        f"ctypes.memmove({address}, {code!r}, 1)"
    )
    page = by_vaddr(library(loaded, demo))[place & -PAGE_SIZE]
    assert (page.causes, page.reason) == (("identical",), "")


def test_a_stripped_library_has_the_names_of_its_debug_file(tmp_path: Path) -> None:
    source, stripped, debug = (tmp_path / name for name in ("lib.c", "lib.so", "lib.so.debug"))
    source.write_text("static long secret = 3; void bump(void) { secret++; }\n")
    commands = (
        ["gcc", "-g", "-shared", "-fPIC", "-Wl,--build-id", "-o", stripped, source],
        ["objcopy", "--only-keep-debug", stripped, debug],
        ["objcopy", "--strip-unneeded", f"--add-gnu-debuglink={debug}", stripped],
    )
    for command in commands:
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    with told(f"lib = ctypes.CDLL({str(stripped)!r}); lib.bump()") as one:
        written = {name for page in library(one, stripped).private_pages for name in page.written}
        debug.unlink()
        without = {name for page in library(one, stripped).private_pages for name in page.written}
    assert "secret" in written
    assert "secret" not in without


def test_slots_of_a_static_program(tmp_path: Path) -> None:
    """IRELATIVE, which its start-up code applies: what readelf lists is relocated, nothing written there."""
    source, program = tmp_path / "static.c", tmp_path / "static"
    source.write_text(
        '#include <unistd.h>\nint main(void) { char c; write(1, "x", 1); return read(0, &c, 1); }\n'
    )
    compiled = subprocess.run(["gcc", "-static", "-o", program, source], capture_output=True, check=False)
    if compiled.returncode:
        pytest.skip("this machine lacks a static libc")
    lines = subprocess.run(["readelf", "-rW", program], capture_output=True, text=True, check=True).stdout
    slots = {int(line.split()[0], 16) for line in lines.splitlines() if "R_X86_64_IRELATIV" in line}
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        pages = miniloader.audit([process.pid], library=str(program)).library(str(program)).private_pages
        views = [
            view_page(process.pid, vaddr, str(program)) for vaddr in {slot & -PAGE_SIZE for slot in slots}
        ]
        process.kill()
    assert slots
    assert {word.vaddr for view in views for word in view.words if word.cause == "relocation"} == slots
    assert not {word.vaddr & -8 for view in views for word in view.words if word.cause == "write"} & slots
    assert sum(page.kinds.get("R_X86_64_IRELATIVE", 0) for page in pages) == len(slots)


_I386 = """
char written[8192] __attribute__((aligned(4096), visibility("hidden"))) = {1};
static int call(int number, int first, const void *second, int third) {
    int result;
    __asm__ volatile("int $0x80"
        : "=a"(result) : "a"(number), "b"(first), "c"(second), "d"(third) : "memory");
    return result;
}
void _start(void) {
    char c = written[5] = 7;
    call(2, 0, 0, 0);                                   /* fork */
    call(4, 1, &c, 1);                                  /* write */
    for (;;) call(29, 0, 0, 0);                         /* pause */
}
"""


def test_a_program_of_32_bits_does_not_stop_an_audit(loaded: Told, demo: Path, tmp_path: Path) -> None:
    """Its pages are counted as the kernel does, and why they were copied; of others all is told."""
    source, program = tmp_path / "small.c", tmp_path / "small"
    source.write_text(_I386)
    options = ["-m32", "-O1", "-static", "-nostdlib", "-fno-stack-protector", "-fno-pie", "-no-pie"]
    compiled = subprocess.run(["gcc", *options, "-o", program, source], capture_output=True, check=False)
    if compiled.returncode or processor() != "x86_64":
        pytest.skip("this machine lacks a compiler for i386")
    try:
        process = subprocess.Popen([program], stdout=subprocess.PIPE, start_new_session=True)
    except OSError:
        pytest.skip("this kernel lacks programs of 32 bits")
    with process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"\7\7"
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        wait_until_at_rest(process.pid, child)
        found = miniloader.audit([process.pid, child, loaded.pid])
        os.killpg(process.pid, signal.SIGKILL)
    assert not found.unreadable
    small = found.library(str(program))
    assert {row.pid for row in small.processes} == {process.pid, child}
    (page,) = small.private_pages
    assert (page.causes, page.written, page.reason) == (("write",), ("written",), "")
    assert by_vaddr(found.library(str(demo)))[page_of(demo, "demo_operations")].only_relocated


@pytest.mark.parametrize("by", LOADED_BY)
@pytest.mark.parametrize("name", ["asks_itself", "cxx", "tls_user"])
def test_slots_that_lead_where_they_should(
    name: str, by: str, fixture_library: Callable[[str], Path]
) -> None:
    """To code of ours that stands for a function of glibc's; to a thread-local symbol of another file."""
    path = fixture_library(name)
    with told(LOADED_BY[by].format(path=str(path)), "") as one:
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


@pytest.mark.parametrize("by", list(LOADED_BY))
def test_the_tail_of_bss(fixture_library: Callable[[str], Path], by: str) -> None:
    path = fixture_library("bss")
    with told(LOADED_BY[by].format(path=str(path)), AT_SYMBOLS.format(by=by)) as one:
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
        for by, code in LOADED_BY.items():
            with told(code.format(path=str(path)), AT_SYMBOLS.format(by=by)) as one:
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


@pytest.mark.parametrize("fault", ["far away", "longer than memory", "odd", "no names"])
def test_a_library_that_only_looks_like_ours_stands_for_nothing(tmp_path: Path, fault: str) -> None:
    """Its table of what stands for what may be said to be anywhere, of any length."""
    shipped = build.ROOT / "miniloader/native" / f"loops-{processor()}.so"
    image = inspect(shipped)
    place, at = image.symbols.find(STAND_INS), image.file_offset(image.dynamic.tags[DT_SYMTAB])
    assert place is not None
    assert at is not None
    data = bytearray(shipped.read_bytes())
    value, size = struct.unpack_from("<QQ", data, at + 24 * place + 8)
    if fault == "no names":
        dynamic = image.segment("PT_DYNAMIC")
        assert dynamic is not None
        row = [tag for tag, _ in image.dynamic.entries].index(DT_SONAME)
        struct.pack_into("<Q", data, dynamic.file_offset + 16 * row + 8, 1 << 40)
    wrong = {"far away": (2**64 - 16, size), "longer than memory": (value, 2**63), "odd": (value, size - 3)}
    struct.pack_into("<QQ", data, at + 24 * place + 8, *wrong.get(fault, (value, size)))
    path = tmp_path / "native" / "loops-like.so"
    path.parent.mkdir()
    path.write_bytes(data)
    start = map_file(path, 4)
    answer = stand_ins_in(os.getpid(), [vma for vma in read_maps() if vma.start == start])
    assert len(answer) <= PAGE_SIZE // 16
