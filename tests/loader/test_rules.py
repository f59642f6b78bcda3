"""Which file, in which order, bound to what: ld.so and miniloader on made trees (`tools/corpus --rules`)."""

from __future__ import annotations

from pathlib import Path

from tests.oracle.rules import compare, described, python_with_rpath


def test_five_hundred_trees_load_as_with_ld_so(tmp_path: Path) -> None:
    import sys

    differences = compare(500, seed_number=17, pythons=[sys.executable, *python_with_rpath(tmp_path)])
    assert differences.trees == 500
    assert differences.outcomes["loaded"] > 100
    assert differences.outcomes["refused"] > 100
    assert not differences.found, described(*differences.found[0])
