"""The end of the process: ld.so finalises ours in their turn among the libraries that it has loaded itself.

When exit(3) has called all that it was told of, ld.so runs the destructors of what it has loaded: of who
needs others first.  So it is given a library that needs what ours need of it, and has their destructors.
"""

from __future__ import annotations

from collections.abc import Sequence

from miniloader.elf.writer import bare_library
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc.host import HostLibrary
from miniloader.loader.beside_glibc.tls_carrier import open_bytes

__all__ = ["hand_over"]


def hand_over(destructors: Sequence[int], needed: Sequence[HostLibrary]) -> bool:
    """ld.so shall call ``destructors``, in this order, before those of ``needed``; whether it will."""
    names = [library.path for library in needed if library.path]
    try:
        open_bytes("miniloader-end", bare_library(needed=names, destructors=destructors))  # stays
    except (OSError, LoadError):
        return False  # there is no room for it, or one of those needed is gone
    return True
