"""Small trees of libraries, for every rule by which ld.so finds, orders, binds and finalises them.

What is asked of a tree is a sequence of calls: the first opens its root, others open and close more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from tests.oracle.rule_library import Definition, NewLibrary, Reference, letters, library_bytes

__all__ = ["Call", "RuleTree", "clear"]

DIRECTORIES: Final = ("a", "b", "a/c", "d", "a/glibc-hwcaps/x86-64-v2")
NAMES: Final = ("libp.so", "libq.so", "libr.so", "libs.so")
#: Those that filters name.  One may name the next: ld.so never ends where filters name each other.
FILTEES: Final = ("libf.so", "libg.so")
FILTERED: Final = (
    "{}",
    "{}",
    "$ORIGIN/{}",
    "a/{}",
    "$ORIGIN/../b/{}",
    "{tree}/d/{}",
    "$LIB/{}",
    "../{name}/d/{}",
)
SONAMES: Final = (None, None, None, *NAMES, "libx.so", "libx.so")
NEEDED: Final = (
    *NAMES, *NAMES, "libx.so", "", "a/libp.so", "./b/libq.so", "$ORIGIN/libr.so", "${ORIGIN}/../a/libp.so",
    "$ORIGIN/../b/libs.so", "l/libq.so", "$ORIGIN/../c/libr.so", "$LIB/libp.so", "{tree}/d/libs.so",
    "a/../b/libq.so", "/../libp.so", "${LIB}/libq.so", "$ORIGIN/../$PLATFORM/libr.so", "$LIBS/libp.so",
)  # fmt: skip
PATHS: Final = (
    "a", "b", "d", "a/c", "$ORIGIN", "$ORIGIN", "${ORIGIN}/../a", "$ORIGIN/../b", "$ORIGIN/c", "$ORIGIN/../c",
    "l", "l/..", "", "$ORIGIN/nowhere/../c", "{tree}/a", "{tree}/d//", "./b", "$ORIGINAL", "${ORIGIN", "$LIB",
    "$PLATFORM", "$ORIGIN/../l", "/", "nowhere", "$ORIGIN/../a/../d", "a/libp.so", "x", "$ORIGIN/..",
    "$ORIGIN/../$LIB", "${LIB}", "$ORIGIN/../../${PLATFORM}", "$ORIGIN/../$PLATFORM", "$LIB/../../d", "$LIBx",
    "$PLATFORM/$LIB",
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
#: Where $LIB and $PLATFORM may lead, which are not the same everywhere.
TOKENS: Final = (
    ("lib/x86_64-linux-gnu", "../a"), ("lib64", "a"), ("x86_64", "b"), ("haswell", "b"), ("xeon_phi", "b"),
)  # fmt: skip
SYMBOLS: Final = "stuv"
#: Those that have versions in some trees, and the versions that libraries may define.
VERSIONED: Final = "st"
VERSIONS: Final = ("1", "12", "12", "21", "")
#: Flags of DT_FLAGS_1 and of DT_FLAGS that libraries have now and then, those that ld.so ignores among them.
FLAGS_1: Final = {
    "NOW": 0x1, "GLOBAL": 0x2, "GROUP": 0x4, "NODELETE": 0x8, "LOADFLTR": 0x10, "INITFIRST": 0x20,
    "ORIGIN": 0x80, "DIRECT": 0x100, "INTERPOSE": 0x400, "NODEFLIB": 0x800, "ENDFILTEE": 0x4000,
}  # fmt: skip
NOOPEN: Final = 0x40
FLAGS: Final = {"ORIGIN": 0x1, "SYMBOLIC": 0x2, "BIND_NOW": 0x8}
#: Flags of dlopen(3).
LAZY, NOW = os.RTLD_LAZY, os.RTLD_NOW
MODES: Final = (
    NOW, NOW, LAZY, NOW | os.RTLD_GLOBAL, NOW | os.RTLD_NODELETE, NOW | os.RTLD_DEEPBIND,
    LAZY | os.RTLD_GLOBAL | os.RTLD_DEEPBIND, NOW | os.RTLD_NOLOAD, NOW | os.RTLD_GLOBAL | os.RTLD_NOLOAD,
)  # fmt: skip


class Call(NamedTuple):
    """One call: dlopen(3) of ``name`` with ``flags``, or dlclose(3) of what call ``number`` has opened."""

    name: str | None
    flags: int = NOW
    number: int = 0


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
    """Files by their paths below the tree, links, and what is called: the first opens a library."""

    libraries: tuple[tuple[str, NewLibrary], ...]
    links: tuple[tuple[str, str], ...]
    hard_links: tuple[tuple[str, str], ...]
    odd: tuple[tuple[str, str], ...]
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, data: bytes) -> RuleTree:
        """The tree that ``data`` stands for."""
        draw = _Draw(data)
        letters = "ABCDEFGH"[: 3 + draw.number(5)]
        directories = [draw.of(DIRECTORIES[: 5 if draw.chance(6) else 4]) for _ in letters]
        there = [f"{directory}/{draw.of(NAMES)}" for directory in directories]
        names = (*map(os.path.basename, there[1:]), *there[1:], *there[2:], "{tree}/" + there[-1])
        versioned, filters = draw.chance(3), draw.chance(3)
        libraries = {
            place: _library(draw, letter, names, versioned, FILTEES if filters else ())
            for letter, place in zip(letters, there, strict=True)
        }
        for letter in "JKLM"[: 1 + draw.number(3)] if filters else "":
            number = draw.number(1)
            filtee = _library(draw, letter, names, versioned, FILTEES[1 + number :])
            libraries.setdefault(f"{draw.of(DIRECTORIES[:4])}/{FILTEES[number]}", filtee)
        places = tuple(libraries)
        links = [("l", draw.of(LINKS))] if draw.chance(2) else []
        for _ in range(draw.number(2)):
            target = draw.of(places)
            text = target if draw.chance(2) else os.path.basename(target)
            links.append((f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", "{tree}/" + text))
        hard = [
            (f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", draw.of(places)) for _ in range(draw.number(2))
        ]
        odd = []
        if draw.chance(2):
            odd.append((f"{draw.of(DIRECTORIES[:4])}/{draw.of(NAMES)}", draw.of(ODD)))
        path = places[0]
        root = draw.of(ROOTS).replace("{path}", path).replace("{directory}", os.path.dirname(path))
        root = root.replace("{file}", os.path.basename(path))
        if draw.chance(4):
            _put_in_the_way(draw, libraries, odd, path)
        if draw.chance(4):
            links[:1], root = [("l", "a/c")], _behind_a_link(draw, libraries)
        if draw.chance(3):
            links += TOKENS
        others = (
            root,
            *places,
            *NAMES,
            "libx.so",
            "$LIB/libp.so",
            *(place for place, _ in (*links[:1], *hard)),
        )
        return cls(
            tuple(libraries.items()), tuple(links), tuple(hard), tuple(odd), _calls(draw, root, others)
        )

    def write(self, tree: Path) -> list[Call]:
        """Make the files in the empty directory ``tree``; what is called there."""

        def filled(text: str) -> str:
            return text.replace("{tree}", str(tree)).replace("{name}", tree.name)

        for directory in DIRECTORIES[:4]:
            (tree / directory).mkdir(parents=True, exist_ok=True)
        for place, library in self.libraries:
            (tree / place).parent.mkdir(parents=True, exist_ok=True)
            (tree / place).write_bytes(library_bytes(_filled(library, filled)))
        for place, target in self.links:
            if not os.path.lexists(tree / place):
                (tree / place).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(filled(target), tree / place)
        for place, target in self.hard_links:
            if (tree / target).exists() and not os.path.lexists(tree / place):
                os.link(tree / target, tree / place)
        for place, kind in self.odd:
            if not os.path.lexists(tree / place):
                _write_odd(tree / place, kind)
        return [call._replace(name=call.name and filled(call.name)) for call in self.calls]


def _filled(library: NewLibrary, filled: Callable[[str], str]) -> NewLibrary:
    needs = tuple((kind, filled(name)) for kind, name in library.needs)
    rpath, runpath = (text if text is None else filled(text) for text in (library.rpath, library.runpath))
    opens = tuple((filled(name), mode) for name, mode in library.opens)
    return replace(library, needs=needs, rpath=rpath, runpath=runpath, opens=opens)


def _library(
    draw: _Draw, letter: str, names: tuple[str, ...], versioned: bool, filtees: tuple[str, ...]
) -> NewLibrary:
    """A library that needs some of ``names``, and may be a filter of some of ``filtees``; of a tree whose
    symbols have versions, or not."""
    rpath = _path(draw) if not draw.chance(3) else None
    runpath = _path(draw) if draw.chance(4) else None
    soname = SONAMES[draw.number(len(SONAMES) - 1)]
    needs = [("needed", draw.of(NEEDED if draw.chance(8) else names)) for _ in range(draw.number(3))]
    for _ in range(draw.number(2) if filtees else 0):
        kind = "filter" if draw.chance(3) else "auxiliary"
        name = draw.of(FILTERED).replace("{}", draw.of(filtees))
        needs.insert(draw.number(len(needs)), (kind, name))
    versions = draw.of(VERSIONS) if versioned and not draw.chance(4) else None
    files = [
        name for kind, name in needs if kind == "needed" and name and "$" not in name and "{" not in name
    ]
    return NewLibrary(
        letter,
        soname,
        tuple(needs),
        rpath,
        runpath,
        defines=_definitions(draw, versioned, versions),
        refers=_references(draw, files if versioned else []),
        versions=versions,
        symbolic=draw.chance(16),
        flags=sum(flag for flag in FLAGS.values() if draw.chance(16)),
        flags_1=sum(flag for flag in FLAGS_1.values() if draw.chance(14)) | NOOPEN * draw.chance(40),
        unbound=draw.chance(20),
        opens=_opens(draw, names) if draw.chance(5) else (),
        closes=draw.chance(2),
        closes_at_once=draw.chance(5),
    )


def _opens(draw: _Draw, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """What a library's constructor opens."""
    choices = (*names, *NAMES, "$ORIGIN/libq.so", "./b/libp.so", "$ORIGIN/../$LIB/libp.so")
    return tuple((draw.of(choices), MODES[draw.number(len(MODES) - 1)]) for _ in range(1 + draw.number(2)))


