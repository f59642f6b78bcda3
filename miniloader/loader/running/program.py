"""A Python program, run as ``python`` itself would: a script, a module (``-m``), or lines of code (``-c``).

What ``__main__``, ``sys.argv`` and ``sys.path[0]`` are is as Python's own start has it; modules, directories
and zip files are run by :mod:`runpy`, as Python itself runs them.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib._bootstrap_external import MAGIC_NUMBER
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Final, TypeVar

from miniloader.errors import tell
from miniloader.files import working_directory
from miniloader.forking import importing
from miniloader.loader.running.outermost import call_outermost, show_outermost
from miniloader.loader.running.own_modules import make_way
from miniloader.values import dataclass

__all__ = ["PythonProgram", "UnrunnableProgram", "code", "module", "script"]

_Function = TypeVar("_Function", bound=Callable[..., None])
_ROOM: Final = 1 << 17  # bytes: a thousand calls
_PART: Final = 1 << 20  # bytes that are read at once
_HEAD: Final = 16  # bytes of a compiled file before its code
_FILE_INPUT: Final = 257  # Py_file_input of C
#: How a program says in its first two lines what its text is: PEP 263.
_CODING: Final = rb"(?:[ \t\f]*(?:#.*)?\n)?[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+"
_OF_NO_FILE: Final = {"__package__": None, "__spec__": None, "__loader__": BuiltinImporter}


def _with_room(function: _Function) -> _Function:
    """``function``, with room for the calls that it makes.

    CPython's stack of calls consists of pieces of 16 KiB, and a piece is unmapped when the first call in it
    returns: a loop whose calls begin one maps it at every turn.  A load makes thousands of calls wherever
    the program is.  What does not fit into a piece gets one of its own, its size the next power of two, and
    the calls that it makes get what is left.
    """
    assert isinstance(function, FunctionType)
    size = _ROOM // struct.calcsize("P") + 1
    function.__code__ = function.__code__.replace(co_stacksize=size)
    return function


#: Whether CPython counts a call of exec() among those of a program: until 3.11, as functions of Python's.
_COUNTED: Final = int(sys.version_info < (3, 12))


class UnrunnableProgram(Exception):
    """What Python says of a program that cannot begin: an ``error`` or a line."""

    def __init__(self, said: Exception | str) -> None:
        self.said = said

    def show(self) -> None:
        """Show it on standard error, as Python does."""
        if isinstance(self.said, str):
            tell(self.said)
        else:
            show_outermost(self.said.with_traceback(None))


@dataclass(frozen=True)
class PythonProgram:
    """What is to run: its ``code``, the first of ``sys.argv``, and the ``names`` that ``__main__`` has.

    Without code it is the ``module`` that :mod:`runpy` finds, which names it in ``sys.argv`` where it
    ``is_named`` so.
    """

    code: CodeType | None
    name: str
    names: Mapping[str, object]
    module: str = "__main__"
    is_named: bool = False

    @_with_room
    def run(self, arguments: Sequence[str]) -> None:
        """Run it as ``__main__`` with these ``arguments``; what it raises is the caller's."""
        make_way()
        main = ModuleType("__main__")
        # From 3.14 on annotations are made when somebody asks for them.
        annotations = {"__annotations__": dict[str, object]()} if sys.version_info < (3, 14) else {}
        main.__dict__.update(self.names, __builtins__=builtins, **annotations)
        sys.modules["__main__"] = main
        sys.argv[:] = [self.name, *arguments]
        if self.code is None:
            with importing:  # as Python's own main does, and not for a script
                from runpy import _run_module_as_main  # type: ignore[attr-defined]
            call_outermost(partial(_run_module_as_main, self.module), self.is_named)
        else:
            call_outermost(partial(exec, self.code, main.__dict__), main.__dict__, _COUNTED)

    def own_traceback(self, trace: TracebackType | None) -> TracebackType | None:
        """The part of ``trace`` that is the program's, as Python would show it; None where nothing is."""
        while trace is not None and trace.tb_frame.f_code is not call_outermost.__code__:
            trace = trace.tb_next
        return trace.tb_next if trace is not None else None

    def has_begun(self, trace: TracebackType | None) -> bool:
        """Whether ``trace`` comes from the program, not from who looks for it."""
        while self.code is None and trace is not None and trace.tb_frame.f_code is not _code_of_runpy():
            trace = trace.tb_next
        return trace is not None


