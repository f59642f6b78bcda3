"""What the tests of the kernel's records look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from miniloader.kernel.syscalls import PAGE_SIZE
from tests.memory import map_anonymous, map_file, still_child, store, synced_file, touch


@pytest.fixture
def file8(tmp_path: Path) -> Path:
    """A file of eight pages, on the disk."""
    return synced_file(tmp_path / "file8", 8)


def _varied(path: str) -> dict[str, int]:
    """Map a bit of everything: file pages read and copied, anonymous pages written and read."""
    file, anonymous = map_file(Path(path), 8), map_anonymous(8)
    touch(file, 6)
    store(file + 2 * PAGE_SIZE)
    store(file + 7 * PAGE_SIZE)
    store(anonymous)
    touch(anonymous + PAGE_SIZE)
    return {"file": file, "anonymous": anonymous}


@pytest.fixture
def varied(file8: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """A still process (this Python, forked) with ``_varied`` mappings: its pid, their addresses."""
    with still_child(_varied, str(file8)) as child:
        yield child
