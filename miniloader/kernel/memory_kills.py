"""Whether the kernel has ended processes of this control group for lack of memory.

Sources: Documentation/admin-guide/cgroup-v2.rst, ``memory.events``; cgroup-v1/memory.rst,
``memory.oom_control``, which counts them since 4.13.
"""

from __future__ import annotations

from typing import Final

__all__ = ["memory_kills"]

_ROOT: Final = "/sys/fs/cgroup"


def memory_kills(groups: str = "/proc/self/cgroup", root: str = _ROOT) -> int:
    """How many processes of the control group named in ``groups`` have been ended so, since it is there.

    0, too, where nobody tells: control groups are mounted elsewhere, or not at all.
    """
    try:
        with open(groups) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return 0
    files = [f"{root}{path}/memory.events" for _, controllers, path in lines if not controllers]
    files += [f"{root}/memory{path}/memory.oom_control" for _, names, path in lines if "memory" in names]
    return max(map(_counted, files), default=0)


def _counted(path: str) -> int:
    try:
        with open(path) as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, ValueError, IndexError):
        return 0
