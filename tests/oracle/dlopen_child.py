"""Opens one library with dlopen(3), says where everything is, and holds still.

A script for a fresh interpreter that knows nothing of miniloader: ``python -I -S dlopen_child.py REPORT HOLD
PATH [BEFORE…]``.  REPORT and HOLD are descriptors of pipes; the libraries BEFORE are opened first.  See
:mod:`tests.oracle.held`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

_PT_LOAD = 1
_RTLD_DI_LINKMAP = 2


class _Phdr(ctypes.Structure):
    """``Elf64_Phdr``."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("offset", "vaddr", "paddr", "filesz", "memsz", "align")),
    )


class _PhdrInfo(ctypes.Structure):
    """``struct dl_phdr_info``."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("phdr", ctypes.POINTER(_Phdr)),
        ("phnum", ctypes.c_uint16),
        ("adds", ctypes.c_uint64),
        ("subs", ctypes.c_uint64),
        ("tls_modid", ctypes.c_size_t),
        ("tls_data", ctypes.c_void_p),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_PhdrInfo), ctypes.c_size_t, ctypes.c_void_p)


def libraries() -> list[dict[str, Any]]:
    """Every library that ld.so has loaded: path, bias, first and last address, TLS.

    ``tls_offset`` is where the calling thread's block begins, from its thread pointer; ``None`` without one.
    """
    libc = ctypes.CDLL(None)
    libc.pthread_self.restype = libc.__tls_get_addr.restype = ctypes.c_size_t
    thread_pointer: int = libc.pthread_self()
    if os.uname().machine == "aarch64":  # the pointer is behind the thread's structure there (its psABI)
        thread_pointer += ctypes.c_uint32.in_dll(libc, "_thread_db_sizeof_pthread").value

    def block(module: int) -> int:
        """Its offset; glibc makes a thread's block when it is first asked for."""
        index = (ctypes.c_size_t * 2)(module, 0)
        address: int = libc.__tls_get_addr(index)
        return address - thread_pointer

    found: list[dict[str, Any]] = []

    def visit(pointer: Any, _size: int, _data: Any) -> int:
        info = pointer.contents
        rows = [info.phdr[index] for index in range(info.phnum)]
        loads = [row for row in rows if row.type == _PT_LOAD]
        name = os.fsdecode(info.name or b"") or "/proc/self/exe"
        found.append(
            {
                "path": os.path.realpath(name),
                "bias": info.address,
                "start": info.address + min(row.vaddr for row in loads),
                "end": info.address + max(row.vaddr + row.memsz for row in loads),
                "tls_module": info.tls_modid,
                "tls_offset": block(info.tls_modid) if info.tls_modid else None,
            }
        )
        return 0

    libc.dl_iterate_phdr(_CALLBACK(visit), None)
    return found


def main(report: int, hold: int, path: str, *before: str) -> None:
    """Open, report one line of JSON, wait to be killed."""
    answer: dict[str, Any]
    libc = ctypes.CDLL(None)
    libc.dlopen.restype, libc.dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    libc.dlinfo.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    libc.dlerror.restype = ctypes.c_char_p
    for other in before:
        libc.dlopen(os.fsencode(other), os.RTLD_NOW)
    handle = libc.dlopen(os.fsencode(path), os.RTLD_NOW)
    if handle is None:
        answer = {"error": os.fsdecode(libc.dlerror() or b"no reason given")}
    else:
        link_map = ctypes.POINTER(ctypes.c_uint64)()
        libc.dlinfo(handle, _RTLD_DI_LINKMAP, ctypes.byref(link_map))
        answer = {"bias": link_map[0], "libraries": libraries()}
    os.write(report, json.dumps(answer).encode() + b"\n")
    os.read(hold, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
