"""The command line: one table of commands, one place where errors become exit statuses.

Each command is a module ``miniloader.cli.NAME`` (see :class:`miniloader.cli.parser.Command`).  Importing
them has to cost next to nothing, since ``--help`` imports them all: what a command needs, it imports
inside ``run``.

Exit status: see :data:`EXIT_STATUSES`.
"""

from __future__ import annotations

import gc
import os
import sys

from miniloader import __version__
from miniloader.cli.exit_status import CLOSED_PIPE, EXIT_STATUSES, INTERRUPTED
from miniloader.errors import MiniloaderError, printable, tell
from miniloader.shortage import demand_room, fault, refused

TYPE_CHECKING = False  # typing is slow to import, and --version needs this module
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence
    from types import FrameType

__all__ = ["CLOSED_PIPE", "COMMANDS", "EXIT_STATUSES", "INTERRUPTED", "leave", "main", "reported"]

#: The commands, in the order ``--help`` shows them.
COMMANDS: tuple[str, ...] = (
    "inspect",
    "tree",
    "check",
    "load",
    "run",
    "disasm",
    "prove",
    "audit",
    "diff",
    "walkthrough",
    "prepare",
    "cache",
    "doctor",
)

#: What pyproject.toml asks for, by the name of its first import: an installation may have lost it.
_PROJECTS = {
    "capstone": "capstone",
    "elftools": "pyelftools",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "prometheus_client": "prometheus-client",
    "pycxxfilt": "pycxxfilt",
    "rich": "rich",
    "shtab": "shtab",
}


