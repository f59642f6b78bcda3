"""What is true of every chapter: its claims hold here, for root and others, and its exercise can be done."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from miniloader.evidence.verdict import Verdict
from miniloader.kernel.probe import best_level
from miniloader.walkthrough.chapters import CHAPTERS, chapter, chapters
from miniloader.walkthrough.exercise_runner import check_file
from miniloader.walkthrough.run_chapter import ChapterResult, run_chapter
from miniloader.walkthrough.scratch_files import file_system_of
from tests.conftest import AsNobody

#: Claims about a clock, which a machine that does much else may disagree with.
BY_CLOCK = {"read-wins-once", "mmap-wins-random"}


def verdicts(name: str) -> dict[str, tuple[Verdict, str]]:
    return {
        claim.id: (claim.verdict, claim.reason or claim.observed)
        for claim in run_chapter(chapter(name)).claims
    }


def on_memory(reason: str) -> bool:
    """Whether files for the time being lie in memory here (tmpfs), where no page can be let go of."""
    return file_system_of(tempfile.gettempdir()) == "tmpfs" and "the page cache would not let go" in reason


seen_here = cache(verdicts)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_claim_holds(name: str) -> None:
    found = seen_here(name)
    assert {claim.id for claim in chapter(name).claims} == found.keys() | (
        BY_CLOCK if name == "copies" else set()
    )
    amiss = {id: said for id, said in found.items() if said[0] != "proven" and not on_memory(said[1])}
    if best_level() != "frames":
        amiss = {id: said for id, said in amiss.items() if not said[1].endswith("this needs frames")}
    assert amiss == {}


@pytest.mark.parametrize("name", CHAPTERS)
def test_an_ordinary_user_sees_nothing_else(name: str, as_nobody: AsNobody) -> None:
    """What frames prove is unknown to them, and what needs a Python that they cannot read."""
    seen_here(name)  # imports what such a user may not be able to read
    found = as_nobody(verdicts, name)
    assert {id: said for id, said in found.items() if said[0] == "refuted"} == {}
    for verdict, reason in found.values():
        not_started = "cannot be started" in reason or "cannot start worker" in reason
        excused = "this needs frames" in reason or not_started or on_memory(reason)
        assert verdict == "proven" or (verdict == "unknown" and excused)


@pytest.mark.parametrize("name", CHAPTERS)
def test_an_exercise_is_not_done_before_it_is(name: str, tmp_path: Path) -> None:
    exercise = chapter(name).exercise
    for text, passed in ((exercise.snippet, False), (exercise.solution, True)):
        (tmp_path / "try.py").write_text(text)
        answer, printed = check_file(chapter(name), str(tmp_path / "try.py"))
        assert answer.passed is passed, (answer.message, printed)
        assert answer.message


def test_a_question_has_one_right_answer_of_several_and_reasons() -> None:
    for one in chapters():
        asked = one.question
        assert 0 <= asked.answer < len(asked.choices) > 1
        assert len({choice.text for choice in asked.choices}) == len(asked.choices)
        assert all(choice.why for choice in asked.choices)


def test_ids_are_names_of_modules_and_all_different() -> None:
    for name, one in zip(CHAPTERS, chapters(), strict=True):
        assert one.id == name
        assert one.sources
        assert len({claim.id for claim in one.claims}) == len(one.claims)


def test_less_evidence_is_never_a_refutation() -> None:
    for one in chapters():
        result: ChapterResult = run_chapter(one, level="totals")
        assert not [one for one in result.claims if one.verdict == "refuted" and one.id not in BY_CLOCK]
        levels: dict[str, Any] = {claim.id: claim.level for claim in one.claims}
        unknown = {claim.id for claim in result.claims if claim.verdict == "unknown"}
        assert unknown >= {id for id, level in levels.items() if level in ("frames", "flags")}
