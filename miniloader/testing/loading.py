"""What a test claims of a file: that it will load where it is meant to."""

from __future__ import annotations

import os

from miniloader.lab.check.check import check
from miniloader.report.check import lines
from miniloader.report.text import laid_out, plain

__all__ = ["assert_loads"]


def assert_loads(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] = "/",
    within: str | int | None = None,
    libc: str | None = None,
    policy: str | None = None,
) -> None:
    """The library or program ``path`` loads: a wheel's extension, say, with ``policy="manylinux_2_28"``.

    Parameters are those of :func:`miniloader.check`.  AssertionError says all that keeps it from loading.

    >>> assert_loads("libz.so.1", libc="2.34")
    """
    __tracebackhide__ = True
    checked = check(path, root=root, within=within, libc=libc, policy=policy)
    if not checked.loads:
        raise AssertionError("\n".join(plain(line) for line in laid_out(lines(checked), None)))
