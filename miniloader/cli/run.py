"""``miniloader run``: a Python program whose extension modules miniloader loads, and what that cost."""

from __future__ import annotations

import sys
from types import SimpleNamespace

TYPE_CHECKING = False  # typing, argparse: the program may do without
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from contextlib import ExitStack

    from miniloader.loader.running.bill import Bill
    from miniloader.loader.running.importing import Imports
    from miniloader.loader.running.program import PythonProgram

__all__ = ["HELP", "configure", "put_program", "run", "split", "without_options"]

HELP = "run a Python program with its extension modules loaded by miniloader, and say what each cost"

_EXAMPLES = """\
  miniloader run script.py ARGUMENTS…
  miniloader run -m pytest -x tests
  miniloader run -c 'import scipy.linalg'
  generate | miniloader run -
  miniloader run --bill - -c 'import sqlite3'       every library, in full, on standard error
  miniloader run --writers - server.py              who wrote first to the pages that workers inherit

Options of miniloader stand before the program. The interpreter's own calls of dlopen are led to
miniloader, so that import, ctypes and cffi all load through it; CPython initialises the modules as ever.
What miniloader itself needs is loaded by ld.so before. The program ends as it would end without: exit
status, output, signals are its own.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The program, with all that follows it, and what is to be done with the bill."""
    import argparse

    from miniloader.cli import options

    options.examples(parser, _EXAMPLES)
    parser.usage = "miniloader run [OPTIONS] (PROGRAM | -m MODULE | -c CODE) [ARGUMENTS]"
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="MODULE: run it, or a package's __main__"
    )
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, help="CODE: run this text")
    parser.add_argument(
        "program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="a Python program, and its arguments"
    )
    parser.add_argument(
        "--bill",
        metavar="FILE",
        help="write the whole bill there, - for standard error, instead of a summary",
    )
    parser.add_argument("--no-bill", action="store_true", help="say nothing of what it cost")
    parser.add_argument(
        "--writers",
        metavar="FILE",
        help="write there (- for standard error) which pages forked processes were the first to write to",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="load only what fits, such as '*/scipy/*'; the rest is ld.so's"
    )
    parser.add_argument(
        "--strict", action="store_true", help="what cannot be loaded is an error: no falling back to ld.so"
    )
    parser.add_argument("--trace", action="store_true", help="tell each step on standard error as it happens")
    parser.add_argument("--follow", action="store_true", help="new Python interpreters that it starts, too")
    options.prepared(parser)


_WITH_VALUE = ("bill", "writers", "only")
#: What there is of each option that is not given.
_WITHOUT = {
    **dict.fromkeys(("module", "code", *_WITH_VALUE)),
    **dict.fromkeys(("no_bill", "strict", "trace", "follow", "prepared", "json", "debug"), False),
}


def without_options(words: Sequence[str]) -> argparse.Namespace | None:
    """What the ``words`` behind ``run`` say where no option is before the program; else None.

    As the parser would have it, which takes longer to be made than all modules of a small program.
    """
    options, program = split(words)
    if options or not program:
        return None
    name, told = _program_of(words)
    if not told or told[0].startswith("-"):
        return None
    return SimpleNamespace(**{**_WITHOUT, "program": [], name: told, "run": run})  # type: ignore[return-value]


