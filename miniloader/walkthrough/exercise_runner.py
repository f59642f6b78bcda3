"""Running an exercise: a learner's snippet runs in a child, and what it leaves behind is judged there."""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import runpy
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import Any, Final

from miniloader.errors import EvidenceError, UsageError
from miniloader.lab.workers.child import die_with
from miniloader.walkthrough.chapter import Answer, Chapter

__all__ = ["check_file"]

_SECONDS: Final = 10


def check_file(chapter: Chapter[Any], path: str) -> tuple[Answer, str]:
    """Run the learner's file and judge it; the answer, and what it printed.

    Raises UsageError when it cannot be read, EvidenceError when the kernel does not tell enough to judge it.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as verdict:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _be_the_child(chapter, path, output.fileno(), verdict.fileno(), parent)
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        finally:
            _end_group(pid)
            _, status = os.waitpid(pid, 0)
        output.seek(0)
        verdict.seek(0)
        pickled, printed = verdict.read(), output.read().decode(errors="replace")
    if not pickled:
        return Answer(False, _end(os.waitstatus_to_exitcode(status))), printed
    answer = pickle.loads(pickled)
    if isinstance(answer, EvidenceError):
        raise answer
    return Answer(*answer), printed


def _end(code: int) -> str:
    """Why there is nothing to judge."""
    if code == -signal.SIGALRM:
        return f"it was still running after {_SECONDS} seconds, and was ended"
    end = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return f"it {end} before it could be judged"


def _end_group(pid: int) -> None:
    """Kill a child that leads a group, and what it has started: nobody was reaped, so the number is its."""
    for kill in (os.kill, os.killpg):  # the group may not be there yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _be_the_child(chapter: Chapter[Any], path: str, output: int, verdict: int, parent: int) -> None:
    """Run the learner's file, which prints to ``output``; pickle the answer into ``verdict``, and end."""
    try:
        os.setpgid(0, 0)
        die_with(parent)
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # there is nobody to answer it
        sys.stdin = os.fdopen(0, closefd=False)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
        os.write(verdict, pickle.dumps(_judged(chapter, path)))
        sys.stdout.flush()
    finally:
        os._exit(0)


def _judged(chapter: Chapter[Any], path: str) -> tuple[bool, str] | EvidenceError:
    try:
        names = runpy.run_path(path)
    except SystemExit:
        return (False, "it left with exit() before its mappings could be looked at")
    except BaseException as error:  # noqa: BLE001 - the learner's error, whatever it is, is the answer
        return (False, f"it raised {type(error).__name__}: {error}{_line(error, path)}")
    try:
        answer = chapter.exercise.check(names)
        return (answer.passed, answer.message)
    except EvidenceError as error:
        return error
    except KeyError as error:
        return (False, f"it no longer has a {error.args[0]}, which is looked at")
    except Exception as error:  # noqa: BLE001 - a mapping closed, a number where a mapping was: the learner's, too
        return (False, f"what it leaves behind cannot be looked at: {type(error).__name__}: {error}")


def _line(error: BaseException, path: str) -> str:
    """Where in the learner's file it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (line {frames[-1].lineno})" if frames else ""
