"""The parts of the walkthrough as they are printed: each at every width, and what a reader may rely on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from functools import cache

import pytest

from miniloader.evidence.snapshot import ProcessRange, take
from miniloader.kernel.probe import best_level
from miniloader.kernel.syscalls import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, PROT_READ, PROT_WRITE
from miniloader.report import walkthrough
from miniloader.report.grid import explained, matrix, matrix_legend
from miniloader.report.text import Part, laid_out, plain
from miniloader.walkthrough.chapter import Answer, Choice, Quiz
from miniloader.walkthrough.chapters import build, cow, fork, relocation
from miniloader.walkthrough.run_chapter import ChapterResult, run_chapter
from miniloader.walkthrough.step import (
    BeforeAfter,
    ChangedWord,
    ChapterStep,
    CodeLine,
    CodeListing,
    Figures,
    PageBytes,
    Row,
)
from miniloader.walkthrough.traced_calls import TracedCall
from miniloader.walkthrough.workbench import Workbench

QUESTION = Quiz("Which?", (Choice("this", "It is not."), Choice("that", "It is.")), 1)


def lines(parts: Iterable[Part], width: int = 80) -> list[str]:
    return [plain(line).rstrip() for line in laid_out(parts, width)]


def step(width: int = 80, told: Collection[int] = (), **seen: object) -> list[str]:
    return lines(walkthrough.step_view(ChapterStep("name", "did.", **seen), width, told), width)  # type: ignore[arg-type]


@cache
def result(level: str | None = None) -> ChapterResult:
    return run_chapter(cow.CHAPTER, level=level)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ the question
def test_a_wrong_answer_is_explained() -> None:
    wrong = lines(walkthrough.correction(QUESTION, 0))
    assert wrong == ["✘ not so", "1: this. It is not.", "The answer is 2: that. It is."]
    assert lines(walkthrough.correction(QUESTION, 1)) == ["✔ right", "The answer is 2: that. It is."]
    assert lines(walkthrough.correction(QUESTION, None)) == ["The answer is 2: that. It is."]


def test_the_choices_are_numbered() -> None:
    assert lines(walkthrough.question(QUESTION)) == [
        "── What do you expect?",
        "Which?",
        "  1  this",
        "  2  that",
    ]


# ---------------------------------------------------------------------------------------- the experiment
def test_calls_and_accesses_are_told_apart_and_by_whom() -> None:
    calls = (
        TracedCall("open(x)", "3"),
        TracedCall("p[0]", '"a"', "child", access=True),
        TracedCall("close(3)", "0", "child"),
    )
    assert step(calls=calls) == [
        "",
        "  this process open(x) = 3",
        '  child        p[0] → "a"',
        "               close(3) = 0",
        "",
        "   p[0] = x: a store; p[0] → x: a load, and what it gave",
    ]
    told = walkthrough.told_by(ChapterStep("name", "did.", calls))
    assert step(calls=calls, told=told)[-1] == "               close(3) = 0"  # once a chapter
    alone = (TracedCall("open(x)", "3"), TracedCall("note"))
    assert step(calls=alone) == ["", "   open(x) = 3", "   note"]


def test_what_changed_is_marked_without_colour() -> None:
    rows = (Row("page 0", "here", "here"), Row("page 1", "here", "there"))
    shown = step(evidence=(BeforeAfter("Pages", "/proc", rows),))
    assert shown[-2:] == ["     page 0  here    here", "  ≠  page 1  here    there"]


@pytest.mark.parametrize(("width", "row"), [(80, 16), (60, 8)])
def test_bytes_are_marked_below(width: int, row: int) -> None:
    page = PageBytes(
        "page", 0x1000, bytes(32), bytes(9) + b"\x01\x02" + bytes(21), (ChangedWord(9, 2, "a store"),)
    )
    shown = step(width, bytes=(page,))
    start = shown.index("   page") + 1
    first, after, marks, name = shown[start : start + 4]
    address = 0x1000 + 9 // row * row
    assert first == f"   {address:#x}  before  {' '.join(['00'] * row)}"
    assert after[marks.index("^") : marks.rindex("^") + 1] == "01 02"
    assert (marks.count("^"), name.strip()) == (5, "a store")
    assert len(shown) == start + 4  # no other row has changed


def test_a_listing_leads_to_its_slots() -> None:
    code = (
        CodeLine(0x10, b"\xff", "jmp slot", 0x80),
        CodeLine(0x12, b"\xff", "jmp slot", 0x80),
        CodeLine(0x14, b"\xc3", "ret"),
    )
    shown = step(listing=CodeListing("code", code, ((0x80, "puts", "stub", "libc"),)))
    assert shown[1:] == [
        "   code",
        "   10  jmp slot  → slot 0x80",
        "         ↳ puts",
        "           before: stub",
        "           after:  libc",
        "   12  jmp slot  → slot 0x80",
        "   14  ret",
    ]


def test_nothing_from_outside_acts_on_the_terminal() -> None:
    evil = "\x1b[31m"
    page = PageBytes(evil, 0, b"\0", b"\1", (ChangedWord(0, 1, evil),))
    seen = {
        "calls": (TracedCall(evil, evil, evil),),
        "saw": (evil,),
        "evidence": (BeforeAfter(evil, "", (Row(evil, evil, evil),)),),
        "tables": (Figures(evil, ("a",), ((evil,),)),),
        "bytes": (page,),
        "listing": CodeListing(evil, (CodeLine(0, b"", evil, 0),), ((0, evil, evil, evil),)),
    }
    shown = "\n".join(step(**seen))
    assert "\x1b" not in shown
    assert shown.count(r"\x1b") == 17


# -------------------------------------------------------------------------------------------- the grid
def test_the_grid_is_what_the_kernel_says() -> None:
    """Page 2 of four is written: its sign is another, in that row and column only."""
    with Workbench() as bench:
        fd = bench.opened(bench.file("file", bytes(4 * PAGE_SIZE)))
        both = [bench.mapped(4 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd) for _ in "ab"]
        for mapping in both:
            for page in range(4):
                bench.load(mapping.page(page))
        bench.store(both[1].page(2), b"x")
        targets = [ProcessRange(os.getpid(), one.address, 0, one.length) for one in both]
        snapshot = take(targets, level=bench.level)
    shown = lines(matrix(snapshot, ("one", "the other"), ((0, "begin"), (2 * PAGE_SIZE, "end")), 80))
    assert shown == [
        "           begin end",
        "           rw-   rw-",
        "one        ██    ▒█",
        "the other  ██    B█",
    ]
    legend = lines([matrix_legend(snapshot, ())])
    assert [line[0] for line in legend] == ["█", "▒", "B"]
    told = explained(snapshot, ())
    assert not matrix_legend(snapshot, (), told).rows


@pytest.mark.parametrize(("pages", "signs", "numbered"), [(8, 8, False), (24, 24, False), (1024, 0, True)])
def test_a_grid_of_few_pages_has_a_sign_for_each(pages: int, signs: int, numbered: bool) -> None:
    with Workbench() as bench:
        memory = bench.mapped(pages * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
        target = [ProcessRange(os.getpid(), memory.address, 0, memory.length)]
        snapshot = take(target, level=bench.level)
    *_, row = lines(matrix(snapshot, ("one",), (), 60))
    assert len(row.removeprefix("one").strip()) == signs or not signs
    assert len(row) <= 60
    legend = lines([matrix_legend(snapshot, ())])
    assert any("pages in the run below the number" in line for line in legend) is numbered


def grids(found: ChapterResult, width: int) -> Sequence[str]:
    told: set[int] = set()
    shown = []
    for number, one in enumerate(found.steps, 1):
        shown += lines(walkthrough.step_opening(number, one), width)
        shown += lines(walkthrough.step_view(one, width, told), width)
        told |= walkthrough.told_by(one)
    return shown


@pytest.mark.parametrize("width", [60, 80, 110])
def test_steps_fit(width: int) -> None:
    for chapter in (cow.CHAPTER, relocation.CHAPTER):
        shown = grids(run_chapter(chapter), width)
        assert max(map(len, shown)) <= width


def test_a_sign_is_explained_once() -> None:
    shown = grids(result(), 80)
    assert sum("a frame of this process alone" in line for line in shown) == 1
    assert sum("pages in the run below the number" in line for line in shown) == 1


def test_a_sign_has_one_meaning() -> None:
    """After fork: what both have is another sign than what a process has for itself."""
    meanings: dict[str, set[str]] = {}
    for line in grids(run_chapter(fork.CHAPTER), 110):
        signs, _, meaning = line.strip().partition("  ")
        if meaning.lstrip().startswith("a "):
            for sign in signs.split():
                meanings.setdefault(sign, set()).add(meaning.strip())
    if best_level() != "frames":
        assert meanings
    else:
        assert meanings.keys() >= {"a", "A", "B"}
    assert {sign: len(texts) for sign, texts in meanings.items()} == dict.fromkeys(meanings, 1)


def test_a_grid_without_evidence_says_so() -> None:
    shown = grids(result("totals"), 80)
    assert any("the kernel does not say at this level" in line for line in shown)


# ------------------------------------------------------------------------------------------ what follows
def test_the_summary_says_what_is_unknown_and_why() -> None:
    shown = lines(walkthrough.summary([result("totals")]))
    assert shown[1] == "?  3  MAP_PRIVATE: copy on write  5 proven, 4 unknown"
    assert "  unknown  evidence here is totals, and this needs flags" in shown
    assert any(line.startswith("for more  flags") for line in shown)


def test_a_snippet_is_python_with_its_task() -> None:
    text = walkthrough.snippet(cow.CHAPTER)
    compile(text, "snippet", "exec")
    assert text.endswith(cow.CHAPTER.exercise.snippet)
    task = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert task.startswith(cow.CHAPTER.exercise.task)


def test_the_solution_shows_what_was_attempted_alone() -> None:
    """Of the loader: the step that a learner has written, and none that is still to come."""
    attempt = build.CHAPTER.exercise.snippet.replace("    raise NotImplementedError", "    return []", 1)
    shown = lines(walkthrough.solution(build.CHAPTER, attempt))
    assert any('struct.unpack_from("<HH", file, 54)' in line for line in shown)
    assert not any("MAP_FIXED" in line for line in shown if line.strip().startswith("+"))
    assert lines(walkthrough.solution(build.CHAPTER, "def plan(:"))  # what is no Python has no functions


def test_what_a_learner_printed_cannot_act() -> None:
    shown = lines(walkthrough.checked(Answer(False, "\x1b[2J"), "a\n\x1b[2J\n"))
    assert shown == ["It printed:", "  a", r"  \x1b[2J", "", r"✘ not yet  \x1b[2J"]
