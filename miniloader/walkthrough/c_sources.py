"""The experiments of chapters as programs in C that anybody can compile: ``c/CHAPTER.c`` beside this file."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["c_source"]


def c_source(id: str) -> str:
    """The program of the chapter of that id, "" where it has none, or none that may be read.

    >>> "mmap(" in c_source("cow")
    True
    """
    path = files("miniloader.walkthrough").joinpath("c", f"{id}.c")
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, PermissionError):
        return ""
