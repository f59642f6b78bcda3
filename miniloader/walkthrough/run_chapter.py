"""Running a chapter: each step as it is done, then the claims, judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from miniloader.errors import MiniloaderError
from miniloader.evidence.verdict import CLAIM_SCHEMA, VERDICT_SCHEMA, Claim, Verdict, combine, judge
from miniloader.json_schema import COUNT, TEXT, array, keys, record
from miniloader.kernel.features import LEVEL_SCHEMA, LevelName
from miniloader.values import dataclass
from miniloader.walkthrough.chapter import Chapter, Statement
from miniloader.walkthrough.step import STEP_SCHEMA, ChapterStep
from miniloader.walkthrough.workbench import Environment, Workbench

__all__ = ["CHAPTER_SCHEMA", "ChapterResult", "judged", "run_chapter"]


@dataclass(frozen=True)
class ChapterResult:
    """What came of running ``chapter``: the steps, and the claims judged by what was seen."""

    chapter: Chapter[Any]
    environment: Environment
    steps: tuple[ChapterStep, ...]
    claims: tuple[Claim, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on all claims together."""
        return combine(self.claims)

    def to_json(self) -> dict[str, Any]:
        """One element of ``chapters`` of ``walkthrough --json``."""
        chapter = self.chapter
        return {
            "id": chapter.id,
            "number": chapter.number,
            "title": chapter.title,
            "claim": chapter.claim,
            "surprise": chapter.surprise,
            "verdict": self.verdict,
            "evidence": self.environment.level,
            "facts": self.environment.to_json(),
            "claims": [{**claim.to_json(), "source": chapter.source_of[claim.id]} for claim in self.claims],
            "question": chapter.question.to_json(),
            "questions": [quiz.to_json() for quiz in chapter.questions],
            "steps": [step.to_json() for step in self.steps],
            "explanation": list(chapter.explanation),
            "sources": list(chapter.sources),
            "exercise": {
                "task": chapter.exercise.task,
                "snippet": chapter.exercise.snippet,
                "hints": list(chapter.exercise.hints),
            },
        }


_CLAIM: Final = CLAIM_SCHEMA | {
    "properties": CLAIM_SCHEMA["properties"] | {"source": TEXT},
    "required": [*CLAIM_SCHEMA["required"], "source"],
}
_QUIZ: Final = record(
    keys(TEXT, "text step"), {"choices": array(record(keys(TEXT, "text why"))), "answer": COUNT}
)

CHAPTER_SCHEMA: Final = record(
    keys(TEXT, "id title claim surprise"),
    {"number": COUNT, "verdict": VERDICT_SCHEMA, "evidence": LEVEL_SCHEMA, "claims": array(_CLAIM)},
    {"facts": record(
        keys(TEXT, "kernel machine privilege shows"), {"page_size": COUNT, "file_systems": array(TEXT)}
    )},
    {"question": _QUIZ, "questions": array(_QUIZ), "steps": array(STEP_SCHEMA)},
    {"exercise": record(keys(TEXT, "task snippet"), {"hints": array(TEXT)})},
    keys(array(TEXT), "explanation sources"),
)  # fmt: skip
"""What :meth:`ChapterResult.to_json` gives."""


def run_chapter(
    chapter: Chapter[Any],
    *,
    level: LevelName | None = None,
    on_step: Callable[[ChapterStep], None] | None = None,
) -> ChapterResult:
    """Run ``chapter`` and judge its claims; ``on_step`` hears of each step as it is done.

    ``level`` asks for less evidence than the best that works here.  Where the kernel or the permissions here
    do not let the experiment go on, its claims are unknown, and say why.
    """
    steps: list[ChapterStep] = []
    with Workbench(level) as bench:
        experiment = chapter.run(bench)
        try:
            while True:
                step = next(experiment).told_at(bench.level)
                steps.append(step)
                if on_step is not None:
                    on_step(step)
        except StopIteration as end:
            claims = judged(chapter, end.value, bench.level)
        except (MiniloaderError, OSError) as error:
            claims = tuple(_not_judged(statement, str(error)) for statement in chapter.claims)
        return ChapterResult(chapter, bench.environment, tuple(steps), claims)


def judged(chapter: Chapter[Any], seen: Any, level: LevelName) -> tuple[Claim, ...]:
    """The claims of ``chapter``, judged by what was ``seen`` with evidence of ``level``."""
    return tuple(
        judge(statement.id, statement.text, **statement.finding(seen)._asdict())
        if statement.told_at(level)
        else _not_judged(statement, f"evidence here is {level}, and this needs {statement.level}")
        for statement in chapter.claims
    )


def _not_judged(statement: Statement[Any], reason: str) -> Claim:
    return judge(statement.id, statement.text, holds=None, expected="", observed="nothing", reason=reason)
