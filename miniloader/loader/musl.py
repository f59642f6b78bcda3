"""musl's dynamic linker: where it looks for libraries, which is not where glibc's does.

It has no cache, and no sub-directories for processors.  Its default directories stand in a file of
its own, ``/etc/ld-musl-ARCH.path``, below the directory above the one that it lies in itself.
Source: musl's ``ldso/dynlink.c`` (``load_library``, ``fixup_rpath``, ``__dls3``) and ``ldso(8)`` of Alpine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from miniloader.loader.root import Root

__all__ = ["default_directories", "interpreter_of", "is_itself", "is_musl"]

_DIRECTORIES: Final = ("/lib", "/usr/local/lib", "/usr/lib")  # where there is no such file
_LARGEST: Final = 1 << 16
_NAME: Final = r"ld-musl-(?P<arch>[A-Za-z0-9_]+)\.so\.1"
#: What musl has within its one library, and so never looks for: ``libc.so``, ``libpthread.so.0``, …
_ITSELF: Final = r"lib(c|pthread|rt|m|dl|util|xnet)\."
_ARCHES: Final = {
    ("X86_64", 64): "x86_64",
    ("AARCH64", 64): "aarch64",
    ("386", 32): "i386",
    ("ARM", 32): "armhf",
    ("RISCV", 64): "riscv64",
    ("S390", 64): "s390x",
    ("PPC64", 64): "powerpc64le",
}


def is_musl(interpreter: str) -> bool:
    """Whether a program with this interpreter is loaded by musl's dynamic linker.

    >>> is_musl("/lib/ld-musl-x86_64.so.1"), is_musl("/lib64/ld-linux-x86-64.so.2")
    (True, False)
    """
    name = os.path.basename(interpreter)
    return name.startswith("ld-musl-") and re.fullmatch(_NAME, name) is not None


def is_itself(name: str) -> bool:
    """Whether ``name``, as ``DT_NEEDED`` has it, means musl itself, which is there already.

    >>> is_itself("libc.so"), is_itself("libm.so.6"), is_itself("libz.so.1")
    (True, True, False)
    """
    return re.match(_ITSELF, name) is not None


def interpreter_of(machine: str, elf_class: int, needed: Sequence[str]) -> str | None:
    """musl's dynamic linker, for a library that names none, but needs musl's C library; else None.

    >>> interpreter_of("AARCH64", 64, ["libz.so.1", "libc.musl-aarch64.so.1"])
    '/lib/ld-musl-aarch64.so.1'
    """
    arch = _ARCHES.get((machine, elf_class))
    if arch is None or not any(name == "libc.so" or name.startswith("libc.musl-") for name in needed):
        return None
    return f"/lib/ld-musl-{arch}.so.1"


def default_directories(root: Root, interpreter: str) -> tuple[str, ...]:
    """The default directories of the dynamic linker at ``interpreter``, each with ``/`` at its end."""
    match = re.fullmatch(_NAME, os.path.basename(interpreter))
    assert match is not None
    above = os.path.dirname(os.path.dirname(interpreter)).rstrip("/")
    try:
        with open(root.open(f"{above}/etc/ld-musl-{match['arch']}.path"), "rb") as file:
            text = os.fsdecode(file.read(_LARGEST))
    except FileNotFoundError:
        return tuple(f"{directory}/" for directory in _DIRECTORIES)
    except (OSError, ValueError):
        return ()  # as musl has it: with what cannot be read nothing is searched
    return tuple(f"{directory.rstrip('/')}/" for directory in re.split("[:\n]+", text) if directory)
