"""The loops alone, under sanitizers of addresses and undefined behaviour (``tools/fuzz --native``)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fixtures.build import build
from fixtures.sanitized import SOURCES, build_fuzzer, fuzzed


def test_loops_read_and_write_where_they_may(tmp_path: Path) -> None:
    fuzzer = build_fuzzer(tmp_path)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, build("demo"), seed=1, runs=3000, seconds=20)
    assert status == 0, said
    counts = re.fullmatch(r"(\d+) runs, (\d+) edges", said)
    assert counts is not None
    assert int(counts[2]) > 400


def test_a_loop_that_looks_beyond_what_is_readable_is_found(tmp_path: Path) -> None:
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    header = sources / "loops.h"
    text = header.read_text()
    weaker = text.replace(" && size <= spans[i].end - vaddr)", ")")
    assert weaker != text
    header.write_text(weaker)
    fuzzer = build_fuzzer(tmp_path, sources)
    if fuzzer is None:
        pytest.skip("this machine lacks gcc's sanitizers")
    status, said = fuzzed(fuzzer, build("demo"), seed=1, runs=3000, seconds=20)
    assert status != 0
    assert "AddressSanitizer" in said