def main(argv: Sequence[str] | None = None, *, paused: bool = False) -> int:
    """Run one command line (``sys.argv`` when ``argv`` is None) and return its exit status.

    Where looking for garbage is ``paused``, it goes on when what comes first is imported.

    An error is one line on standard error and, with ``--json``, the object
    ``{"error": {"kind", "message"}}`` on standard output.  ``--debug``, which no help shows, lets the
    traceback through.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _main(words, is_process=argv is None, paused=paused)
    except Exception as error:  # where there is no memory, anything: Python may lose what it was to raise
        _spare.clear()
        if "--debug" in words:
            raise
        try:
            return _report(error, as_json="--json" in words)
        except Exception:  # noqa: BLE001 - nor is there any to say so with
            os.write(2, b"miniloader: too little memory\n")
            return 1


def _main(words: list[str], *, is_process: bool, paused: bool) -> int:
    """The status of a command line; the process ends with it where it ``is_process``."""
    if words[:1] == [_ANOTHER_PROGRAM]:
        return _run_another(words, paused=paused)
    from miniloader.startup import open_what_is_closed, travel_light

    travel_light()
    if paused:
        gc.enable()
    demand_room()
    open_what_is_closed()
    _escape_what_cannot_be_printed()
    try:
        _spare[:] = [bytes(_SPARE)]  # which touches no page of it
    except MemoryError:
        return _report(MemoryError(), as_json="--json" in words)
    status = reported(lambda: _dispatch(words), as_json="--json" in words, debug="--debug" in words)
    if is_process:
        gc.freeze()  # it need not look for garbage among all that it holds
        leave(status)
    return status


def leave(status: int) -> None:
    """End the process as Python does, but for taking down what it holds, which takes up to ten milliseconds.

    Where that is not to be had, it returns, and Python ends the process.
    """
    ctypes, threading = sys.modules.get("ctypes"), sys.modules.get("threading")
    if ctypes is None:  # nothing large was imported, either
        return
    import atexit

    if threading is not None:
        threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):  # Python has its own words for that
        return
    ctypes.PyDLL(None).exit(status)  # of C: destructors of libraries run, and what C has printed is written


_SPARE = 4 << 20
_spare: list[bytes] = []
"""Memory that is let go when something goes wrong: where there was none left, it can be said."""


#: The command whose process is another program's: nothing is changed there that programs can see.
_ANOTHER_PROGRAM = "run"


def _run_another(words: list[str], *, paused: bool) -> int:
    """The status of another program, run in this process: :func:`main` without what is for commands alone."""

    def run() -> int:
        from miniloader.cli.run import put_program, split, without_options

        arguments = without_options(words[1:])
        if arguments is None:
            from miniloader.cli.parser import build, parse

            options, program = split(words[1:])
            try:
                arguments = parse(build((_ANOTHER_PROGRAM,)), [_ANOTHER_PROGRAM, *options])
            except SystemExit as done:  # --help
                return int(done.code or 0)
            if program:
                put_program(arguments, program)
        arguments.is_process = paused
        if paused:
            gc.freeze()  # of what is there nothing is garbage
            gc.enable()
        status: int = arguments.run(arguments)
        return status

    return reported(run, as_json=False, debug="--debug" in words[:2], flushes=False)


def reported(function: Callable[[], int], *, as_json: bool, debug: bool, flushes: bool = True) -> int:
    """The status that ``function`` returns, or that of the error it raises, which is reported.

    What it has printed is flushed, so that it can be told where that fails; a program's own output is
    flushed, and told of, by Python.
    """
    try:
        status = function()
        if flushes:
            _flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        _spare.clear()
        if debug:
            raise
        return _report(error, as_json=as_json)


def _dispatch(words: list[str]) -> int:
    if words in (["--version"], ["-V"], ["version"]):  # not worth the price of argparse
        print(f"miniloader {__version__}")
        return 0
    from miniloader.startup import import_argparse

    import_argparse()
    from miniloader.cli.parser import build, parse

    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    named = tuple(words[:1])
    parser = build(named if set(named) & set(COMMANDS) else COMMANDS)  # one command needs no other
    try:
        arguments = parse(parser, words)
    except SystemExit as done:  # --help, --completion
        return int(done.code or 0)
    if arguments.run is None:
        tell(parser.format_help().rstrip("\n"))
        return 2
    return _interruptible(arguments.run, arguments)


def _interruptible(run: Callable[[Namespace], int], arguments: Namespace) -> int:
    """``run``'s status.

    An interrupt is hidden by numpy, which makes an ImportError of it while it is imported, and by Python
    where it comes in a callback or destructor, whose exceptions are told and no more: that one comes again.
    """
    import _thread
    import signal
    import time
    from contextlib import suppress

    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # inherited, and nobody could wait for a child
        with suppress(ValueError):  # a thread sets no handlers
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return run(arguments)
    heard = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    thread = _thread.get_ident()

    def again() -> None:
        time.sleep(0.001)  # until Python is out of what hid it
        signal.pthread_kill(thread, signal.SIGINT)  # which wakes it, too

    def hidden(error: sys.UnraisableHookArgs) -> None:
        if issubclass(error.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(again, ())
        else:
            tell_hidden(error)

    tell_hidden, sys.unraisablehook = sys.unraisablehook, hidden
    with suppress(ValueError):  # a thread gets no signals
        signal.signal(signal.SIGINT, note)
    try:
        return run(arguments)
    except ImportError as error:
        if heard:
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = tell_hidden
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _report(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong on one line; return the exit status."""
    match error:
        case BrokenPipeError():  # the reader (head, less) has seen enough
            _drop_output()
            return CLOSED_PIPE
        case MiniloaderError():
            status, message = error.exit_status, str(error)
        case KeyboardInterrupt():
            # Python remembers an interrupt out of exec() as unhandled (a dataclass is made by one), and would
            # end by SIGINT after all, but for another exec().
            exec("")
            status, message = INTERRUPTED, "interrupted"
        case OSError(strerror=str()):
            status, message = 1, refused(error, "; --debug shows which")
        case ModuleNotFoundError(name=str(name)) if name in _PROJECTS:
            install = f"{sys.executable} -m pip install {_PROJECTS[name]}"
            status, message = 3, f"this Python lacks {_PROJECTS[name]}, which miniloader needs; {install}"
        case _:
            status, message = 1, fault(error, "; --debug shows where")
    try:
        if as_json:
            from miniloader.report.json import dump

            dump({"error": {"kind": type(error).__name__, "message": printable(message)}})
        _flush()
    except OSError:  # what matters is the error itself
        _drop_output()
    tell(f"miniloader: {printable(message)}")
    return status


def _escape_what_cannot_be_printed() -> None:
    """In a locale without, say, ``→``, write signs that it has."""
    from codecs import register_error
    from io import TextIOWrapper

    register_error("miniloader.signs", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="miniloader.signs")


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What codecs write instead of what they cannot."""
    from miniloader.report.signs import spelled

    assert isinstance(error, UnicodeEncodeError)
    return spelled(error.object[error.start : error.end]), error.end


def _flush() -> None:
    """Write out what is buffered now, while an error can still be reported."""
    if sys.stdout is not None:  # it is None where standard output is closed
        sys.stdout.flush()


def _drop_output() -> None:
    """Send what is still buffered nowhere, or the interpreter would try again when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
