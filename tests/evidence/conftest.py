"""A file to look at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memory import synced_file


@pytest.fixture
def file8() -> Iterator[Path]:
    """A file of eight pages that an ordinary user may read too (``tmp_path`` is for its owner alone)."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield synced_file(Path(directory) / "file8", 8)
