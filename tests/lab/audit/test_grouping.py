"""The processes of an audit by what they are known by, against the sums of the whole and of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import miniloader
from miniloader.kernel.maps import read_maps
from miniloader.lab.audit.grouping import GROUPED_BY, Grouping, grouped
from tests.lab.audit.told_processes import KB, agreed, rollup_of, told, told_children


@pytest.fixture(scope="module")
def audited(demo: Path) -> tuple[miniloader.Audit, int]:
    """Two Pythons, one of them with a child, which are as smaps says; and how many mappings smaps lists."""
    load = f"import ctypes; lib = ctypes.CDLL({str(demo)!r})"
    with told(load) as first, told_children(first, 1) as (child,), told() as second:
        pids = [first.pid, child, second.pid]
        audits = list[miniloader.Audit]()

        def own() -> tuple[list[int], list[int]]:
            audits.append(miniloader.audit(pids, causes=False))
            sums = map(rollup_of, pids)
            theirs = [(one["Private_Clean"] + one["Private_Dirty"]) * KB for one in sums]
            return [process.uss for process in audits[-1].processes], theirs

        agreed(own)
        return audits[-1], sum(len(read_maps(pid)) for pid in pids)


@pytest.fixture
def audit(audited: tuple[miniloader.Audit, int]) -> miniloader.Audit:
    return audited[0]


@pytest.mark.parametrize("by", GROUPED_BY)
def test_groups_add_up_to_the_whole(audited: tuple[miniloader.Audit, int], by: Grouping) -> None:
    audit, listed = audited
    groups = grouped(audit, by)
    assert sum(group.rss for group in groups) == audit.rss
    assert sum(group.uss for group in groups) == audit.uss
    if audit.pss is not None:
        pss = sum(group.pss or 0 for group in groups)
        rounding = KB * (len(audit.mappings) if audit.level == "frames" else listed)  # smaps tells whole kB
        assert pss == pytest.approx(audit.pss, abs=rounding)
    assert [group.pss or group.rss for group in groups] == sorted(
        (group.pss or group.rss for group in groups), reverse=True
    )
    assert {pid for group in groups for pid in group.pids} == {process.pid for process in audit.processes}


def test_groups_are_what_processes_have_in_common(audit: miniloader.Audit, demo: Path) -> None:
    names = {process.name for process in audit.processes}
    assert {group.name for group in grouped(audit, "name")} == names
    (group,) = grouped(audit, "user")
    assert len(group.pids) == 3
    assert group.name in (os.environ.get("USER", group.name), group.name)
    (library,) = [group for group in grouped(audit, "library") if group.name == str(demo)]
    assert library.pids == tuple(process.pid for process in audit.processes[:2])
    mapped = [mapping for mapping in audit.mappings if mapping.name == str(demo)]
    assert library.uss == sum(process.own for mapping in mapped for process in mapping.processes)
