"""What a loader of one's own is given: system calls, memory, and the numbers of elf.h; for x86-64.

A learner's loader imports it: see :mod:`miniloader.walkthrough.chapters.build`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Final

__all__ = [
    "DT_GNU_HASH",
    "DT_INIT",
    "DT_INIT_ARRAY",
    "DT_INIT_ARRAYSZ",
    "DT_JMPREL",
    "DT_PLTRELSZ",
    "DT_RELA",
    "DT_RELASZ",
    "DT_STRTAB",
    "DT_SYMTAB",
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_PRIVATE",
    "PAGE",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "PT_DYNAMIC",
    "PT_GNU_RELRO",
    "PT_LOAD",
    "R_64",
    "R_GLOB_DAT",
    "R_JUMP_SLOT",
    "R_RELATIVE",
    "Header",
    "call",
    "dlsym",
    "down",
    "dynamic",
    "mmap",
    "mprotect",
    "peek",
    "poke",
    "text",
    "up",
    "word",
]  # fmt: skip

Header = tuple[int, int, int, int, int, int]
"""A program header: type, flags, file offset, vaddr, filesz, memsz."""

PAGE: Final = os.sysconf("SC_PAGESIZE")
PT_LOAD, PT_DYNAMIC, PT_GNU_RELRO = 1, 2, 0x6474E552
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x02, 0x10, 0x20
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ, DT_INIT = 2, 5, 6, 7, 8, 12
DT_JMPREL, DT_INIT_ARRAY, DT_INIT_ARRAYSZ, DT_GNU_HASH = 23, 25, 27, 0x6FFFFEF5
R_64, R_GLOB_DAT, R_JUMP_SLOT, R_RELATIVE = 1, 6, 7, 8

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.dlsym.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.dlsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p]


def mmap(address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """mmap(2): the address; OSError where the kernel refuses."""
    result = _libc.mmap(address, length, protection, flags, fd, offset)
    if result == ctypes.c_void_p(-1).value:
        raise _refused(f"mmap({address:#x}, {length:#x}, …)")
    return int(result)


def mprotect(address: int, length: int, protection: int) -> None:
    """mprotect(2); OSError where the kernel refuses."""
    if _libc.mprotect(address, length, protection):
        raise _refused(f"mprotect({address:#x}, {length:#x}, …)")


def _refused(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def peek(address: int, length: int) -> bytes:
    """The bytes at an address."""
    return ctypes.string_at(address, length)


def text(address: int) -> bytes:
    """The bytes at an address up to the first zero."""
    return ctypes.string_at(address)


def word(address: int) -> int:
    """The 8 bytes at an address, as a number."""
    return int.from_bytes(peek(address, 8), "little")


def poke(address: int, data: bytes) -> None:
    """Store bytes at an address."""
    ctypes.memmove(address, data, len(data))


def down(address: int) -> int:
    """The start of the page that has an address."""
    return address // PAGE * PAGE


def up(address: int) -> int:
    """The first start of a page that is not below an address."""
    return down(address + PAGE - 1)


def dlsym(name: bytes) -> int:
    """The address of a name in the libraries that the process has, as ld.so gives it; 0 for none."""
    return _libc.dlsym(None, name) or 0


def call(address: int) -> None:
    """Call the function at an address, without arguments."""
    ctypes.CFUNCTYPE(None)(address)()


def dynamic(base: int, headers: Iterable[Header]) -> dict[int, int]:
    """The dynamic section of a library that is mapped, from tag to value; addresses in it are vaddrs."""
    tags: dict[int, int] = {}
    for kind, _, _, vaddr, _, memsz in headers:
        if kind == PT_DYNAMIC:
            for at in range(base + vaddr, base + vaddr + memsz, 16):
                tag, value = struct.unpack("<QQ", peek(at, 16))
                if tag == 0:
                    break
                tags[tag] = value
    return tags
