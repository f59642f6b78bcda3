"""What may be loaded, and what a caller allows and asks for."""

from __future__ import annotations

import os
from typing import Final, Literal

from miniloader.elf import ElfImage, Source, read_image
from miniloader.elf.checks import refuse_other_types, refuse_problems
from miniloader.elf.dynamic import DF_1_NOOPEN, DT_FLAGS_1
from miniloader.errors import ElfError, LoadError
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.native import gate
from miniloader.values import dataclass

__all__ = ["Binding", "Policy", "comes_from_host", "is_module_of_libc", "open_image", "refuse"]

Binding = Literal["now", "lazy"]

#: Libraries with state that a process may have only once, by SONAME: when another library needs them they
#: come from the system's loader, and what it has already is not loaded again.
_ONLY_ONCE: Final = frozenset((
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2",
    "librt.so.1", "libutil.so.1",
    "libthread_db.so.1", "libresolv.so.2", "libanl.so.1", "libBrokenLocale.so.1", "libnss_compat.so.2",
    "libnss_db.so.2", "libnss_dns.so.2", "libnss_files.so.2", "libnss_hesiod.so.2",
))  # fmt: skip
#: Libraries that, when another library needs them, come from the system's loader too.
_FROM_HOST: Final = _ONLY_ONCE | {
    *("libm.so.6", "libmvec.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libc++.so.1", "libc++abi.so.1")
}


_AUDIT: Final = "how processes share it: miniloader audit PID"


@dataclass(frozen=True)
class Policy:
    """What a caller allows and asks for; see :func:`load`.

    Who calls dlopen(3) may ask that names are looked up in the library before the global scope (``deep``),
    that the library is in that scope (``is_global``), and that it is never unmapped (``stays``).
    """

    init: bool = True
    bind: Binding = "now"
    address: int | None = None
    text_relocations: bool = False
    executable_stack: bool = False
    writable_code: bool = False
    prepared: bool = False
    gdb: bool = False
    deep: bool = False
    is_global: bool = False
    stays: bool = False


def comes_from_host(name: str | None) -> bool:
    """Whether the library ``name``, when another needs it, is loaded by the system's loader.

    >>> comes_from_host("libm.so.6"), comes_from_host("libm.software.so"), comes_from_host("libz.so.1")
    (True, False, False)
    """
    return name in _FROM_HOST


def is_module_of_libc(path: str) -> bool:
    """Whether ``path`` is of those that glibc opens inside itself: for iconv(3), names, and unwinding.

    >>> is_module_of_libc("/usr/lib/gconv/IBM037.so"), is_module_of_libc("/lib/libz.so.1")
    (True, False)
    """
    directory, _, name = path.rpartition("/")
    return directory.endswith("/gconv") or name.startswith(("libnss_", "libgcc_s.so"))


def open_image(source: Source, policy: Policy) -> ElfImage:
    """Read and check what is to be loaded; :class:`ElfError` or :class:`LoadError` says why it cannot be."""
    image = read_image(source)
    refuse(image, policy)
    refuse_problems(image)
    refuse_problems(image, when_linked=True)
    return image


def refuse(image: ElfImage, policy: Policy) -> None:
    """Raise :class:`ElfError` or :class:`LoadError` for what is no library, not for here, or not allowed."""
    path, header, here = image.path, image.header, gate.processor()
    gate.require_loading()
    if (header.machine, header.elf_class, header.byte_order) != (here.upper(), 64, "little"):
        found = f"{header.elf_class}-bit {header.byte_order}-endian {header.machine}"
        raise ElfError(path, "e_machine", found, f"64-bit little-endian {here.upper()}: this process is")
    refuse_other_types(image)
    if image.dynamic.flag(DT_FLAGS_1, DF_1_NOOPEN):
        raise ElfError(path, "DT_FLAGS_1", "DF_1_NOOPEN", "a library that may be opened while a program runs")
    if (image.soname or os.path.basename(path)) in _ONLY_ONCE and _is_present(image.soname or path):
        raise LoadError(f"{path}: a process can have it only once, and this one has it already", hint=_AUDIT)
    if image.executable_stack and not policy.executable_stack:
        hint = "allow it with executable_stack=True (--allow-executable-stack)"
        found = "an executable stack" if image.segment("PT_GNU_STACK") else "none: the stack is executable"
        raise ElfError(path, "PT_GNU_STACK.p_flags", found, "a stack that is not", hint=hint)
    for load in image.loads:
        if "w" in load.flags and "x" in load.flags and not policy.writable_code:
            hint = "allow it with writable_code=True (--allow-writable-code)"
            field = f"PT_LOAD[{load.index}].p_flags"
            raise ElfError(path, field, load.flags, "writable or executable, not both", hint=hint)
    if image.dynamic.text_relocations and not policy.text_relocations:
        hint = "allow them with text_relocations=True (--allow-text-relocations)"
        raise ElfError(path, "DT_TEXTREL", "relocations of read-only segments", "none", hint=hint)


def _is_present(name: str) -> bool:
    """Whether the system's loader has the library ``name``, a soname or a path."""
    handle = dynamic_linker.open_host(name, load=False)
    if handle is not None:
        dynamic_linker.close_host(handle)
    return handle is not None
