"""Grading a class: every solution beneath a directory is run and judged, each in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from miniloader.errors import EvidenceError, MiniloaderError, UsageError, printable
from miniloader.files import write_whole
from miniloader.values import dataclass
from miniloader.walkthrough.chapters import CHAPTERS, chapter
from miniloader.walkthrough.exercise_runner import check_file

__all__ = ["Graded", "grade", "junit", "submissions", "write_marks"]

#: What ``--exercise`` prints above each snippet.
_NAMED: Final = re.compile(r"miniloader walkthrough (\w+) --check")
_HEAD: Final = 4096  # bytes in which a file says of which chapter it is
_TOLD: Final = 2000  # characters of what a solution has printed, that a report keeps


@dataclass(frozen=True)
class Graded:
    """A solution of the exercise of the chapter ``id``: who it is from, and what came of it.

    ``passed`` is None where it could not be judged here: then ``message`` says why.
    """

    student: str
    id: str
    path: str
    passed: bool | None
    message: str
    printed: str


def submissions(directory: str) -> Iterator[tuple[str, str, str]]:
    """Each solution beneath ``directory``, in a fixed order: whose it is, the chapter's id, the path.

    A file is one when a comment at its top names its chapter, as ``--exercise`` prints it, or when it is
    named after it: ``cow.py``, ``3.py``, ``03-cow.py``.  Whose it is the directory says, or, beside others in
    ``directory`` itself, the name of the file.  UsageError where there is none, MiniloaderError where
    ``directory`` is none.
    """
    root, any_file = Path(directory), False
    if not root.is_dir():
        raise MiniloaderError(f"{directory}: found no directory, expected one with solutions")
    for path in sorted(root.rglob("*.py")):
        id = _chapter_of(path)
        if id is not None and path.is_file():
            any_file = True
            parent = path.parent.relative_to(root).as_posix()
            yield (path.stem if parent == "." else parent), id, str(path)
    if not any_file:
        raise UsageError(
            f"{directory}: no solution in it",
            hint="expected files as --exercise prints them, or named cow.py",
        )


def _chapter_of(path: Path) -> str | None:
    with path.open("rb") as file:
        named = _NAMED.search(file.read(_HEAD).decode(errors="replace"))
    words = [named[1]] if named else re.split(r"[-_ .]", path.stem)
    numbers = {str(number): id for number, id in enumerate(CHAPTERS)}
    for word in words:
        if word in CHAPTERS:
            return word
        if word.lstrip("0") in numbers or word == "0":
            return numbers[word.lstrip("0") or "0"]
    return None


def grade(directory: str, on_each: Callable[[str], None] = lambda told: None) -> tuple[Graded, ...]:
    """Run and judge each of :func:`submissions`; ``on_each`` hears which, before it is run."""
    return tuple(_graded(*submission, on_each) for submission in submissions(directory))


def _graded(student: str, id: str, path: str, on_each: Callable[[str], None]) -> Graded:
    on_each(f"{student}: {id}")
    try:
        answer, printed = check_file(chapter(id), path)
    except EvidenceError as error:
        return Graded(student, id, path, None, str(error), "")
    return Graded(student, id, path, answer.passed, answer.message, printed)


def junit(graded: tuple[Graded, ...]) -> bytes:
    """``graded`` as JUnit XML, the same for the same answers: a suite a student, a case a chapter.

    Which file a chapter's solution was in is a property of the suite: in the schema that Jenkins reads by, a
    case has no place for it.
    """
    root = ElementTree.Element("testsuites", name="miniloader walkthrough")
    for student in dict.fromkeys(solution.student for solution in graded):
        solutions = [solution for solution in graded if solution.student == student]
        suite = ElementTree.SubElement(
            root, "testsuite", attrib={"name": printable(student), **_counts(solutions)}
        )
        files = ElementTree.SubElement(suite, "properties")
        for solution in solutions:
            ElementTree.SubElement(files, "property", name=printable(solution.path), value=solution.id)
        for solution in solutions:
            case = ElementTree.SubElement(suite, "testcase", classname=printable(student), name=solution.id)
            if solution.passed is not True:
                tag = "skipped" if solution.passed is None else "failure"
                ElementTree.SubElement(case, tag, message=printable(solution.message))
            if solution.printed:
                lines = solution.printed[:_TOLD].splitlines()
                ElementTree.SubElement(case, "system-out").text = "\n".join(map(printable, lines))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def write_marks(graded: tuple[Graded, ...], path: str) -> None:
    """Write :func:`junit` to ``path``, or nothing; MiniloaderError says why not."""
    try:
        write_whole(path, [junit(graded)])
    except OSError as error:
        raise MiniloaderError(f"{path}: cannot write the marks: {error.strerror}") from error


def _counts(solutions: list[Graded]) -> dict[str, str]:
    passed = [solution.passed for solution in solutions]
    return {
        "tests": str(len(passed)),
        "failures": str(passed.count(False)),
        "errors": "0",
        "skipped": str(passed.count(None)),
    }
