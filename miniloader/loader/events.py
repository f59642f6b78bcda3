"""What a loader does, told as it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Final, Literal

from miniloader.values import dataclass

__all__ = ["RUN_CODE", "Event", "OnEvent", "Stage"]

Stage = Literal[
    "search", "parse", "reserve", "map", "zero", "need", "bind", "tls", "relocate", "protect", "register",
    "prepared", "initialise", "finalise", "unmap",
]  # fmt: skip

RUN_CODE: Final[tuple[Stage, ...]] = ("bind", "initialise", "finalise")
"""Stages after whose events code of libraries runs: IFUNC resolvers, constructors, destructors."""


@dataclass(frozen=True)
class Event:
    """One step: what was done to which ``library``, in a sentence, and its numbers in ``data``."""

    stage: Stage
    library: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]
"""Called with each event, in order, in the thread that loads."""
