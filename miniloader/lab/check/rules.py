"""What keeps a file from being loaded, or is worth knowing before: one table of rules over a situation.

What a rule of severity ``error`` says is what glibc asks for as it loads with ``RTLD_NOW``; the source is
said where it is not plain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from miniloader.elf.dynamic import DF_1_NOOPEN, DT_FLAGS_1, DT_RELR
from miniloader.elf.versions import Version
from miniloader.errors import ElfError
from miniloader.lab.check.closure import Lack
from miniloader.lab.check.load_rule import LoadProblem, LoadRule, load_rule
from miniloader.lab.check.releases import number_of, release_of
from miniloader.lab.check.shared_object import SharedObject, dlopen_notes
from miniloader.lab.check.situation import Situation, owners_of
from miniloader.lab.check.static_blocks import StaticBlocks
from miniloader.lab.check.where import defined_on_machine, definers, files_like, similar, uses
from miniloader.loader.search import Machine
from miniloader.native import gate

__all__ = ["LOAD_RULES", "problems_of_load"]

_OPTIONAL: Final = 512  # bytes of glibc's surplus that TLS descriptors may have: rtld.optional_static_tls
_MOST_EXPLAINED: Final = 20  # symbols whose uses and providers are looked for
_MOST_DUPLICATES: Final = 100  # symbols that are told of for each pair of libraries
_STACK_REFUSED: Final = (2, 41)  # the glibc from which on dlopen makes no stack executable
#: Machines whose stack is executable where a file does not say (glibc's DEFAULT_STACK_PERMS).
_STACK_BY_DEFAULT: Final = ("X86_64", "386", "ARM")


# ----------------------------------------------------------------------------------------------- files
@load_rule("malformed", "error", "Every file keeps the rules of `miniloader inspect --checks`.")
def malformed(situation: Situation) -> Iterator[LoadProblem]:
    """Files that break a rule, or are of a kind that is not opened by others."""
    for item in situation.new:
        if situation.of_musl and item.uses.resolvers:
            hint = f"{item.uses.resolvers:,} relocations of IFUNCs, which musl does not know"
            yield LoadProblem(needed_by=item.path, hint=hint)
        for field, found, expected in item.faults:
            yield LoadProblem(needed_by=item.path, hint=f"{field}: found {found}, expected {expected}")
        if item is not situation.file and item.is_program:
            yield LoadProblem(name=item.path, hint="a program: nobody can load it as a library")
    file = situation.file
    if situation.host is not None and file.image.dynamic.flag(DT_FLAGS_1, DF_1_NOOPEN):
        yield LoadProblem(name=file.path, hint="DF_1_NOOPEN: it may be linked to, and not opened by dlopen")
    if situation.host is not None and not file.image.dynamic.entries:
        yield LoadProblem(name=file.path, hint="no dynamic section: nothing can be linked")
    for lack in situation.closure.lacks:
        if lack.error is not None or lack.found.stopped:
            step = lack.found.steps[-1] if lack.found.steps else None
            reason = (
                str(lack.error) if lack.error is not None or step is None else f"{step.path}: {step.outcome}"
            )
            yield LoadProblem(name=lack.name, needed_by=lack.needed_by.path, hint=reason)


def _lack_kind(lack: Lack) -> str:
    if lack.error is not None or lack.found.stopped:
        return "malformed"
    misfits = {step.misfit for step in lack.found.steps}
    if "class" in misfits:
        return "wrong-class"
    return "wrong-machine" if "machine" in misfits else "missing-library"


def _misfits(situation: Situation, kind: str) -> Iterator[LoadProblem]:
    for lack in situation.closure.lacks:
        if _lack_kind(lack) == kind:
            wrong = [step.path for step in lack.found.steps if step.misfit]
            yield LoadProblem(
                name=lack.name, needed_by=lack.needed_by.path, hint=f"only this was found: {', '.join(wrong)}"
            )


def _machine_of(item: SharedObject) -> str:
    header = item.header
    return f"{header.elf_class}-bit {header.byte_order}-endian {header.machine}"


def _expected_machine(situation: Situation) -> tuple[Machine | None, str]:
    """The machine of the process: its program's, or in this machine's own root this one."""
    if situation.host is not None and situation.host.program is not None:
        program = situation.host.program
        return Machine.of(program.header), _machine_of(program)
    here = {"x86_64": Machine(64, "<", 62), "aarch64": Machine(64, "<", 183)}.get(gate.processor())
    return (here, f"this machine is {gate.processor()}") if situation.shelf.root.is_ours else (None, "")


@load_rule("wrong-machine", "error", "Every file is for the machine of the process.")
def wrong_machine(situation: Situation) -> Iterator[LoadProblem]:
    """The file itself is for another processor, or only such a library was found."""
    expected, text = _expected_machine(situation)
    machine = Machine.of(situation.file.header)
    if expected is not None and machine.elf_class == expected.elf_class and machine != expected:
        yield LoadProblem(
            name=situation.file.path, hint=f"found {_machine_of(situation.file)}, expected {text}"
        )
    yield from _misfits(situation, "wrong-machine")


@load_rule("wrong-class", "error", "Every file has the word size of the process.")
def wrong_class(situation: Situation) -> Iterator[LoadProblem]:
    """The file itself has other words, or only such a library was found."""
    expected, text = _expected_machine(situation)
    machine = Machine.of(situation.file.header)
    is_program = situation.host is None  # 32-bit programs run where their ld.so is
    if not is_program and expected is not None and machine.elf_class != expected.elf_class:
        yield LoadProblem(
            name=situation.file.path, hint=f"found {_machine_of(situation.file)}, expected {text}"
        )
    yield from _misfits(situation, "wrong-class")


@load_rule("missing-library", "error", "Every library that is needed is found.")
def missing_library(situation: Situation) -> Iterator[LoadProblem]:
    """Libraries that are nowhere where ld.so looks; the interpreter of a program is one."""
    interpreter = situation.file.image.interpreter
    if situation.file.is_program and interpreter is not None:
        try:
            situation.shelf.root.identity(interpreter)
        except (OSError, ValueError):
            yield LoadProblem(
                name=interpreter, needed_by=situation.file.path, hint="the kernel starts the program by it"
            )
    for lack in situation.closure.lacks:
        if _lack_kind(lack) == "missing-library":
            places = len(lack.found.steps)
            providers = tuple(files_like(lack.name, situation.surroundings))
            hint = f"not in any of {places} places: `miniloader tree` shows them"
            yield LoadProblem(name=lack.name, needed_by=lack.needed_by.path, providers=providers, hint=hint)


# -------------------------------------------------------------------------------------------- versions
@load_rule("missing-version", "error", "Every version that is needed is defined by its library.")
def missing_version(situation: Situation) -> Iterator[LoadProblem]:
    """Versions that the library found does not have.  Source: glibc's elf/dl-version.c.

    A library without any versions lacks none, and what is needed weakly may be missing; musl asks for none.
    """
    for item in situation.new if not situation.of_musl else ():
        for index, file, version in item.needs:
            library = _lacking(situation, version)
            if library is None:
                continue
            release = release_of(version.name)
            of = f"{version.name} is of {release}; " if release else ""
            newest = _newest(library, version.name)
            hint = f"{of}{library.path} has {f'versions up to {newest}' if newest else 'no such version'}"
            directories = [os.path.dirname(member.path) + "/" for member in situation.scope]
            others = files_like(file, situation.surroundings, directories)
            providers = tuple(path for path in others if _defines(situation, path, version.name))
            for symbol in item.names_of(index) or (None,):
                yield LoadProblem(
                    name=file, version=version.name, symbol=symbol,
                    needed_by=item.path, providers=providers, hint=hint,
                )  # fmt: skip


def _lacking(situation: Situation, version: Version | None) -> SharedObject | None:
    """The library that ought to define ``version`` and does not; None where nothing is wrong with it."""
    library = situation.closure.named.get(version.file or "") if version is not None else None
    if library is None or version is None or version.weak or not library.defines or situation.of_musl:
        return None
    return None if version.name in library.defines else library


def _newest(library: SharedObject, version: str) -> str | None:
    """The newest version of the family that a library defines."""
    family, _ = number_of(version)
    numbered = [
        (number, name)
        for name in library.defines
        for kind, number in [number_of(name)]
        if kind == family and number
    ]
    return max(numbered)[1] if numbered else None


def _glibc_of(situation: Situation) -> tuple[int, ...]:
    """The version of the process's glibc; () where it has none."""
    newest = _newest(situation.libc, "GLIBC_2") if situation.libc is not None else None
    return number_of(newest or "")[1] or ()


