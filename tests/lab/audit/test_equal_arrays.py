"""What is kept of processes that have much alike."""

from __future__ import annotations

import numpy as np

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.equal_arrays import EqualArrays
from miniloader.lab.audit.survey import Memo, Survey, survey


def test_what_only_looks_equal_is_kept_apart() -> None:
    """Another type, another shape, or another content."""
    arrays, known = EqualArrays(), np.arange(4, dtype=np.uint32)
    assert arrays.first(known) is known
    assert arrays.first(known.copy()) is known
    for unlike in (known.view(np.int32), known.reshape(2, 2), known + np.uint32(1), known[:2].copy()):
        assert arrays.first(unlike) is unlike


def _kept(process: Survey) -> int:
    """The bytes that are kept of each page."""
    columns = process.copies, process.originals
    return sum(
        array.nbytes for column in columns for array in (column.places, column.numbers, column.exclusive)
    )


def test_a_page_of_a_process_is_kept_in_nine_bytes(servers: list[int]) -> None:
    """A thousand processes have some four thousand each: what is kept of them is what an audit takes."""
    memo = Memo()
    for pid in servers:
        seen = survey(pid, memo, causes=False)
        pages = len(seen.copies) + len(seen.originals)
        assert pages * PAGE_SIZE == seen.rss * PAGE_SIZE
        assert _kept(seen) == 9 * pages


def test_columns_say_where_the_pages_are(servers: list[int]) -> None:
    """Addresses ascend, each in its mapping; those of a file are the ones among all of them."""
    seen = survey(servers[0], Memo(), causes=False)
    for columns in (seen.copies, seen.originals):
        addresses = columns.addresses
        assert (np.diff(addresses.astype(np.int64)) > 0).all()
        assert (addresses % np.uint64(PAGE_SIZE) == 0).all()
    for placed in seen.files:
        assert np.isin(placed.addresses, seen.copies.addresses[placed.copied]).all()
        assert len(placed.addresses) == len(placed.file_offsets) == placed.private
        assert len(placed.own_offsets) == placed.shared
