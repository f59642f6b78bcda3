"""The inner loops of linking, in C: looking up names, noting what they are bound to, writing words.

They are in ``names.c``, ``notes.c`` and ``words.c``; ``link.c`` goes through all of them for an ordinary
library, ``prepared.c`` has those of prepared pages, ``objects.c`` looks at copies of others' pages.

Beside them stands what libraries of ours call instead of dlopen(3) and its like (``inside.c``).

A library of medium size has ten thousand names to look up and a hundred thousand words to relocate.  What
one of them takes in Python, or numpy for each pass over all of them, is a hundred times what ld.so takes.
So these loops are C, and nothing else is: which libraries there are, in which order, by which rules is
Python's to say.  They work where the library lies in memory, as ld.so does: nothing is copied.

Beside them is what must not wait for Python, or what Python cannot do: ``lazy.c``, ``fault.c``, ``calls.c``,
``host.c``, ``debugger.c``, ``keep.c``; and what looks at the values that Python calls a loop with,
``arguments.c``.

All of it is compiled once, for x86-64 and aarch64, and lies beside this file (``tools/native`` makes it
anew, and a test compares).  ``loops.h`` has the structures; they are declared here again,
field by field.  This module opens the compiled code and knows of nothing above it: the tables it works on are
composed in :mod:`miniloader.loader.symbol_lookup` and :mod:`miniloader.loader.relocation_job`.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from _ctypes import dlsym
from array import array
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final

from miniloader.errors import NO_ROOM, LoadError, without_room
from miniloader.native import gate

__all__ = [
    "ADDRESS_MASK",
    "ANSWERS",
    "FINALISE",
    "FORMULAS",
    "FRAME_RECORD",
    "INDIRECT_FUNCTION",
    "INNERMOST",
    "INSIDE",
    "INTERFACE",
    "KINDS",
    "LOOPS_SONAME",
    "NEWEST",
    "PLT_ENTRIES",
    "STAND_INS",
    "UNBOUND",
    "UNIQUE",
    "VERSIONED",
    "JobStructure",
    "LinkStructure",
    "QuestionStructure",
    "Reason",
    "Stopped",
    "SymbolsStructure",
    "address_of",
    "buffer_address",
    "copy",
    "functions",
    "run",
    "unlocked",
]

#: What is met while names are looked up: a need that nobody fulfils, unique symbols, IFUNCs.
UNBOUND, UNIQUE, INDIRECT_FUNCTION = 1, 2, 4
#: How names are looked up: versions count; PLT entries are found, not definitions; or the newest version.
VERSIONED, PLT_ENTRIES, NEWEST = 1, 2, 4
#: In the order of loops.h, from 1 on; those of thread-local words are one more.
FORMULAS: Final = ("none", "B + A", "S + A", "S", "S + A - P", "Z + A", "indirect", "copy")
#: How many relocation kinds the loops can tell apart, by number.
KINDS: Final = 1088
_AGAIN: Final = "install miniloader again"
_UNGUARDED: Final = (
    "SIGBUS or SIGSEGV is kept by somebody else here (a sanitizer with handle_segv=2 or handle_sigbus=2?): "
    "a file that is cut short while it is loaded ends this process; with 1 for 2 it is an error"
)
#: Addresses are computed in 64 bits, as the processor does.
ADDRESS_MASK: Final = (1 << 64) - 1


class Reason(IntEnum):
    """Why a loop stopped."""

    GONE = 1
    NO_TABLE = 2
    TOO_MUCH = 3
    OUTSIDE = 4
    NO_KIND = 5
    NO_SYMBOL = 6
    NOT_RELATIVE = 7
    NO_CODE = 8
    TOO_FAR = 9
    DAMAGED = 10
    STRANGE = 11


class Stopped(Exception):
    """A loop met what it cannot do, at the word ``where`` (a vaddr): ``what`` is the kind, value or
    symbol that is wrong."""

    def __init__(self, reason: Reason, where: int = 0, what: int = 0) -> None:
        super().__init__(reason, where, what)
        self.reason, self.where, self.what = reason, where, what


def _words(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_uint64) for name in names.split()]


class SymbolsStructure(ctypes.Structure):
    """``Table`` of loops.h: the dynamic symbols of a library, as they lie in memory."""

    _fields_ = _words(
        "bias readable readable_count"
        " strtab strsz symtab gnu_hash sysv_hash versym verneed verneednum verdef verdefnum"
        " count labels_count labels rows strings versions bloom buckets chains sysv_buckets sysv_chains"
        " bloom_mask shift bucket_count chain_count first sysv_bucket_count sysv_chain_count"
    )


class JobStructure(ctypes.Structure):
    """``Job`` of loops.h: the relocation of a library, as it lies in memory."""

    _fields_ = _words(
        "bias page_size start kinds writable code pointers parts"
        " writable_count code_count pointer_count part_count pages where what"
    )


class LinkStructure(ctypes.Structure):
    """``Link`` of link.c: what is given to it, and what it finds."""

    _fields_ = [
        ("table", SymbolsStructure),
        ("readable", ctypes.c_uint64 * 32),
        ("labels", ctypes.c_uint32 * 256),
        *_words("bias page_size load_count tag_count dynamic dynamic_size"),
        *_words("scope_count own needed_count asked_count"),
        ("exits", ctypes.c_uint64 * 2),
        *_words("turn"),
        ("exit_addresses", ctypes.c_uint64 * 2),
        *_words("local_count noted_count noted pages where what"),
    ]


class QuestionStructure(ctypes.Structure):
    """``Question`` of inside.c: what a library of ours asks glibc for, and what it is answered.

    ``function`` is the place of its name in :data:`INSIDE`, ``caller`` the address that it returns to, and
    ``begun`` when it asked: nanoseconds by the clock of :func:`time.perf_counter`.
    """

    _fields_ = _words("function caller handle name version number where begun result error")


#: What the compiled loops are called, and their table of what libraries of ours call instead of glibc's.
LOOPS_SONAME: Final = "miniloader-loops.so"
STAND_INS: Final = "stand_ins"
#: glibc's functions that answers.c answers, and what it has for each; the order is that of its own table.
ANSWERS: Final = {
    b"dl_iterate_phdr": "answer_dl_iterate_phdr",
    b"dladdr1": "answer_dladdr1",
    b"_dl_find_object": "answer_dl_find_object",
    b"dladdr": "answer_dladdr",
    b"backtrace_symbols": "answer_backtrace_symbols",
    b"backtrace_symbols_fd": "answer_backtrace_symbols_fd",
}
#: glibc's functions that libraries of ours do not call themselves, and what inside.c has for each.
INSIDE: Final = {
    b"dlopen": "inside_open",
    b"dlsym": "inside_symbol",
    b"dlvsym": "inside_versioned",
    b"dlclose": "inside_close",
    b"dlinfo": "inside_information",
    b"dlmopen": "inside_namespace",
    b"dlerror": "inside_error",
}
#: Functions of CPython's C interface, and of threads, by which inside.c asks.
INTERFACE: Final = (
    b"PyGILState_Ensure",
    b"PyGILState_Release",
    b"PyLong_FromUnsignedLongLong",
    b"PyObject_CallOneArg",
    b"PyObject_IsTrue",
    b"Py_DecRef",
    b"PyErr_WriteUnraisable",
    b"PyErr_Fetch",
    b"PyErr_Restore",
    b"Py_MakePendingCalls",
    b"Py_AddPendingCall",
    b"PyThreadState_EnterTracing",
    b"PyThreadState_LeaveTracing",
    b"PyGILState_GetThisThreadState",
    b"_PyThreadState_UncheckedGet" if sys.version_info < (3, 13) else b"PyThreadState_GetUnchecked",
    b"PyThreadState_GetInterpreter",
    b"PyInterpreterState_Main",
    b"PyInterpreterState_Head",
    b"PyInterpreterState_Next",
    b"PyEval_SaveThread",
    b"PyEval_RestoreThread",
    b"PyThreadState_New",
    b"PyThreadState_Clear",
    b"PyThreadState_DeleteCurrent",
    b"pthread_create",
    b"pthread_detach",
    b"clock_gettime",
    b"Py_IsInitialized",
)
#: Functions of CPython's C interface by which arguments.c looks at what a loop is called with.
_VALUES: Final = (
    "PyTuple_Size",
    "PyTuple_GetItem",
    "PyObject_CheckBuffer",
    "PyObject_GetBuffer",
    "PyBuffer_Release",
    "PyLong_AsUnsignedLongLongMask",
    "PyErr_Occurred",
)
#: Where a ``PyThreadState`` has the address of its innermost ``_PyCFrame``; 0 from 3.13 on, which has none.
FRAME_RECORD: Final = 56 if sys.version_info < (3, 13) else 0
#: The same for inside.c; 0 from 3.12 on, where such a frame is not on the stack and it need not know.
INNERMOST: Final = FRAME_RECORD if sys.version_info < (3, 12) else 0
#: What exit(3) calls.
FINALISE: Final = "finalise"


#: The loops, and how many numbers each gets.
_ARGUMENTS: Final = {
    "bind_ordinary": 11,
    "compare_pages": 5,
    "compare_sums": 5,
    "compute_values": 5,
    "copy": 4,
    "count_objects": 12,
    "fill_slots": 8,
    "flush_code": 2,
    "gather": 6,
    "guard_is_kept": 0,
    "keep_as_it_is": 2,
    "list_asked": 6,
    "list_entry": 3,
    "list_places": 5,
    "list_set": 4,
    "list_symbols": 5,
    "list_versions": 1,
    "look_name_up": 6,
    "look_up": 12,
    "missing_version": 4,
    "note": 9,
    "note_faults": 3,
    "open_table": 2,
    "relocate": 13,
    "set_answers": 1,
    "set_arguments": 1,
    "set_askers": 3,
    "set_destructors": 2,
    "set_inside": 6,
    "set_process": 0,
    "survey": 3,
    "tell_faults": 1,
    "text_at": 6,
    "use": 3,
    "withdraw_entry": 1,
    "write_ordinary": 6,
}


class _Loops(ctypes.PyDLL):
    """The compiled code: each function is declared when it is first called."""

    def __getitem__(self, name_or_ordinal: Any) -> Any:
        function = super().__getitem__(name_or_ordinal)
        if name_or_ordinal in _ARGUMENTS:
            arguments = [ctypes.c_uint64] * _ARGUMENTS[name_or_ordinal]
            function.argtypes, function.restype = arguments, ctypes.c_int64
        return function


@lru_cache(maxsize=1)
def functions() -> ctypes.PyDLL:
    """The loops themselves; they keep Python's lock, as one loop at a time has SIGBUS to itself."""
    path = gate.own_code()
    if (lack := gate.lacks_own_code()) is not None:
        raise lack
    try:
        library = _Loops(path)
    except OSError as error:
        hint = NO_ROOM if without_room(str(error)) else _AGAIN
        raise LoadError(f"the loader's own loops cannot be used: {error}", hint=hint) from None
    for name in _ARGUMENTS:
        try:
            dlsym(library._handle, name)
        except OSError:
            raise LoadError(
                f"{path}: has no function {name}: these are not the loader's own loops", hint=_AGAIN
            ) from None
    interface = array("Q", [dlsym(ctypes.pythonapi._handle, name) for name in _VALUES])
    library.set_arguments(interface.buffer_info()[0])
    library.call_loop.argtypes, library.call_loop.restype = (
        (ctypes.c_uint64, ctypes.py_object),
        ctypes.c_int64,
    )
    if not library.guard_is_kept():
        warnings.warn(_UNGUARDED, RuntimeWarning, stacklevel=2)
    return library


