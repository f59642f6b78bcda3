"""What a teacher is shown: the sheet of all chapters, and the marks of a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from miniloader.errors import printable
from miniloader.report.text import VERDICT_SIGNS, Cell, Part, Table
from miniloader.walkthrough.chapter import Chapter
from miniloader.walkthrough.grading import Graded

__all__ = ["marks", "sheet"]

#: Minutes: to read a chapter, to answer a question, to do an exercise; seven steps take longer.
_READING, _ANSWERING, _DOING = 10, 3, 10
_LONG: Final = {"build": 240}

_HEAD: Final = """\
# Teacher's sheet

Made by `miniloader walkthrough --sheet` from the chapters themselves: it cannot differ from what learners
see.

Each chapter is told by `miniloader walkthrough ID`; `--html FILE ID` writes its page. Learners take the
exercise with `--exercise > try.py`, check it with `--check try.py`, and see ours beside theirs with
`--check try.py --solution`. A class is graded with `miniloader walkthrough --check DIR --grade marks.xml`:
each solution beneath `DIR` is run, in a process of its own and for ten seconds at most; the marks are JUnit
XML.

**What machines must allow.** Linux on x86-64, Python 3.11 or newer, no privilege. Claims marked *flags* need
`/proc/self/pagemap`, which all may read of their own processes; those marked *frames* need root
(CAP_SYS_ADMIN), and are unknown to others. In a container nothing more is needed than a writable `/tmp` or
`/var/tmp`, and `/dev/shm` for what is shown on tmpfs. What learners hand in runs as you: grade in
a container.
"""


def sheet(chapters: Sequence[Chapter[Any]]) -> str:
    """Markdown: of each chapter what it shows, how long it takes, what it needs, and all answers."""
    return "\n".join([_HEAD, *("\n".join(_chapter(chapter)) + "\n" for chapter in chapters)])


def _chapter(chapter: Chapter[Any]) -> Iterator[str]:
    exercise = chapter.exercise
    minutes = _LONG.get(chapter.id, _READING + _ANSWERING * len(chapter.questions) + _DOING)
    yield f"## {chapter.number}. {chapter.title}  (`{chapter.id}`, about {minutes} minutes)\n"
    yield f"{chapter.claim} *The surprise:* {chapter.surprise}\n"
    for claim in chapter.claims:
        needs = f" *({claim.level})*" if claim.level != "none" else ""
        yield f"- {claim.text}{needs}"
    yield "\n**Questions**\n"
    for quiz in chapter.questions:
        right = quiz.choices[quiz.answer]
        when = f" (before the step *{quiz.step}*)" if quiz.step else ""
        yield f"- {quiz.text}{when} — **{right.text}.** {right.why}"
    yield f"\n**Exercise.** {exercise.task}\n"
    yield from (f"{number}. {hint}" for number, hint in enumerate(exercise.hints, 1))
    yield f"\n```python\n{exercise.solution.rstrip()}\n```"


def marks(graded: Sequence[Graded], path: str) -> Iterator[Part]:
    """A line for each solution, by student, what is wrong with it, and where the marks are."""
    rows: list[tuple[Cell, ...]] = []
    signs = {True: "proven", False: "refuted", None: "unknown"}
    for student, solutions in groupby(graded, lambda solution: solution.student):
        name = printable(student)
        for solution in solutions:
            sign = VERDICT_SIGNS[signs[solution.passed]]  # type: ignore[index]
            rows.append((sign, name, solution.id, printable(solution.message)))
            name = ""
    yield Table(("", "student", "chapter", "what came of it"), rows)
    passed = sum(solution.passed is True for solution in graded)
    yield ()
    yield (f"{passed} of {len(graded)} pass; the marks are in {printable(path)}",)