def _defines(situation: Situation, path: str, version: str) -> bool:
    try:
        return version in situation.shelf.take(path).defines
    except ElfError:
        return False


@load_rule(
    "abi-marker", "error", "Who uses packed relative relocations says that it needs a glibc that knows them."
)
def abi_marker(situation: Situation) -> Iterator[LoadProblem]:
    """DT_RELR without GLIBC_ABI_DT_RELR.  Source: glibc's _dl_check_map_versions, since 2.36.

    Only those that need versions, and that need libc.so themselves, are asked for it, and not by musl.
    """
    for item in situation.new if not situation.of_musl else ():
        needs = {version.name for _, _, version in item.needs}
        packed = DT_RELR in item.image.dynamic.tags and bool(needs)
        needs_libc = any(name.startswith("libc.so.") for name in item.image.needed)
        if packed and needs_libc and "GLIBC_ABI_DT_RELR" not in needs:
            yield LoadProblem(
                name="libc.so.6", version="GLIBC_ABI_DT_RELR", needed_by=item.path,
                hint="link it again with -z pack-relative-relocs, which asks for the version",
            )  # fmt: skip


# --------------------------------------------------------------------------------------------- symbols
@load_rule("undefined-symbol", "error", "Every symbol that is not weak is defined by somebody in scope.")
def undefined_symbol(situation: Situation) -> Iterator[LoadProblem]:
    """Symbols that relocations look up in vain; those of a version that is missing are told of there."""
    for item, symbols in situation.unresolved:
        symbols = tuple(symbol for symbol in symbols if not _lacking(situation, item.version(symbol)))
        explained = symbols[:_MOST_EXPLAINED]
        places = uses(item, explained) if explained else {}
        for symbol in symbols:
            name, version, use = item.name(symbol), item.version(symbol), places.get(symbol)
            hint, providers = None, list[str]()
            if symbol in explained:
                providers = definers(name, situation.scope)
                if providers and situation.of_musl:
                    hint = "defined in the tree by an IFUNC, which musl does not know"
                elif providers:
                    wanted = version.name if version else "none"
                    hint = f"defined in the tree, but not as version {wanted}"
                else:
                    providers = defined_on_machine(name, situation.surroundings, situation.shelf)
                    near = None if providers else similar(name, situation.scope)
                    hint = f"did you mean {near}?" if near else None
                    lacking = [lack.name for lack in situation.closure.lacks if lack.needed_by is item]
                    if lacking and not near:
                        hint = f"perhaps of what is missing: {', '.join(lacking)}"
                    if providers:
                        hint = "defined by a library that is not needed by anybody here"
            yield LoadProblem(
                symbol=name,
                version=version.name if version else None,
                name=version.file if version else None,
                needed_by=item.path,
                section=use.section if use else None,
                function=use.function if use else None,
                providers=tuple(providers),
                hint=hint,
            )  # fmt: skip


