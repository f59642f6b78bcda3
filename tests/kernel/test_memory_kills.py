"""What the kernel says of processes that it has ended for lack of memory, in its two formats; errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniloader.kernel import memory_kills as module
from miniloader.kernel.memory_kills import memory_kills
from miniloader.lab.workers.child import death


def test_both_versions_are_read(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    (tmp_path / "job").mkdir()
    (tmp_path / "memory" / "pool").mkdir(parents=True)
    (tmp_path / "job" / "memory.events").write_text("low 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n")
    (tmp_path / "memory" / "pool" / "memory.oom_control").write_text(
        "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"
    )
    for text, kills in (
        ("0::/job\n", 3),
        ("4:memory:/pool\n2:cpu:/x:y\n0::/\n", 7),
        ("0::/gone\n", 0),
        ("3:cpu:/pool\n", 0),
    ):
        groups.write_text(text)
        assert memory_kills(str(groups), str(tmp_path)) == kills
    assert memory_kills(str(tmp_path / "none"), str(tmp_path)) == 0


@pytest.mark.parametrize(("code", "kills", "said"), [(-9, 2, True), (-9, 0, False), (-11, 2, False)])
def test_who_was_killed_is_told_of_it(
    code: int, kills: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "memory_kills", lambda: kills)
    assert ("for lack of memory (oom_kill 2)" in str(death("it", code, "mapping"))) == said
