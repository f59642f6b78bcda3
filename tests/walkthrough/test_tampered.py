"""No claim that cannot fail: each is refuted when its chapter has seen something else.

Also, chapters on a file system without a disk, and what they leave behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.walkthrough import scratch_files, workbench
from miniloader.walkthrough.chapters import CHAPTERS, chapter
from miniloader.walkthrough.mapping_views import ZEROS_UNTOLD
from miniloader.walkthrough.run_chapter import run_chapter
from miniloader.walkthrough.workbench import Workbench

Tamper = Callable[[Any], Any]


def but(**changes: Any) -> Tamper:
    """What was seen, but for ``changes``: values, or functions of what is there."""
    return lambda seen: replace(
        seen,
        **{name: new(getattr(seen, name)) if callable(new) else new for name, new in changes.items()},
    )


def at(place: int, new: Any) -> Callable[[Any], Any]:
    """A tuple with another value at ``place``, or with a function of what is there."""
    return lambda values: tuple(
        (new(old) if callable(new) else new) if number == place else old for number, old in enumerate(values)
    )


def answers(**changes: str) -> Tamper:
    return but(answers=lambda found: found | {name.replace("_", " "): new for name, new in changes.items()})


def several(**changes: Any) -> Tamper:
    return but(several=but(**changes))


def in_code(state: str) -> Tamper:
    """One process's first page of code is in another state."""
    return lambda seen: replace(seen, states=at(1, at(seen.code[0], state))(seen.states))


def another_frame(pages: str) -> Tamper:
    """One process has, of the pages that a field lists, the first in a frame of its own."""
    return lambda seen: replace(seen, groups=at(1, at(getattr(seen, pages)[0], 9999))(seen.groups))


def same_frame(pages: str) -> Tamper:
    """Two processes have, of the pages that a field lists, the first in one frame."""

    def tamper(seen: Any) -> Any:
        page = getattr(seen, pages)[0]
        return replace(seen, groups=at(1, at(page, seen.groups[0][page]))(seen.groups))

    return tamper


def not_proven(claim: str) -> Callable[[Any], Any]:
    return lambda claims: claims | {claim: (False, "something else")}


FRAMES = tuple(range(1, 9))


def in_worker(field: str, name: str, new: Any) -> Tamper:
    """One worker has something else: a value, or a function of what it has."""
    return but(**{field: lambda seen: seen | {name: new(seen[name]) if callable(new) else new}})