@load_rule(
    "duplicate-symbol", "info", "No library calls another's function where it defines one of that name."
)
def duplicate_symbol(situation: Situation) -> Iterator[LoadProblem]:
    """Interposition: a library refers to what it defines itself, and gets what somebody before it defines.

    Weak and unique definitions are meant to be merged; what ld.so and libc define twice is, too.
    """
    for item in situation.new[1:]:
        wanted = item.uses.symbols
        wanted = wanted[(item.rows["shndx"][wanted] != 0) & (item.bind[wanted] == 1)]
        own = situation.scope.index(item)
        if not len(wanted) or not own or item is situation.libc or _is_ld_so(item):
            continue
        rows = owners_of(item, wanted, situation.scope, own)
        told: dict[int, int] = {}
        for place in np.flatnonzero((rows["owner"] != own) & (rows["info"] >> 4 == 1)).tolist():
            owner, symbol = int(rows["owner"][place]), int(wanted[place])
            winner = situation.scope[owner]
            told[owner] = told.get(owner, 0) + 1
            if told[owner] > _MOST_DUPLICATES or int(rows["symbol"][place]) in winner.uses.copies:
                continue
            name = item.name(symbol)
            yield LoadProblem(
                symbol=name, name=winner.path, needed_by=item.path, providers=(winner.path, item.path),
                hint=f"{item.path} defines it, too, and uses {winner.path}'s, which comes first",
            )  # fmt: skip


