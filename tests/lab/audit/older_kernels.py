"""What an audit does on kernels before 6.7, which lack PAGEMAP_SCAN, as well as on this one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from miniloader.kernel import syscalls
from tests.memory import failing


@contextmanager
def before_6_7() -> Iterator[None]:
    """As on a kernel without PAGEMAP_SCAN."""
    with syscalls.injected("ioctl", failing(errno.ENOTTY)):
        yield


KERNELS = pytest.mark.parametrize("kernel", [nullcontext, before_6_7], ids=["this kernel", "before 6.7"])