def _definitions(draw: _Draw, versioned: bool, versions: str | None) -> tuple[Definition, ...]:
    """What a library defines.

    Where symbols have versions somebody may need one of this library: without any table of versions it does
    not define those symbols, or ld.so would end the process (an assertion in check_match()).
    """
    symbols = [symbol for symbol in SYMBOLS if draw.chance(2)]
    if not versioned:
        return letters("".join(symbols))
    defined: list[Definition] = []
    for symbol in symbols:
        if symbol not in VERSIONED:
            defined += letters(symbol)
        elif versions is not None:
            chosen = [version for version in versions if not draw.chance(4)]
            defined += letters(symbol, chosen or [""])
            if draw.chance(4):
                defined[-1] = defined[-1]._replace(hidden=True)
    return tuple(defined)


def _references(draw: _Draw, files: Sequence[str]) -> tuple[Reference, ...]:
    references = []
    for symbol in SYMBOLS:
        if not draw.chance(2):
            continue
        reference = Reference(symbol, weak=not draw.chance(16))
        if files and symbol in VERSIONED and draw.chance(2):
            version, file = "1212123"[draw.number(6)], draw.of(tuple(files))
            reference = reference._replace(version=version, file=file, weak_version=draw.chance(3))
        references.append(reference)
    return tuple(references)


