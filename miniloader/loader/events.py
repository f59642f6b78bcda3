"""What a loader does, told as it happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Final, Literal, Protocol, cast

from miniloader.values import dataclass

__all__ = ["RUN_CODE", "BriefListener", "Event", "OnEvent", "Stage", "is_brief", "tell"]

Stage = Literal[
    "search", "parse", "reserve", "map", "guard", "zero", "need", "bind", "tls", "relocate", "protect",
    "register", "prepared", "open", "host", "initialise", "finalise", "unmap",
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


class BriefListener(Protocol):
    """Who wants to know when something is done, and not how: where ``brief``, no event is made for it."""

    brief: bool

    def note(self, stage: Stage, library: str, data: Mapping[str, Any], /) -> None:
        """A step of a load is done."""
        ...


def is_brief(listener: OnEvent | None) -> bool:
    """Whether ``listener`` is a :class:`BriefListener`, and wants to be one.

    Then a library is told to be mapped once, and nothing is looked for only to be told.
    """
    return bool(getattr(listener, "brief", False))


def tell(listener: OnEvent, stage: Stage, library: str, text: str, data: Mapping[str, Any]) -> None:
    """Have ``listener`` hear of one step, as it wants to."""
    if is_brief(listener):
        cast(BriefListener, listener).note(stage, library, data)
    else:
        listener(Event(stage, library, text, data))
