"""What a file is that is no ELF file, told from its first bytes: one table of signatures.

Sources: ``magic(5)`` of file(1), Mach-O's ``loader.h`` and ``fat.h``, Microsoft's PE format, WebAssembly's
specification, LLVM's bitcode format; each container's own specification.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

from miniloader.elf.source import Source
from miniloader.errors import ElfError
from miniloader.forking import importing
from miniloader.values import dataclass

__all__ = ["ARCHIVE", "HEAD", "THIN_ARCHIVE", "Signature", "not_elf", "signature_of"]

HEAD: Final = 4096
"""How many bytes of a file are looked at."""
ARCHIVE: Final = b"!<arch>\n"
THIN_ARCHIVE: Final = b"!<thin>\n"
_MOST_ARCHITECTURES: Final = 42  # of a fat Mach-O file; a Java class has its version there, 45 and higher
_SCRIPT_LINE: Final = 64  # bytes of a `#!` line that are shown
_UNPACK: Final = "unpack it first: {} -dc"


@dataclass(frozen=True)
class Signature:
    """What a file is, in words, and what to do with it instead (None: nothing that we know)."""

    name: str
    hint: str | None = None


def _hint(text: str) -> Callable[[bytes], str]:
    return lambda head: text


def _fat(head: bytes) -> str | None:
    (number,) = struct.unpack_from(">I", head.ljust(8, b"\0"), 4)
    if number <= _MOST_ARCHITECTURES:
        return f"a fat Mach-O file for macOS, of {number} architectures"
    return "a Java class"


def _mach_o(order: str) -> Callable[[bytes], str]:
    kinds = {1: "object file", 2: "program", 4: "core dump", 6: "library", 8: "bundle"}

    def name(head: bytes) -> str:
        (kind,) = struct.unpack_from(f"{order}I", head.ljust(16, b"\0"), 12)
        return f"a Mach-O {kinds.get(kind, 'file')} for macOS"

    return name


def _dos(head: bytes) -> str:
    (place,) = struct.unpack_from("<I", head.ljust(64, b"\0"), 60)
    if head[place : place + 4] != b"PE\0\0":
        return "a DOS program"
    (flags,) = struct.unpack_from("<H", head[place : place + 24].ljust(24, b"\0"), 22)
    return "a PE library for Windows (a DLL)" if flags & 0x2000 else "a PE program for Windows"


def _script(head: bytes) -> str:
    line = head[2:].partition(b"\n")[0][:_SCRIPT_LINE].strip()
    return f"a script for {os.fsdecode(line)}" if line else "a script"


_MEMBERS: Final = "`miniloader inspect` lists its members; one of them is 'FILE(MEMBER)'"
_MACH_O: Final = "otool -L shows what it needs, on macOS"
#: Bytes that a file begins with, what that makes it (a function: of its head), and what to do with it.
_SIGNATURES: Final[tuple[tuple[bytes, str | Callable[[bytes], str | None], str | None], ...]] = (
    (ARCHIVE, "an archive", _MEMBERS),
    (THIN_ARCHIVE, "a thin archive", _MEMBERS),
    (b"#!", _script, "that program runs it: look at that"),
    (b"\xfe\xed\xfa\xce", _mach_o(">"), _MACH_O),
    (b"\xfe\xed\xfa\xcf", _mach_o(">"), _MACH_O),
    (b"\xce\xfa\xed\xfe", _mach_o("<"), _MACH_O),
    (b"\xcf\xfa\xed\xfe", _mach_o("<"), _MACH_O),
    (b"\xca\xfe\xba\xbe", _fat, None),
    (b"\xca\xfe\xba\xbf", _fat, None),
    (b"MZ", _dos, "objdump -p shows what it needs"),
    (b"\0asm", "a WebAssembly module", "wasm-objdump -x shows it"),
    (b"go object ", "an object of Go's own kind", "go tool nm, or go tool objdump, show it"),
    (b"BC\xc0\xde", "LLVM bitcode", "compile it first: llc, or clang -c"),
    (b"\xde\xc0\x17\x0b", "LLVM bitcode in a wrapper", "compile it first: llc, or clang -c"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK.format("gzip")),
    (b"\xfd7zXZ\0", "compressed by xz", _UNPACK.format("xz")),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK.format("zstd")),
    (b"BZh", "compressed by bzip2", _UNPACK.format("bzip2")),
    (b"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK.format("lz4")),
    (b"PK\x03\x04", "a zip archive (or a wheel)", "unpack it first: unzip"),
)


def signature_of(source: Source) -> Signature | None:
    """What ``source`` is that is no ELF file; ``None`` where its first bytes do not tell."""
    head = bytes(source.read(0, min(HEAD, source.size), "file"))
    for start, name, hint in _SIGNATURES:
        if head.startswith(start):
            told = name if isinstance(name, str) else name(head)
            return Signature(told, hint) if told is not None else None
    with importing:
        from miniloader.elf.kinds.linker_script import is_linker_script, read_linker_script

    if is_linker_script(head):
        library = read_linker_script(source).library
        see = f"see {library.path or library.name}" if library is not None else None
        return Signature("a linker script", see)
    return Signature("text") if head and _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 without control characters but spaces; a cut character ends them."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode()
    return all(sign.isprintable() or sign in "\t\n\r\f" for sign in text)


def not_elf(source: Source) -> ElfError:
    """The error for a file that does not begin as an ELF file does: it is named for what it is."""
    signature = signature_of(source)
    if signature is None:
        magic = repr(bytes(source.read(0, min(4, source.size), "magic")))[1:]
        return ElfError(source.name, "magic", magic, r"'\x7fELF' (this is not an ELF file)")
    return ElfError(source.name, "file", signature.name, "an ELF file", hint=signature.hint)
