"""``miniloader walkthrough``: how mmap and shared libraries work, each sentence run here and judged."""

from __future__ import annotations

import argparse
import sys

from miniloader.cli import options

TYPE_CHECKING = False  # typing is slow to import, and --help needs this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from miniloader.report.output import Output
    from miniloader.walkthrough.chapter import Chapter, Quiz
    from miniloader.walkthrough.run_chapter import ChapterResult
    from miniloader.walkthrough.step import ChapterStep

__all__ = ["HELP", "configure", "run"]

HELP = "learn how mmap and shared libraries work: every sentence is run here and judged"


def configure(parser: argparse.ArgumentParser) -> None:
    """Which chapters, how they are told, and what else to do with them."""
    parser.add_argument(
        "chapters", metavar="CHAPTER", nargs="*", help="a chapter, by id or number; none lists them all"
    )
    parser.add_argument("--all", action="store_true", help="every chapter, one after the other")
    parser.add_argument("--no-pause", action="store_true", help="do not wait for Enter after each step")
    parser.add_argument(
        "--quiz", action="store_true", help="take my answers to the questions, and keep score"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--exercise", action="store_true", help="print the exercise of a chapter, to change it"
    )
    other.add_argument("--check", metavar="FILE", help="run my solution of a chapter's exercise and judge it")
    other.add_argument("--hints", action="store_true", help="what leads to a solution of the exercise")
    other.add_argument("--words", action="store_true", help="the words that chapters use, and their meaning")
    other.add_argument("--word", metavar="WORD", help="what one of these words means")
    other.add_argument(
        "--sheet", action="store_true", help="for a teacher: what chapters show, need and answer, as Markdown"
    )
    parser.add_argument(
        "--grade",
        metavar="FILE",
        help="with --check DIR: judge every solution there, write JUnit XML (-: here)",
    )
    parser.add_argument(
        "--solution", action="store_true", help="with --check: after my attempt, show yours beside it"
    )
    options.html(other, "write the chapters (all, if none is named) as a page, instead of telling")
    options.level(parser)


def run(arguments: argparse.Namespace) -> int:
    """List, tell, check or write; the exit status is that of the verdicts."""
    _sensible(arguments)
    from miniloader.walkthrough.chapters import chapter, chapters
    from miniloader.walkthrough.ctrl_c import interruptible

    named = tuple(dict.fromkeys(chapter(name) for name in arguments.chapters))
    with interruptible():
        if arguments.exercise:
            return _exercise(arguments, named[0])
        if arguments.hints:
            return _hints(arguments, named[0])
        if arguments.words or arguments.word is not None:
            return _words(arguments)
        if arguments.sheet:
            return _sheet(named or chapters())
        if arguments.grade is not None:
            return _grade(arguments)
        if arguments.check is not None:
            return _check(arguments, named[0])
        if arguments.json or arguments.html is not None:
            return _quietly(arguments, named or chapters())
        if named or arguments.all:
            return _tell(arguments, named or chapters())
        return _contents(arguments)


def _sensible(arguments: argparse.Namespace) -> None:
    """UsageError where options do not go together."""
    from miniloader.errors import UsageError

    if arguments.all and arguments.chapters:
        raise UsageError("--all is every chapter, and one is named", hint="leave one of them out")
    asked = {"--exercise": arguments.exercise, "--check": arguments.check, "--hints": arguments.hints}
    alone = next((option for option, value in asked.items() if value not in (None, False)), None)
    if arguments.solution and arguments.check is None:
        raise UsageError("--solution is shown beside an attempt", hint="as in: cow --check FILE --solution")
    if (arguments.words or arguments.word is not None) and (arguments.chapters or arguments.all):
        raise UsageError("--words are those of all chapters", hint="leave the chapters out")
    if arguments.grade is not None:
        if arguments.check is None or arguments.chapters or arguments.all or arguments.solution:
            raise UsageError("--grade needs --check DIR, and no chapter: the files say theirs")
        return
    if alone and (len(arguments.chapters) != 1 or arguments.all):
        raise UsageError(f"{alone} needs one chapter", hint=f"as in: miniloader walkthrough cow {alone}")
    if arguments.quiz and (arguments.json or arguments.html is not None or alone):
        raise UsageError("--quiz asks while a chapter is told", hint="leave out --json, --html or --check")
    if arguments.quiz and not (arguments.chapters or arguments.all):
        raise UsageError("--quiz needs a chapter", hint="name some, or say --all")


