"""Which processes are meant."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import miniloader
from miniloader.errors import ProcessGone, UsageError
from miniloader.kernel.control_groups import parse_control_groups, read_control_groups
from miniloader.lab.audit.select import choose
from tests.conftest import NOBODY
from tests.lab.audit.told_processes import (
    BECOME_NOBODY,
    told,
    told_children,
)

_DOCKER = "3f5a" * 16
_OTHER = "3f5b" * 16


def test_choosing() -> None:
    with told() as parent, told_children(parent, 2) as children:
        assert choose(tree=parent.pid) == tuple(sorted([parent.pid, *children]))
        assert {parent.pid, *children} <= {*choose(name="*python*")}
        assert parent.pid in choose(user=str(os.geteuid()), tree=parent.pid)
        assert choose(user=str(NOBODY + 1), tree=parent.pid) == ()
        assert {parent.pid, *children} <= {*choose()}
    with pytest.raises(UsageError, match="no such user"):
        choose(user="nobody-is-called-so")
    with pytest.raises(UsageError, match="fits every process"):
        choose(command="")
    with pytest.raises(ProcessGone):
        choose(tree=parent.pid)


def test_a_command_line_is_what_ps_shows_of_it() -> None:
    """A part of it, or a pattern for all of it; also where the program has put something else there."""
    command = ["sleep", "3.1415926e4"]
    with subprocess.Popen(command) as process:
        try:
            ps = subprocess.run(
                ["ps", "-o", "args=", "-p", str(process.pid)], capture_output=True, text=True, check=True
            )
            assert ps.stdout.rstrip("\n") == " ".join(command)
            for pattern in ("p 3.1415926e4", "sleep 3.1415926e?", "*1415926e4"):
                assert choose(command=pattern) == (process.pid,)
            assert choose(command="1415926e?") == ()
            (audited,) = miniloader.audit([process.pid], causes=False).processes
            assert audited.command == " ".join(command)
        finally:
            process.kill()


@pytest.mark.needs_root("to run processes of two users")
def test_a_user_is_whom_a_process_acts_as() -> None:
    """Also of a process that is not dumpable, whose files in /proc are root's."""
    hide = "ctypes.CDLL(None).prctl(4, 0)"  # PR_SET_DUMPABLE
    with told(BECOME_NOBODY) as theirs, told(BECOME_NOBODY, hide) as hidden, told() as ours:
        assert os.stat(f"/proc/{hidden.pid}/maps").st_uid == 0
        assert {theirs.pid, hidden.pid} <= {*choose(user="nobody")}
        assert ours.pid not in choose(user="nobody")
        assert not {theirs.pid, hidden.pid} & {*choose(user="root")}
        audit = miniloader.audit([theirs.pid, hidden.pid, ours.pid], causes=False)
        assert [process.user for process in audit.processes] == ["nobody", "nobody", "root"]


@pytest.mark.parametrize(
    ("path", "units", "containers"),
    [
        ("/system.slice/nginx.service", ("system.slice", "nginx.service"), ()),
        (f"/system.slice/docker-{_DOCKER}.scope", ("system.slice", f"docker-{_DOCKER}.scope"), (_DOCKER,)),
        (f"/docker/{_DOCKER}", (), (_DOCKER,)),
        (f"/kubepods/besteffort/podb1f0c2/{_DOCKER}", (), (_DOCKER,)),
        (f"/machine.slice/libpod-conmon-{_DOCKER}.scope", None, ()),
        (f"/machine.slice/libpod-{_DOCKER}.scope/container", None, (_DOCKER,)),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{_DOCKER}.scope", None, (_DOCKER,)),
        (f"/kubelet_kubepods.slice:cri-containerd:{_DOCKER}", (), ()),
        (f"/docker/{_OTHER}/docker/{_DOCKER}", (), (_OTHER, _DOCKER)),
        ("/machine.slice/machine-web.scope", None, ("web",)),
        ("/lxc.payload.web", (), ("web",)),
        (f"/ecs/{'0c' * 16}/{'0c' * 16}-1234567890", (), ("0c" * 16,)),
        ("/", (), ()),
    ],
)
def test_what_a_control_group_means(
    path: str, units: tuple[str, ...] | None, containers: tuple[str, ...]
) -> None:
    groups = parse_control_groups(f"0::{path}\n")
    assert tuple(dict.fromkeys(groups.containers)) == containers
    assert units is None or groups.units == units


@contextmanager
def _in_group(path: str) -> Iterator[int]:
    """A process in a control group of its own, below one that is mounted here."""
    mounted = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounted if mount[2] == "cgroup2"]
    roots += [Path(mount[1]) for mount in mounted if mount[2] == "cgroup" and "memory" in mount[3].split(",")]
    if not roots:
        pytest.skip("this machine lacks a mounted hierarchy of control groups")
    group = roots[0] / path
    made = [group, *(parent for parent in group.parents if not parent.exists())]
    try:
        group.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"this machine lacks a control group that may be written: {error}")
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            yield process.pid
        finally:
            process.kill()
            process.wait()
            for directory in made:
                directory.rmdir()


@pytest.mark.needs_root("to make control groups")
def test_units_and_containers_are_found_by_the_control_group() -> None:
    """Two containers and a unit, made as systemd and container engines make them."""
    with ExitStack() as stack:
        first = stack.enter_context(_in_group(f"fleet.slice/docker-{_DOCKER}.scope"))
        second = stack.enter_context(_in_group(f"fleet-docker/{_OTHER}"))
        unit = stack.enter_context(_in_group("fleet-system.slice/fleet@7.service/app"))
        assert read_control_groups(first).path == f"/fleet.slice/docker-{_DOCKER}.scope"
        assert choose(container=_DOCKER[:12]) == (first,)
        assert choose(container=_OTHER) == (second,)
        with pytest.raises(UsageError, match=f"2 begin so: {_DOCKER}, {_OTHER}"):
            choose(container="3f5")
        assert choose(container="fleet") == ()
        for name in ("fleet@7", "fleet@7.service", "fleet@*", "fleet-system.slice"):
            assert choose(unit=name) == (unit,)
        assert choose(unit="fleet") == (first,)  # the slice: whole names are meant, not parts
        assert choose(cgroup="/fleet-docker/") == (second,)
        assert choose(cgroup="*.service/app") == (unit,)
        assert choose(cgroup="fleet-d*") == choose(cgroup="/fleet-d*") == (second,)  # from its root on
        assert choose(cgroup="docker-*") == ()
        audit = miniloader.audit([unit], causes=False)
        assert audit.processes[0].cgroup == "/fleet-system.slice/fleet@7.service/app"
