"""An audit as metrics: what the readers of Prometheus' client library find in them is what the audit says."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus

import miniloader
from miniloader.errors import MiniloaderError
from miniloader.lab.audit.grouping import grouped
from miniloader.lab.audit.result import Audit
from miniloader.lab.erosion.result import Erosion
from miniloader.report.openmetrics import exposition, write_metrics
from tests.lab.audit.told_processes import told, told_children

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def audit(demo: Path) -> Audit:
    with told(f"lib = ctypes.CDLL({str(demo)!r})") as parent, told_children(parent, 1) as children:
        return miniloader.audit([parent.pid, *children], causes=False)


def _samples(content: bytes) -> Samples:
    """What both readers find: that of OpenMetrics, and that of node_exporter's textfile collector."""
    text = content.decode()
    assert text.endswith("\n# EOF\n")
    found = list[Samples]()
    for read in (read_openmetrics, read_prometheus):
        samples = [sample for family in read(text) for sample in family.samples]
        by_key = {(one.name, tuple(sorted(one.labels.items()))): one.value for one in samples}
        assert len(by_key) == len(samples)
        assert all(one.timestamp is None for one in samples)
        found.append(by_key)
    assert found[0] == found[1]
    return found[0]


def _labelled(samples: Samples, name: str, /, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    return math.fsum(
        value
        for (sample, pairs), value in samples.items()
        if sample == name and labels.items() <= dict(pairs).items()
    )


def test_every_sum_is_the_audits(audit: Audit, demo: Path) -> None:
    samples = _samples(exposition(audit, grouped(audit, "name")))
    for process in audit.processes:
        pid = str(process.pid)
        for column in ("rss", "uss", "pss"):
            name = f"miniloader_process_{column}_bytes"
            assert _labelled(samples, name, pid=pid, name=process.name) == (getattr(process, column) or 0)
        own = _labelled(samples, "miniloader_process_memory_bytes", pid=pid, share="own")
        assert own == process.uss
        assert _labelled(samples, "miniloader_process_info", pid=pid, user=process.user) == 1
    library = audit.library(str(demo))
    for column, number in (("present", library.present), ("frames", library.frames), ("own", library.own)):
        told = _labelled(samples, f"miniloader_library_{column}_bytes", path=str(demo))
        assert told == number * audit.page_size
    assert _labelled(samples, "miniloader_group_uss_bytes", by="name") == audit.uss
    assert _labelled(samples, "miniloader_audit_timestamp_seconds") == pytest.approx(audit.when)


def test_erosion_is_the_audits(audit: Audit) -> None:
    """A row of it is a sample for each figure; where nobody read the bytes none says how many are equal."""
    rows = (Erosion(41, 40, proven=8192, possible=4096, same=12288), Erosion(42, 40, proven=4096, possible=0))
    samples = _samples(exposition(replace(audit, erosion=rows)))
    figures = {
        (
            name.removeprefix("miniloader_process_eroded_"),
            dict(labels)["pid"],
            dict(labels)["relative"],
        ): value
        for (name, labels), value in samples.items()
        if "_eroded_" in name
    }
    assert figures == {
        ("proven_bytes", "41", "40"): 8192,
        ("possible_bytes", "41", "40"): 4096,
        ("same_bytes", "41", "40"): 12288,
        ("proven_bytes", "42", "40"): 4096,
        ("possible_bytes", "42", "40"): 0,
    }
    hidden = _samples(exposition(replace(audit, erosion=None)))
    assert not [name for name, _ in hidden if "_eroded_" in name]


def test_what_a_process_calls_itself_breaks_nothing(audit: Audit) -> None:
    """Names with quotes, backslashes, line ends, and bytes that are no UTF-8; one path twice is a sum."""
    wild = 'a"b\\c\nd{e}=\udcff\u2028'
    first, *others = audit.processes
    libraries = tuple(replace(library, path=wild, build_id=None) for library in audit.libraries[:2])
    changed = replace(audit, processes=(replace(first, name=wild, cgroup=wild), *others), libraries=libraries)
    samples = _samples(exposition(changed))
    names = {dict(labels).get("name") for _, labels in samples} - {None}
    assert 'a"b\\c\\nd{e}=\\udcff\\u2028' in names
    present = sum(library.present for library in libraries) * audit.page_size
    assert _labelled(samples, "miniloader_library_present_bytes") == present


def test_what_is_not_known_is_no_sample(audit: Audit) -> None:
    processes = tuple(replace(process, pss=None) for process in audit.processes)
    samples = _samples(exposition(replace(audit, processes=processes)))
    assert not [name for name, _ in samples if name == "miniloader_process_pss_bytes"]


def test_a_file_is_whole_or_as_it_was(audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool.prom"
    write_metrics(audit, (), path)
    assert path.stat().st_mode & 0o777 == 0o644
    before = path.read_bytes()
    _samples(before)
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(MiniloaderError, match="cannot write the metrics: No space left on device"):
        write_metrics(replace(audit, when=0.0), (), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _full_disk(fd: int) -> None:
    raise OSError(28, os.strerror(28))
