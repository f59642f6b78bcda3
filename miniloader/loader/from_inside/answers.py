"""One question at a time: who asks is found, the answer made, and an error kept for dlerror(3)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Final, Protocol

from miniloader.errors import LoadError, MiniloaderError
from miniloader.forking import importing
from miniloader.loader import unload
from miniloader.loader.from_inside import opening
from miniloader.loader.from_inside.caller import Caller, caller_at
from miniloader.loader.from_inside.for_host import open_for_host
from miniloader.loader.from_inside.opening import Load, close_library, open_library
from miniloader.loader.from_inside.symbols import symbol
from miniloader.native import INSIDE, QuestionStructure
from miniloader.shortage import fault

__all__ = ["Watch", "answer", "watches"]

_libc: Final = ctypes.CDLL(None)
_strdup: Final = _libc.strdup
_strdup.restype, _strdup.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

#: LM_ID_BASE and LM_ID_NEWLM of <dlfcn.h>, and what glibc calls the caller's own.
_BASE, _NEW, _CALLERS = 0, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFE


class Watch(Protocol):
    """Who is told of calls, of dlopen(3) by its name, None for all others; times are time.perf_counter's."""

    def begin(self, name: str, begin: float, /) -> None:
        """A call of dlopen(3) has begun."""
        ...

    def end(self, name: str | None, begin: float, how: str | None, /) -> None:
        """It ends: ``how`` is ``glibc`` where that answers, ``refused`` where nobody does."""
        ...


#: Who watches, the last one.
watches: Final[list[Watch]] = []
_inside: Final[list[Caller]] = []  # who is being answered


def answer(place: int, load: Load) -> int:
    """Answer the question at the address ``place``; 0 where glibc shall.  ``load`` loads what is found."""
    with unload.lock:
        watch, name = watches[-1] if watches else None, None
        question = QuestionStructure.from_address(place)
        begin = question.begun / 1e9
        function, failed = _FUNCTIONS[question.function]
        if function is _open and question.name and watch is not None:
            name = os.fsdecode(_text(question.name))
            watch.begin(name, begin)
        opening.load_with(load)
        caller, how = caller_at(question.caller), None
        _inside.append(caller)
        try:
            result = function(question, caller)
        except MiniloaderError as error:
            question.error = _strdup(_words_of(error).encode("utf-8", "surrogateescape"))
            result, how = failed, "refused"
        except Exception as error:  # noqa: BLE001 - the caller is machine code: it is told, as of any error
            question.error = _strdup(fault(error).encode("utf-8", "surrogateescape"))
            result, how = failed, "refused"
        finally:
            _inside.pop()
        if result is not None:
            question.result = result & 0xFFFFFFFFFFFFFFFF
        if watch is not None:
            watch.end(name, begin, "glibc" if result is None else how)
    return int(result is not None)


def _words_of(error: MiniloaderError) -> str:
    """What dlerror(3) says: mostly ld.so's words that the error has."""
    if error.ld_so is not None:
        return error.ld_so
    try:
        with importing:
            from miniloader.loader.from_inside.words import words_of
    except ImportError:  # a program that has another root reads no file of ours any more
        return str(error)
    return words_of(error)


def _text(address: int) -> bytes:
    return ctypes.string_at(address)


def _open(question: Any, caller: Caller) -> int | None:
    name = _text(question.name) if question.name else b""
    if not name:
        return None  # the program
    if caller.library is None:
        # What imports modules while it answers is Python, and what they are needed for is loading itself.
        return open_for_host(name, question.number, caller) if len(_inside) == 1 else None
    return open_library(name, question.number, caller)


def _symbol(question: Any, caller: Caller) -> int | None:
    version = _text(question.version).decode("utf-8", "surrogateescape") if question.version else None
    return symbol(question.handle, _text(question.name), version, caller)


def _close(question: Any, caller: Caller) -> int | None:
    return close_library(question.handle, caller)


def _information(question: Any, _: Caller) -> int | None:
    with importing:
        from miniloader.loader.from_inside.information import information

    return information(question.handle, question.number, question.where)


def _open_in_namespace(question: Any, caller: Caller) -> int | None:
    if question.handle == _BASE:
        return _open(question, caller)
    if not question.name or question.number & os.RTLD_GLOBAL:
        return None  # glibc refuses both
    if question.handle == _CALLERS:
        return _open(question, caller)
    if question.handle != _NEW:
        return None  # one that is there has only libraries of glibc's in it
    text = "dlmopen: a namespace of its own cannot have libraries that miniloader has loaded"
    raise LoadError(f"{caller.name}: {text}", ld_so=text)


def _end(_: Any, __: Caller) -> int:
    unload.end()
    return 1


#: What answers each question, and what the function returns when it fails.
_FUNCTIONS: Final[list[tuple[Callable[[Any, Caller], int | None], int]]] = [
    {
        b"dlopen": (_open, 0),
        b"dlsym": (_symbol, 0),
        b"dlvsym": (_symbol, 0),
        b"dlclose": (_close, -1),
        b"dlinfo": (_information, -1),
        b"dlmopen": (_open_in_namespace, 0),
    }[name]
    for name in list(INSIDE)[:6]
] + [(_end, 0)]