def _calls(draw: _Draw, root: str, others: tuple[str, ...]) -> tuple[Call, ...]:
    """The root is opened, and closed; or other calls come between."""
    if draw.chance(2):
        return Call(root), Call(None)
    calls, is_open = [Call(root, MODES[draw.number(len(MODES) - 3)])], [0]  # which is not there yet
    for _ in range(1 + draw.number(3)):
        if draw.chance(3) and is_open:
            calls.append(Call(None, number=is_open.pop(draw.number(len(is_open) - 1))))
        else:
            is_open.append(len(calls))
            calls.append(Call(draw.of(others), MODES[draw.number(len(MODES) - 1)]))
    while is_open and not draw.chance(4):
        calls.append(Call(None, number=is_open.pop(draw.number(len(is_open) - 1))))
    return tuple(calls)


def _put_in_the_way(
    draw: _Draw, libraries: dict[str, NewLibrary], odd: list[tuple[str, str]], path: str
) -> None:
    """Have the library ``path`` need one that lies on its path, behind an odd file of that name."""
    first, second, name = draw.of(DIRECTORIES[:2]), draw.of(DIRECTORIES[2:4]), draw.of(NAMES)
    libraries.setdefault(
        f"{second}/{name}", NewLibrary("Y", defines=letters("u"), refers=(Reference("u"), Reference("v")))
    )
    libraries.pop(f"{first}/{name}" if f"{first}/{name}" != path else "", None)
    odd.insert(0, (f"{first}/{name}", draw.of(ODD)))
    directories = f"{first}:{second}"
    library = libraries[path]
    files = {reference.file for reference in library.refers}
    kept = [need for need in library.needs if need[1] in files] or library.needs[:1]
    library = replace(library, soname=None, needs=(("needed", name), *kept))
    rpath = draw.chance(2)
    libraries[path] = replace(library, rpath=directories) if rpath else replace(library, runpath=directories)


def _behind_a_link(draw: _Draw, libraries: dict[str, NewLibrary]) -> str:
    """Add a library that is loaded by a path with ``..`` behind a link, and needs others there; the path."""
    refers = Reference("s"), Reference("u"), Reference("v")
    needs = tuple(("needed", draw.of(NAMES)) for _ in range(1 + draw.number(1)))
    for _, name in needs:
        made = NewLibrary("Z", defines=letters("uv"), refers=refers, runpath="$ORIGIN")
        libraries.setdefault(f"a/c/{name}", made)
    is_rpath, path = draw.chance(2), draw.of(("$ORIGIN", "$ORIGIN/../c", "${ORIGIN}:a"))
    rpath, runpath = (path, None) if is_rpath else (None, path)
    libraries["a/c/libroot.so"] = NewLibrary("X", needs=needs, refers=refers, rpath=rpath, runpath=runpath)
    return draw.of(("l/../c/libroot.so", "{tree}/l/../c/libroot.so", "l/libroot.so"))


def _path(draw: _Draw) -> str:
    """Some directories, and often all in the end, or most trees would lack a library."""
    last = [f"{{tree}}/{directory}" for directory in DIRECTORIES[:4]] if draw.chance(2) else []
    return ":".join([*(draw.of(PATHS) for _ in range(1 + draw.number(3))), *last])


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
