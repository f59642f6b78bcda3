"""A file system with a file whose contents are soon withheld: ``unanswered_files.py DIRECTORY LIB READS``.

It is served by this process as a FUSE server, which answers so many READS, with what LIB has there, and then
nothing at all.  The process maps the file, writes to a page if it is given that, says ``ready`` and waits:
whoever asks for anything of the file then waits for ever.  Source: fuse(4); include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
from pathlib import Path

SIZE, NAME = 1 << 16, "file.so"
LOOKUP, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 3, 14, 15, 18, 25, 26
PREPARED = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET have no answer


def _attributes(node: int) -> bytes:
    mode, size = (0o40755, 0) if node == 1 else (0o100755, SIZE)
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class _Contents:
    """What the file has, for so many reads."""

    def __init__(self, path: str, reads: int) -> None:
        self._data, self._left = Path(path).read_bytes(), reads
        self.withheld = False

    def read(self, words: bytes) -> bytes | None:
        """What is answered to ``struct fuse_read_in``."""
        _, offset, size = struct.unpack_from("<2QI", words)
        self.withheld = not self._left
        self._left -= 1
        return None if self.withheld else self._data[offset : offset + size].ljust(size, b"\0")


def _answer(opcode: int, node: int, words: bytes, contents: _Contents) -> bytes | int | None:
    """What is answered: bytes, an errno, or nothing."""
    if contents.withheld:
        return None
    if opcode == INIT:
        return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 0, 0, *[0] * 8)
    if opcode == LOOKUP:
        if words.rstrip(b"\0") != NAME.encode():
            return 2
        return struct.pack("<4Q2I", 2, 0, 1000, 1000, 0, 0) + _attributes(2)
    if opcode == GETATTR:
        return struct.pack("<Q2I", 1000, 0, 0) + _attributes(node)
    if opcode == OPEN:
        return struct.pack("<Q2I", 1, 0, 0)
    if opcode in (RELEASE, FLUSH):
        return b""
    if opcode == READ:
        return contents.read(words)
    return None if opcode in PREPARED else 38


def _serve(descriptor: int, contents: _Contents) -> None:
    while True:
        request = os.read(descriptor, 1 << 18)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        answer = _answer(opcode, node, request[40:], contents)
        if answer is not None:
            error, octets = (-answer, b"") if isinstance(answer, int) else (0, answer)
            os.write(descriptor, struct.pack("<IiQ", 16 + len(octets), error, unique) + octets)


def main(directory: str, library: str, reads: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"test", directory.encode(), b"fuse.test", 6, options):
        raise OSError(ctypes.get_errno(), "mount")
    contents = _Contents(library, int(reads))
    threading.Thread(target=_serve, args=(descriptor, contents), daemon=True).start()
    file = os.open(f"{directory}/{NAME}", os.O_RDONLY)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file, 0)
    if int(reads):
        ctypes.memset(address + 0x3000, 1, 1)
    os.close(file)  # mmap.mmap would keep a copy, at whose end there is nobody to answer
    os.write(1, b"ready\n")
    os.read(0, 1)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError:
        os.write(1, b"refused\n")
