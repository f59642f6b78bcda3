"""The file of a prepared library: how it is laid out, found in the cache, read, checked, and written.

A head, JSON, tables, and from a page boundary on the pages.  Anything may have been done to it: what is used
without being asked again is judged here.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final

from miniloader.arrays import NDArray, np
from miniloader.elf import ElfImage
from miniloader.errors import LoadError
from miniloader.kernel import syscalls as sys
from miniloader.loader.prepared import store
from miniloader.loader.prepared.pages import TABLES, THREAD_EXIT, UNIQUE, Prepared
from miniloader.loader.relocation_groups import TLS
from miniloader.machine.relocation import KINDS
from miniloader.native.gate import processor

__all__ = ["check_file", "file_name", "file_state", "find", "open_prepared", "pack", "read_index"]

_AGAIN: Final = "miniloader prepare LIB"
_CHANGED: Final = "its file has changed since it was prepared"
_MAGIC: Final = b"miniprep"
_FORMAT: Final = 5
_MOST_INDEX: Final = 1 << 28  # bytes
_MOST_PAGES: Final = 1 << 36  # bytes, as many as an image may span
#: What another's file may raise that has a checksum, and is none of ours all the same.
_MALFORMED: Final = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
#: Magic, checksum of what follows up to the pages, length of the JSON, of all.
_HEAD: Final = struct.Struct("<8sIIQ")


def file_name(build_id: str) -> str:
    """The name of the file for the library with this build-id."""
    return build_id + store.SUFFIX


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does: device, inode, size, and when it was changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def find(image: ElfImage) -> Prepared:
    """What the cache has of ``image``; :class:`LoadError` says why it has nothing that could be used."""
    if image.build_id is None:
        raise LoadError("it has no build-id")
    candidate = open_prepared(file_name(image.build_id))
    fault = None
    if candidate.build_id != image.build_id:
        fault = LoadError("its file in the cache is another library's")
    elif candidate.file != (image.source.start, *file_state(os.fstat(image.source.fd))):
        fault = LoadError(_CHANGED, hint=_AGAIN)
    if fault is not None:
        candidate.close()
        raise fault
    return candidate


def check_file(ready: Prepared) -> None:
    """Raise :class:`LoadError` if the library's file is not what it was."""
    try:
        state = file_state(os.stat(ready.path))
    except OSError as error:
        raise LoadError(f"{ready.path}: {error.strerror}") from None
    if ready.file[1:] != state:
        raise LoadError(_CHANGED, hint=_AGAIN)


def open_prepared(name: str) -> Prepared:
    """Open and check the file ``name`` of the cache; all but its pages is read."""
    try:
        fd, status = store.open_file(name)
    except FileNotFoundError:
        raise LoadError("it is not in the cache", hint=_AGAIN) from None
    except OSError as error:
        raise LoadError(f"{os.path.join(store.directory(), name)}: {error.strerror}") from None
    try:
        return read_index(fd, status.st_size)
    except BaseException:
        os.close(fd)
        raise


def read_index(fd: int, size: int) -> Prepared:
    """What the file ``fd`` of ``size`` bytes says, all but its pages; :class:`LoadError` if it is damaged."""
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise LoadError("its file in the cache is of another kind")
    _, checksum, length, total = _HEAD.unpack(head)
    if total != size:
        raise LoadError(f"its file in the cache is damaged: {size:,} bytes, expected {total:,}")
    at = int.from_bytes(os.pread(fd, 8, _HEAD.size), "little")
    if not _HEAD.size < at <= min(total, _MOST_INDEX) or total - at > _MOST_PAGES:
        raise LoadError("its index is damaged")
    index = bytearray(at - _HEAD.size)
    if os.preadv(fd, [index], _HEAD.size) < len(index) or _checksum(length, total, index) != checksum:
        raise LoadError("its index is damaged")
    try:
        return _decoded(fd, index, length, at, total)
    except _MALFORMED:
        raise LoadError("its index is damaged") from None


