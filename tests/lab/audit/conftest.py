"""Processes that the tests of an audit look at."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab.audit.told_processes import (
    AT_SYMBOLS,
    LOADED_BY,
    Told,
    told,
    told_children,
)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[int]]:
    """Two Pythons with ssl and sqlite3, one of them with two children, and a bash."""
    with ExitStack() as stack:
        two = [stack.enter_context(told("import ssl, sqlite3")) for _ in range(2)]
        children = stack.enter_context(told_children(two[0], 2))
        bash = stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", "echo ready; read line"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(bash.kill)
        assert bash.stdout is not None
        bash.stdout.readline()
        yield [*(one.pid for one in two), *children, bash.pid]


@pytest.fixture(params=list(LOADED_BY))
def loaded(request: pytest.FixtureRequest, demo: Path) -> Iterator[Told]:
    """A process with the demonstration library, loaded by us or by the system's loader."""
    by = request.param
    with told(LOADED_BY[by].format(path=str(demo)), AT_SYMBOLS.format(by=by)) as one:
        yield one
