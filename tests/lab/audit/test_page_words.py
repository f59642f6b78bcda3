"""One page of one process, word by word."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import pytest

from miniloader.errors import UsageError
from miniloader.lab.audit.page_words import view_page
from tests.conftest import AsNobody
from tests.lab.audit.told_processes import (
    Told,
    vaddr_of,
)


@pytest.mark.parametrize("beyond", [0, 1 << 24, 1 << 62])
def test_what_cannot_be_read_is_not_said_to_be_shared(demo: Path, as_nobody: AsNobody, beyond: int) -> None:
    """Its file is gone: where in it a vaddr is nobody knows, nor where in memory, nor where it ends."""

    def look() -> tuple[str, tuple[str, ...], str]:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "gone.so"
            path.write_bytes(demo.read_bytes())
            library = ctypes.CDLL(str(path))
            ctypes.c_long.in_dll(library, "demo_spare").value = 7
            path.unlink()
        view = view_page(os.getpid(), vaddr_of(demo, "demo_spare") + beyond, "gone.so")
        return view.state, view.causes, view.reason

    state, causes, reason = as_nobody(look)
    assert (state, causes) == ("unknown", ("unknown",))
    assert "deleted" in reason


def test_one_page_of_each_state(loaded: Told, demo: Path) -> None:
    loaded("ctypes.string_at(at('demo_greeting'), 1)")
    shared = view_page(loaded.pid, vaddr_of(demo, "demo_greeting"), str(demo))
    assert (shared.state, shared.causes, shared.words) == ("shared", (), ())
    private = view_page(loaded.pid, vaddr_of(demo, "demo_operations"), str(demo))
    assert (private.state, private.causes) == ("private", ("relocation",))
    assert {word.cause for word in private.words} == {"relocation"}
    assert {word.symbol for word in private.words} == {"demo_operations"}
    assert all(word.new == word.old == private.base + word.file or word.file == 0 for word in private.words)
    with pytest.raises(UsageError, match="not in"):
        view_page(loaded.pid, 1 << 40, str(demo))
    with pytest.raises(UsageError, match="no such file"):
        view_page(loaded.pid, 0, "nothing-is-called-so")
