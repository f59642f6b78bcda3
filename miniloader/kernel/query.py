"""``PROCMAP_QUERY`` (6.11): one mapping of a process, by address, with its file's build-id.

The build-id tells files apart where device and inode do not (overlayfs, bind mounts, btrfs).  Source:
``include/uapi/linux/fs.h``, ``struct procmap_query``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from miniloader.errors import EvidenceError, ProcessGone
from miniloader.kernel import syscalls
from miniloader.kernel.maps import Vma, as_named
from miniloader.kernel.procfs import NO_MEMORY, open_process_file
from miniloader.values import dataclass

__all__ = ["MappedVma", "query_vma"]


class _Query(ctypes.Structure):
    """``struct procmap_query``."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in (
            "size", "query_flags", "query_addr", "vma_start", "vma_end", "vma_flags",
            "vma_page_size", "vma_offset", "inode",
        )),
        *((name, ctypes.c_uint32) for name in ("dev_major", "dev_minor", "vma_name_size", "build_id_size")),
        *((name, ctypes.c_uint64) for name in ("vma_name_addr", "build_id_addr")),
    )  # fmt: skip


_READABLE, _WRITABLE, _EXECUTABLE, _SHARED = 1, 2, 4, 8
# _IOWR('f', 17, struct procmap_query)
_PROCMAP_QUERY: Final = 3 << 30 | ctypes.sizeof(_Query) << 16 | ord("f") << 8 | 17
_NAME_SIZE: Final = 4096  # PATH_MAX
_BUILD_ID_SIZE: Final = 20  # BUILD_ID_SIZE_MAX
_DELETED: Final = b" (deleted)"


@dataclass(frozen=True)
class MappedVma:
    """A mapping, the size of its pages in bytes, and the build-id of its file (None: it has none)."""

    vma: Vma
    page_size: int
    build_id: bytes | None


def query_vma(pid: int | None, address: int) -> MappedVma | None:
    """The mapping of process ``pid`` (None: this one) that holds ``address``, or None.

    Raises EvidenceError where the kernel does not have it or the process may not be read, ProcessGone.
    """
    name = ctypes.create_string_buffer(_NAME_SIZE)
    build_id = ctypes.create_string_buffer(_BUILD_ID_SIZE)
    query = _Query(
        size=ctypes.sizeof(_Query),
        query_addr=address,
        vma_name_size=len(name),
        vma_name_addr=ctypes.addressof(name),
        build_id_size=len(build_id),
        build_id_addr=ctypes.addressof(build_id),
    )
    fd = open_process_file(pid, "maps")
    try:
        syscalls.ioctl(fd, _PROCMAP_QUERY, ctypes.addressof(query))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise _refused(pid, error) from error
    finally:
        os.close(fd)
    path = name.value
    return MappedVma(
        vma=as_named(
            Vma(
                start=query.vma_start,
                end=query.vma_end,
                protection="".join(
                    letter if query.vma_flags & bit else "-"
                    for letter, bit in (("r", _READABLE), ("w", _WRITABLE), ("x", _EXECUTABLE))
                ),
                shared=bool(query.vma_flags & _SHARED),
                file_offset=query.vma_offset,
                device=(query.dev_major, query.dev_minor),
                inode=query.inode,
                path=os.fsdecode(path.removesuffix(_DELETED)),
                deleted=path.endswith(_DELETED),
            )
        ),
        page_size=query.vma_page_size,
        build_id=build_id.raw[: query.build_id_size] if query.build_id_size else None,
    )


def _refused(pid: int | None, error: OSError) -> EvidenceError:
    if error.errno == errno.ESRCH:
        return ProcessGone(pid, NO_MEMORY)
    if error.errno == errno.ENOTTY:
        return EvidenceError("PROCMAP_QUERY: this kernel does not have it", hint="it came with Linux 6.11")
    return EvidenceError(f"PROCMAP_QUERY: {error.strerror}")
