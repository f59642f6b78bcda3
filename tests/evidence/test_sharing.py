"""Sharing against sets counted by hand, against real processes, and one level against the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniloader.evidence import sharing
from miniloader.evidence.sharing import STATES, Sharing, analyse
from miniloader.evidence.snapshot import PAGE_DTYPE, Backing, ProcessPages, ProcessRange, Snapshot, take
from miniloader.kernel import syscalls
from miniloader.kernel.features import LevelName
from miniloader.kernel.maps import Vma
from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import map_anonymous, map_file, still_child, store, touch

SIGN = {state.code: state.sign for state in STATES}


def signs(found: Sharing) -> list[str]:
    """One string a process, one sign a page."""
    return ["".join(SIGN[int(code)] for code in row) for row in found.states]


# ------------------------------------------------------------------------------- snapshots made by hand
def vma(path: str = "/lib/a.so", inode: int = 7, start: int = 0) -> Vma:
    return Vma(start, start + 2**40, "r--", False, 0, (8, 1), inode, path, False)


def process(
    pages: Sequence[dict[str, Any]], *, mapping: Vma | None = None, first: int = 0, **more: Any
) -> ProcessPages:
    """A process with these pages, from page ``first`` on, all in one mapping of a file."""
    table = np.zeros(len(pages), dtype=PAGE_DTYPE)
    table["zero_known"] = True
    table["vaddr"] = table["file_offset"] = (np.arange(len(pages), dtype=np.uint64) + first) * PAGE_SIZE
    for row, page in zip(table, pages, strict=True):
        for name, value in page.items():
            row[name] = value
    return ProcessPages(1, 0, (Backing(mapping or vma(), b"id"),), table, **more)


def snap(level: LevelName, *processes: ProcessPages) -> Snapshot:
    return Snapshot("", level, processes, 0.0)


def file_page(frame: int = 0, **more: Any) -> dict[str, Any]:
    return {"present": True, "file": True, "frame": frame} | more


def copy(frame: int = 0, **more: Any) -> dict[str, Any]:
    return {"present": True, "frame": frame, "exclusive": True} | more


ABSENT: dict[str, Any] = {}


def test_frames_prove() -> None:
    found = analyse(
        snap(
            "frames",
            process([file_page(10), copy(20), file_page(30), copy(41), copy(50), ABSENT]),
            process([file_page(10), copy(21), ABSENT, copy(42), copy(50), ABSENT]),
            process([file_page(10), file_page(11), ABSENT, copy(43), copy(51), file_page(60)]),
        )
    )
    assert signs(found) == ["█◆▒◆◇·", "█◆·◆◇·", "█▒·◆◆▒"]
    assert found.frame_group.tolist() == [
        [1, 2, 5, 6, 9, 0],
        [1, 3, 0, 7, 9, 0],
        [1, 4, 0, 8, 10, 11],
    ]
    assert found.present_pages == 14
    assert found.distinct_frames == 11
    assert found.used_bytes == 11 * PAGE_SIZE
    assert found.unshared_bytes == 14 * PAGE_SIZE


def test_map_counts_and_bit_56_do_not_outweigh_frames() -> None:
    alone = process([file_page(10, map_count=9, exclusive=False), copy(11, map_count=9, exclusive=False)])
    assert signs(analyse(snap("frames", alone))) == ["▒◆"]


def test_one_frame_twice_in_one_process_is_not_shared() -> None:
    """The last page of text and the first of data are often one page of the file."""
    found = analyse(snap("frames", process([file_page(10), file_page(10)]), process([ABSENT, file_page(10)])))
    assert signs(found) == ["██", "·█"]
    found = analyse(snap("frames", process([file_page(10), file_page(10)]), process([ABSENT, ABSENT])))
    assert signs(found) == ["▒▒", "··"]
    assert found.distinct_frames == 1


@pytest.mark.parametrize("level", ["frames", "flags"])
def test_states_of_a_page_alone(level: LevelName) -> None:
    one = process(
        [
            ABSENT,
            {"guard": True},
            {"swapped": True},
            copy(5, zero=True, exclusive=False),
            copy(6, changed=True),
            {"changed": True},
        ]
    )
    assert signs(analyse(snap(level, one))) == ["··~0!!"]


def test_no_frame_no_claim() -> None:
    assert signs(analyse(snap("frames", process([file_page(0), copy(0)])))) == ["??"]


def test_zeros_use_no_memory() -> None:
    one = process([copy(9, zero=True), copy(8)])
    found = analyse(snap("frames", one, one))
    assert signs(found) == ["0◇", "0◇"]
    assert (found.present_pages, found.distinct_frames) == (2, 1)


def test_flags_prove_by_the_place_in_the_file() -> None:
    one = process([file_page(), copy(), file_page(), copy(exclusive=False)])
    two = process([file_page(), copy(), ABSENT, copy(exclusive=False)])
    found = analyse(snap("flags", one, two))
    assert signs(found) == ["█◆▒◇", "█◆·◇"]
    assert found.frame_group.tolist() == [[1, 2, 4, 0], [1, 3, 0, 0]]
    # A copy whose partners are hidden counts as one's own: an upper bound.
    assert (found.present_pages, found.distinct_frames) == (7, 6)


@pytest.mark.parametrize(
    "other",
    [vma("/lib/b.so"), vma(inode=8), Vma(0, 2**40, "r--", False, 0, (8, 2), 7, "/lib/a.so", False)],
)
def test_flags_do_not_take_another_file_for_the_same(other: Vma) -> None:
    found = analyse(snap("flags", process([file_page()]), process([file_page()], mapping=other)))
    assert signs(found) == ["▒", "▒"]
    assert found.distinct_frames == 2


def test_flags_do_not_take_another_offset_for_the_same() -> None:
    two = process([file_page(file_offset=PAGE_SIZE)])
    assert signs(analyse(snap("flags", process([file_page()]), two))) == ["▒", "▒"]


def test_flags_take_a_contradiction_for_unknown() -> None:
    """Two seem to have the same page, yet bit 56 says that one of them is alone with it."""
    found = analyse(snap("flags", process([file_page(exclusive=True)]), process([file_page()])))
    assert signs(found)[0] == "?"
    assert found.frame_group[0, 0] == 0


def test_flags_without_a_file_or_zeros_do_not_guess() -> None:
    anonymous = vma("", inode=0)
    unknown = copy(exclusive=False, zero_known=False)
    one = process([file_page(), copy(), unknown], mapping=anonymous)
    assert signs(analyse(snap("flags", one))) == ["?◆?"]
    one = process([unknown])  # a page of a file is never the page of zeros
    assert signs(analyse(snap("flags", one))) == ["◇"]


def test_processes_that_could_not_be_read() -> None:
    pages = process([file_page(10)])
    gone = process([ABSENT], gone=True, reason="process 5: there is none (any more)")
    refused = process([ABSENT], reason="Permission denied")
    assert signs(analyse(snap("frames", pages, gone, refused))) == ["▒", "·", "?"]


def test_totals_say_nothing_about_pages() -> None:
    found = analyse(snap("totals", process([ABSENT, ABSENT], reason="sums")))
    assert signs(found) == ["??"]
    assert found.present_pages == 0


def test_ranges_that_differ() -> None:
    found = analyse(
        snap("frames", process([file_page(10), file_page(11)]), process([file_page(11)], first=1))
    )
    assert found.vaddrs.tolist() == [0, PAGE_SIZE]
    assert signs(found) == ["▒█", "?█"]


def test_nothing_at_all() -> None:
    found = analyse(snap("frames"))
    assert found.runs() == ()
    assert (found.present_pages, found.distinct_frames) == (0, 0)
    assert analyse(snap("frames", process([]))).runs() == ()


frame_matrices = st.integers(1, 6).flatmap(
    lambda columns: st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=columns, max_size=columns),
        min_size=1,
        max_size=5,
    )
)


@settings(deadline=None)
@given(frame_matrices)
def test_frames_against_sets(matrix: list[list[tuple[int, bool]]]) -> None:
    rows = [
        process([(file_page(frame) if file else copy(frame)) if frame else ABSENT for frame, file in row])
        for row in matrix
    ]
    found = analyse(snap("frames", *rows))
    holders = {
        frame: {index for index, row in enumerate(matrix) for other, _ in row if other == frame}
        for frame in range(1, 5)
    }
    for index, row in enumerate(matrix):
        for column, (frame, file) in enumerate(row):
            shared = frame and len(holders[frame]) > 1
            expected = "·" if not frame else ("█" if shared else "▒") if file else ("◇" if shared else "◆")
            assert SIGN[int(found.states[index, column])] == expected
    groups = found.frame_group
    flat = [frame for row in matrix for frame, _ in row]
    assert len({*flat} - {0}) == found.distinct_frames
    for (one, group), (other, with_group) in (
        (a, b) for a in zip(flat, groups.ravel(), strict=True) for b in zip(flat, groups.ravel(), strict=True)
    ):
        assert (one == other) == (group == with_group)
    by_column = [int(number) for number in groups.T.ravel() if number]
    assert list(dict.fromkeys(by_column)) == list(
        range(1, len(set(by_column)) + 1)
    )  # first come, first number


# ------------------------------------------------------------------------------------------------- runs
@settings(deadline=None)
@given(frame_matrices, st.sets(st.integers(0, 6)))
def test_runs_lose_nothing(matrix: list[list[tuple[int, bool]]], breaks: set[int]) -> None:
    found = analyse(
        snap(
            "frames",
            *(process([file_page(frame) if frame else ABSENT for frame, _ in row]) for row in matrix),
        )
    )
    runs = found.runs({page * PAGE_SIZE for page in breaks})
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(matrix[0])
    assert {run.start for run in runs} >= {page for page in breaks if page < len(matrix[0])}
    for run in runs:
        assert (run.vaddr, run.pages) == (run.start * PAGE_SIZE, run.stop - run.start)
        for column in range(run.start, run.stop):
            frames = [row[column][0] for row in matrix]
            assert run.states == tuple(found.states[:, column].tolist())
            assert run.partners == tuple(frames.index(frame) if frame else -1 for frame in frames)
    for one, other in pairwise(runs):
        assert (one.states, one.partners) != (other.states, other.partners) or other.start in breaks


def test_runs_end_at_gaps() -> None:
    pages = process([file_page(10), file_page(11), file_page(12)])
    pages.pages["vaddr"][2] += np.uint64(PAGE_SIZE)
    assert [run.pages for run in analyse(snap("frames", pages)).runs()] == [2, 1]


# --------------------------------------------------------------------------------------- real processes
PAGES = 10


def image(path: Path, written: int) -> ProcessRange:
    """Eight file pages, one of them written; a page of zeros and an anonymous page."""
    start = map_anonymous(PAGES)
    with path.open("rb") as file:
        syscalls.mmap(start, 8 * PAGE_SIZE, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED, file.fileno(), 0)
    touch(start, 9)
    store(start + written * PAGE_SIZE)
    store(start + 9 * PAGE_SIZE)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    return ProcessRange(os.getpid(), start, 0, PAGES * PAGE_SIZE)


EXPECTED = ["██◆█████0◆", "███◆████0◆", "████◆███0◆"]


def three(path: Path, level: LevelName | None) -> tuple[str, list[str], list[list[int]], int]:
    with ExitStack() as stack:
        targets = [stack.enter_context(still_child(image, path, page))[1] for page in (2, 3, 4)]
        found = analyse(take(targets, level=level))
    return found.level, signs(found), found.frame_group.tolist(), found.distinct_frames


@pytest.mark.parametrize("level", ["flags", None])
def test_three_processes(file8: Path, level: LevelName | None) -> None:
    """The same at both levels: the same pictures, numbers and sums."""
    _, found, groups, distinct = three(file8, level)
    assert found == EXPECTED
    # Pages 2 to 4: two processes have the file's, one its own. Page 9: three anonymous pages.
    assert groups == [
        [1, 2, 3, 5, 7, 9, 10, 11, 12, 13],
        [1, 2, 4, 6, 7, 9, 10, 11, 12, 14],
        [1, 2, 4, 5, 8, 9, 10, 11, 12, 15],
    ]
    assert distinct == 14  # the page of zeros is no memory of theirs


def test_three_processes_unprivileged(file8: Path, as_nobody) -> None:
    level, found, _, distinct = as_nobody(three, file8, None)
    assert (level, found, distinct) == ("flags", EXPECTED, 14)


def test_fork_shares_copies_until_they_are_written(file8: Path) -> None:
    target = image(file8, 2)

    def write_again() -> None:
        store(target.base + 9 * PAGE_SIZE, 1)

    with still_child(write_again) as (pid, _):
        both = [target, ProcessRange(pid, target.base, 0, PAGES * PAGE_SIZE)]
        for level in ("flags", None):
            found = analyse(take(both, level=level))
            assert signs(found)[0][2] == signs(found)[1][2] == "◇"
            assert signs(found)[0][9] == signs(found)[1][9] == "◆"
            if found.level == "frames":
                assert found.frame_group[0, 2] == found.frame_group[1, 2]


def test_one_page_of_a_file_at_two_places(file8: Path) -> None:
    start = map_anonymous(2)
    with file8.open("rb") as file:
        for page in range(2):
            syscalls.mmap(
                start + page * PAGE_SIZE,
                PAGE_SIZE,
                1,
                syscalls.MAP_PRIVATE | syscalls.MAP_FIXED,
                file.fileno(),
                0,
            )
    touch(start, 2)
    for level in ("flags", None):
        found = analyse(take([ProcessRange(os.getpid(), start, 0, 2 * PAGE_SIZE)], level=level))
        assert signs(found) == ["▒▒"]
        assert found.frame_group.tolist() == [[1, 1]]


def test_an_untouched_page_is_absent(file8: Path) -> None:
    address = map_file(file8, 1)
    found = analyse(take([ProcessRange(os.getpid(), address, 0, PAGE_SIZE)]))
    assert found.count(sharing.ABSENT) == 1


def test_the_table_of_states() -> None:
    assert [state.code for state in STATES] == list(range(len(STATES)))
    assert len({state.sign for state in STATES}) == len({state.name for state in STATES}) == len(STATES)
    assert STATES[sharing.COPIED_SHARED].name == "copied-shared"