def _is_ld_so(item: SharedObject) -> bool:
    return (item.image.soname or "").startswith(("ld-", "ld.", "ld64."))


@load_rule("too-recent", "error", "No version is needed that the oldest system aimed at does not have.")
def too_recent(situation: Situation) -> Iterator[LoadProblem]:
    """Versions that ``--libc`` or ``--policy`` does not have: the file's own needs, as auditwheel counts."""
    item, limit = situation.file, situation.limit
    for index, file, version in item.needs if limit is not None else ():
        if limit is None or file.startswith(("ld-linux", "ld64.so")) or limit.allows(version.name):
            continue
        release = release_of(version.name)
        hint = f"{f'of {release}; ' if release else ''}{limit.name} has none so new"
        for symbol in item.names_of(index) or (None,):
            yield LoadProblem(
                name=file, version=version.name, symbol=symbol,
                needed_by=item.path, hint=hint,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------ protections
@load_rule("executable-stack", "warning", "Nobody asks for an executable stack.")
def executable_stack(situation: Situation) -> Iterator[LoadProblem]:
    """PT_GNU_STACK with execute permission, or missing; from glibc 2.41 on dlopen refuses such libraries."""
    refused = situation.host is not None and _glibc_of(situation) >= _STACK_REFUSED
    for item in situation.new:
        silent = item.image.segment("PT_GNU_STACK") is None and item.header.machine in _STACK_BY_DEFAULT
        if item.image.executable_stack or (silent and item.image.dynamic.entries):
            field = "no PT_GNU_STACK, which means one" if silent else "PT_GNU_STACK asks for one"
            yield LoadProblem(
                severity="error" if refused else "warning", needed_by=item.path,
                hint=f"{field}; glibc 2.41 and newer refuse to open such a library",
            )  # fmt: skip


@load_rule("text-relocation", "warning", "Nobody relocates its code.")
def text_relocation(situation: Situation) -> Iterator[LoadProblem]:
    """DT_TEXTREL: code that every process has a copy of, and that SELinux refuses."""
    for item in situation.new:
        if item.image.dynamic.text_relocations:
            yield LoadProblem(needed_by=item.path, hint="compile it with -fPIC")


# ------------------------------------------------------------------------------- thread-local storage
@load_rule("static-tls", "error", "What dlopen brings of static thread-local storage fits the surplus.")
def static_tls(situation: Situation) -> Iterator[LoadProblem]:
    """Blocks that have to be at a fixed distance from the thread pointer, and do not fit any more.

    Source: glibc's _dl_determine_tlsoffset and _dl_try_allocate_static_tls, with its tunables as they are.
    """
    if situation.host is None:
        return  # a program's are laid out before any thread starts
    start = filter(None, (item.image.tls for item in situation.host.objects))
    blocks = StaticBlocks.of_program(list(start), situation.file.header.machine, _glibc_of(situation))
    placed, optional = set(situation.host.objects), _OPTIONAL
    for item in reversed(situation.new):  # who is needed is relocated first
        for owner, may_fail in _static_owners(situation, item):
            tls = owner.image.tls
            if tls is None or owner in placed or (may_fail and situation.of_musl):
                continue
            if situation.of_musl:
                hint = "musl has room for it only as a program starts"
                yield LoadProblem(name=owner.path, needed_by=item.path, hint=hint)
                continue
            more = blocks.with_block(tls)
            if may_fail and (more is None or more.used - blocks.used > optional):
                continue
            placed.add(owner)
            if more is None:
                surplus = f"of glibc's surplus {blocks.free:,} are free, aligned to {blocks.align} at most"
                hint = f"{tls.memsz:,} bytes, aligned to {tls.align}; {surplus}"
                yield LoadProblem(name=owner.path, needed_by=item.path, hint=hint)
                continue
            optional -= (more.used - blocks.used) * may_fail
            blocks = more


def _static_owners(situation: Situation, item: SharedObject) -> Iterator[tuple[SharedObject, bool]]:
    """Whose blocks ``item`` needs at a fixed distance; those of TLS descriptors may be elsewhere (True)."""
    for symbols, may_fail in ((item.uses.static_tls, False), (item.uses.tls_descriptors, True)):
        if len(symbols) and not symbols[0]:
            yield item, may_fail
        named = symbols[symbols > 0]
        if len(named):
            owners = owners_of(item, named, situation.scope, situation.scope.index(item))["owner"]
            for place in dict.fromkeys(owners[owners >= 0].tolist()):
                yield situation.scope[place], may_fail


# ----------------------------------------------------------------------------------------------- paths
@load_rule("runpath-leaves-root", "warning", "No run-path leads out of the root.")
def runpath_leaves_root(situation: Situation) -> Iterator[LoadProblem]:
    """``..`` above the root, or a directory of the machine where it was built that holds the root."""
    root = situation.shelf.root
    for item in situation.new:
        for directory in (*item.image.rpath, *item.image.runpath):
            text = directory.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", os.path.dirname(item.path))
            depth = 0
            for part in text.split("/"):
                depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
                if depth < 0:
                    break
            outside = not root.is_ours and f"{text}/".startswith(f"{root.directory}/")
            if depth < 0 or outside:
                yield LoadProblem(
                    name=directory, needed_by=item.path, hint="inside of the root it means another directory"
                )


@load_rule("dlopen-note", "info", "A file says nothing of libraries that it may open as it runs.")
def dlopen_note(situation: Situation) -> Iterator[LoadProblem]:
    """Libraries that are opened while it runs, where the file says so (``.note.dlopen``)."""
    if situation.file.image.segment("PT_NOTE") is None:
        return
    try:
        notes = list(dlopen_notes(situation.file.reopened()))
    except ElfError:
        return
    for text in notes:
        try:
            entries = json.loads(text.rstrip(b"\0"))
        except (ValueError, RecursionError):
            continue
        for entry in entries if isinstance(entries, list) else ():
            names = entry.get("soname") if isinstance(entry, dict) else None
            if isinstance(names, list):
                about = " ".join(str(entry.get(key)) for key in ("priority", "description") if entry.get(key))
                yield LoadProblem(
                    name=" or ".join(map(str, names)), needed_by=situation.file.path,
                    hint=about or "opened while it runs",
                )  # fmt: skip


LOAD_RULES: Final = tuple(value for value in [*globals().values()] if isinstance(value, LoadRule))
"""Every rule, in the order in which they are written and problems are told."""


def problems_of_load(situation: Situation) -> tuple[LoadProblem, ...]:
    """Every problem that any rule finds."""
    return tuple(problem for rule in LOAD_RULES for problem in rule.problems(situation))
