"""Exceptions: telling the unwinder about code that ld.so does not know.

``_Unwind_Find_FDE`` of libgcc looks among the tables registered with ``__register_frame`` before it asks
ld.so, so a library mapped by hand takes part in throwing and catching once its ``.eh_frame`` is
registered.  Source: the LSB core specification, "Exception Frames" and ``.eh_frame_hdr``.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from miniloader.elf import ElfImage
from miniloader.errors import ElfError
from miniloader.loader import host

__all__ = ["deregister", "eh_frame", "register"]

_PCREL_SDATA4: Final = 0x1B
_UDATA4: Final = 0x03
_DATAREL_SDATA4: Final = 0x3B
_LIBGCC: Final = "libgcc_s.so.1"


def eh_frame(image: ElfImage) -> int | None:
    """The vaddr of ``.eh_frame``, from ``PT_GNU_EH_FRAME``; ``None`` when there is none that can be used.

    The table has to end with a zero word, since registering gives no length: the entry furthest back in
    it, as the binary search table knows, is looked behind.
    """
    header = image.segment("PT_GNU_EH_FRAME")
    if header is None or header.filesz < 12 or "r" not in header.flags:
        return None
    try:
        version, pointer, count, table = image.read(header.vaddr, 4, "PT_GNU_EH_FRAME")
        if (version, pointer, count, table) != (1, _PCREL_SDATA4, _UDATA4, _DATAREL_SDATA4):
            return None
        distance, entries = np.frombuffer(image.read(header.vaddr + 4, 8, "PT_GNU_EH_FRAME"), "<i4").tolist()
        if entries <= 0:
            return None
        rows = image.read(header.vaddr + 12, 8 * entries, "PT_GNU_EH_FRAME")
        last = header.vaddr + int(np.frombuffer(rows, "<i4")[1::2].max())
        while (length := int.from_bytes(image.read(last, 4, ".eh_frame"), "little")) != 0:
            last += 4 + length
    except ElfError:
        return None
    return int(header.vaddr + 4 + distance)


def _call(name: bytes, address: int) -> bool:
    handle = host.open_host(_LIBGCC, load=False)
    function = host.symbol_address(handle, name) if handle is not None else None
    if handle is None or function is None:
        return False
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(address)
    host.close_host(handle)
    return True


def register(address: int) -> bool:
    """Register the table at ``address``; ``False`` when the process has no libgcc to throw with."""
    return _call(b"__register_frame", address)


def deregister(address: int) -> None:
    """Take the table at ``address`` back, which has to be done before it is unmapped."""
    _call(b"__deregister_frame", address)
