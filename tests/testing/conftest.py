"""The processes that the tests of the plugin lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniloader.testing import (
    StartCrew,
    Workers,
)


@pytest.fixture
def workers(crew: StartCrew, demo: Path, request: pytest.FixtureRequest) -> Workers:
    """Three workers with the demonstration library, loaded by the system unless a test asks for both."""
    return crew(3, library=demo, by=getattr(request, "param", "dlopen"))


@pytest.fixture
def server(crew: StartCrew, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """A process that has imported a module, which has opened the library."""
    (tmp_path / "served.py").write_text(
        f"import ctypes, time\nlibrary = ctypes.CDLL({str(demo)!r})\n"
        "def handle(number):\n    return library.demo_next() + number\n"
        "def refuse():\n    raise ValueError('no such item')\n"
        "def fail_slowly(number):\n"
        "    try:\n        return {'items': {}}[\"items\"][number]\n"
        "    except KeyError as error:\n        raise ValueError(f'no item {number}') from error\n"
        "class Shop:\n    @staticmethod\n    def handle():\n        return {1}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return crew(1, module="served")
