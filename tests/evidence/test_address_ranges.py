"""Ranges of addresses, against one look at each range for each address."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miniloader.evidence.address_ranges import AddressRanges

PLACES = st.integers(0, 30) | st.integers((1 << 64) - 30, (1 << 64) - 1)


@given(st.lists(st.tuples(PLACES, PLACES).map(sorted)), st.lists(PLACES.filter(lambda at: at < 1 << 63)))
def test_what_meets_a_range(ranges: list[list[int]], addresses: list[int]) -> None:
    pairs = [(start, end) for start, end in ranges]
    for length in (1, 4):
        met = AddressRanges(pairs).meet(np.array(addresses, np.uint64), length)
        assert met.tolist() == [
            any(start < address + length and address < end for start, end in pairs if start < end)
            for address in addresses
        ]
