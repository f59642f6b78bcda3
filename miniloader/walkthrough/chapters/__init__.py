"""The chapters, in order: the one place that knows them all.  Light: a chapter is imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import UsageError
from miniloader.forking import importing
from miniloader.suggestions import did_you_mean
from miniloader.whole_numbers import whole_number

if TYPE_CHECKING:
    from miniloader.walkthrough.chapter import Chapter

__all__ = ["CHAPTERS", "chapter", "chapters"]

#: Ids of chapters, each the name of its module.
CHAPTERS: Final = (
    "memory",
    "mapping",
    "lazy",
    "cow",
    "fork",
    "shared",
    "copies",
    "unmappable",
    "segments",
    "relocation",
    "processes",
    "textrel",
    "relro",
    "tls",
    "prepared",
    "build",
    "erosion",
)


def chapters() -> tuple[Chapter[Any], ...]:
    """Every chapter, in order."""
    return tuple(map(_load, CHAPTERS))


def chapter(name: str) -> Chapter[Any]:
    """The chapter of that id, or of that number; UsageError where there is none.

    >>> chapter("3").id
    'cow'
    """
    if name in CHAPTERS:
        return _load(name)
    number = whole_number(name)
    if number is not None:
        for numbered in chapters():
            if numbered.number == number:
                return numbered
    meant = did_you_mean(name, CHAPTERS)
    raise UsageError(f"no chapter {name!r}", hint=meant or f"there are {', '.join(CHAPTERS)}")


def _load(name: str) -> Chapter[Any]:
    with importing:
        declared: Chapter[Any] = import_module(f"{__name__}.{name}").CHAPTER
    return declared
