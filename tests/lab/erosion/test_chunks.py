"""The chunks of malloc in the heap of a C program that says itself what it has allocated and freed."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.erosion.chunks import chunks_between, chunks_of_arena
from miniloader.report.erosion import erosion_view
from miniloader.report.text import laid_out, plain
from tests.lab.erosion.pools import in_two_copies, needs_frames
from tests.lab.erosion.test_objects import _AT, Bytes, row_of

#: What each program begins with: how it ends.
_BEGINNING = r"""
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int with_a_child_that_writes(char **chunks, int count, int place, int more) {
    int ready[2];
    if (pipe(ready)) return 1;
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < count; i++) chunks[i][place] = 3;
        for (int i = 0; i < more; i++) chunks[i] = memset(malloc(4000), 1, 4000);
        if (write(ready[1], "x", 1) != 1) return 1;
        for (;;) pause();
    }
    char byte;
    if (read(ready[0], &byte, 1) != 1) return 1;
    printf("%d\n", child);
    fflush(stdout);
    for (;;) pause();
}
"""

_SOURCE = r"""
int main(void) {
    enum { N = 4000 };
    static char *kept[N], *freed[N / 4];
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    for (int i = 0; i < N; i++) {
        kept[i] = memset(malloc(1200), 1, 1200);              /* beyond what a thread keeps: 1032 bytes */
        if (i % 4 == 0) freed[i / 4] = memset(malloc(2000), 2, 2000);
    }
    for (int i = 0; i < N / 4; i++) free(freed[i]);
    return with_a_child_that_writes(kept, N, 600, MORE);
}
"""


#: A thread that allocates more than one heap of its arena holds; argv[1] gets where the chunks are that were
#: kept, and then where those are that were freed.
_THREAD = r"""
#include <pthread.h>
enum { N = 14000 };
static char *kept[N], *freed[N];
static void *work(void *nothing) {
    for (int i = 0; i < N; i++) {
        kept[i] = memset(malloc(4000), 1, 4000);
        freed[i] = memset(malloc(2000), 1, 2000);
    }
    for (int i = 0; i < N; i++) free(freed[i]);
    return nothing;
}
int main(int argc, char **argv) {
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    FILE *told = argc > 1 ? fopen(argv[1], "w") : NULL;
    pthread_t thread;
    if (!told) return 1;
    if (pthread_create(&thread, NULL, work, NULL) || pthread_join(thread, NULL)) return 1;
    fwrite(kept, sizeof kept, 1, told);
    fwrite(freed, sizeof freed, 1, told);
    fclose(told);
    return with_a_child_that_writes(kept, N, 2000, 0);
}
"""


@contextmanager
def c_pool(directory: Path, program: str) -> Iterator[tuple[int, int]]:
    source = directory / "pool.c"
    source.write_text(_BEGINNING + program)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", directory / "pool", source], check=True)
    with subprocess.Popen(
        [directory / "pool", directory / "told"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            yield parent.pid, child
        finally:
            os.kill(child, signal.SIGKILL)
            parent.kill()


@needs_frames
@pytest.mark.parametrize("more", [0, 2000])
def test_chunks_of_a_c_program(tmp_path: Path, more: int) -> None:
    """Also where the child allocates more: what its heap grows by is a mapping of its own."""
    with c_pool(tmp_path, f"#define MORE {more}{_SOURCE}") as (parent, child):
        result = audit([parent, child], library="nothing")
    row = row_of(result, child)
    assert row.runtime is None
    found = {kind.type: kind for kind in row.objects}
    assert abs(found["malloc chunk in use"].count - 4_000) <= 60
    assert abs(found["malloc chunk free"].count - 1_000) <= 40
    assert found["malloc chunk in use"].pages <= row.apart // PAGE_SIZE
    assert row.causes["other-write"] > 0.95 * row.apart
    said = " ".join(plain(line) for line in laid_out(erosion_view(result), 10_000))
    assert re.search(r"Objects there: [\d,]+ malloc chunks in use, [\d,]+ malloc chunks free", said)


@needs_frames
def test_chunks_of_a_thread_are_told_apart(tmp_path: Path) -> None:
    """An arena of two heaps: what the program says of its chunks is found, in use and free."""
    with c_pool(tmp_path, _THREAD) as (parent, child):
        row = row_of(audit([parent, child], library="nothing"), child)
        pages = np.array(sorted(in_two_copies(child, parent)), np.uint64)
    kept, freed = np.split(np.fromfile(tmp_path / "told", np.uint64) - np.uint64(16), 2)
    found = {kind.type: kind.count for kind in row.objects}
    for state, chunks in (("in use", kept), ("free", freed)):
        on_pages = np.isin(chunks & ~np.uint64(PAGE_SIZE - 1), pages).sum()
        assert on_pages > 5_000
        assert abs(found[f"malloc chunk {state} of a thread's arena"] - on_pages) <= 20


def heap(*sizes: int, left: int = 0) -> Bytes:
    """A page of chunks, each in use but for the last."""
    page, at = bytearray(PAGE_SIZE), 0
    for size in sizes:
        page[at + 8 : at + 16] = struct.pack("<Q", size | 1)
        at += size
    assert at == PAGE_SIZE - left
    return Bytes({_AT: bytes(page)})


def test_what_does_not_come_out_even_is_no_heap_of_glibc_s() -> None:
    chunks = chunks_between(heap(64, 1024, PAGE_SIZE - 1088), _AT, _AT + PAGE_SIZE)
    assert chunks is not None
    assert (chunks[0] - _AT).tolist() == [0, 64, 1088]
    assert chunks[1].tolist() == [True, True, False]
    assert chunks_between(heap(64, left=PAGE_SIZE - 64), _AT, _AT + PAGE_SIZE) is None  # then a length of 0
    assert chunks_between(heap(40, PAGE_SIZE - 40), _AT, _AT + PAGE_SIZE) is None
    assert chunks_between(Bytes({}), _AT, _AT + PAGE_SIZE) is None
    assert chunks_between(Bytes({}), _AT, _AT) is None


def test_what_only_looks_like_an_arena_is_none() -> None:
    """A heap that says of its arena or its length what no heap says."""
    start, chunks = 64 << 20, struct.pack("<QQ", 0, PAGE_SIZE - 2256 | 5)
    for arena, size, writable in (
        (start + 48, PAGE_SIZE, PAGE_SIZE),
        (start + 64, PAGE_SIZE, PAGE_SIZE),
        (start + 48, 2**64 - PAGE_SIZE, 2**64 - PAGE_SIZE),
        (start + 48, PAGE_SIZE, 0),
        (start + 48, 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        (0, PAGE_SIZE, PAGE_SIZE),
    ):
        head = struct.pack("<QQQQQ", arena, 0, size, writable, PAGE_SIZE)
        memory = Bytes({start: (head.ljust(2256, b"\0") + chunks).ljust(PAGE_SIZE, b"\0")})
        is_one = (arena, size, writable) == (start + 48, PAGE_SIZE, PAGE_SIZE)
        assert (chunks_of_arena(memory, start) is not None) == is_one


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1, 48])
def test_garbage_is_no_heap(word: int) -> None:
    page = struct.pack("<Q", word) * (PAGE_SIZE // 8)
    found = chunks_between(Bytes({_AT: page}), _AT, _AT + PAGE_SIZE)
    assert found is None or len(found[0]) * 48 == PAGE_SIZE
