"""Causes of the private pages of i386 libraries: words of 32 bits, whose addends lie in the file's words."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import miniloader
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.live_bindings import live_bindings
from miniloader.lab.audit.page_words import PageWord, view_page
from miniloader.lab.audit.result import AuditedLibrary
from miniloader.native.gate import processor
from tests.lab.audit.told_processes import wait_until_at_rest

#: A library that is its own program, without a C library: it relocates itself as ld.so would, writes, forks.
_ITS_OWN_LOADER = r"""
#define PAGE __attribute__((aligned(4096), used))
#define HIDDEN __attribute__((visibility("hidden")))
typedef unsigned int word;
struct rel { word offset, info; };
struct sym { word name, value, size; unsigned char info, other; unsigned short section; };
extern HIDDEN word _DYNAMIC[];
extern HIDDEN char __ehdr_start[];

static int chosen(void) { return 1; }
static void *choose(void) { return chosen; }
HIDDEN int by_resolver(void) __attribute__((ifunc("choose")));
int called(void) { return 2; }
extern int nobodys(void) __attribute__((weak));
__thread int early __attribute__((tls_model("initial-exec"))), late;

int target[16] = {1};
PAGE HIDDEN int *inside[1024] = {(int *)&inside[3], (int *)&inside[9]};     /* RELATIVE, addends in words */
PAGE HIDDEN int *by_name[1024] = {target, target + 2, target + 5};          /* R_386_32, S + A */
PAGE HIDDEN int *spoilt[1024] = {(int *)&spoilt[1], (int *)&spoilt[2], target + 4};
PAGE HIDDEN char written[4096] = {1};
PAGE HIDDEN char stored_again[4096] = {1};
PAGE HIDDEN char left_alone[4096] = {1};

/* Nobody calls it: what it needs are slots of each kind. */
int needs(void) { return by_resolver() + called() + target[0] + early + late + (nobodys != 0); }

static int call(int number, int first, const void *second, int third) {
    int result;
    __asm__ volatile("int $0x80"
        : "=a"(result) : "a"(number), "b"(first), "c"(second), "d"(third) : "memory");
    return result;
}

static void relocate(const struct rel *row, word size, const struct sym *symbols, word base) {
    for (const struct rel *end = row + size / sizeof *row; row < end; row++) {
        word *place = (word *)(base + row->offset);
        const struct sym *symbol = symbols + (row->info >> 8);
        word value = symbol->section ? base + symbol->value : 0;
        switch (row->info & 255) {
        case 1: *place += value; break;
        case 6: *place = value; break;
        case 7: *place += base; break;                        /* lazy: its own PLT entry */
        case 8: *place += base; break;
        case 14: *place += symbol->value - 64; break;         /* below the thread pointer */
        case 35: *place = 1; break;
        case 36: *place = symbol->value; break;
        case 42: *place = ((word (*)(void))(base + *place))(); break;
        }
    }
}

void _start(void) {
    word base = (word)__ehdr_start, of[32] = {0};
    for (word *entry = _DYNAMIC; *entry; entry += 2) if (*entry < 32) of[*entry] = entry[1];
    const struct sym *symbols = (void *)(base + of[6]);
    relocate((void *)(base + of[17]), of[18], symbols, base);
    relocate((void *)(base + of[23]), of[2], symbols, base);
    spoilt[1] = (int *)0x1234;
    spoilt[2] = (int *)(base + 4 * sizeof *target);           /* as if its addend had no symbol */
    written[5] = 7;
    *(volatile char *)stored_again = 1;
    call(2, 0, 0, 0);                                         /* fork */
    call(4, 1, "\7", 1);                                      /* write */
    for (;;) call(29, 0, 0, 0);                               /* pause */
}
"""
_OPTIONS = ["-m32", "-O1", "-shared", "-fPIC", "-nostdlib", "-fno-stack-protector", "-Wl,-e,_start,-z,lazy"]
_CROSS = Path("/usr/i686-linux-gnu/lib")  # where Debian puts the libraries of its cross compiler


@contextmanager
def _paused(command: Sequence[str | Path]) -> Iterator[tuple[int, int]]:
    """The process that ``command`` starts, and its child: each has written a byte."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    except OSError:
        pytest.skip("this kernel lacks programs of 32 bits")
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(2) == b"\7\7"
            child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            wait_until_at_rest(process.pid, child)
            yield process.pid, child
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def its_own_loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("i386")
    source, library = directory / "library.c", directory / "library.so"
    source.write_text(_ITS_OWN_LOADER)
    compiled = subprocess.run(["gcc", *_OPTIONS, "-o", library, source], capture_output=True, check=False)
    if compiled.returncode or processor() != "x86_64":
        pytest.skip("this machine lacks a compiler for i386")
    return library