#: What to see instead, by chapter and claim; several for a claim with several halves.
TAMPERED: dict[str, dict[str, tuple[Tamper, ...]]] = {
    "build": {
        **{
            id: (but(differences=at(step, "the page at vaddr 0 is in no mapping")),)
            for step, id in enumerate(
                ("headers", "plan", "mapped", "zeroed", "relocated", "bound", "started")
            )
        },
        "like-ld-so": (but(relocated=(28, 27)), but(relocated=(0, 0))),
        "crc32": (but(crc=1),),
    },
    "memory": {
        "in-the-map": (but(line="7f0000000000-7f0000001000 r--p"),),
        "table-empty": (but(untouched=1),),
        "one-entry": (but(states=at(1, "absent")), but(states=at(0, "copied"))),
        "first-touch-faults": (but(faults=(0, 1, 1, 1)), but(again=(1, 1, 1, 1))),
        "cached": (but(cached=1),),
        "cached-is-not-mapped": (but(in_table=1),),
        "two-addresses-one-frame": (but(frames=(4, 5)), but(addresses=(4096, 4096))),
        "same-bytes": (but(bytes_read=(b"X", b"Y")),),
    },
    "mapping": {
        "file-mapped": (but(kinds=at(0, "")),),
        "device-mapped": (but(kinds=at(1, "data")), but(device=b"\1" * 8)),
        "anonymous-mapped": (but(kinds=at(2, "data")), but(anonymous=b"\1" * 8)),
        "nothing-loaded": (but(present_at_first=1), but(huge_present=1)),
        "page-tables": (but(touched=at(1, "copied")), but(same_frames=False)),
        "like-an-array": (but(as_array=False),),
        "zero-then-own": (but(anonymous_states=("absent", "copied", "copied")),),
        "in-step": (but(from_pwrite=(b"older",)), but(by_store=(b"written",))),
    },
    "lazy": {
        "on-demand": (
            but(before=1),
            but(touched_after="absent"),
            but(touched_before="sole"),
            but(by_one_touch=1 << 30),
        ),
        "one-fault-many": (but(by_one_touch=0),),
        "write-one": (but(by_one_write=2), but(by_one_write=0)),
        "by-fault": (but(everything=0), but(warm=lambda faults: faults._replace(minor=0, major=0))),
        "cold-and-warm": (but(cached=0, cold=lambda faults: faults._replace(major=0)),),
    },
    "cow": {
        "copied": (
            but(states_after=at(3, "sole")),
            but(states_before=at(3, "copied")),
            but(frames_before=(5,) * 8, frames_after=(5,) * 8),
        ),
        "only-that-page": (but(states_after=at(4, "copied")), but(frames_after=at(4, 5))),
        "invisible": (but(read_there=b"h"), but(read_here=b"DDDDD")),
        "never-in-file": (but(in_file=b"hello"),),
        "later-change-shows": (but(later_elsewhere=b"FFFFF"), but(later_in_copy=b"later")),
        "same-on-tmpfs": (but(on_tmpfs=("sole",) * 8),),
        "working-copy": (but(copied=tuple(range(512))), but(file_same=False)),
        "read-only-refused": (but(read_only=""), but(read_only="SIGBUS")),
        "past-the-end": (but(past_end=""), but(past_end="SIGSEGV")),
    },
    "shared": {
        "unrelated": (but(talks=at(0, but(related=True))),),
        "visible-at-once": (but(talks=at(0, but(heard_by_b=""))),),
        "both-ways": (but(talks=at(0, but(heard_by_a=""))),),
        "one-frame": (
            but(talks=at(0, but(states=("shared", "copied")))),
            but(talks=at(0, but(same_frames=False))),
        ),
        "not-copied": (
            but(talks=at(0, but(states=("shared", "copied")))),
            but(talks=at(0, but(moved=True))),
        ),
        "in-the-file": (but(talks=at(0, but(by_pread=""))),),
        "persistent": (but(talks=at(0, but(after_both=""))), but(talks=at(0, but(from_disk="")))),
    },
    "copies": {
        "mapping-is-the-cache": (but(mapping=at(0, "copied")),),
        "read-copies": (but(buffer=at(0, "sole")),),
        "frames-distinct": (but(mapping_frames=(7,), buffer_frames=(7,)),),
        "buffer-is-a-snapshot": (but(in_buffer=b"new "), but(in_other_buffer=b"old ")),
        "mapping-follows": (but(in_mapping=b"old "),),
        "read-wins-once": (but(once=but(by_read=(2.0,), by_mmap=(1.0,))),),
        "mmap-wins-random": (but(random=but(by_read=(1.0,), by_mmap=(2.0,))),),
    },
    "unmappable": {
        "streams-refuse": (answers(a_pipe="mapped"), answers(a_terminal="EACCES")),
        "tcp-maps": (answers(a_TCP_socket="ENODEV"),),
        "things-without-pages": (answers(a_directory="mapped"), answers(a_file="ENODEV")),
        "rights-count": (but(answers=lambda found: found | {"write-only file, to read": "mapped"}),),
        "shape-counts": (answers(length_0="mapped"),),
        "beyond-the-end": (but(beyond=""), but(beyond="SIGSEGV")),
    },
    "segments": {
        "segments-decide": (but(kernel=lambda lines: lines[1:]), but(kernel=at(0, (0, 1, "rwx", 0)))),
        "nothing-loaded": (but(present_at_first=1),),
        "one-page-twice": (
            but(twice=at(1, "copied")),
            but(twice_frames=(1, 2)),
            but(twice_bytes_equal=False),
        ),
        "tail-was-not-zero": (but(tail_in_file=bytes(8)), but(tail_state=at(0, "copied"))),
        "tail-zeroed": (but(tail=b"\0\1"), but(tail_state=at(1, "sole"))),
    },
    "relocation": {
        "code-unchanged": (but(code_equal=False), but(code_states=at(0, "copied"))),
        "through-the-slot": (but(named_by_code=None), but(named_by_code=1)),
        "slot-holds-address": (but(bound=1), but(result=0)),
        "bound-when-called": (but(unbound=1 << 40), but(bound=1, unbound=2)),
        "only-written-copied": (but(copied=()), but(copied=lambda pages: (0, *pages))),
    },
    "processes": {
        "code-one-copy": (in_code("copied"), another_frame("code"), but(code=())),
        "relocated-own": (
            same_frame("relocated"),
            lambda seen: replace(seen, states=at(0, at(seen.relocated[0], "shared"))(seen.states)),
        ),
        "adds-what-it-writes": (another_frame("code"), same_frame("relocated")),
        "isolated": (but(claims=not_proven("writes-isolated")),),
        "file-unchanged": (but(claims=not_proven("file-unchanged")),),
        "pss": (but(text=((12288, 12288),) * 4), but(text=((0, 0),) * 4)),
        "saved": (but(used=1 << 20, unshared=1 << 20),),
    },
    "prepared": {
        "private-otherwise": (
            but(plain=same_frame("relocated")),
            but(plain=lambda seen: replace(seen, states=at(0, at(seen.relocated[0], "shared"))(seen.states))),
        ),
        "relocated-one-copy": (
            but(shared=another_frame("relocated")),
            but(
                shared=lambda seen: replace(seen, states=at(1, at(seen.relocated[0], "copied"))(seen.states))
            ),
            but(filled=4),
        ),
        "same-address": (but(shared=but(bases=at(1, 1 << 40))), but(address=1 << 40)),
        "saved": (but(plain=lambda seen: replace(seen, used=0)), but(filled=4)),
        "isolated": (but(shared=but(claims=not_proven("writes-isolated"))),),
    },
    "erosion": {
        "forked-shared": (in_worker("forked", "collects", at(3, "copied")),),
        "idle-stays": (in_worker("worked", "idle", ("copied",) * 48),),
        "reading-copies": (in_worker("worked", "reads", at(1, "copied-shared")),),
        "new-frames": (but(frames=(FRAMES, FRAMES)),),
        "nothing-changed": (in_worker("equal", "reads", 7),),
        "collecting-copies": (in_worker("worked", "collects", at(2, "copied-shared")),),
        "collector-changes-nothing": (in_worker("equal", "collects", 0),),
        "freeze-stops-the-collector": (in_worker("worked", "frozen, collects", ("copied",) * 48),),
        "freeze-stops-no-reader": (in_worker("worked", "frozen, reads", at(5, "copied-shared")),),
        "preloading-saves": (but(late=at(0, "copied-shared")),),
    },
    "fork": {
        "all-shared": (but(forked=at(1, at(3, "copied"))), but(forked_frames=at(1, at(3, 5)))),
        "own-when-written": (but(written=at(0, at(5, "copied-shared"))), but(written=at(1, at(0, "copied")))),
        "first-writer-moves": (
            but(forked_frames=(FRAMES, FRAMES), written_frames=(FRAMES, FRAMES)),
            but(forked_frames=(FRAMES, FRAMES), written_frames=(at(2, 99)(FRAMES), at(5, 99)(FRAMES))),
        ),
        "isolated": (but(parent_reads=b"child"), but(child_reads=b"mine!")),
        "last-owner-stays": (but(alone_frames=at(2, 5)),),
        "owner-again": (but(alone=at(2, "copied-shared")),),
        "shared-stays-shared": (but(shared_word=bytes(5)),),
    },
    "textrel": {
        "refused-unasked": (but(refused=""),),
        "addresses-in-code": (but(changed=lambda vaddrs: (*vaddrs, 0)), but(changed=())),
        "every-page-differs": (but(differ=at(1, False)), but(differ=())),
        "code-private": (
            but(several=in_code("shared")),
            but(several=same_frame("code")),
            several(code=()),
        ),
        "pss": (several(text=((16384, 4096),) * 4),),
        "file-unchanged": (several(claims=not_proven("file-unchanged")),),
    },
    "relro": {
        "writable-at-first": (but(relocating="r--"),),
        "frozen": (but(frozen=at(0, "rw-")), but(data="r--"), but(frozen=())),
        "still-copied": (but(states=at(0, "sole")), but(states=lambda states: ("sole",) * len(states))),
        "store-refused": (but(store=""), but(store="SIGBUS")),
        "data-writable": (but(store_data=(False, "SIGSEGV")),),
        "differ-by-bias": (
            but(differences=lambda found: (*found, 1)),
            but(others_equal=False),
            but(bases=(PAGE_SIZE, PAGE_SIZE), differences=(0,)),
        ),
    },
    "tls": {
        "two-addresses": (
            lambda seen: replace(seen, threads=at(1, but(address=seen.threads[0].address))(seen.threads)),
        ),
        "from-the-template": (but(in_file=0), but(threads=at(1, but(values=at(0, 1001))))),
        "own-values": (
            but(threads=at(0, but(at_the_end=1004))),
            but(threads=at(1, but(values=at(1, 1002)))),
        ),
        "template-stays": (but(in_memory=(1000, 1004)),),
        "not-in-the-library": (
            lambda seen: replace(seen, threads=at(0, but(address=seen.template))(seen.threads)),
            but(threads=at(0, but(file="/lib/other.so"))),
        ),
        "late-thread": (but(late=1003),),
    },
}


