"""What differs between two audits of processes that write meanwhile."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import miniloader
from miniloader.kernel.features import LevelName
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.diff import diff
from miniloader.lab.audit.growth import growth
from miniloader.lab.audit.result import Audit
from miniloader.report.audit import summary
from miniloader.report.audit_growth import growth_view, tick
from miniloader.report.text import laid_out, plain
from tests.lab.audit.told_processes import (
    Told,
    page_of,
    told_children,
)


@pytest.mark.parametrize("level", [None, "flags"])
def test_what_a_family_has_no_more_in_common_has_gone_private(
    loaded: Told, demo: Path, level: LevelName | None
) -> None:
    """Whoever writes there, even the same as before the fork, has its own copy; and so has who is left."""
    loaded("store('demo_counters', 5)")
    with told_children(loaded, 1) as (child,):
        pids = [loaded.pid, child]
        before = miniloader.audit(pids, level=level)
        loaded("store('demo_counters', 5)")
        after = miniloader.audit(pids, level=level)
    assert before.library(str(demo)).common > after.library(str(demo)).common
    assert after.library(str(demo)).own - before.library(str(demo)).own >= 2
    changes = [one for one in diff(before, after) if one.path == str(demo) and one.section == ".data"]
    assert [(one.vaddr, one.change, one.symbols, {*one.pids}) for one in changes] == [
        (page_of(demo, "demo_counters"), "private", ("demo_counters",), {*pids})
    ]
    said = " ".join(plain(line) for line in summary(before))
    assert re.search(r"copies that relatives still share: [0-9.,]+ [KM]iB, counted in each of them", said)
    assert "as at the start" not in plain(tick(after, before))


def test_bss_that_is_touched_has_gone_private(loaded: Told, demo: Path) -> None:
    before = miniloader.audit([loaded.pid])
    loaded(f"store('demo_history', 1, 2 * {PAGE_SIZE})")
    after = miniloader.audit([loaded.pid])
    (change,) = [one for one in diff(before, after) if one.path == str(demo)]
    assert (change.change, change.section, change.causes) == ("private", ".bss", ("bss",))
    assert after.library(str(demo)).own - before.library(str(demo)).own == 1


def test_what_the_first_version_saved() -> None:
    """It lacks every key that was added since, and is read and compared all the same."""
    old = Audit.load(Path(__file__).parent / "saved_at_first.json")
    assert (old.mappings, old.erosion) == ((), None)
    assert old.libraries[0].private_pages[0].common == ()
    now = audit([os.getpid()], library="libz", causes=False)
    for first, second in ((old, now), (now, old), (old, old)):
        grown = growth(first, second)
        assert grown.erosion is None
        assert [*laid_out(growth_view(grown), 80)]
        assert isinstance(diff(first, second), tuple)
    assert Audit.from_json(old.to_json()) == old
