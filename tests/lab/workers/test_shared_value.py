"""What a forked child leaves its parent in memory: the last value, of any size, however the child ended."""

from __future__ import annotations

import os
import signal

import numpy as np

from miniloader.lab.workers.child import ForkedProcess
from miniloader.lab.workers.shared_value import SharedValue


def _left(body) -> object:
    shared = SharedValue()
    with ForkedProcess(lambda: body(shared)) as process:
        process.wait()
    return shared.read()


def test_nothing_was_left() -> None:
    assert _left(lambda shared: 0) is None


def test_the_last_value_is_read() -> None:
    assert _left(lambda shared: shared.leave("a longer text") + shared.leave(("short", 1))) == ("short", 1)


def test_it_is_there_though_the_child_has_crashed() -> None:
    def crash(shared: SharedValue) -> int:
        shared.leave("before the end")
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    assert _left(crash) == "before the end"


def test_it_is_left_though_the_child_has_no_descriptors() -> None:
    def close_all(shared: SharedValue) -> int:
        os.closerange(3, 1024)
        return shared.leave("still here")

    assert _left(close_all) == "still here"


def test_there_is_room_for_large_arrays_and_they_are_aligned() -> None:
    def leave(shared: SharedValue) -> int:
        shared.leave("x" * 1_000_000)
        return shared.leave([np.arange(3, dtype=np.uint8), np.arange(1_000_000, dtype=np.uint64)])

    small, large = _left(leave)
    assert np.array_equal(small, [0, 1, 2])
    assert np.array_equal(large, np.arange(1_000_000))
    assert large.flags.aligned
    assert not large.flags.writeable, "the memory is not the parent's to change"


def test_values_are_left_turn_by_turn() -> None:
    shared = SharedValue()
    for value in (b"x" * 100_000, "second", [3]):
        with ForkedProcess(lambda value=value: shared.leave(value)) as process:
            process.wait()
        assert shared.read() == value