@cache
def seen_by(name: str) -> Any:
    """What the chapter's experiment sees, at the best level there is."""
    with Workbench() as bench:
        experiment = chapter(name).run(bench)
        try:
            while True:
                next(experiment)
        except StopIteration as done:
            return done.value


def test_the_table_has_every_claim() -> None:
    claims = {name: {claim.id for claim in chapter(name).claims} for name in CHAPTERS}
    assert {name: set(table) for name, table in TAMPERED.items()} == claims


@pytest.mark.parametrize(("name", "claim"), [(name, one) for name in TAMPERED for one in TAMPERED[name]])
def test_a_claim_is_refuted_by_something_else(name: str, claim: str) -> None:
    seen, finding = seen_by(name), next(one.finding for one in chapter(name).claims if one.id == claim)
    for number, tamper in enumerate(TAMPERED[name][claim]):
        other = tamper(seen)
        assert other != seen, f"tampering {number} changes nothing"
        found = finding(other)
        assert found.holds is False, (number, found)
        assert found.expected
        assert found.observed


def test_a_state_that_is_not_told_refutes_nothing() -> None:
    seen, states = seen_by("fork"), but(forked=at(1, at(3, "unknown")), written=at(0, at(1, "unknown")))
    other = replace(states(seen), alone=at(2, "unknown")(seen.alone))
    found = {one.id: one.finding(other) for one in chapter("fork").claims}
    untold = {id for id, finding in found.items() if finding.holds is None}
    assert untold == {"all-shared", "own-when-written", "owner-again"}
    assert {found[id].reason for id in untold} == {ZEROS_UNTOLD}


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name not in ("copies", "fork")])
def test_without_a_disk_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files on tmpfs; that waits for no disk, so nothing can be said of cold files there."""
    find = scratch_files.scratch_directory
    if scratch_files.file_system_of(find("tmpfs").directory) != "tmpfs":
        pytest.skip("this machine lacks a tmpfs")
    monkeypatch.setattr(workbench, "scratch_directory", lambda kind: find("tmpfs"))
    result = run_chapter(chapter(name))
    assert all(one.startswith("tmpfs ") for one in result.environment.file_systems)
    said = {claim.id: (claim.verdict, claim.reason) for claim in result.claims}
    unknown = {id: reason for id, (verdict, reason) in said.items() if verdict == "unknown"}
    assert "refuted" not in {verdict for verdict, _ in said.values()}, said
    assert all("this needs frames" in why or id == "cold-and-warm" for id, why in unknown.items()), unknown


def _children() -> set[str]:
    """The children of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("name", ["processes", "textrel", "relro", "tls", "shared", "fork"])
def test_nothing_is_left_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = scratch_files.ScratchDirectory(str(tmp_path), "here")
    monkeypatch.setattr(workbench, "scratch_directory", lambda kind: place)
    children, threads = _children(), len(os.listdir("/proc/self/task"))
    with Workbench() as bench:
        experiment = chapter(name).run(bench)
        next(experiment)
        experiment.close()  # in the middle of it: as when it is interrupted
    run_chapter(chapter(name))
    assert os.listdir(tmp_path) == []
    assert _children() <= children
    until = time.monotonic() + 20  # the kernel may list a thread for a moment more that has been joined
    while len(os.listdir("/proc/self/task")) > threads:
        assert time.monotonic() < until
        time.sleep(0.01)
