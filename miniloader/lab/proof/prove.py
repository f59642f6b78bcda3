"""``prove``: several processes load one library, step by step, and the kernel is asked after each step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from miniloader.errors import UsageError
from miniloader.forking import importing
from miniloader.lab.workers.crew import Crew

if TYPE_CHECKING:
    from miniloader.kernel.features import LevelName
    from miniloader.lab.proof.proof import OnStep, Proof

__all__ = ["prove"]


def prove(
    path: str | os.PathLike[str],
    processes: int = 4,
    *,
    level: LevelName | None = None,
    on_step: OnStep | None = None,
    timeout: float = 60.0,
    text_relocations: bool = False,
    executable_stack: bool = False,
    writable_code: bool = False,
    prepared: bool = False,
) -> Proof:
    """Load the library ``path`` in freshly started ``processes``, and judge what they share.

    A bare name is searched as ld.so searches.  ``level`` asks for less evidence than the best that works
    here.  ``timeout`` is how many seconds a process may take for a step.  ``prepared`` takes the pages that
    :func:`miniloader.prepare` has relocated.  The others allow what :func:`miniloader.load`
    refuses otherwise.

    Raises UsageError for fewer than 2 processes, whatever ``load`` raises in them, WorkerError when one of
    them dies or hangs, and EvidenceError where the kernel tells nothing, or less than ``level``.
    """
    if processes < 2:
        raise UsageError(f"{processes} processes: expected at least 2, or there is nobody to share with")
    with Crew(processes, timeout=timeout) as crew:
        with importing:
            from miniloader.lab.proof.experiment import experiment  # as long as the workers take to start

        allow = {
            "text_relocations": text_relocations,
            "executable_stack": executable_stack,
            "writable_code": writable_code,
            "prepared": prepared,
        }
        return experiment(crew, os.fspath(path), level, on_step, allow)
