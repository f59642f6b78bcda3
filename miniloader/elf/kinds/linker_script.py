"""Linker scripts in a library's place, such as ``libc.so``: which files ld reads instead.

Source: GNU ld's manual, "Commands Dealing with Files"; where files are looked for as ``ldfile.c`` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from miniloader.elf.source import Source
from miniloader.errors import ElfError
from miniloader.values import dataclass

__all__ = ["LinkerScript", "ScriptInput", "is_linker_script", "read_linker_script"]

_MOST: Final = 1 << 16  # bytes; those in a library's place have a few hundred
_COMMENT: Final = re.compile(rb"/\*.*?\*/", re.DOTALL)
_TOKEN: Final = re.compile(rb'"[^"\n]*"|[()]|[^\s(),;"]+')
_COMMANDS: Final = (b"OUTPUT_FORMAT", b"GROUP", b"INPUT", b"OUTPUT_ARCH", b"SEARCH_DIR", b"AS_NEEDED")
_NAMING: Final = ("AS_NEEDED", "GROUP", "INPUT")
#: Scripts that lay out a whole program begin so; they are linker scripts, too, but name no library.
_OTHERS: Final = (b"SECTIONS", b"ENTRY", b"MEMORY", b"PHDRS", b"VERSION", b"TARGET", b"STARTUP")
#: Where ld looks for a library behind the directory of the script (``ld --verbose``, SEARCH_DIR).
_DIRECTORIES: Final = (
    "/usr/local/lib/{0}", "/lib/{0}", "/usr/lib/{0}", "/usr/local/lib64", "/lib64", "/usr/lib64",
    "/usr/local/lib", "/lib", "/usr/lib",
)  # fmt: skip


@dataclass(frozen=True)
class ScriptInput:
    """A file that ld reads: ``name`` as written (``-lm`` for libm), where it is (None: not here).

    ``as_needed``: it is linked only if something is needed of it.
    """

    name: str
    command: Literal["GROUP", "INPUT"]
    as_needed: bool
    path: str | None


@dataclass(frozen=True)
class LinkerScript:
    """What a linker script in a library's place says."""

    path: str
    output_format: str | None
    inputs: tuple[ScriptInput, ...]

    @property
    def library(self) -> ScriptInput | None:
        """The file that a program linked by the script loads: its first shared object."""
        named = (item for item in self.inputs if ".so" in (item.path or item.name))
        return next(named, next(iter(self.inputs), None))


def is_linker_script(head: bytes) -> bool:
    """Whether text that begins so is a linker script.

    >>> is_linker_script(b"/* GNU ld script */ GROUP ( /lib/libc.so.6 )"), is_linker_script(b"GROUP ME")
    (True, False)
    """
    if b"\0" in head:
        return False
    text = _COMMENT.sub(b" ", head)
    if not text.strip() and b"GNU ld script" in head:
        return True
    tokens = [match[0] for match in _TOKEN.finditer(text[:512])][:2]
    return len(tokens) == 2 and tokens[0] in _COMMANDS + _OTHERS and tokens[1] in (b"(", b"{")


def read_linker_script(source: Source) -> LinkerScript:
    """What the linker script in ``source`` says; :class:`ElfError` where it is no well-formed one."""
    if source.size > _MOST:
        raise ElfError(source.name, "linker script", f"{source.size} bytes", f"at most {_MOST}")
    text = _COMMENT.sub(b" ", bytes(source.read(0, source.size, "linker script")))
    tokens = [os.fsdecode(match[0]) for match in _TOKEN.finditer(text)]
    directory = os.path.dirname(source.name) or "."
    return LinkerScript(source.name, _output_format(tokens), tuple(_inputs(tokens, directory, source.name)))


def _output_format(tokens: Sequence[str]) -> str | None:
    place = tokens.index("OUTPUT_FORMAT") if "OUTPUT_FORMAT" in tokens else len(tokens)
    return (
        tokens[place + 2].strip('"')
        if tokens[place + 1 : place + 2] == ["("] and tokens[place + 2 :]
        else None
    )


def _inputs(tokens: Sequence[str], directory: str, path: str) -> Iterator[ScriptInput]:
    open_commands: list[str] = []
    previous = ""
    for token in tokens:
        if token == "(":
            open_commands.append(previous)
        elif token == ")":
            if not open_commands:
                raise ElfError(path, "linker script", "a ) without its (", "one for each")
            open_commands.pop()
        elif not {"GROUP", "INPUT"}.isdisjoint(open_commands) and token not in _NAMING:
            name = token.strip('"')
            command: Literal["GROUP", "INPUT"] = "GROUP" if "GROUP" in open_commands else "INPUT"
            yield ScriptInput(name, command, "AS_NEEDED" in open_commands, _find(name, directory))
        previous = token
    if open_commands:
        raise ElfError(path, "linker script", "a ( without its )", "one for each")


def _find(name: str, directory: str) -> str | None:
    """Where the file ``name`` of a script in ``directory`` is: beside it, or where ld looks for libraries."""
    if "\0" in name:
        return None
    if name.startswith("/"):
        return name if os.path.exists(name) else None
    library = name.startswith("-l")
    files = (f"lib{name[2:]}.so", f"lib{name[2:]}.a") if library else (name.removeprefix("="),)
    triplet = f"{os.uname().machine}-linux-gnu"
    for place in (directory, *(pattern.format(triplet) for pattern in _DIRECTORIES)):
        for file in files:
            if os.path.exists(os.path.join(place, file)):
                return os.path.join(place, file)
    return None