def _code_of_runpy() -> CodeType:
    with importing:
        from runpy import _run_code  # type: ignore[attr-defined]
    called: CodeType = _run_code.__code__
    return called


def _begin_path(directory: str | None, *, always: bool = False) -> None:
    """Modules are looked for in ``directory`` first, unless Python was told to look in no such place (-P).

    It comes in the place of what miniloader's own start had put there, and where it is None nothing does.
    ``python -m miniloader`` has put nothing there in a directory that has been removed.  A directory or zip
    file that is the program ``always`` comes first.
    """
    begun = 0
    if not sys.flags.safe_path:
        is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
        begun = 0 if is_module and not working_directory() else 1
    elif not always:
        return
    sys.path[:begun] = [] if directory is None else [directory]


def script(path: str) -> PythonProgram:
    """The program in the file ``path``, or the ``__main__.py`` of the directory or zip file there.

    ``-`` is standard input.  UnrunnableProgram where it is no program.
    """
    if path == "-":
        _begin_path("")
        of_stdin = {**_OF_NO_FILE, "__file__": "<stdin>", "__cached__": None}
        return PythonProgram(_compiled(_read(0), "<stdin>"), path, of_stdin)
    file = _absolute(path)
    if _is_imported_from(file):
        _begin_path(file, always=True)
        return PythonProgram(None, path, _OF_NO_FILE)
    try:
        text, is_compiled = _read_program(path)
    except OSError as error:
        said = f"{sys.orig_argv[0]}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}"
        raise UnrunnableProgram(said) from None
    _begin_path(os.path.dirname(_place_of(path)))
    loader = (SourcelessFileLoader if is_compiled else SourceFileLoader)("__main__", file)
    names = {
        "__file__": file,
        "__loader__": loader,
        "__package__": None,
        "__spec__": None,
        "__cached__": None,
    }
    return PythonProgram((_compiled_before if is_compiled else _compiled)(text, file), path, names)


def _absolute(path: str) -> str:
    """``path`` as Python itself makes it absolute: put behind the working directory, which alone is ``.``."""
    directory = working_directory()
    return directory if directory and path in ("", ".") else os.path.join(directory, path)


def _is_imported_from(path: str) -> bool:
    """Whether Python would import from there: a directory or zip file, whatever may stand before it."""
    find = ctypes.pythonapi.PyImport_GetImporter  # what Python's main asks, and remembers
    find.argtypes, find.restype = [ctypes.py_object], ctypes.py_object
    return find(path) is not None


def _place_of(path: str) -> str:
    """Where the file is that ``path`` leads to; of a pipe, as far as Python itself follows it."""
    try:
        return os.path.realpath(path, strict=True)
    except OSError:
        link = os.readlink(path) if os.path.islink(path) else ""
        return os.path.join(os.path.dirname(path), link) if "/" in link else path


def _read_program(path: str) -> tuple[bytes, bool]:
    """The text or the compiled code there, and whether it is compiled; OSError."""
    with open(path, "rb", buffering=0) as stream:
        begin = stream.read(2)
        is_compiled = path.endswith(".pyc") or begin == MAGIC_NUMBER[:2]
        return begin + (stream.readall() or b"" if is_compiled else _read(stream.fileno())), is_compiled


def _read(descriptor: int) -> bytes:
    """What can be read there, once: it may be a pipe.  What has a zero byte is no program."""
    text = bytearray()
    with open(descriptor, "rb", closefd=False, buffering=0) as stream:
        while part := stream.read(_PART):
            text += part
            if b"\0" in part:
                break
    return bytes(text)


