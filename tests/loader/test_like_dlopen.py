"""What is loaded is laid out, bound and relocated as dlopen(3) does it in another process."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import miniloader
from fixtures import build
from miniloader.errors import LoadError, WorkerError
from miniloader.kernel import syscalls
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.loaded import Loaded
from miniloader.loader.scope import Bindings
from tests.memory import failing
from tests.oracle import compare as lab
from tests.oracle.compare import Comparison
from tests.oracle.comparer import Comparer

LIBRARIES = (
    "libz.so.1", "libm.so.6", "libcrypto.so.3", "libsqlite3.so.0", "libexpat.so.1", "liblzma.so.5",
    "libstdc++.so.6", "libgcc_s.so.1", "libxml2.so.2", "libicudata.so.72", "libasan.so.8",
)  # fmt: skip
FIXTURES = sorted(build.FIXTURES.keys() - {"cycle_stand_in"})
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (...)p ([0-9a-f]+) \S+ \d+\s*(.*)")


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    with Comparer() as comparer:
        yield comparer


def find(soname: str) -> str:
    """Where the system has a library."""
    from miniloader.loader.surroundings import find_path

    try:
        return os.path.realpath(find_path(soname))
    except miniloader.LoadError:
        pytest.skip(f"this machine lacks {soname}")


def path_of(name: str) -> str:
    return str(build.build(name)) if name in build.FIXTURES else find(name)


# ------------------------------------------------------------------------------------------- layout
def ranges(maps: str, base: int, start: int, end: int) -> list[tuple[int, int, str, int, str]]:
    """The lines of ``/proc/PID/maps`` between two addresses, relative to ``base``, cut to the span."""
    found = []
    for line in maps.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        low, high, offset = (int(match[group], 16) for group in (1, 2, 4))
        if low < end and start < high:
            offset += max(start - low, 0) if match[5] else 0
            found.append((max(low, start) - base, min(high, end) - base, match[3], offset, match[5]))
    return found


DLOPEN = """
import ctypes, os, sys
handle = ctypes.CDLL(sys.argv[1], os.RTLD_NOW)._handle
link_map = ctypes.POINTER(ctypes.c_uint64)()
ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), 2, ctypes.byref(link_map))
print(link_map[0])
print(open('/proc/self/maps').read())
"""


@pytest.mark.parametrize(
    "name", [*LIBRARIES[:7], "overaligned_64k", "overaligned_2m", "demo", "demo_base", "bss"]
)
def test_the_kernel_shows_the_same_mappings(name: str) -> None:
    path = path_of(name)
    done = subprocess.run([sys.executable, "-c", DLOPEN, path], capture_output=True, text=True, check=True)
    bias, maps = done.stdout.split("\n", 1)
    with miniloader.load(path) as library:
        plan = library.plan
        ours = ranges(
            Path("/proc/self/maps").read_text(),
            library.base,
            library.base + plan.start,
            library.base + plan.end,
        )
    assert ours == ranges(maps, int(bias), int(bias) + plan.start, int(bias) + plan.end)
    assert ours[0][0] == plan.start
    assert ours[-1][1] == plan.end


@pytest.mark.parametrize("name", ["demo", "overaligned_64k"])
def test_at_an_address_of_ones_own_choice(name: str) -> None:
    path, wanted = path_of(name), 0x2_0000_0000
    with miniloader.load(path, address=wanted) as library:
        assert library.base + library.plan.start == wanted
        with pytest.raises(miniloader.LoadError, match="is 0x200000000 free"):
            miniloader.load(path_of("bss"), address=wanted)
    with pytest.raises(miniloader.LoadError, match="a multiple of the page size"):
        miniloader.load(path, address=wanted + 1)


@pytest.mark.parametrize("wanted", [-PAGE_SIZE, 1 << 62, 2**64 - 2 * PAGE_SIZE, 1 << 64, 1 << 80])
def test_no_process_has_such_an_address(wanted: int) -> None:
    """It is not memory that lacks: the kernel says ENOMEM, too, and ctypes would cut off the higher bits."""
    with pytest.raises(LoadError, match=rf" at {wanted:#x}: that is beyond the addresses") as caught:
        miniloader.load(path_of("demo"), address=wanted)
    assert caught.value.hint == "give one such as 0x200000000, or none"
    full = failing(errno.ENOMEM)
    with syscalls.injected("mmap", full), pytest.raises(LoadError, match="too little memory"):
        miniloader.load(path_of("demo"), address=0x2_0000_0000)


# --------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("name", [*LIBRARIES, *FIXTURES])
def test_every_relocated_word_is_the_same(comparer: Comparer, name: str) -> None:
    comparison = comparer.compare(path_of(name))
    assert comparison.alike, comparison
    unfit = ("tls_large_initial", "tls_aligned_initial")
    refused = name in (*unfit, "tls_user_alone", "tls_unbound", "opened_lazy", "libasan.so.8")
    assert comparison.both_load or refused, comparison


@pytest.mark.parametrize("name", LIBRARIES)
def test_so_is_every_word_of_a_prepared_library(name: str) -> None:
    with Comparer(prepared=True) as comparer:
        comparison = comparer.compare(path_of(name))
        assert comparison.alike, comparison
        assert not comparison.both_load or comparison.plain is None
        assert comparison.words > 0 or not comparison.both_load or name == "libicudata.so.72"


def test_what_cannot_be_prepared_is_compared_and_says_why(tmp_path: Path) -> None:
    source, library = tmp_path / "made.c", tmp_path / "made.so"
    source.write_text("int here; int *there = &here;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,--build-id=none", source, "-o", library], check=True)
    with Comparer(prepared=True) as comparer:
        comparison = comparer.compare(str(library))
    assert comparison.alike
    assert comparison.plain is not None
    assert "no build-id" in comparison.plain


def test_a_sample_of_the_system_libraries(comparer: Comparer, system_libraries: list[Path]) -> None:
    """One in sixty; tools/corpus takes them all."""
    sample = system_libraries[::60]
    assert len(sample) > 5
    different = []
    for path in sample:
        comparison = comparer.compare(str(path))
        if not comparison.alike:
            different.append(comparison)
    assert different == []


class Spoiled(miniloader.Loading):
    """A load that leaves one word and one protection wrong."""

    def link(self) -> dict[Loaded, Bindings]:
        bindings = super().link()
        library = self.mapped[0]
        index = library.symbols.find("demo_current")
        assert index is not None
        word = library.bias + int(library.symbols.rows["value"][index])
        ctypes.c_uint64.from_address(word).value += 1
        syscalls.mprotect(library.mapped.start, syscalls.PAGE_SIZE, syscalls.PROT_NONE)
        return bindings


def test_one_wrong_word_and_one_wrong_protection_are_found(
    monkeypatch: pytest.MonkeyPatch, demo: Path
) -> None:
    from tests.oracle import held

    monkeypatch.setattr(held, "Loading", Spoiled)  # in the child that is forked
    comparison = lab.compare(str(demo))
    assert comparison.dlopen == comparison.ours == "loaded"
    assert not comparison.alike
    assert comparison.different == 1
    (difference,) = comparison.differing
    assert re.search(r"R_\w+_(RELATIVE|64|ABS64)\b", difference.where)
    assert difference.dlopen != difference.ours
    assert any("---" in each.ours for each in comparison.layout)
    assert any("r--" in each.dlopen for each in comparison.layout)


def test_crashes_refusals_and_time_limits_are_outcomes(tmp_path: Path, demo: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    comparison = lab.compare(str(text))
    assert comparison.alike
    assert "invalid ELF header" in comparison.dlopen or "file too short" in comparison.dlopen
    assert comparison.ours.endswith("found text, expected an ELF file")
    assert not comparison.both_load


def constructor(tmp_path: Path, body: str) -> str:
    """A library whose constructor does ``body``."""
    source, library = tmp_path / "made.c", tmp_path / "made.so"
    includes = "#include <unistd.h>\n#include <stdlib.h>\n"
    source.write_text(f"{includes}__attribute__((constructor)) static void run(void) {{ {body} }}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", source, "-o", library], check=True)
    return str(library)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("*(volatile int *)0 = 1;", "was killed by SIGSEGV (Segmentation fault)"),
        ("exit(7);", "ended with exit status 7"),
        ("for (;;) pause();", "took more than 1 s"),
    ],
)
def test_what_a_constructor_can_do(tmp_path: Path, body: str, outcome: str) -> None:
    comparison = lab.compare(constructor(tmp_path, body), seconds=1)
    assert (comparison.dlopen, comparison.ours) == (outcome, outcome)


def test_what_a_constructor_changes_is_told_from_what_relocation_left(tmp_path: Path) -> None:
    body = "static int there; static void *heap = &there, *moved = &there, *kept = &there;"
    body += 'heap = malloc(9); moved = (void *)getenv; __asm__ volatile("" : : "r"(&kept));'
    comparison = lab.compare(constructor(tmp_path, body))
    assert comparison.alike, comparison
    assert comparison.rewritten == 2


def children() -> str:
    return Path("/proc/thread-self/children").read_text()


def test_nothing_of_a_comparison_is_left(demo: Path) -> None:
    before = os.listdir("/proc/self/fd"), children()
    lab.compare(str(demo))
    assert (os.listdir("/proc/self/fd"), children()) == before


def test_a_comparer_that_died_starts_again(demo: Path) -> None:
    with Comparer() as comparer:
        assert comparer.compare(str(demo)).alike
        assert comparer._crew is not None
        comparer._crew.workers[0].kill()
        with pytest.raises(WorkerError, match=r"worker 1 of 1 .* was killed by SIGKILL"):
            comparer.compare(str(demo))
        assert comparer.compare(str(demo)).alike


def test_what_counts_as_alike() -> None:
    good = Comparison("x", "loaded", "loaded", words=10, equal=7, rewritten=2, stubs=1)
    assert good.alike
    assert not dataclasses.replace(good, equal=6).alike
    assert not dataclasses.replace(good, ours="no").alike
    assert not dataclasses.replace(good, layout=(lab.Difference("mapping", "a", "b"),)).alike
    assert Comparison("x", "no", "neither").alike


def test_what_a_process_has_once_is_told_apart(comparer: Comparer) -> None:
    """ld.so's own libc: dlopen hands out the one that is there, and there must not be another."""
    comparison = comparer.compare(find("libc.so.6"))
    assert comparison.dlopen == "loaded"
    assert "only once" in comparison.ours
    assert comparison.only_once
    assert comparison.alike


def test_another_copy_of_it_is_a_difference(comparer: Comparer, tmp_path: Path) -> None:
    """ld.so has not got that file: where dlopen loads it, ours does not do as dlopen does."""
    copy = shutil.copy(find("libc.so.6"), tmp_path / "libc.so.6")
    comparison = comparer.compare(str(copy))
    assert "only once" in comparison.ours
    assert not comparison.only_once
    assert comparison.alike == (comparison.dlopen != "loaded")
