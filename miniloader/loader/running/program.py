"""A Python program, run as ``python`` itself would: a script, a module (``-m``), or lines of code (``-c``).

What ``__main__``, ``sys.argv`` and ``sys.path[0]`` are is as Python's own start has it; modules, directories
and zip files are run by :mod:`runpy`, as Python itself runs them.
"""

from __future__ import annotations

import builtins
import os
import runpy
import stat
import struct
import sys
import zipimport
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Final, TypeVar

from miniloader.errors import LoadError
from miniloader.files import working_directory
from miniloader.forking import importing
from miniloader.loader.running.outermost import call_outermost
from miniloader.values import dataclass

__all__ = ["PythonProgram", "code", "module", "script"]

_Function = TypeVar("_Function", bound=Callable[..., None])
_ROOM: Final = 1 << 17  # bytes: a thousand calls
_PART: Final = 1 << 20  # bytes that are read at once
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
        main = ModuleType("__main__")
        # From 3.14 on annotations are made when somebody asks for them.
        annotations = {"__annotations__": dict[str, object]()} if sys.version_info < (3, 14) else {}
        main.__dict__.update(self.names, __builtins__=builtins, **annotations)
        sys.modules["__main__"] = main
        sys.argv[:] = [self.name, *arguments]
        if self.code is None:
            run_module = runpy._run_module_as_main  # type: ignore[attr-defined]  # what Python's main calls
            call_outermost(partial(run_module, self.module), self.is_named)
        else:
            call_outermost(partial(exec, self.code, main.__dict__), main.__dict__, _COUNTED)

    def own_traceback(self, trace: TracebackType | None) -> TracebackType | None:
        """The part of ``trace`` that is the program's, as Python would show it; None where nothing is."""
        while trace is not None and trace.tb_frame.f_code is not call_outermost.__code__:
            trace = trace.tb_next
        return trace.tb_next if trace is not None else None

    def has_begun(self, trace: TracebackType | None) -> bool:
        """Whether ``trace`` comes from the program, not from who looks for it."""
        run_code = runpy._run_code.__code__  # type: ignore[attr-defined]
        while self.code is None and trace is not None and trace.tb_frame.f_code is not run_code:
            trace = trace.tb_next
        return trace is not None


def _begin_path(directory: str | None) -> None:
    """Modules are looked for in ``directory`` first, unless Python was told to look in no such place (-P).

    It comes in the place of what miniloader's own start had put there, and where it is None nothing does.
    ``python -m miniloader`` has put nothing there in a directory that has been removed.
    """
    if not sys.flags.safe_path:
        is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
        begun = 0 if is_module and not working_directory() else 1
        sys.path[:begun] = [] if directory is None else [directory]


def script(path: str) -> PythonProgram:
    """The program in the file ``path``, or the ``__main__.py`` of the directory or zip file there.

    ``-`` is standard input.  SyntaxError where it is no program.
    """
    if path == "-":
        _begin_path("")
        of_stdin = {**_OF_NO_FILE, "__file__": "<stdin>", "__cached__": None}
        return PythonProgram(_compiled(_read(0), "<stdin>"), path, of_stdin)
    file = os.path.join(working_directory(), path)
    if os.path.isdir(path) or _is_zip(path):
        _begin_path(file)
        return PythonProgram(None, path, _OF_NO_FILE)
    try:
        text = _read(path)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}", hint="give a Python program") from None
    _begin_path(os.path.dirname(_place_of(path)))
    is_compiled = os.path.splitext(path)[1] == ".pyc"
    loader = (SourcelessFileLoader if is_compiled else SourceFileLoader)("__main__", file)
    names = {
        "__file__": file,
        "__loader__": loader,
        "__package__": None,
        "__spec__": None,
        "__cached__": None,
    }
    if not is_compiled:
        return PythonProgram(_compiled(text, file), path, names)
    try:
        return PythonProgram(loader.get_code("__main__"), path, names)
    except (ImportError, EOFError, ValueError) as error:
        raise LoadError(f"{path}: {error}", hint="compiled by another version of Python?") from None


def _place_of(path: str) -> str:
    """Where the file is that ``path`` leads to; of a pipe, as far as Python itself follows it."""
    try:
        return os.path.realpath(path, strict=True)
    except OSError:
        link = os.readlink(path) if os.path.islink(path) else ""
        return os.path.join(os.path.dirname(path), link) if "/" in link else path


def _read(file: str | int) -> bytes:
    """What can be read there, once: it may be a pipe.  What has a zero byte is no program."""
    text = bytearray()
    with open(file, "rb", closefd=isinstance(file, str), buffering=0) as stream:
        while part := stream.read(_PART):
            text += part
            if b"\0" in part:
                break
    return bytes(text)


def _compiled(text: bytes | str, file: str) -> CodeType:
    """The code of a program; SyntaxError where it is none."""
    if isinstance(text, bytes) and (end := text.find(b"\0")) >= 0:
        line = text.count(b"\n", 0, end) + 1
        raise SyntaxError("source code cannot contain null bytes", (file, line, None, None))
    compiled: CodeType = compile(text, file, "exec", dont_inherit=True)  # this module's own __future__
    return compiled


def _is_zip(path: str) -> bool:
    """Whether Python would import from the file: a zip file, whatever may stand before it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        zipimport.zipimporter(path)
    except (OSError, zipimport.ZipImportError):
        return False
    return True


def code(text: str) -> PythonProgram:
    """The program that ``text`` is."""
    _begin_path("")
    compiled = _compiled(text, "<string>")
    if sys.version_info >= (3, 13):  # from then on its lines are shown
        with importing:
            import linecache

        linecache._register_code(compiled, text, "<string>")  # type: ignore[attr-defined]  # as Python's main does
    return PythonProgram(compiled, "-c", _OF_NO_FILE)


def module(name: str) -> PythonProgram:
    """The program that the module ``name`` is, or the ``__main__`` of a package."""
    _begin_path(working_directory() or None)  # as Python's own -m in a directory that has been removed
    return PythonProgram(None, "-m", _OF_NO_FILE, name, is_named=True)
