"""``kpagecount`` and ``kpageflags`` of frames whose story we know, and of many at once."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from miniloader.errors import EvidenceError
from miniloader.kernel.frames import KPF, distinct, flag_names, frame_flags, map_counts, marks_merged
from miniloader.kernel.pagemap import PageMap
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import map_anonymous, map_file, still_child, store, touch

needs_root = pytest.mark.needs_root("frame numbers need CAP_SYS_ADMIN")


def frames(address: int, pages: int = 1) -> np.ndarray:
    with PageMap() as pagemap:
        return pagemap.table(address, address + pages * PAGE_SIZE).frame


def names(address: int) -> set[str]:
    return set(flag_names(int(frame_flags(frames(address))[0])))


@needs_root
def test_a_page_of_a_file_and_its_copy(file8: Path) -> None:
    address = map_file(file8, 8)
    touch(address, 8)
    assert "anonymous" not in names(address)
    assert {"mmap", "uptodate"} <= names(address)
    store(address)
    assert {"anonymous", "mmap", "swapbacked"} <= names(address)
    assert "ksm" not in names(address)  # as some kernels have it
    assert map_counts(frames(address)).tolist() == [1]


@pytest.mark.parametrize("marked", [{"anonymous", "ksm"}, {"anonymous"}])
def test_a_kernel_that_marks_every_anonymous_page_as_merged(
    marked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of Debian 13 does (6.12); on a kernel that does not, a marked page is merged."""
    word = np.bitwise_or.reduce([KPF[name].mask for name in marked])
    merged = KPF["anonymous"].mask | KPF["ksm"].mask
    answers = iter([np.array([merged]), np.array([word])])  # for the page that was asked for, for a fresh one
    monkeypatch.setattr("miniloader.kernel.frames._lookup", lambda *_: next(answers))
    marks_merged.cache_clear()
    try:
        flags = flag_names(int(frame_flags(np.array([7], np.uint64))[0]))
    finally:
        marks_merged.cache_clear()
    assert flags == (("anonymous",) if "ksm" in marked else ("anonymous", "ksm"))


@needs_root
def test_the_page_of_zeros() -> None:
    address = map_anonymous(2)
    touch(address, 2)
    assert "zero_page" in names(address)
    assert frames(address, 2)[0] == frames(address, 2)[1]
    assert map_counts(frames(address)).tolist() == [0]


@needs_root
def test_fork_counts_twice() -> None:
    address = map_anonymous(1)
    store(address)
    with still_child(int):
        assert map_counts(frames(address)).tolist() == [2]
    assert map_counts(frames(address)).tolist() == [1]


@needs_root
@pytest.mark.parametrize(
    ("ask", "path"), [(map_counts, "/proc/kpagecount"), (frame_flags, "/proc/kpageflags")]
)
def test_many_frames_in_any_order(ask, path: str) -> None:
    """Against one read a frame; with repetitions, frame 0, and a frame beyond all memory."""
    address = map_anonymous(3000)
    for page in range(3000):
        store(address + page * PAGE_SIZE)
    own = frames(address, 3000)[:: np.random.default_rng(7).integers(2, 5)]
    wanted = np.concatenate([own, own[:10], np.array([0, 2**40], dtype=np.uint64)])
    np.random.default_rng(1).shuffle(wanted)
    found = ask(wanted.reshape(2, -1) if len(wanted) % 2 == 0 else wanted)
    # What other processes do meanwhile does not change the flags of our own pages, except these.
    steady = ~(KPF["referenced"].mask | KPF["idle"].mask | KPF["lru"].mask | KPF["active"].mask)
    if ask is frame_flags and not marks_merged():
        steady &= ~KPF["ksm"].mask
    with open(path, "rb", buffering=0) as file:
        for frame, word in zip(wanted.tolist(), found.ravel().tolist(), strict=True):
            read = os.pread(file.fileno(), 8, frame * 8)
            expected = struct.unpack("Q", read)[0] if read and frame else 0
            assert word & int(steady) == expected & int(steady)
    assert ask(np.empty(0, dtype=np.uint64)).shape == (0,)


@pytest.mark.parametrize("ask", [map_counts, frame_flags])
def test_an_ordinary_user_is_told_what_is_needed(as_nobody, ask) -> None:
    with pytest.raises(EvidenceError, match=r"/proc/kpage\w+: Permission denied; .* root"):
        as_nobody(ask, np.array([1], dtype=np.uint64))


def test_the_table_has_every_flag_of_the_header() -> None:
    header = Path("/usr/include/linux/kernel-page-flags.h")
    if not header.exists():
        pytest.skip("this machine lacks the kernel's headers")
    published = {int(bit) for bit in re.findall(r"#define KPF_\w+\s+(\d+)", header.read_text())}
    assert len(published) > 20
    assert published <= {flag.bit for flag in KPF.values()}
    assert [flag.bit for flag in KPF.values()] == sorted({flag.bit for flag in KPF.values()})


@pytest.mark.parametrize(("highest", "how_many"), [(10, 1000), (1 << 40, 1000), (5, 1), (1, 0)])
def test_distinct_values_are_found_however_dense_they_lie(highest: int, how_many: int) -> None:
    values = np.random.default_rng(7).integers(0, highest, how_many, np.uint64)
    found = distinct(values)
    assert found.dtype == values.dtype
    assert found.tolist() == sorted(set(values.tolist()))
    assert distinct(values.astype(np.int64) - 3).tolist() == sorted({value - 3 for value in values.tolist()})
