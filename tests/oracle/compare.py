"""Does miniloader load a library as dlopen(3) does?  Every relocated word, and the whole layout, compared.

Two fresh children load the same file, one each way, and hold still; their memory is read from outside.  A
word is *named* before it is compared: (file, offset in its image), or (file, offset in its thread-local
block), so that it does not matter where anything was mapped.  Ours are read twice, before and after the
constructors, so that what the library's own code changed can be told from what relocation left.

:func:`main` is the program of a worker that compares: that process has loaded only what Python and numpy are
made of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from miniloader.elf import ElfImage, LoadPlan, Source, read_image
from miniloader.elf.relocations import kind_name
from miniloader.errors import WorkerError
from miniloader.kernel.maps import read_maps, within
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.lab.workers.worker import Commands, settle
from miniloader.loader.beside_glibc import host
from miniloader.loader.relocation_groups import Sorted, sort_relocations
from miniloader.values import dataclass
from tests.oracle.held import HeldProcess, RemoteMemory, load_and_hold, open_and_hold
from tests.oracle.word_names import WordNames

__all__ = ["Comparison", "Difference", "compare", "main"]

#: What stands in place of a relocation's kind where there is none.
_NO_KIND: Final = {-1: "RELR", -2: "of the dynamic section"}
_RELR, _DYNAMIC = _NO_KIND
#: What :func:`miniloader.loader.policy.refuse` says of a second copy.
_ONLY_ONCE: Final = "a process can have it only once"
_SHOWN: Final = 20  # differing words that are listed; all are counted


@dataclass(frozen=True)
class Difference:
    """One thing that is not alike: the word or range ``where``, as dlopen has it and as ours is."""

    where: str
    dlopen: str
    ours: str


@dataclass(frozen=True)
class Comparison:
    """How a library compares.

    ``dlopen`` and ``ours`` are "loaded", or why not.  ``words`` are the relocated ones; of these ``equal``
    are alike, ``rewritten`` were changed by the library's own code afterwards, to the same or to something
    that has no name (the heap) in both, and ``stubs`` lead to code of ours that stands for what theirs lead
    to (see :mod:`miniloader.loader.beside_glibc.stand_ins`).  At most 20 of the others are in ``differing``.
    ``plain`` is why it was not loaded from prepared pages, where that was asked for.  ``only_once``: ld.so
    has it in the process already, where dlopen hands out that one; ours is refused, as there must not be two.
    """

    path: str
    dlopen: str
    ours: str
    words: int = 0
    equal: int = 0
    rewritten: int = 0
    stubs: int = 0
    layout: tuple[Difference, ...] = ()
    differing: tuple[Difference, ...] = ()
    plain: str | None = None
    only_once: bool = False

    @property
    def both_load(self) -> bool:
        """Whether there was anything to compare."""
        return self.dlopen == self.ours == "loaded"

    @property
    def alike(self) -> bool:
        """Whether both load it, word for word the same and laid out the same, or neither makes it anew."""
        if self.only_once:
            return True
        if (self.dlopen == "loaded") != (self.ours == "loaded"):
            return False
        return not self.layout and not self.different

    @property
    def different(self) -> int:
        """How many relocated words differ."""
        return self.words - self.equal - self.rewritten - self.stubs


def compare(path: str, *, seconds: float = 60, prepared_in: str | None = None) -> Comparison:
    """Load ``path`` both ways, in children that have ``seconds`` each.

    With ``prepared_in``, a directory, ours is prepared and loaded so; its layout is another, then, and not
    compared.
    """
    path = os.path.abspath(path)
    theirs = open_and_hold(path, seconds)
    with theirs, load_and_hold(path, seconds, prepared_in=prepared_in) as ours:
        first, answer = _report(ours), _report(theirs)
        dlopen, mine = (report.get("error", "loaded") for report in (answer, first))
        if dlopen != "loaded" or mine != "loaded":
            if mine == "loaded":  # its constructors may still fail
                ours.go_on()
                mine = _report(ours).get("error", "loaded")
            only_once = dlopen == "loaded" and _ONLY_ONCE in mine and _is_present(path)
            return Comparison(path, dlopen, mine, only_once=only_once)
        image = read_image(Source.open(path))
        plan = image.plan(PAGE_SIZE)
        words = RelocatedWords.of(image)
        bias = first["start"] - plan.start
        before = words.read(RemoteMemory(ours.pid, path, plan, bias))
        ours.go_on()
        found = _report(ours)
        if "error" in found:
            return Comparison(path, dlopen, found["error"])
        after = words.read(RemoteMemory(ours.pid, path, plan, bias))
        peer = words.read(RemoteMemory(theirs.pid, path, plan, answer["bias"]))
        files: dict[str, int] = {}
        their_names = WordNames(theirs.pid, answer, files)
        our_names = WordNames(ours.pid, found, files)
        places = (theirs.pid, answer["bias"], ours.pid, bias)
        layout = tuple(_layout(plan, *places)) if prepared_in is None else ()
        return _judged(
            Comparison(path, dlopen, mine, layout=layout, plain=found["plain"]),
            words,
            (their_names, peer),
            (our_names, before, after),
            found["stubs"],
        )


def _is_present(path: str) -> bool:
    """Whether ld.so has that very file in this process, and so in children of it."""
    return os.path.realpath(path) in {os.path.realpath(library.path) for library in host.libraries()}


def _report(child: HeldProcess) -> Mapping[str, Any]:
    try:
        return child.report()
    except WorkerError as error:
        return {"error": str(error)}


def _layout(plan: LoadPlan, their_pid: int, their_bias: int, our_pid: int, bias: int) -> Iterator[Difference]:
    """The ranges of the library's span that differ, as ``/proc/PID/maps`` has them."""

    def lines(pid: int, base: int) -> list[str]:
        vmas = within(read_maps(pid), base + plan.start, base + plan.end)
        return [
            f"{vma.start - base:#x}-{vma.end - base:#x} {vma.protection} {vma.file_offset:#x} {vma.path}"
            for vma in vmas
        ]

    theirs, ours = lines(their_pid, their_bias), lines(our_pid, bias)
    for line in theirs:
        if line not in ours:
            yield Difference("mapping", line, "")
    for line in ours:
        if line not in theirs:
            yield Difference("mapping", "", line)


