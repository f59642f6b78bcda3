"""The claims as functions of what was seen: each is refuted, or unknown, when exactly that is altered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miniloader.lab.proof.experiment
from miniloader.evidence.snapshot import Snapshot
from miniloader.evidence.verdict import Claim
from miniloader.kernel.probe import best_level
from miniloader.lab.proof.claims import Evidence, FileState, judge_claims
from miniloader.lab.proof.prove import prove

IDS = ["code-shared", "untouched-data-shared", "written-data-private", "writes-isolated", "file-unchanged"]
CODE, CONSTANTS, RELOCATED, WRITTEN, BSS = 1, 4, 5, 8, 12  # pages of the demonstration library


@pytest.fixture(scope="module")
def seen(demo: Path) -> Evidence:
    """What a proof of the demonstration library, by flags, is judged by: all of it proven."""
    kept: list[Evidence] = []

    def keep(evidence: Evidence) -> tuple[Claim, ...]:
        kept.append(evidence)
        return judge_claims(evidence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniloader.lab.proof.experiment, "judge_claims", keep)
        proof = prove(demo, 3, level="flags" if best_level() == "frames" else None)
    assert proof.verdict == "proven"
    assert proof.word is not None
    assert proof.word.vaddr // 0x1000 == WRITTEN
    return kept[0]


def altered(snapshot: Snapshot, process: int, **changes: Any) -> Snapshot:
    """``snapshot`` with other fields of one process, or of one ``page`` of that process."""
    processes = [*snapshot.processes]
    old = processes[process]
    if "page" in changes:
        pages = old.pages.copy()
        page = changes.pop("page")
        for field, value in changes.items():
            pages[field][page] = value
        changes = {"pages": pages}
    processes[process] = replace(old, **changes)
    return replace(snapshot, processes=tuple(processes))


def judged(evidence: Evidence, **changes: Any) -> dict[str, Claim]:
    return {claim.id: claim for claim in judge_claims(replace(evidence, **changes))}


def not_proven(claims: dict[str, Claim]) -> dict[str, str]:
    return {id: claim.verdict for id, claim in claims.items() if claim.verdict != "proven"}


def test_every_claim_in_its_order(seen: Evidence) -> None:
    claims = judge_claims(seen)
    assert [claim.id for claim in claims] == IDS
    assert {claim.verdict for claim in claims} == {"proven"}


@pytest.mark.parametrize(
    ("page", "fields", "expected"),
    [
        (CODE, {"file": False, "exclusive": True}, {"code-shared": "refuted"}),
        (CODE, {"present": False}, {"code-shared": "unknown"}),
        (CODE, {"changed": True}, {"code-shared": "unknown"}),
        (CODE, {"exclusive": True}, {"code-shared": "unknown"}),  # another file of the same name, after all
        (CONSTANTS, {"file": False, "exclusive": True}, {"untouched-data-shared": "refuted"}),
        (CONSTANTS, {"swapped": True, "present": False}, {"untouched-data-shared": "unknown"}),
        (RELOCATED, {"file": True}, {"written-data-private": "refuted"}),
        (RELOCATED, {"present": False}, {"written-data-private": "unknown"}),
        (RELOCATED, {"exclusive": False}, {"written-data-private": "unknown"}),
        (WRITTEN, {"file": True}, {"written-data-private": "refuted"}),
        (BSS, {"file": True}, {}),  # nobody wrote it: nothing is claimed of it
    ],
)
def test_one_page_of_one_process(
    seen: Evidence, page: int, fields: dict[str, bool], expected: dict[str, str]
) -> None:
    for process in range(3):
        claims = judged(seen, written=altered(seen.written, process, page=page, **fields))
        assert not_proven(claims) == expected
        for id in expected:
            assert claims[id].observed.startswith({CODE: "2 of 3", CONSTANTS: "3 of 4"}.get(page, "14 of 15"))


def test_the_others_must_go_on_sharing_when_one_has_ended(seen: Evidence) -> None:
    exited = altered(seen.exited, 0, page=CODE, file=False, exclusive=True)
    claims = judged(seen, exited=exited)
    assert not_proven(claims) == {"code-shared": "refuted"}
    assert claims["code-shared"].observed.startswith("3 of 3, and 2 when one process has ended; 1 page not")
    # The one that has ended is no witness.
    assert not_proven(judged(seen, exited=altered(seen.exited, 2, page=CODE, file=True))) == {}


def test_what_the_library_s_code_copies_counts_as_written(seen: Evidence) -> None:
    """Copied while constructors ran: written by them.  Copied before, without a reason: refuted."""
    page = WRITTEN + 1

    def copied(snapshot: Snapshot) -> Snapshot:
        return altered(snapshot, 1, page=page, file=False, exclusive=True)

    claims = judged(
        seen, loaded=copied(seen.loaded), written=copied(seen.written), exited=copied(seen.exited)
    )
    assert not_proven(claims) == {}
    assert "1 written by the library's own code" in claims["written-data-private"].expected
    assert "13 of" not in claims["written-data-private"].observed
    too_early = judged(
        seen,
        linked=copied(seen.linked),
        loaded=copied(seen.loaded),
        written=copied(seen.written),
        exited=copied(seen.exited),
    )
    assert not_proven(too_early) == {"untouched-data-shared": "refuted"}
    too_late = judged(seen, written=copied(seen.written), exited=copied(seen.exited))
    assert not_proven(too_late) == {"untouched-data-shared": "refuted"}


def test_a_process_that_cannot_be_looked_at(seen: Evidence) -> None:
    claims = judged(seen, written=altered(seen.written, 1, reason="forbidden, for the test"))
    assert not_proven(claims) == dict.fromkeys(IDS[:3], "unknown")
    assert claims["code-shared"].reason == "forbidden, for the test"
    assert str(seen.pids[1]) in claims["code-shared"].observed


@pytest.mark.parametrize("reads", [(1, 0), (0, 2)])
def test_a_write_that_others_see(seen: Evidence, reads: tuple[int, int]) -> None:
    who, whose = reads
    read = [*seen.read]
    read[who] = seen.pids[whose]
    claims = judged(seen, read=read)
    assert not_proven(claims) == {"writes-isolated": "refuted"}
    assert (
        claims["writes-isolated"].observed == f"1 do not: process {seen.pids[who]} reads {seen.pids[whose]}"
    )


def test_nothing_to_write_to(seen: Evidence) -> None:
    before_writing = dict.fromkeys(("loaded", "written", "exited"), seen.loaded)
    claims = judged(seen, word=None, read=[], **before_writing)
    assert not_proven(claims) == {"writes-isolated": "nothing to judge"}
    assert claims["writes-isolated"].reason


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"size": 1}, "1 bytes"),
        ({"modified": 1}, "modified meanwhile"),
        ({"sha256": "0" * 64}, "SHA-256 0000000000000000…"),
        ({"inode": 1}, "another file"),
        ({"device": 1}, "another file"),
        (None, "the file is gone"),
    ],
)
def test_every_change_of_the_file_counts(
    seen: Evidence, changes: dict[str, Any] | None, observed: str
) -> None:
    after: FileState | None = None if changes is None else replace(seen.before, **changes)
    claims = judged(seen, after=after)
    assert not_proven(claims) == {"file-unchanged": "refuted"}
    assert claims["file-unchanged"].observed == observed


@pytest.mark.needs_root("frame numbers need CAP_SYS_ADMIN")
def test_frames_decide_where_flags_agree(demo: Path, seen: Evidence) -> None:
    """All flags as they should be, but one process has another frame: only level frames can see that."""
    kept: list[Evidence] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            miniloader.lab.proof.experiment, "judge_claims", lambda e: kept.append(e) or judge_claims(e)
        )
        prove(demo, 3)
    (evidence,) = kept
    claims = judged(evidence, written=altered(evidence.written, 2, page=CODE, frame=0x7FFFFFFF))
    assert not_proven(claims) == {"code-shared": "refuted"}
    same = evidence.written.processes[0].pages["frame"][RELOCATED]
    claims = judged(evidence, written=altered(evidence.written, 1, page=RELOCATED, frame=same))
    assert not_proven(claims) == {"written-data-private": "refuted"}


def test_masks_follow_the_plan(seen: Evidence) -> None:
    def pages(mask: Any) -> list[int]:
        return np.flatnonzero(mask).tolist()

    assert pages(seen.code) == [1, 2, 3]
    assert pages(seen.data) == [0, *range(4, 15)]
    assert pages(seen.of_file) == [*range(12)]
    assert pages(seen.relocated) == [5, 6, 7, 11]
    assert pages(seen.zeroed) == [11]
    assert pages(seen.worked) == [WRITTEN]
    assert not seen.by_code.any()
    assert seen.wrote.shape == (3, 15)
