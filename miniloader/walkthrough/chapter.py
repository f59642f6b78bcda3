"""What a chapter declares: claims, a question, an explanation, an exercise, and the experiment that it runs.

A :class:`Chapter` is declared once, in a module of its own.  Its ``run`` is a generator: it yields a
:class:`~miniloader.walkthrough.step.ChapterStep` as each is done, and returns what it has seen.  Each claim
is judged by a pure function of that, so that a test can hand it other observations and see it refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import field
from typing import Any, Generic, TypeVar

from miniloader.kernel.features import LEVELS, LevelName
from miniloader.lab.proof.claims import Finding
from miniloader.values import NamedTuple, dataclass
from miniloader.walkthrough.step import ChapterStep
from miniloader.walkthrough.traced_calls import quoted
from miniloader.walkthrough.workbench import Workbench

__all__ = ["Answer", "Chapter", "Choice", "Exercise", "Finding", "Quiz", "Statement", "claim", "equal"]

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Statement(Generic[Seen]):
    """A claim before it is judged: ``finding`` judges it by what the chapter has seen.

    ``level`` is the least evidence it needs: with less, it stays unknown.
    """

    id: str
    text: str
    finding: Callable[[Seen], Finding]
    level: LevelName = "none"

    def told_at(self, level: LevelName) -> bool:
        """Whether evidence of ``level`` is enough to judge it.

        >>> Statement("copied", "A page was copied", lambda seen: seen, "flags").told_at("totals")
        False
        """
        names = [evidence.name for evidence in LEVELS]
        return names.index(level) <= names.index(self.level)


def claim(
    id: str, text: str, level: LevelName = "none"
) -> Callable[[Callable[[Seen], Finding]], Statement[Seen]]:
    """Make the function below it the judge of a claim.

    >>> @claim("even", "The number is even")
    ... def even(number: int) -> Finding:
    ...     return Finding(number % 2 == 0, "an even number", str(number))
    >>> even.finding(3)
    Finding(holds=False, expected='an even number', observed='3', reason='')
    """
    return lambda finding: Statement(id, text, finding, level)


def equal(
    id: str, text: str, expected: object, form: str = "{}", level: LevelName = "none"
) -> Callable[[Callable[[Seen], object]], Statement[Seen]]:
    """Make the function below it the observer of a claim, which holds when it gives what was ``expected``.

    Both are told in one ``form``, which is given the value, or each of the values of a tuple; bytes as C has
    them.

    >>> @equal("killed", "It is killed", "SIGSEGV", "by {}")
    ... def killed(signal: str) -> str:
    ...     return signal or "nothing"
    >>> killed.finding("")
    Finding(holds=False, expected='by SIGSEGV', observed='by nothing', reason='')
    """

    def told(value: object) -> str:
        values = value if isinstance(value, tuple) else (value,)
        return form.format(*(quoted(part) if isinstance(part, bytes) else part for part in values))

    def statement(observe: Callable[[Seen], object]) -> Statement[Seen]:
        def finding(seen: Seen) -> Finding:
            observed = observe(seen)
            return Finding(observed == expected, told(expected), told(observed))

        return Statement(id, text, finding, level)

    return statement


@dataclass(frozen=True)
class Choice:
    """One answer to a question, and why it is right or wrong."""

    text: str
    why: str


@dataclass(frozen=True)
class Quiz:
    """What to predict before the step whose name begins with ``step`` is shown; ``choices[answer]`` is right.

    ``step`` is "" for what is asked before the experiment begins.
    """

    text: str
    choices: tuple[Choice, ...]
    answer: int
    step: str = ""

    def to_json(self) -> dict[str, Any]:
        """An element of ``questions`` of a chapter."""
        choices = [{"text": choice.text, "why": choice.why} for choice in self.choices]
        return {"text": self.text, "choices": choices, "answer": self.answer, "step": self.step}


class Answer(NamedTuple):
    """Whether a learner's snippet does what the exercise asks for, and a sentence about it.

    ``hint`` is what leads on from here, "" where those of the exercise do.
    """

    passed: bool
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Exercise:
    """A small change to a ``snippet`` of Python that runs as it is.

    ``check`` judges the names that the snippet leaves behind, while its mappings are still there; it runs in
    the snippet's own process.  ``solution`` is the snippet as it may look when done; ``hints`` lead there.
    ``where`` tells the parent how far ``check`` had come when the process died, "" where there is no saying.
    """

    task: str
    snippet: str
    solution: str
    check: Callable[[dict[str, Any]], Answer]
    hints: tuple[str, ...] = ()
    where: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Chapter(Generic[Seen]):
    """One chapter.  ``claim`` is its one sentence, ``claims`` the statements that are judged.

    ``question`` is asked first, those of ``later`` before the step each names.  ``surprise`` is what the
    experiment shows that few expect.  ``explanation`` are paragraphs; ``sources`` say where that is written
    down, and ``source_of`` where each claim is, by its id.
    """

    id: str
    number: int
    title: str
    claim: str
    surprise: str
    claims: tuple[Statement[Seen], ...]
    question: Quiz
    explanation: tuple[str, ...]
    sources: tuple[str, ...]
    exercise: Exercise
    source_of: Mapping[str, str] = field(compare=False)
    run: Callable[[Workbench], Generator[ChapterStep, None, Seen]] = field(repr=False)
    later: tuple[Quiz, ...] = ()

    @property
    def questions(self) -> tuple[Quiz, ...]:
        """All questions, in the order in which they are asked."""
        return self.question, *self.later

    def asked_before(self, step: str) -> tuple[Quiz, ...]:
        """The questions to ask before the step of that name is shown."""
        return tuple(quiz for quiz in self.later if step.startswith(quiz.step))
