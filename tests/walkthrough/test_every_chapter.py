"""What is true of every chapter: its claims hold here, for root and others, and its exercise can be done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fixtures import build
from miniloader.evidence.verdict import Verdict
from miniloader.kernel.probe import best_level
from miniloader.report import walkthrough as report
from miniloader.report.text import laid_out, plain
from miniloader.walkthrough.chapters import CHAPTERS, chapter, chapters
from miniloader.walkthrough.run_chapter import ChapterResult, run_chapter
from miniloader.walkthrough.scratch_files import file_system_of
from miniloader.walkthrough.words import ALIASES, WORDS, words_in
from tests.conftest import AsNobody

#: Claims about a clock, which a machine that does much else may disagree with.
BY_CLOCK = {"read-wins-once", "mmap-wins-random"}


def result_of(name: str) -> ChapterResult:
    return run_chapter(chapter(name))


def verdicts(name: str) -> dict[str, tuple[Verdict, str]]:
    return verdicts_of(run_chapter(chapter(name)))


def verdicts_of(result: ChapterResult) -> dict[str, tuple[Verdict, str]]:
    return {claim.id: (claim.verdict, claim.reason or claim.observed) for claim in result.claims}


def on_memory(reason: str) -> bool:
    """Whether files for the time being lie in memory here (tmpfs), where no page can be let go of."""
    return file_system_of(tempfile.gettempdir()) == "tmpfs" and "the page cache would not let go" in reason


result_here = cache(result_of)


def seen_here(name: str) -> dict[str, tuple[Verdict, str]]:
    return verdicts_of(result_here(name))


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
    hidden = not as_nobody(os.access, build.ROOT, os.X_OK)  # as what is below /root
    for verdict, reason in found.values():
        not_started = "cannot be started" in reason or "cannot start worker" in reason
        not_there = hidden and reason.startswith("no lib")
        excused = "this needs frames" in reason or not_started or not_there or on_memory(reason)
        assert verdict == "proven" or (verdict == "unknown" and excused)


@pytest.mark.parametrize("name", CHAPTERS)
def test_an_exercise_is_not_done_before_it_is(name: str, tmp_path: Path) -> None:
    """In a process of its own, as learners have it: where objects lie is up to what was there before."""
    exercise, path = chapter(name).exercise, tmp_path / "try.py"
    for text, passed in ((exercise.snippet, False), (exercise.solution, True)):
        path.write_text(text)
        command = [sys.executable, "-m", "miniloader", "walkthrough", name, "--check", path, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=build.ROOT)
        answer = json.loads(done.stdout)
        assert (answer["passed"], done.returncode) == (passed, not passed), (answer, done.stderr)
        assert answer["message"]


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


#: How the insides name things, or Python writes them: nothing for a learner.
INTERNAL = re.compile(r"\bsole\b|copied-shared|\bthey do\b|\bb'|\bb\"|\bNone\b")


def test_no_internal_word_reaches_the_screen() -> None:
    for name in CHAPTERS:
        found = result_here(name)
        shown = [plain(line) for line in laid_out(report.closing(found), 100)]
        for step in found.steps:
            shown += [step.did, *step.saw]
            shown += [plain(line) for line in laid_out(report.step_view(step, 100), 100)]
        assert [line for line in shown if INTERNAL.search(line)] == []


def test_each_claim_has_its_source() -> None:
    """A manual page, a document or a file of the kernel or CPython, a standard; or it is measured here."""
    known = re.compile(
        r"\(\d\)|Documentation/|mm/|net/|gABI|psABI|glibc|Drepper|binutils|android_|measured here|zlib\.h"
        "|Include/|Python/|Doc/"
    )
    for one in chapters():
        assert {claim.id for claim in one.claims} == {*one.source_of}
        assert [id for id, source in one.source_of.items() if not known.search(source)] == []
        for claim in result_here(one.id).to_json()["claims"]:
            assert claim["source"] == one.source_of[claim["id"]]


def test_three_questions_a_chapter_each_before_its_step() -> None:
    for name in CHAPTERS:
        asked = [quiz for step in result_here(name).steps for quiz in chapter(name).asked_before(step.name)]
        assert len(chapter(name).questions) >= 3
        assert {*chapter(name).later} == {*asked}, name


def test_each_exercise_has_hints_and_none_is_the_solution() -> None:
    for one in chapters():
        assert len(one.exercise.hints) >= 2
        assert not any(one.exercise.solution in hint for hint in one.exercise.hints)


def test_words_are_found_in_the_texts_of_chapters() -> None:
    texts = " ".join(paragraph for one in chapters() for paragraph in (*one.explanation, one.claim))
    named = {word for _, word in words_in(texts) if word}
    assert len(named) >= 20
    assert "".join(text for text, _ in words_in(texts)) == texts


#: Names in capitals that are told where they are used, or are no subject of the course.
TOLD_IN_PLACE = {
    "CPython", "PID", "POSIX", "FIFOs", "TCP", "TCP_ZEROCOPY_RECEIVE", "MAP_POPULATE", "PROT_READ",
    "PROT_WRITE",
    "SEGV_ACCERR", "DT_TEXTREL", "R_X86_64_RELATIVE", "PIC", "fPIC", "KiB", "GiB", "MiB",
}  # fmt: skip
TERM = re.compile(r"(?<![\w.])[A-Za-z]*[A-Z]{2,}[A-Z_a-z0-9]*\b")


def test_each_term_can_be_looked_up() -> None:
    """What a chapter calls by a name in capitals is a word of the table, one key or hover away."""
    known = {*WORDS, *ALIASES, *(f"{word}s" for word in WORDS)} | TOLD_IN_PLACE
    for one in chapters():
        choices = [choice for quiz in one.questions for choice in quiz.choices]
        asked = [quiz.text for quiz in one.questions] + [f"{choice.text} {choice.why}" for choice in choices]
        told = [one.title, one.claim, one.surprise, *one.explanation, one.exercise.task, *asked]
        assert {*TERM.findall(" ".join(told))} - known == set(), one.id


def test_a_verb_is_no_word_of_the_table() -> None:
    """A fault maps pages: that is not the process's map."""
    text = "it maps a file; the process's map; they map it"
    assert [word for _, word in words_in(text) if word] == ["process's map"]


def test_a_trace_uses_the_descriptors_that_it_was_given() -> None:
    """Each number that is handed to mmap or pread has come back from a call before, in the same process."""
    given_back, used = (
        re.compile(r"\b\d+\b"),
        re.compile(r"(?:mmap\(.*, (\d+), \d+|p(?:read|write)\((\d+), .*)\)"),
    )
    for name in CHAPTERS:
        known: dict[str, set[str]] = {}
        for call in (call for step in result_here(name).steps for call in step.calls):
            match = used.fullmatch(call.text)
            if match:
                assert (match[1] or match[2]) in known.get(call.process, set()), (name, call)
            if not call.access and not call.result.startswith(("-1", "0x")):
                known.setdefault(call.process, set()).update(given_back.findall(call.result))


@pytest.mark.parametrize("name", CHAPTERS)
def test_what_is_not_told_of_pages_is_not_told(name: str) -> None:
    """With sums alone no sentence says how many pages came, or what they are."""
    for step in run_chapter(chapter(name), level="totals").steps:
        told = [sentence for sentence in step.saw if re.search(r"\bunknown\b|\b0 (of|pages)|\(\)", sentence)]
        assert [sentence for sentence in told if not sentence.startswith(("Kept: ", "Warm: "))] == [], (
            step.name
        )
        cells = [cell for table in step.tables for row in table.rows for cell in row]
        assert not [cell for cell in cells if "there (" in cell]
