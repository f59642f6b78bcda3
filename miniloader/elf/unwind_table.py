"""Where functions begin, as the table that the unwinder searches says: ``.eh_frame_hdr``.

Stripped files have it, too.  Source: LSB 5.0, "Exception Frames", the section ``.eh_frame_hdr``.
"""

from __future__ import annotations

from typing import Final

from miniloader.arrays import NDArray, np
from miniloader.elf.image import ElfImage
from miniloader.errors import ElfError

__all__ = ["unwind_entries"]

_ENCODINGS: Final = {0x3B: "i4", 0x33: "u4"}  # of the table: relative to the section, four bytes
_SIZES: Final = {0x0: 0, 0x3: 4, 0x4: 8, 0xB: 4, 0xC: 8}  # of the encodings of a pointer, by their low bits


def unwind_entries(image: ElfImage) -> NDArray[np.uint64]:
    """The first vaddr of each function that the table lists, ascending; none where there is no usable one."""
    nothing = np.empty(0, np.uint64)
    segment = image.segment("PT_GNU_EH_FRAME")
    if segment is None or segment.filesz < 12:
        return nothing
    try:
        data = bytes(image.source.read(segment.file_offset, segment.filesz, "PT_GNU_EH_FRAME"))
    except ElfError:
        return nothing
    version, pointer, counting, table = data[:4]
    size = image.header.word if pointer & 0xF == 0 else _SIZES.get(pointer & 0xF)
    if version != 1 or counting != 0x03 or table not in _ENCODINGS or size is None:
        return nothing
    start = 4 + size
    if len(data) < start + 4:
        return nothing
    count = int.from_bytes(data[start : start + 4], image.header.byte_order)
    count = min(count, (len(data) - start - 4) // 8)
    rows = np.frombuffer(data, f"{image.header.order}{_ENCODINGS[table]}", 2 * count, start + 4)
    vaddrs = rows[::2].astype(np.int64) + np.int64(segment.vaddr) if segment.vaddr < 1 << 62 else rows[:0]
    return np.sort(vaddrs.astype(np.uint64))