@lru_cache(maxsize=16)
def unlocked(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of the compiled code that runs code of libraries: Python's lock is free meanwhile.

    >>> hex(unlocked("thread_pointer", ctypes.c_uint64)())[:2]
    '0x'
    """
    return ctypes.CFUNCTYPE(restype, *argtypes)(address_of(name))


@lru_cache(maxsize=64)
def address_of(name: str) -> int:
    """Where a function, or an object, of the compiled code is in this process."""
    return dlsym(functions()._handle, name)  # a function of ctypes' own for each would take ten times as long


def buffer_address(data: Any) -> int:
    """Where the bytes of the buffer ``data`` (contiguous, writable, kept by the caller) are; 0 if empty.

    >>> data = bytearray(b"abc")
    >>> ctypes.string_at(buffer_address(data), 3)
    b'abc'
    """
    if isinstance(data, array):  # at a third of the price
        return data.buffer_info()[0] if data else 0
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if len(data) else 0


def run(name: str, *arguments: Any) -> None:
    """Call one of :func:`functions` with numbers, and buffers, of which it gets the address.

    :class:`Stopped` says why it did not come to its end.
    """
    if len(arguments) != _ARGUMENTS[name]:  # it would take what is missing for zeros, and write there
        raise TypeError(f"{name} gets {_ARGUMENTS[name]} arguments, not {len(arguments)}")
    reason = functions().call_loop(address_of(name), arguments)
    if reason:
        raise Stopped(Reason(reason))


def copy(to: int, from_: int, length: int) -> None:
    """Copy bytes from address to address; :class:`Stopped` with the one that could not be read or written.

    >>> source, target = bytearray(b"abc"), bytearray(3)
    >>> copy(buffer_address(target), buffer_address(source), 3)
    >>> target
    bytearray(b'abc')
    """
    where = ctypes.c_uint64()
    try:
        run("copy", to, from_, length, ctypes.addressof(where))
    except Stopped as stopped:
        raise Stopped(stopped.reason, where.value) from None