def _decoded(fd: int, index: bytearray, length: int, at: int, total: int) -> Prepared:
    """What an ``index`` says whose JSON has ``length`` bytes; the pages are from ``at`` to ``total``."""
    facts = json.loads(index[8 : 8 + length])
    _check(facts)
    tables, whole = {}, memoryview(index)
    offset = 8 + -(-length // 8) * 8
    for key, (_, row) in TABLES.items():
        size = row.size * facts["counts"][key]
        tables[key] = whole[offset : offset + size]
        if not 0 <= size == len(tables[key]):
            raise LoadError("its index is damaged")
        offset += -(-size // 8) * 8
    ready = Prepared(
        fd=fd,
        path=facts["path"],
        build_id=facts["build_id"],
        file=tuple(facts["file"]),
        address=facts["address"],
        end=facts["end"],
        scope=tuple(facts["scope"]),
        special=tuple(map(tuple, facts["special"])),
        names={int(key): name for key, name in facts["names"].items()},
        tls_kinds=tuple(map(tuple, facts["tls_kinds"])),
        tls_names=tuple(facts["tls_names"]),
        held=tuple(facts["held"]),
        symbols=facts["symbols"],
        words=facts["words"],
        filled=facts["filled"],
        unwind_table=facts["unwind_table"],
        at=at,
        tables=tables,
    )
    slots, numbers = (ready.tables[key].nbytes for key in ("slots", "numbers"))
    if slots != numbers or ready.count * sys.PAGE_SIZE != total - at or not _is_sound(ready):
        raise LoadError("its index is damaged")
    return ready


def _is_sound(ready: Prepared) -> bool:
    """Whether what is used without being asked again is of its kind, and is where it may be.

    What the loops are given they look at themselves.  May raise any of :data:`_MALFORMED`.
    """
    special, tls_kinds, scope = ready.special, ready.tls_kinds, len(ready.scope)
    texts = [ready.path, ready.build_id, *ready.scope, *ready.tls_names, *ready.names.values()]
    counts = [ready.address, ready.end, ready.symbols, ready.words, ready.filled, *ready.file, *ready.held]
    counts += [ready.unwind_table or 0, *chain.from_iterable(special), *chain.from_iterable(tls_kinds)]
    if {*map(type, texts)} != {str} or {*map(type, counts)} != {int} or min(counts) < 0:
        return False
    os.fsencode(ready.path)
    owners, kinds = ready.rows("tls_symbols")[1::4], KINDS[processor().upper()]
    values, page = ready.rows_of("values"), 0
    for _, first, count in ready.runs:  # as they follow one another in the file
        if first != page:
            return False
        page += count
    return (
        max(counts) < 1 << 64
        and ready.address <= ready.end
        and "\0" not in ready.path
        and all(position < scope for position in ready.held)
        and all(number < values and how <= THREAD_EXIT and of < scope for number, how, of in special)
        and all(how != UNIQUE or number in ready.names for number, how, _ in special)
        and all(code in kinds and kinds[code].formula in TLS for code, _ in tls_kinds)
        and sum(count for _, count in tls_kinds) == ready.rows_of("tls_rows")
        and all(-1 <= owner < scope for owner in owners)
    )


def _checksum(length: int, total: int, index: bytes | bytearray) -> int:
    """The checksum of all but the pages, which have their own: of the numbers in the head, and the index."""
    return zlib.crc32(index, zlib.crc32(struct.pack("<QQ", length, total)))


def _check(facts: Mapping[str, Any]) -> None:
    if facts["format"] != _FORMAT or facts["page_size"] != sys.PAGE_SIZE:
        raise LoadError("it was prepared by another version")
    if facts["boot"] != store.boot_id():
        raise LoadError("it was prepared before the machine booted", hint=_AGAIN)


def pack(
    facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], data: NDArray[np.uint8]
) -> Iterator[Any]:
    """The file: a head, JSON, the arrays, and from a page boundary on the cached pages."""
    counts = {key: len(arrays[key]) for key in TABLES}
    common = {"format": _FORMAT, "page_size": sys.PAGE_SIZE, "boot": store.boot_id(), "counts": counts}
    text = json.dumps({**facts, **common}).encode()
    parts = [text.ljust(-(-len(text) // 8) * 8)]
    for key, (dtype, _) in TABLES.items():
        octets = np.ascontiguousarray(arrays[key], dtype).tobytes()
        parts.append(octets.ljust(-(-len(octets) // 8) * 8, b"\0"))
    index = b"".join(parts)
    at = -(-(_HEAD.size + 8 + len(index)) // sys.PAGE_SIZE) * sys.PAGE_SIZE
    index = (at.to_bytes(8, "little") + index).ljust(at - _HEAD.size, b"\0")
    total = at + len(data)
    yield _HEAD.pack(_MAGIC, _checksum(len(text), total, index), len(text), total) + index
    yield data