def _compiled(text: bytes, file: str) -> CodeType:
    """The code of the program that ``file`` is; UnrunnableProgram where it is none."""
    end = text.find(b"\0")
    try:
        if end < 0 and _is_decodable(text):
            return _code(text, file)
        line = text.count(b"\n", 0, end) + 1
        error: Exception = SyntaxError("source code cannot contain null bytes", (file, line, None, None))
    except Exception as failure:  # noqa: BLE001 - whatever it is, Python would show it
        error = failure
        if not any(word in str(error) for word in ("codec", "encoding")):
            raise UnrunnableProgram(error) from None
    # Before 3.11.4 a zero byte ended the text, and what was before it was run.
    fails = end < 0 or sys.version_info >= (3, 11, 4) or not _is_decodable(text[:end])
    if fails and (end < 0 or len(text) < _PART):  # of a device or a hole it is not all
        error = _as_of_file(text, file) or error
    raise UnrunnableProgram(error) from None


def _is_decodable(text: bytes) -> bool:
    """Whether it is UTF-8, or says to be something else: bytes in a comment are nothing to compile()."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return re.match(_CODING, text) is not None
    return True


def _code(text: bytes | str, file: str) -> CodeType:
    code: CodeType = compile(text, file, "exec", dont_inherit=True)  # this module's own __future__
    return code


def _as_of_file(text: bytes, file: str) -> Exception | None:
    """What Python says of a program that it cannot decode: other words, where it reads a file.

    None of it is run: Python reads a file to its end before it does so.
    """
    libc, run = ctypes.PyDLL(None), ctypes.pythonapi.PyRun_FileExFlags
    libc.fdopen.restype = ctypes.c_void_p
    run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, *[ctypes.py_object] * 2]
    run.argtypes += [ctypes.c_int, ctypes.c_void_p]
    run.restype = ctypes.py_object
    try:
        descriptor = os.memfd_create("program")
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(text)
        os.lseek(descriptor, 0, os.SEEK_SET)
        opened = libc.fdopen(descriptor, b"rb")
        if opened is None:  # no memory
            os.close(descriptor)
            return None
        run(opened, os.fsencode(file), _FILE_INPUT, {"__builtins__": {}}, {}, 1, None)
    except Exception as error:  # noqa: BLE001 - what was to be seen
        return error if not isinstance(error, OSError) else None
    return None


def _compiled_before(text: bytes, _: str) -> CodeType:
    """The code of a program that was compiled, by this version of Python; UnrunnableProgram where not."""
    ends_early = UnrunnableProgram(EOFError("EOF read where not expected"))
    if len(text) < len(MAGIC_NUMBER) and sys.version_info >= (3, 13):
        raise ends_early
    if text[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:
        raise UnrunnableProgram(RuntimeError("Bad magic number in .pyc file"))
    if len(text) < _HEAD:
        raise ends_early
    try:
        code = marshal.loads(text[_HEAD:])
    except (EOFError, ValueError, TypeError):
        code = None
    if not isinstance(code, CodeType):
        raise UnrunnableProgram(RuntimeError("Bad code object in .pyc file"))
    return code


def code(text: str) -> PythonProgram:
    """The program that ``text`` is; UnrunnableProgram where it is none."""
    _begin_path("")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        tell("Unable to decode the command from the command line:")
        raise UnrunnableProgram(error) from None
    if sys.version_info >= (3, 14) and text[:1].isspace():
        with importing:
            from textwrap import dedent

        text = dedent(text)
    try:
        compiled = _code(text, "<string>")
    except Exception as error:  # noqa: BLE001 - whatever it is, Python would show it
        raise UnrunnableProgram(error) from None
    if sys.version_info >= (3, 13):  # from then on its lines are shown
        with importing:
            import linecache

        linecache._register_code(compiled, text, "<string>")  # type: ignore[attr-defined]  # as Python's main does
    return PythonProgram(compiled, "-c", _OF_NO_FILE)


def module(name: str) -> PythonProgram:
    """The program that the module ``name`` is, or the ``__main__`` of a package."""
    _begin_path(working_directory() or None)  # as Python's own -m in a directory that has been removed
    return PythonProgram(None, "-m", _OF_NO_FILE, name, is_named=True)
