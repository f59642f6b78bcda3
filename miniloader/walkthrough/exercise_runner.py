"""Running an exercise: a learner's snippet runs in a child, and what it leaves behind is judged there."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import traceback
from typing import Any, Final

from miniloader.errors import EvidenceError
from miniloader.files import open_regular
from miniloader.lab.workers.child import INTERRUPTS, ForkedProcess, crash_quietly, ending
from miniloader.lab.workers.shared_value import SharedValue
from miniloader.walkthrough.chapter import Answer, Chapter

__all__ = ["check_file"]

_SECONDS: Final = 10


def check_file(chapter: Chapter[Any], path: str) -> tuple[Answer, str]:
    """Run the learner's file and judge it; the answer, and what it printed.

    Raises OSError when it cannot be read, EvidenceError when the kernel does not tell enough to judge it.
    """
    os.close(open_regular(path))
    verdict = SharedValue()
    with tempfile.TemporaryFile() as output:

        def judge() -> int:
            _be_alone(output.fileno())
            verdict.leave(_judged(chapter, path))
            sys.stdout.flush()
            return 0

        with ForkedProcess(judge, leader=True) as learner:
            code = learner.wait()
        output.seek(0)
        printed = output.read().decode(errors="replace")
    answer = verdict.read()
    if answer is None:
        place = chapter.exercise.where()
        return Answer(False, _end(code) + (f", {place}" if place else "")), printed
    if isinstance(answer, EvidenceError):
        raise answer
    return Answer(*answer), printed


def _end(code: int | None) -> str:
    """Why there is nothing to judge."""
    if code == -signal.SIGALRM:
        return f"it was still running after {_SECONDS} seconds, and was ended"
    return f"it {ending(code)} before it could be judged"


def _be_alone(output: int) -> None:
    """In the child: no input, all output to ``output``, signals as they are by default, and not for long."""
    crash_quietly()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS)
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # there is nobody to answer it
    sys.stdin = os.fdopen(0, closefd=False)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)


def _judged(chapter: Chapter[Any], path: str) -> Answer | EvidenceError:
    try:
        names = runpy.run_path(path)
    except SystemExit:
        return Answer(False, "it left with exit() before its mappings could be looked at")
    except BaseException as error:  # noqa: BLE001 - the learner's error, whatever it is, is the answer
        return Answer(False, f"it raised {type(error).__name__}: {error}{_line(error, path)}")
    try:
        return chapter.exercise.check(names)
    except EvidenceError as error:
        return error
    except KeyError as error:
        return Answer(False, f"it no longer has a {error.args[0]}, which is looked at")
    except Exception as error:  # noqa: BLE001 - a mapping closed, a number where a mapping was: the learner's, too
        return Answer(False, f"what it leaves behind cannot be looked at: {type(error).__name__}: {error}")


def _line(error: BaseException, path: str) -> str:
    """Where in the learner's file it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (line {frames[-1].lineno})" if frames else ""
