"""Exceptions: telling the unwinder about code that ld.so does not know.

``_Unwind_Find_FDE`` of libgcc looks among the tables registered with ``__register_frame`` before it asks
ld.so, so a library mapped by hand takes part in throwing and catching once its ``.eh_frame`` is
registered.  Source: the LSB core specification, "Exception Frames" and ``.eh_frame_hdr``.
"""

from __future__ import annotations

import ctypes
import struct
from contextlib import suppress
from functools import lru_cache
from itertools import count
from typing import Any, Final

from miniloader.elf import ElfImage
from miniloader.errors import ElfError, LoadError
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.loader.beside_glibc.host import HostListing

__all__ = ["bring", "deregister", "eh_frame", "register", "walkers"]

_PCREL_SDATA4: Final = 0x1B
_UDATA4: Final = 0x03
_DATAREL_SDATA4: Final = 0x3B
_LIBGCC: Final = "libgcc_s.so.1"
_HEADER: Final = struct.Struct("<4Bii")  # three kinds of numbers after the version; where .eh_frame is; rows
_ROW: Final = struct.Struct("<ii")  # a function, and its entry, both from the header on
_NEAR: Final = 64
_PART: Final = 256  # bytes that are read at once: the last entries, mostly


def eh_frame(image: ElfImage) -> int | None:
    """The vaddr of ``.eh_frame``, from ``PT_GNU_EH_FRAME``; ``None`` when there is none that can be used.

    The table has to end with a zero word, since registering gives no length.  From the entry of the last
    function it is mostly near; else the entry furthest back, as the binary search table knows, is looked
    behind.
    """
    header = image.segment("PT_GNU_EH_FRAME")
    if header is None or header.filesz < 12 or "r" not in header.flags:
        return None
    try:
        *kinds, distance, entries = _HEADER.unpack(image.read(header.vaddr, _HEADER.size, "PT_GNU_EH_FRAME"))
        if kinds != [1, _PCREL_SDATA4, _UDATA4, _DATAREL_SDATA4] or entries <= 0:
            return None
        rows = header.vaddr + _HEADER.size
        _, place = _ROW.unpack(image.read(rows + _ROW.size * (entries - 1), _ROW.size, "PT_GNU_EH_FRAME"))
        if not _ends(image, header.vaddr + place, _NEAR):
            table = image.read(rows, _ROW.size * entries, "PT_GNU_EH_FRAME")
            _ends(image, header.vaddr + max(memoryview(table).cast("i")[1::2]))
    except ElfError:
        return None
    return int(header.vaddr + 4 + distance)


def _ends(image: ElfImage, vaddr: int, most: int | None = None) -> bool:
    """Whether a zero word comes after at ``most`` so many entries; :class:`ElfError` where they leave."""
    start, part = vaddr, b""
    for _ in range(most) if most is not None else count():
        at = vaddr - start
        if at + 4 > len(part):
            start, at, part = vaddr, 0, bytes(image.read_some(vaddr, 4, _PART, ".eh_frame"))
        length = int.from_bytes(part[at : at + 4], "little")
        if not length:
            return True
        vaddr += 4 + length
    return False


def _call(name: bytes, address: int) -> bool:
    function = _function(name)
    if function is None:
        _function.cache_clear()  # somebody may bring libgcc yet
        return False
    function(address)
    return True


@lru_cache(maxsize=2)
def _function(name: bytes) -> Any:
    """A function of the process's libgcc, which is kept from now on; None if it has none."""
    handle = dynamic_linker.open_host(_LIBGCC, load=False)
    address = dynamic_linker.symbol_address(handle, name) if handle is not None else None
    return None if address is None else ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


#: The tables that are registered once the process has a libgcc, which walks through what was there before it.
_waiting: Final[dict[int, None]] = {}


def register(address: int, listing: HostListing) -> bool:
    """Register the table at ``address``, and all that wait; ``False`` when it has to wait, since the process
    has no libgcc to throw with.

    ``listing`` is what the process has: ld.so would search for it anew at each load.
    """
    _waiting[address] = None
    return (bool(_function.cache_info().currsize) or listing.called(_LIBGCC) is not None) and _register()


def _register() -> bool:
    """Register all that wait; ``False`` when they have to."""
    while _waiting and _call(b"__register_frame", next(reversed(_waiting))):
        _waiting.popitem()
    return not _waiting


def deregister(address: int) -> None:
    """Take the table at ``address`` back, which has to be done before it is unmapped."""
    if address in _waiting:
        del _waiting[address]
    else:
        _call(b"__deregister_frame", address)


@lru_cache(maxsize=1)
def walkers() -> tuple[int, ...]:
    """The addresses of glibc's functions that walk through who calls them, by a libgcc that they bring."""
    address = dynamic_linker.symbol_address(dynamic_linker.global_handle(), b"backtrace")
    return () if address is None else (address,)


def bring() -> None:
    """Have a libgcc in the process, or be without where ld.so finds none: then glibc finds none either."""
    with suppress(LoadError):
        dynamic_linker.open_host(_LIBGCC, load=True)
        _function(b"__register_frame")  # so it is known, whatever listing a load goes by
        _register()