def _program_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """What those ``words`` are called among parsed arguments: the program, and its own."""
    name = {"-m": "module", "-c": "code"}.get(words[0], "program")
    return name, list(words if name == "program" else words[1:])


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options before the program, and the rest, whose words are the program's, ``--`` too.

    A parser takes that one for its own, and drops it.
    """
    place = 0
    while place < len(words) and words[place] not in ("-m", "-c", "-") and words[place].startswith("-"):
        if words[place] == "--" or words[place][:2] in ("-m", "-c"):  # as one word: the parser's
            return list(words), []
        with_value = any(f"--{option}".startswith(words[place]) for option in _WITH_VALUE)
        place += 2 if with_value else 1
    return list(words[:place]), list(words[place:])


def put_program(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    """Have the parsed ``arguments`` name the program, and its own words, that :func:`split` has found."""
    name, told = _program_of(words)
    setattr(arguments, name, told)


def run(arguments: argparse.Namespace) -> int:
    """Run the program in this process.  Returns 0 when it comes to its end; else it ends as programs do."""
    status = _status_of(arguments)
    if sys.flags.inspect:
        _leave_to_python(status)
    return status


def _status_of(arguments: argparse.Namespace) -> int:
    import gc

    from miniloader.errors import UsageError

    words = next(filter(None, (arguments.module, arguments.code, arguments.program)), None)
    if not words:
        raise UsageError(
            "nothing to run: give a program, -m MODULE or -c CODE", hint="see miniloader run --help"
        )
    collects = gc.isenabled()
    gc.disable()  # what is imported until then is no garbage
    try:
        begun = _set_out(arguments, words[0])
        if isinstance(begun, int):
            return begun
        if arguments.is_process:  # or what is there is another's, and its garbage would stay
            gc.freeze()  # what is ours: the program's collections look at it as little as without us
    finally:
        if collects:
            gc.enable()
    option = ["-m"] if words is arguments.module else ["-c"] if words is arguments.code else []
    _leave_out_the_command([*option, *words])
    return _run(*begun, words[1:])


def _leave_out_the_command(words: list[str]) -> None:
    """Have sys.orig_argv be as Python has it, for the program that these ``words`` name and are given to.

    Options of Python's own stand before them, as they stood before the command.
    """
    before = len(sys.orig_argv) - len(sys.argv[1:])
    if before < 2 or sys.orig_argv[before:] != sys.argv[1:]:
        return  # somebody else has called us
    *options, command = sys.orig_argv[:before]
    if command.startswith("-"):  # -mminiloader
        options.append(command.partition("m")[0])
    elif options[-1].startswith("-") and options[-1].endswith("m") and len(options) > 1:
        options[-1] = options[-1][:-1]
    sys.orig_argv[:] = [*(option for option in options if option != "-"), *words]


def _set_out(arguments: argparse.Namespace, word: str) -> tuple[PythonProgram, ExitStack] | int:
    """The program; from now on, until the stack is closed, what it opens comes through us.

    Where it cannot begin that is shown, and what it ends with is returned.
    """
    import atexit
    from contextlib import ExitStack

    # All that is imported until the program begins, before its directory is looked into.
    from miniloader.lab.workers.fault_teller import tell_faults
    from miniloader.loader.running.importing import importing
    from miniloader.loader.running.program import UnrunnableProgram

    tell = None
    if arguments.trace:
        from miniloader.report.load import Narrator

        tell = Narrator(stderr=True)
    if arguments.writers is not None:  # before what is imported is loaded by us, and billed
        from miniloader.lab.erosion.watched_program import watch
    loading = ExitStack()
    if arguments.follow:
        _have_followed(arguments)
    path = list(sys.path)
    imports = loading.enter_context(
        importing(arguments.only, strict=arguments.strict, prepared=arguments.prepared, on_event=tell)
    )
    try:
        program = _program(arguments, word)
    except UnrunnableProgram as error:
        loading.close()
        error.show()
        return 1  # where Python ends with 2, too: a file that is not there is no wrong usage
    # Left at the very end: what the program's threads and exit handlers import comes through us, too.
    atexit.register(loading.close)
    if arguments.writers is not None:
        watch("miniloader.cli.run_writers", arguments.writers, "json" if arguments.json else "text", path)
    if not arguments.no_bill:
        atexit.register(_write_at_end, imports, arguments.bill, arguments.json, path)
    tell_faults()  # what ends the program by a fault is told with the library, the function and the place
    return program, loading


def _program(arguments: argparse.Namespace, word: str) -> PythonProgram:
    from miniloader.loader.running import program

    if arguments.module:
        return program.module(word)
    return program.code(word) if arguments.code else program.script(word)


def _have_followed(arguments: argparse.Namespace) -> None:
    """What the program starts with this environment, and is Python, loads as this process does."""
    import json
    import os
    from pathlib import Path

    import miniloader
    from miniloader.loader import running

    rules = {name: getattr(arguments, name) for name in ("only", "strict", "prepared")}
    os.environ["MINILOADER_RUN"] = json.dumps({"package": str(Path(miniloader.__file__).parents[1]), **rules})
    follow = str(Path(running.__file__).with_name("follow"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (follow, os.environ.get("PYTHONPATH"))))


def _run(program: PythonProgram, loading: ExitStack, words: list[str]) -> int:
    """Run it; an exception that it does not catch is shown as Python shows it, and ends it so.

    Of a program that has not begun there is no bill, and it opens nothing any more.
    """
    import _signal  # type: ignore[import-not-found]  # signal makes enumerations of it: the program may do without
    import os

    from miniloader.errors import tell
    from miniloader.loader.running.outermost import show_outermost

    try:
        program.run(words)
        return 0
    except SystemExit as error:
        own = program.own_traceback(error.__traceback__)
        begun = program.has_begun(own)
        if not begun and isinstance(error.code, str):
            _take_back(loading)
            tell(error.code)
            return 1
        if not sys.flags.inspect:
            raise
        uncaught: BaseException = error.with_traceback(own)
    except BaseException as error:  # the program's
        own = program.own_traceback(error.__traceback__)
        if not program.has_begun(own):
            _take_back(loading)
        if own is None and isinstance(error, Exception):  # it has not begun: memory lacks even for that
            raise
        uncaught = error.with_traceback(own or error.__traceback__)
    show_outermost(uncaught)  # here none is being handled any more, as Python's own main has it
    if isinstance(uncaught, KeyboardInterrupt) and not _is_prompt_to_come():
        _end()
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        os.kill(os.getpid(), _signal.SIGINT)
    return 1


def _is_prompt_to_come() -> bool:
    import os

    return bool(sys.flags.inspect and (sys.flags.interactive or os.isatty(0)))


def _leave_to_python(status: int) -> None:
    """Have Python go on as it does behind a program under -i: with its prompt, where one comes."""
    import ctypes

    if not _is_prompt_to_come():
        ctypes.pythonapi.Py_Exit(status)
    last = ("last_exc", "last_type", "last_value", "last_traceback")
    shown, hook = {name: vars(sys)[name] for name in last if name in vars(sys)}, sys.excepthook

    def say_nothing(*_: object) -> None:
        """Of the command's own SystemExit, which Python shows before its prompt."""
        sys.excepthook = hook
        for name in last:
            vars(sys).pop(name, None)
        vars(sys).update(shown)

    sys.excepthook = say_nothing


def _take_back(loading: ExitStack) -> None:
    """What was to be done at the end of a program is done now, or not at all."""
    import atexit

    atexit.unregister(_write_at_end)
    atexit.unregister(loading.close)
    loading.close()


def _end() -> None:
    """What Python does at its end, for a program that ends by a signal."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _write_at_end(imports: Imports, file: str | None, as_json: bool, path: list[str]) -> None:
    """Write the bill of a program that has begun; what that takes is imported as ``sys.path`` was before."""
    from miniloader.loader.running.own_modules import as_before

    with as_before(path):
        _write(imports.bill, file, as_json=as_json)


def _write(bill: Bill, path: str | None, *, as_json: bool) -> None:
    """Write the bill: a summary unless there is a ``path``, to standard error unless that is of a file."""
    from miniloader.cli.aside import tell_aside
    from miniloader.report import bill as shown

    parts = shown.lines(bill) if path else shown.summary(bill)
    tell_aside(path or "-", parts, shown.as_json(bill) if as_json else None)