def _relocations(path: Path) -> dict[int, str]:
    """The kind at each vaddr, as readelf lists them."""
    listing = subprocess.run(["readelf", "-rW", path], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^([0-9a-f]{8}) +[0-9a-f]{8} (R_386_\w+)", listing, re.MULTILINE)
    return {int(vaddr, 16): kind for vaddr, kind in rows}


def _symbols(path: Path) -> dict[str, int]:
    listing = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    return {name: int(vaddr, 16) for vaddr, _, name in re.findall(r"^(\w{8}) (\w) (\w+)$", listing, re.M)}


def _causes(library: AuditedLibrary) -> dict[int, set[str]]:
    """The causes of each private page, whoever has it."""
    causes: dict[int, set[str]] = {}
    for page in library.private_pages:
        causes.setdefault(page.vaddr, set()).update(page.causes)
    return causes


def test_each_page_has_the_causes_that_it_has_on_x86_64(its_own_loader: Path) -> None:
    vaddr, relocations = _symbols(its_own_loader), _relocations(its_own_loader)
    with _paused([its_own_loader]) as pids:
        library = miniloader.audit(pids).library(str(its_own_loader))
        pages = {slot & -PAGE_SIZE for slot in relocations}
        words = {
            word.vaddr: word for page in pages for word in view_page(pids[0], page, str(its_own_loader)).words
        }
        bindings = live_bindings(pids[0], str(its_own_loader)).bindings
    causes = _causes(library)
    assert causes[vaddr["inside"]] == causes[vaddr["by_name"]] == {"relocation"}
    assert causes[vaddr["spoilt"]] == {"relocation", "overwritten"}
    assert causes[vaddr["written"]] == {"write"}
    assert causes[vaddr["stored_again"]] == {"identical"}
    assert vaddr["left_alone"] not in causes
    assert not [page for page in library.private_pages if page.reason]
    assert {page for page, of_page in causes.items() if "relocation" in of_page} == pages
    _each_word_is_right(words, relocations, vaddr["spoilt"])
    shown = {(row.symbol, row.state) for row in bindings}
    assert shown >= {("called", "lazy"), ("target", "bound"), ("nobodys", "nobody"), ("early", "offset")}
    assert not {state for symbol, state in shown} & {"rebound", "unread"}


def _each_word_is_right(words: dict[int, PageWord], relocations: dict[int, str], spoilt: int) -> None:
    """Of each relocated word the kind is readelf's, and it is as relocation made it, but for two."""
    assert {place: words[place].kind for place in relocations} == relocations
    assert set(relocations.values()) >= {
        "R_386_32", "R_386_RELATIVE", "R_386_GLOB_DAT", "R_386_JUMP_SLOT", "R_386_IRELATIVE",
        "R_386_TLS_TPOFF", "R_386_TLS_DTPMOD32", "R_386_TLS_DTPOFF32",
    }  # fmt: skip
    overwritten = {place for place in relocations if words[place].cause != "relocation"}
    assert overwritten == {spoilt + 4, spoilt + 8}
    assert (words[spoilt + 4].cause, words[spoilt + 4].new) == ("overwritten", 0x1234)
    assert words[spoilt + 4].size == 4
    assert words[spoilt + 4].old - words[spoilt + 4].file == words[spoilt].new - words[spoilt].file


#: A program of a C library's, with a variable of the library's copied into it, threads' storage and a plugin.
_OF_LIBC = r"""
#include <math.h>
#include <stdio.h>
#include <unistd.h>
__thread int late;
extern char **environ;
int (*const writes)(const char *, FILE *) = fputs;
int main(int count, char **arguments) {
    late = count + (int)cos(count) + (environ != 0);
    fork();
    write(1, "\7", 1);
    for (;;) pause();
}
"""


def test_what_ld_so_has_relocated_is_nobody_s_writing(tmp_path: Path) -> None:
    """An i386 glibc and libm, loaded by their own ld.so; glibc itself writes to its program's names alone."""
    compiler, loader = shutil.which("i686-linux-gnu-gcc"), _CROSS / "ld-linux.so.2"
    if compiler is None or not loader.exists():
        pytest.skip("this machine lacks a C library for i386")
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(_OF_LIBC)
    subprocess.run([compiler, "-O1", "-no-pie", "-fno-pie", "-o", program, source, "-lm"], check=True)
    with _paused([loader, "--library-path", _CROSS, program]) as pids:
        audit = miniloader.audit(pids)
        bindings = live_bindings(pids[0]).bindings
        files = {Path(library.path).name: library for library in audit.libraries}
        judged = {name: _causes(files[name]) for name in ("libc.so.6", "libm.so.6", "program")}
        overwritten = {
            word.symbol
            for name, causes in judged.items()
            for page, of_page in causes.items()
            if "overwritten" in of_page
            for word in view_page(pids[0], page, str(files[name].path)).words
            if word.cause == "overwritten"
        }
    for name, causes in judged.items():
        relocations = _relocations(Path(files[name].path))
        assert not [page for page in files[name].private_pages if page.reason]
        relocated = {page for page, of_page in causes.items() if "relocation" in of_page}
        assert relocated == {page for place in relocations if (page := place & -PAGE_SIZE) in causes}
    assert overwritten == {"program_invocation_short_name", "__progname_full"}  # argv[0]
    states = {row.state for row in bindings}
    assert "bound" in states
    assert not states & {"rebound", "overwritten"}
    assert {row.provider for row in bindings if row.symbol == "cos"} == {str(_CROSS / "libm.so.6")}
