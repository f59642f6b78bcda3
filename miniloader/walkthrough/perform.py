"""Running a chapter: each step as it is done, then the claims, judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miniloader.errors import MiniloaderError
from miniloader.evidence.verdict import Claim, judge
from miniloader.kernel.features import LEVELS, LevelName
from miniloader.walkthrough.model import Chapter, Result, Statement, Step
from miniloader.walkthrough.workbench import Bench

__all__ = ["OnStep", "judged", "perform"]

OnStep = Callable[[Step], None]


def perform(
    chapter: Chapter[Any], *, level: LevelName | None = None, on_step: OnStep | None = None
) -> Result:
    """Run ``chapter`` and judge its claims; ``on_step`` hears of each step as it is done.

    ``level`` asks for less evidence than the best that works here.  Where the kernel or the permissions here
    do not let the experiment go on, its claims are unknown, and say why.
    """
    steps: list[Step] = []
    with Bench(level) as bench:
        experiment = chapter.run(bench)
        try:
            while True:
                step = next(experiment)
                steps.append(step)
                if on_step is not None:
                    on_step(step)
        except StopIteration as done:
            claims = judged(chapter, done.value, bench.level)
        except (MiniloaderError, OSError) as error:
            claims = tuple(_not_judged(one, str(error)) for one in chapter.claims)
        return Result(chapter, bench.facts, tuple(steps), claims)


def judged(chapter: Chapter[Any], seen: Any, level: LevelName) -> tuple[Claim, ...]:
    """The claims of ``chapter``, judged by what was seen at ``level``."""
    names = [known.name for known in LEVELS]
    return tuple(
        _not_judged(one, f"evidence here is {level}, and this needs {one.level}")
        if names.index(level) > names.index(one.level)
        else judge(one.id, one.text, **one.finding(seen)._asdict())
        for one in chapter.claims
    )


def _not_judged(statement: Statement[Any], why: str) -> Claim:
    return judge(statement.id, statement.text, holds=None, expected="", observed="nothing", reason=why)