# ------------------------------------------------------------------------------------ relocated words
@dataclass(frozen=True, eq=False)
class RelocatedWords:
    """Every word that an image's relocations write: where, how many bytes, by which formula and kind.

    The addresses in its dynamic section, which ld.so adjusts, are among them.
    """

    image: ElfImage
    vaddrs: NDArray[np.uint64]
    sizes: NDArray[np.uint8]
    formulas: NDArray[np.object_]
    kinds: NDArray[np.int64]
    symbols: NDArray[np.int64]

    @classmethod
    def of(cls, image: ElfImage) -> RelocatedWords:
        """Those of ``image``.  A descriptor counts as one word, its second."""
        relocations: Sorted = sort_relocations(image)
        parts: list[tuple[NDArray[np.uint64], int, str, int, NDArray[Any]]] = []
        dynamic, relr = relocations.dynamic["offset"], relocations.relr
        parts.append((dynamic, 8, "B + A", _DYNAMIC, np.zeros(len(dynamic), np.int64)))
        parts.append((relr, 8, "B + A", _RELR, np.zeros(len(relr), np.int64)))
        relative = relocations.relative
        parts.append((relative["offset"], 8, "B + A", 8, relative["symbol"]))
        for kind, rows in relocations.others:
            vaddrs = rows["offset"] + np.uint64(8 if kind.formula == "descriptor" else 0)
            size = min(kind.size, 8)
            parts.append((vaddrs, size, kind.formula, int(rows["type"][0]), rows["symbol"]))
        lengths = [len(part[0]) for part in parts]

        def each(column: int, dtype: Any) -> NDArray[Any]:
            values = np.empty(len(parts), dtype)
            values[:] = [part[column] for part in parts]
            return np.repeat(values, lengths)

        return cls(
            image,
            np.concatenate([part[0] for part in parts]).astype(np.uint64),
            each(1, np.uint8),
            each(2, object),
            each(3, np.int64),
            np.concatenate([part[4] for part in parts]).astype(np.int64),
        )

    def read(self, memory: RemoteMemory) -> NDArray[np.uint64]:
        """What they are in that process."""
        values = np.empty(len(self.vaddrs), np.uint64)
        if not len(values):
            return values
        # A buffer from the first word to the last, of which the pages that hold none are never touched.
        size = memory.plan.page_size
        low, high = int(self.vaddrs.min()) & -size, int((self.vaddrs + self.sizes).max())
        buffer = np.empty(-(-(high - low) // size) * size, np.uint8)
        offsets = (self.vaddrs - np.uint64(low)).view(np.int64)
        touched = np.zeros(len(buffer) // size + 2, np.int8)
        for ends in (offsets, offsets + self.sizes - 1):
            touched[ends // size + 1] = 1
        for first, last in (np.flatnonzero(np.diff(touched)).reshape(-1, 2) * size).tolist():
            memory.read_into(low + first, buffer[first:last])
        aligned = (self.sizes == 8) & (offsets & 7 == 0)
        values[aligned] = buffer.view(np.uint64)[offsets[aligned] >> 3]
        for index in np.flatnonzero(~aligned).tolist():  # there are a handful in all the world
            at = int(offsets[index])
            values[index] = int.from_bytes(buffer[at : at + int(self.sizes[index])], "little")
        return values

    def label(self, index: int) -> str:
        """What to call one in a report."""
        kind = int(self.kinds[index])
        name = _NO_KIND.get(kind) or kind_name(self.image.header.machine, kind)
        symbol = int(self.symbols[index])
        of = f" of {self.image.symbols.name(symbol)}" if symbol > 0 else ""
        return f"vaddr {int(self.vaddrs[index]):#x}, {name}{of}"


def _judged(
    comparison: Comparison,
    words: RelocatedWords,
    theirs: tuple[WordNames, NDArray[np.uint64]],
    ours: tuple[WordNames, NDArray[np.uint64], NDArray[np.uint64]],
    stubs: Sequence[tuple[int, int]],
) -> Comparison:
    """Compare word by word."""
    (their_names, peer), (our_names, relocated, final) = theirs, ours
    direct = relocated.copy()
    for stub, function in stubs:
        direct[direct == stub] = function
    behind = direct != relocated
    wanted, found = their_names.of(words, peer), our_names.of(words, direct)
    same = _same(wanted, found)
    rewritten = np.zeros(len(peer), bool)
    if not same.all():
        now = our_names.of(words, final)
        (their_file, their_place), (our_file, our_place) = (
            their_names.addresses(peer),
            our_names.addresses(final),
        )
        elsewhere = (their_file == our_file) & ((their_place == our_place) | (their_file < 0))
        rewritten = ~same & (relocated != final) & (_same(wanted, now) | elsewhere)
    differing = tuple(
        Difference(
            words.label(index), their_names.text(words, peer, index), our_names.text(words, direct, index)
        )
        for index in np.flatnonzero(~same & ~rewritten)[:_SHOWN].tolist()
    )
    return replace(
        comparison,
        words=len(peer),
        equal=int((same & ~behind).sum()),
        rewritten=int(rewritten.sum()),
        stubs=int((same & behind).sum()),
        differing=differing,
    )


def _same(
    first: tuple[NDArray[np.int64], NDArray[np.uint64]], second: tuple[NDArray[np.int64], NDArray[np.uint64]]
) -> NDArray[np.bool_]:
    return np.asarray((first[0] == second[0]) & (first[1] == second[1]), bool)


class _CompareCommands(Commands):
    """The one command of the process that compares, see :class:`tests.oracle.comparer.Comparer`."""

    def do_compare(self, path: str, seconds: float, cache: str | None) -> dict[str, Any]:
        """Compare, as :func:`compare` does."""
        return asdict(compare(path, seconds=seconds, prepared_in=cache))


def main() -> None:
    """``argv``: the descriptor of the connection, and the pid of the parent."""
    settle(int(sys.argv[2]))
    _CompareCommands(int(sys.argv[1])).serve()