def _status(results: Sequence[ChapterResult]) -> int:
    """1 where a claim was refuted, 3 where none could be judged, else 0."""
    verdicts = {claim.verdict for result in results for claim in result.claims}
    return 1 if "refuted" in verdicts else 0 if "proven" in verdicts else 3


def _output() -> Output:
    """Standard output, in lines no longer than what reads well."""
    from miniloader.report.output import Output
    from miniloader.report.walkthrough import WIDEST

    return Output(widest=WIDEST)


def _contents(arguments: argparse.Namespace) -> int:
    from miniloader.kernel.probe import best_level
    from miniloader.report.walkthrough import contents
    from miniloader.walkthrough.chapters import chapters

    _output().show(contents(chapters(), arguments.level or best_level()))
    return 0


# ------------------------------------------------------------------------------------- without telling
def _quietly(arguments: argparse.Namespace, chapters: Sequence[Chapter[Any]]) -> int:
    """Run, then print one object, or write a page and print what came of each chapter."""
    from miniloader.report.progress import progress
    from miniloader.walkthrough.run_chapter import run_chapter

    alone = options.page_alone(arguments)
    if arguments.html is not None and not alone:
        from miniloader.report.html import refuse_unwritable

        refuse_unwritable(arguments.html)  # now, not after half a minute
    results = []
    with progress() as say:
        for chapter in chapters:
            say(f"chapter {chapter.number}: {chapter.title}")
            results.append(run_chapter(chapter, level=arguments.level))
    if arguments.html is not None:  # before a reader may close the pipe
        from miniloader.report.html import write_walkthrough

        write_walkthrough(results, arguments.html)
    if alone:
        return _status(results)
    if arguments.json:
        from miniloader.report.json import dump

        dump({"chapters": [result.to_json() for result in results]})
    else:
        from miniloader.report.walkthrough import summary

        out = _output()
        out.show(summary(results))
        out.show(options.page_written(arguments), wrap=False)
    return _status(results)


# ---------------------------------------------------------------------------------------------- telling
def _tell(arguments: argparse.Namespace, chapters: Sequence[Chapter[Any]]) -> int:
    from miniloader.report.walkthrough import farewell, summary

    out, reader = _output(), _Reader(arguments)
    results: list[ChapterResult] = []
    for chapter in chapters:
        if results:
            reader.pause("the next chapter")
            out.show([(), ()])
        results.append(_tell_one(arguments, chapter, out, reader))
    if len(results) > 1:
        out.show([(), *summary(results)])
    if arguments.all:
        out.show([(), *farewell()])
    if arguments.quiz:
        out.show([(), (f"Your score: {reader.right} of {reader.asked}",)])
    return _status(results)


def _tell_one(
    arguments: argparse.Namespace, chapter: Chapter[Any], out: Output, reader: _Reader
) -> ChapterResult:
    """Question, experiment, verdicts, explanation and exercise of one chapter."""
    from contextlib import ExitStack

    from miniloader.report.progress import progress
    from miniloader.report.walkthrough import closing, opening, step_opening, step_view, told_by
    from miniloader.walkthrough.chapters import CHAPTERS
    from miniloader.walkthrough.run_chapter import run_chapter
    from miniloader.walkthrough.workbench import Workbench

    last = len(CHAPTERS) - 1  # they begin at 0
    out.show([*opening(chapter, last, Workbench(arguments.level).environment), ()])
    reader.ask(chapter.question, out)
    steps: list[ChapterStep] = []
    asked: list[Quiz] = []
    told: set[int] = set()
    with ExitStack() as waiting:

        def wait() -> None:
            waiting.enter_context(progress())(f"chapter {chapter.number}, after step {len(steps)}")

        def on_step(step: ChapterStep) -> None:
            waiting.close()
            steps.append(step)
            out.show([(), *step_opening(len(steps), step)])
            for quiz in chapter.asked_before(step.name):
                if quiz not in asked:
                    asked.append(quiz)
                    out.show([()])
                    reader.ask(quiz, out)
            out.show(step_view(step, out.drawing, told))
            told.update(told_by(step))
            reader.pause("go on")
            wait()

        wait()
        result = run_chapter(chapter, level=arguments.level, on_step=on_step)
    place = CHAPTERS.index(chapter.id) + 1
    out.show([(), *closing(result, CHAPTERS[place] if place < len(CHAPTERS) else None)])
    return result


