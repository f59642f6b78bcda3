"""Small trees of libraries made of bytes, for every rule by which ld.so finds, orders and binds them.

Each library has a constructor in machine code that writes to descriptor :data:`LOG`: its own letter, then,
for each symbol that it refers to, two letters: the library that the symbol is bound to, and the symbol.  So
the log of a load says who is loaded, in which order constructors ran, and who is bound to whom; it is the
same code for ld.so and for miniloader.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from miniloader.elf import dynamic as tags
from miniloader.elf.layout import RELA, SYM
from miniloader.elf.writer import Strings, dynamic_section, elf_header, hash_table, program_header

LOG: Final = 77
_PAGE: Final = 0x1000
_CODE: Final = 0x800


@dataclass(frozen=True)
class NewLibrary:
    """A library to be made.  ``letter`` names it in the log; symbols are single letters."""

    letter: str
    soname: str | None = None
    needed: tuple[str, ...] = ()
    rpath: str | None = None
    runpath: str | None = None
    defines: str = ""
    refers: str = ""
    symbolic: bool = False
    flags_1: int = 0


def library_bytes(library: NewLibrary) -> bytes:
    """The file of ``library``, for x86-64."""
    strings = Strings()
    names = {symbol: strings.add(f"symbol_{symbol}") for symbol in library.defines + library.refers}
    wanted = "".join(dict.fromkeys(library.refers))
    only_wanted = "".join(symbol for symbol in wanted if symbol not in library.defines)
    entries = [(tags.DT_NEEDED, strings.add(name)) for name in library.needed]
    for tag, text in (
        (tags.DT_SONAME, library.soname),
        (tags.DT_RPATH, library.rpath),
        (tags.DT_RUNPATH, library.runpath),
    ):
        if text is not None:
            entries.append((tag, strings.add(text)))
    if library.symbolic:
        entries.append((tags.DT_SYMBOLIC, 0))
    if library.flags_1:
        entries.append((tags.DT_FLAGS_1, library.flags_1))

    # The segment that is only read: headers, symbols, their names, relocations, code.
    places, at = {}, 64 + 4 * 56
    count = 1 + len(library.defines) + len(only_wanted)
    hashed = hash_table(count, len(library.defines))
    for part, size in (
        ("hash", len(hashed)),
        ("symbols", SYM.size * count),
        ("relocations", 24 * len(wanted)),
    ):
        places[part] = at = -(-at // 8) * 8
        at += size
    places["strings"] = at
    strings_end = at + len(strings)
    code = -(-max(strings_end, _CODE) // 16) * 16

    dynamic_size = 16 * (len(entries) + 10)
    slots = -(-(code + _PAGE) // _PAGE) * _PAGE + dynamic_size
    dynamic = slots - dynamic_size
    objects = slots + 8 * len(wanted)
    end = objects + 2 * len(library.defines) + 4
    constructor = _constructor(code, slots, len(wanted), end - 4)
    assert code + len(constructor) <= dynamic

    order = [*library.defines, *only_wanted]
    table = SYM.pack()
    for position, symbol in enumerate(library.defines):
        value = objects + 2 * position
        table += SYM.pack(name=names[symbol], info=0x11, shndx=5, value=value, size=2)
    table += b"".join(SYM.pack(name=names[symbol], info=0x21) for symbol in only_wanted)  # weak
    relocations = b"".join(
        RELA.pack(offset=slots + 8 * position, info=(1 + order.index(symbol)) << 32 | 6)
        for position, symbol in enumerate(wanted)
    )
    entries += [
        (tags.DT_HASH, places["hash"]), (tags.DT_SYMTAB, places["symbols"]), (tags.DT_SYMENT, SYM.size),
        (tags.DT_STRTAB, places["strings"]), (tags.DT_STRSZ, len(strings)), (tags.DT_INIT, code),
    ]  # fmt: skip
    if wanted:
        entries += [
            (tags.DT_RELA, places["relocations"]), (tags.DT_RELASZ, len(relocations)), (tags.DT_RELAENT, 24),
        ]  # fmt: skip
    entries.append((tags.DT_NULL, 0))

    image = bytearray(end)
    read_only = code + len(constructor)
    image[:64] = elf_header(segments=4)
    image[64 : 64 + 4 * 56] = b"".join((
        program_header("PT_LOAD", "r-x", 0, read_only, align=_PAGE),
        program_header("PT_LOAD", "rw-", dynamic, end - dynamic, align=_PAGE),
        program_header("PT_DYNAMIC", "rw-", dynamic, 16 * len(entries), align=8),
        program_header("PT_GNU_STACK", "rw-", 0, 0, align=16),
    ))  # fmt: skip
    for part, data in (("hash", hashed), ("symbols", table), ("relocations", relocations)):
        image[places[part] : places[part] + len(data)] = data
    image[places["strings"] : strings_end] = bytes(strings)
    image[code:read_only] = constructor
    image[dynamic : dynamic + 16 * len(entries)] = dynamic_section(entries)
    for position, symbol in enumerate(library.defines):
        image[objects + 2 * position : objects + 2 * position + 2] = f"{library.letter}{symbol}".encode()
    image[end - 4 :] = f"{library.letter}:--".encode()
    return bytes(image)


def _constructor(code: int, slots: int, count: int, letter: int) -> bytes:
    """write(2) the letter and a colon, then for each slot the two bytes it points to, or two dashes."""
    text = bytearray()

    def relative(opcode: str, target: int) -> None:
        nonlocal text
        text += bytes.fromhex(opcode) + struct.pack("<i", target - (code + len(text) + 7))

    def write() -> None:
        nonlocal text
        text += b"\xbf" + struct.pack("<I", LOG)  # mov edi, LOG
        text += bytes.fromhex("ba02000000 b801000000 0f05")  # mov edx, 2; mov eax, 1; syscall

    relative("488d35", letter)  # lea rsi, [rip + letter]
    write()
    for position in range(count):
        relative("488b35", slots + 8 * position)  # mov rsi, [rip + slot]
        relative("488d0d", letter + 2)  # lea rcx, [rip + dashes]
        text += bytes.fromhex("4885f6 480f44f1")  # test rsi, rsi; cmovz rsi, rcx
        write()
    return bytes(text + b"\xc3")


# -------------------------------------------------------------------------------------------------- trees
DIRECTORIES: Final = ("a", "b", "a/c", "d", "a/glibc-hwcaps/x86-64-v2")
NAMES: Final = ("libp.so", "libq.so", "libr.so", "libs.so")
SONAMES: Final = (None, None, None, *NAMES, "libx.so", "libx.so")
NEEDED: Final = (
    *NAMES, *NAMES, "libx.so", "", "a/libp.so", "./b/libq.so", "$ORIGIN/libr.so", "${ORIGIN}/../a/libp.so",
    "$ORIGIN/../b/libs.so", "l/libq.so", "$ORIGIN/../c/libr.so", "$LIB/libp.so", "{tree}/d/libs.so",
    "a/../b/libq.so", "/../libp.so",
)  # fmt: skip
PATHS: Final = (
    "a", "b", "d", "a/c", "$ORIGIN", "$ORIGIN", "${ORIGIN}/../a", "$ORIGIN/../b", "$ORIGIN/c", "$ORIGIN/../c",
    "l", "l/..", "", "$ORIGIN/nowhere/../c", "{tree}/a", "{tree}/d//", "./b", "$ORIGINAL", "${ORIGIN", "$LIB",
    "$PLATFORM", "$ORIGIN/../l", "/", "nowhere", "$ORIGIN/../a/../d", "a/libp.so", "x", "$ORIGIN/..",
)  # fmt: skip
LINKS: Final = ("a/c", "a", "b", "nowhere", "l", "../{name}/a", "{tree}/d", "a/../b")
ODD: Final = ("text", "empty", "directory", "class", "machine", "loop", "dangling", "short", "order")
ROOTS: Final = (
    "{path}",
    "./{path}",
    "{tree}/{path}",
    "l/../{path}",
    "{directory}/../{path}",
    "l/{file}",
    "l/{file}",
)
SYMBOLS: Final = "stuv"
NODEFLIB, INITFIRST = 0x800, 0x20


class _Draw:
    """Choices made of bytes: small bytes are the first, simplest choices."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, most: int) -> int:
        self._at += 1
        return self._data[(self._at - 1) % len(self._data)] % (most + 1)

    def of(self, choices: tuple[str, ...]) -> str:
        return choices[self.number(len(choices) - 1)]

    def chance(self, of: int) -> bool:
        """Once in ``of``; not for small bytes."""
        return self.number(of - 1) == of - 1


