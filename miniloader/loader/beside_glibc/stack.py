"""Stacks whose pages can be executed: for a library that asks for them, and a caller who allows it.

Only glibc knows the stacks of all threads, and how those to come are made.  dlopen(3) has it change them when
a library without PT_GNU_STACK, or with an executable one, is opened; so one is, with nothing else in it.
"""

from __future__ import annotations

import os
from typing import Final

from miniloader.elf.writer import bare_library
from miniloader.errors import LoadError
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.loader.beside_glibc.tls_carrier import open_bytes
from miniloader.native import gate

__all__ = ["make_executable"]

#: From this glibc on dlopen(3) makes no stack executable.
_NOT_BY_DLOPEN: Final = (2, 41)


def make_executable(owner: str) -> None:
    """Make the stacks of this process executable, those of threads to come, too, for the library ``owner``.

    Raises :class:`LoadError` where this kernel or this glibc (from 2.41 on) does not let it be done.
    """
    try:
        handle, fd = open_bytes("miniloader-stack", bare_library(stack="rwx"))
    except OSError as error:
        raise LoadError(f"{owner}: PT_GNU_STACK: stacks stay as they are: {error}") from None
    except LoadError as error:
        reason = (error.ld_so or str(error)).partition(": ")[2]
        text = f"{owner}: PT_GNU_STACK: needs an executable stack, which glibc refuses: {reason}"
        raise LoadError(text, hint=_hint(), ld_so=f"{owner}: {reason}") from None
    dynamic_linker.close_host(handle)
    os.close(fd)


def _hint() -> str:
    """What may help where glibc refuses.  Source: its NEWS for 2.41, and its manual, glibc.rtld.execstack."""
    if gate.glibc_version() < _NOT_BY_DLOPEN:
        return "this process may not make pages executable: the kernel, or whoever started it, forbids it"
    return "glibc has them so from the start only: GLIBC_TUNABLES=glibc.rtld.execstack=2 in the environment"