class _Reader:
    """Who reads along: waits for them, asks them, and counts their right answers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self._pauses = terminal and not arguments.no_pause
        self._quiz = arguments.quiz
        self.right = self.asked = 0

    def pause(self, what: str) -> None:
        """Wait for Enter, where somebody may press it; a word that is typed before it is explained."""
        while self._pauses and (word := self._line(f"[Enter: {what}; a word: what it means] ").strip()):
            self._explain(word)

    def _explain(self, word: str) -> None:
        from miniloader.errors import UsageError
        from miniloader.walkthrough.words import meaning

        try:
            print(f"  {meaning(word)}")
        except UsageError as error:
            print(f"  {error}")

    def ask(self, question: Quiz, out: Output) -> None:
        """Ask, take an answer (``--quiz``) or wait, and give the right one."""
        from miniloader.report import walkthrough

        out.show([*walkthrough.question(question), ()])
        self.asked += 1
        chosen = None
        if self._quiz:
            chosen = self._choice(len(question.choices))
            self.right += chosen == question.answer
        else:
            self.pause("the answer")
        out.show(walkthrough.correction(question, chosen))

    def _choice(self, choices: int) -> int | None:
        """The index of the answer that was chosen; None: none was."""
        while True:
            words = self._line(f"Your answer, 1 to {choices} (Enter: show it): ").split()
            if not words:
                return None
            if len(words) == 1 and words[0] in map(str, range(1, choices + 1)):
                return int(words[0]) - 1
            print(f"  {' '.join(words)!r} is none of the answers: type its number")

    def _line(self, prompt: str) -> str:
        """A line from standard input; at its end nobody is waited for any more."""
        print(prompt, end="", flush=True)
        try:
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except KeyboardInterrupt:
            print()
            raise
        if not line.endswith("\n"):
            self._pauses = False
            print()
        elif not sys.stdin.isatty():
            print(line, end="")  # what a terminal would have shown
        return line


# ---------------------------------------------------------------------------------------- the exercise
def _exercise(arguments: argparse.Namespace, chapter: Chapter[Any]) -> int:
    if arguments.json:
        from miniloader.report.json import dump

        dump({"id": chapter.id, "task": chapter.exercise.task, "snippet": chapter.exercise.snippet})
    else:
        from miniloader.report.walkthrough import snippet

        print(snippet(chapter), end="")
    return 0


def _sheet(chapters: Sequence[Chapter[Any]]) -> int:
    from miniloader.report.teaching import sheet

    print(sheet(chapters), end="")
    return 0


def _grade(arguments: argparse.Namespace) -> int:
    """0 where each solution passes, 1 where one does not, 3 where none could be judged."""
    from miniloader.report.html import refuse_unwritable
    from miniloader.report.progress import progress
    from miniloader.walkthrough.grading import grade, junit, write_marks

    if arguments.grade != "-":
        refuse_unwritable(arguments.grade, "marks")  # now, not after all have been run

    with progress() as say:
        graded = grade(arguments.check, say)
    if arguments.grade == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(junit(graded))
    else:
        write_marks(graded, arguments.grade)
        if arguments.json:
            from dataclasses import asdict

            from miniloader.report.json import dump

            dump({"graded": [asdict(solution) for solution in graded]})
        else:
            from miniloader.report.teaching import marks

            _output().show(marks(graded, arguments.grade))
    passed = {solution.passed for solution in graded}
    return 1 if False in passed else 0 if True in passed else 3


def _hints(arguments: argparse.Namespace, chapter: Chapter[Any]) -> int:
    if arguments.json:
        from miniloader.report.json import dump

        dump({"id": chapter.id, "hints": list(chapter.exercise.hints)})
    else:
        from miniloader.report.walkthrough import hints

        _output().show(hints(chapter))
    return 0


def _words(arguments: argparse.Namespace) -> int:
    from miniloader.walkthrough.words import WORDS, meaning

    told = WORDS if arguments.words else {arguments.word: meaning(arguments.word)}
    if arguments.json:
        from miniloader.report.json import dump

        dump({"words": told})
    else:
        from miniloader.report.walkthrough import word_list

        _output().show(word_list(told))
    return 0


def _check(arguments: argparse.Namespace, chapter: Chapter[Any]) -> int:
    from miniloader.walkthrough.exercise_runner import check_file

    answer, printed = check_file(chapter, arguments.check)
    if arguments.json:
        from miniloader.report.json import dump

        dump({"id": chapter.id, "passed": answer.passed, "message": answer.message, "printed": printed})
    else:
        from miniloader.files import read_text
        from miniloader.report.walkthrough import checked, solution

        out = _output()
        out.show(checked(answer, printed, answer.hint or next(iter(chapter.exercise.hints), None)))
        if arguments.solution:
            out.show([(), *solution(chapter, read_text(arguments.check, errors="replace"))])
    return 0 if answer.passed else 1