@dataclass(frozen=True)
class RuleTree:
    """Files by their paths below the tree, links, and which library is loaded."""

    libraries: tuple[tuple[str, NewLibrary], ...]
    links: tuple[tuple[str, str], ...]
    hard_links: tuple[tuple[str, str], ...]
    odd: tuple[tuple[str, str], ...]
    root: str

    @classmethod
    def of(cls, data: bytes) -> RuleTree:
        """The tree that ``data`` stands for."""
        draw = _Draw(data)
        libraries: dict[str, NewLibrary] = {}
        letters = "ABCDEFGH"[: 3 + draw.number(5)]
        directories = [draw.of(DIRECTORIES[: 5 if draw.chance(6) else 4]) for _ in letters]
        there = [f"{directory}/{draw.of(NAMES)}" for directory in directories]
        names = (*map(os.path.basename, there[1:]), *there[1:], "{tree}/" + there[-1])
        for letter, place in zip(letters, there, strict=True):
            rpath = _path(draw) if draw.chance(2) else None
            runpath = _path(draw) if draw.chance(4) else None
            libraries[place] = NewLibrary(
                letter,
                SONAMES[draw.number(len(SONAMES) - 1)],
                tuple(draw.of(NEEDED if draw.chance(3) else names) for _ in range(draw.number(3))),
                rpath,
                runpath,
                defines="".join(symbol for symbol in SYMBOLS if draw.chance(2)),
                refers="".join(symbol for symbol in SYMBOLS if draw.chance(2)),
                symbolic=draw.chance(12),
                flags_1=NODEFLIB if draw.chance(10) else 0,
            )
        places = tuple(libraries)
        links = [("l", draw.of(LINKS))] if draw.chance(2) else []
        for _ in range(draw.number(2)):
            target = draw.of(places)
            text = target if draw.chance(2) else os.path.basename(target)
            links.append((f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", "{tree}/" + text))
        hard = [
            (f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", draw.of(places)) for _ in range(draw.number(1))
        ]
        odd = []
        if draw.chance(2):
            odd.append((f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", draw.of(ODD)))
        path = next(iter(libraries))
        root = draw.of(ROOTS).replace("{path}", path).replace("{directory}", os.path.dirname(path))
        root = root.replace("{file}", os.path.basename(path))
        if draw.chance(4):
            _put_in_the_way(draw, libraries, odd, path)
        if draw.chance(4):
            links[:1], root = [("l", "a/c")], _behind_a_link(draw, libraries)
        return cls(tuple(libraries.items()), tuple(links), tuple(hard), tuple(odd), root)

    def write(self, tree: Path) -> str:
        """Make the files in the empty directory ``tree``; the path to be loaded there."""

        def filled(text: str) -> str:
            return text.replace("{tree}", str(tree)).replace("{name}", tree.name)

        for directory in DIRECTORIES[:4]:
            (tree / directory).mkdir(parents=True, exist_ok=True)
        for place, library in self.libraries:
            (tree / place).parent.mkdir(parents=True, exist_ok=True)
            needed = tuple(map(filled, library.needed))
            rpath, runpath = (
                text if text is None else filled(text) for text in (library.rpath, library.runpath)
            )
            values = {**library.__dict__, "needed": needed, "rpath": rpath, "runpath": runpath}
            (tree / place).write_bytes(library_bytes(NewLibrary(**values)))
        for place, target in self.links:
            if not os.path.lexists(tree / place):
                os.symlink(filled(target), tree / place)
        for place, target in self.hard_links:
            if (tree / target).exists() and not os.path.lexists(tree / place):
                os.link(tree / target, tree / place)
        for place, kind in self.odd:
            if not os.path.lexists(tree / place):
                _write_odd(tree / place, kind)
        return filled(self.root)


def _put_in_the_way(
    draw: _Draw, libraries: dict[str, NewLibrary], odd: list[tuple[str, str]], path: str
) -> None:
    """Have the library ``path`` need one that lies on its path, behind an odd file of that name."""
    first, second, name = draw.of(DIRECTORIES[:2]), draw.of(DIRECTORIES[2:4]), draw.of(NAMES)
    libraries.setdefault(f"{second}/{name}", NewLibrary("Y", defines="s", refers="st"))
    libraries.pop(f"{first}/{name}" if f"{first}/{name}" != path else "", None)
    odd.insert(0, (f"{first}/{name}", draw.of(ODD)))
    directories = f"{first}:{second}"
    paths = {"rpath": directories} if draw.chance(2) else {"runpath": directories}
    library = libraries[path]
    changed = {**library.__dict__, "soname": None, "needed": (name, *library.needed[:1]), **paths}
    libraries[path] = NewLibrary(**changed)


def _behind_a_link(draw: _Draw, libraries: dict[str, NewLibrary]) -> str:
    """Add a library that is loaded by a path with ``..`` behind a link, and needs others there; the path."""
    needed = tuple(draw.of(NAMES) for _ in range(1 + draw.number(1)))
    for name in needed:
        libraries.setdefault(f"a/c/{name}", NewLibrary("Z", defines="tu", refers="stu", runpath="$ORIGIN"))
    is_rpath, path = draw.chance(2), draw.of(("$ORIGIN", "$ORIGIN/../c", "${ORIGIN}:a"))
    rpath, runpath = (path, None) if is_rpath else (None, path)
    libraries["a/c/libroot.so"] = NewLibrary("X", needed=needed, refers="stu", rpath=rpath, runpath=runpath)
    return draw.of(("l/../c/libroot.so", "{tree}/l/../c/libroot.so", "l/libroot.so"))


def _path(draw: _Draw) -> str:
    return ":".join(draw.of(PATHS) for _ in range(1 + draw.number(3)))


def _write_odd(path: Path, kind: str) -> None:
    """A file that is no library for this process, of this kind."""
    data = bytearray(library_bytes(NewLibrary("O")))
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        os.symlink(path.name, path)
    elif kind == "dangling":
        os.symlink("nowhere", path)
    else:
        if kind == "class":
            data[4] = 1
        elif kind == "machine":
            data[18:20] = (183).to_bytes(2, "little")
        elif kind == "order":
            data[5] = 2
        contents = {"text": b"/* a linker script, longer than an ELF header */ INPUT ( libp.so libq.so )"}
        contents |= {"empty": b"", "short": bytes(data[:40])}
        path.write_bytes(contents.get(kind, bytes(data)))


def clear(tree: Path) -> None:
    """Empty the directory ``tree``."""
    if tree.exists():
        shutil.rmtree(tree)
    tree.mkdir()
