"""Control groups: in which a process is, and which unit of systemd or which container that means.

Sources: cgroups(7), "/proc/pid/cgroup"; systemd.unit(5) and the control group tree of systemd; the names
that container engines give: ``docker-ID.scope``, ``libpod-ID.scope``, ``cri-containerd-ID.scope``,
``/docker/ID``, ``/kubepods/…/podUID/ID``, ``machine-NAME.scope``, ``lxc.payload.NAME``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from miniloader.kernel.procfs import read_process_file
from miniloader.values import dataclass

__all__ = ["ControlGroups", "parse_control_groups", "read_control_groups"]

_UNIT: Final = re.compile(r"(.+)\.(?:service|scope|slice|socket|mount|swap)")
#: An engine's name before it, and the identifier that it has given: of 64 hexadecimal digits, as a rule.
_BY_ENGINE: Final = re.compile(r"(?:([a-z-]+)[-:])?([0-9a-f]{32,64})(?:-\d+)?(?:\.scope)?")
_BY_NAME: Final = re.compile(r"(?:machine-|lxc\.payload\.)(.+?)(?:\.scope)?")


@dataclass(frozen=True)
class ControlGroups:
    """The control groups of a process, a path for each hierarchy: version 2 has one, version 1 several.

    ``paths`` are the different ones, the most telling first: that of version 2, then that of the memory
    controller; ``/`` is last, as it is where a process is put that nobody has put anywhere.
    """

    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        """The most telling of the paths; "" where the kernel has no control groups.

        >>> parse_control_groups("4:memory:/docker/0a1b\\n1:name=systemd:/\\n0::/\\n").path
        '/docker/0a1b'
        """
        return self.paths[0] if self.paths else ""

    @property
    def units(self) -> tuple[str, ...]:
        """The units of systemd that the process is in, with the slices around.

        >>> parse_control_groups("0::/system.slice/nginx.service\\n").units
        ('system.slice', 'nginx.service')
        """
        return tuple(part for part in self._parts() if _UNIT.fullmatch(part))

    @property
    def containers(self) -> tuple[str, ...]:
        """The containers that the process is in, by the identifiers or names that their engines gave them.

        A container engine's monitor (conmon) is beside its container, not in it.

        >>> parse_control_groups("0::/machine.slice/libpod-" + "ab" * 32 + ".scope/container\\n").containers
        ('abababababababababababababababababababababababababababababababab',)
        """
        containers = []
        for part in self._parts():
            by_engine, by_name = _BY_ENGINE.fullmatch(part), _BY_NAME.fullmatch(part)
            if by_engine and not (by_engine[1] or "").endswith("conmon"):
                containers.append(by_engine[2])
            elif by_name:
                containers.append(by_name[1])
        return tuple(containers)

    def _parts(self) -> Iterator[str]:
        """The names on all paths, each once."""
        yield from dict.fromkeys(part for path in self.paths for part in path.split("/") if part)


def parse_control_groups(text: str) -> ControlGroups:
    """What ``/proc/PID/cgroup`` says: on each line the hierarchy's number, its controllers, and a path.

    >>> parse_control_groups("4:memory:/pool\\n2:cpu:/fast\\n0::/user.slice\\n").paths
    ('/user.slice', '/pool', '/fast')
    """
    ordered = list[tuple[bool, int, str]]()
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        rank = 0 if hierarchy == "0" else 1 if "memory" in controllers.split(",") else 2
        ordered.append((path == "/", rank, path))
    ordered.sort(key=lambda group: group[:2])
    return ControlGroups(tuple(dict.fromkeys(path for _, _, path in ordered)))


def read_control_groups(pid: int) -> ControlGroups:
    """The control groups of process ``pid``; raises ProcessGone, EvidenceError where there are none."""
    return _parsed(os.fsdecode(read_process_file(pid, "cgroup")))


_parsed = lru_cache(maxsize=64)(parse_control_groups)  # many processes are in one group
