"""A budget for what a pool no longer shares: the pool of somebody whose test passed while its heap eroded."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniloader.errors import EvidenceError, UsageError
from miniloader.kernel.probe import best_level
from miniloader.testing import MemorySnapshot, StartCrew, assert_memory

_SHOP = """
import gc
class Item:
    def __init__(self, name): self.name = name
DATA = [Item(f"item{number}") for number in range(30_000)]
def collect(): gc.collect()
def nothing(): pass
"""


def test_a_budget_for_erosion(crew: StartCrew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection copies what it visits, and the message says whose memory, how much, and which objects."""
    (tmp_path / "eroding_shop.py").write_text(_SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    server = crew(1, module="eroding_shop")
    workers = server.fork(2)
    family = server + workers
    forked = family.snapshot("forked", library="libc.so.6")
    workers.call("nothing")
    idle = family.snapshot("idle", library="libc.so.6")
    workers[1].call("collect")
    served = family.snapshot("served", library="libc.so.6")
    with pytest.raises(UsageError, match="a snapshot of before"):
        assert_memory(served, eroded_at_most=0)
    if best_level() != "frames":
        with pytest.raises(EvidenceError, match="frames is needed"):
            assert_memory([forked, idle, served], eroded_at_most="1 MiB")
        return
    assert_memory([forked, idle], eroded_at_most="1 MiB")
    with pytest.raises(AssertionError) as caught:
        assert_memory([forked, idle, served], eroded_at_most="1 MiB")
    message = str(caught.value)
    assert message.startswith("served: memory no longer shared since forked: ")
    assert (
        f"of pid {workers[1].pids[0]} with {server.pids[0]}; at most 1 MiB allowed (1 of 2 processes"
        in message
    )
    assert "eroding_shop.Item" in message
    assert_memory([forked, served], eroded_at_most="40 MiB")


def test_strangers_have_nothing_to_erode() -> None:
    alone = MemorySnapshot("alone", "frames", (1,), (), {}, (), ())
    with pytest.raises(UsageError, match="no two of these processes are relatives"):
        assert_memory([alone, alone], eroded_at_most=0)
    hidden = MemorySnapshot("hidden", "flags", (1,), (), {}, (), None)
    with pytest.raises(EvidenceError, match="frames is needed"):
        assert_memory([hidden, hidden], eroded_at_most=0)
