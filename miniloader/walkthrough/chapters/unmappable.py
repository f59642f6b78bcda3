"""Chapter 6: what cannot be mapped."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

from miniloader.kernel import syscalls
from miniloader.kernel.syscalls import MAP_PRIVATE, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE
from miniloader.values import dataclass
from miniloader.walkthrough.model import (
    Answer,
    Chapter,
    Choice,
    Exercise,
    Finding,
    Question,
    Statement,
    Step,
    Table,
)
from miniloader.walkthrough.recorded_calls import Calls
from miniloader.walkthrough.workbench import Bench

__all__ = ["CHAPTER", "Seen"]

_BOTH = PROT_READ | PROT_WRITE


@dataclass(frozen=True)
class Seen:
    """The answer to each attempt: "mapped", the name of an errno, or "not here: …" when it could not be made.

    ``beyond`` is the signal that touching a page beyond the end of the file gave.
    """

    answers: dict[str, str]
    beyond: str


class _Attempt(NamedTuple):
    """One thing to map: how to open it, and how to map it."""

    what: str
    open: Callable[[Bench, ExitStack], int]
    protection: int = PROT_READ
    flags: int = MAP_SHARED
    length: int = PAGE_SIZE
    offset: int = 0


def _pipe(bench: Bench, stack: ExitStack) -> int:
    reading, writing = bench.do("pipe2(…, O_CLOEXEC)", os.pipe)
    stack.callback(os.close, writing)
    return reading


def _fifo(bench: Bench, stack: ExitStack) -> int:
    path = os.path.join(bench.place().directory, "fifo")
    bench.do('mkfifo("fifo", 0600)', lambda: os.mkfifo(path, 0o600), lambda _: "0")
    return bench.open(path, os.O_RDWR)


def _socket(family: int, kind: int, text: str) -> Callable[[Bench, ExitStack], int]:
    def make(bench: Bench, stack: ExitStack) -> int:
        made: socket.socket = bench.do(text, lambda: socket.socket(family, kind), lambda s: str(s.fileno()))
        return made.detach()

    return make


def _terminal(bench: Bench, stack: ExitStack) -> int:
    leader, follower = bench.do("openpty(…)", os.openpty)
    stack.callback(os.close, leader)
    return follower


def _epoll(bench: Bench, stack: ExitStack) -> int:
    made = bench.do("epoll_create1(EPOLL_CLOEXEC)", select.epoll, lambda e: str(e.fileno()))
    stack.callback(made.close)
    return os.dup(made.fileno())


def _path(path: str, flags: int = os.O_RDONLY) -> Callable[[Bench, ExitStack], int]:
    return lambda bench, stack: bench.open(path, flags)


def _own(flags: int) -> Callable[[Bench, ExitStack], int]:
    return lambda bench, stack: bench.open(os.path.join(bench.place().directory, "file"), flags)


def _directory(bench: Bench, stack: ExitStack) -> int:
    return bench.open(bench.place().directory, os.O_RDONLY | os.O_DIRECTORY)


def _closed(bench: Bench, stack: ExitStack) -> int:
    fd = bench.open(os.path.join(bench.place().directory, "file"), os.O_RDONLY)
    bench.close(fd)
    return fd


def _sealed(bench: Bench, stack: ExitStack) -> int:
    fd = bench.do(
        "memfd_create(…, MFD_ALLOW_SEALING)", lambda: os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    )
    os.ftruncate(fd, PAGE_SIZE)
    text = f"fcntl({fd}, F_ADD_SEALS, F_SEAL_WRITE)"
    bench.do(text, lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))
    return fd


_STREAMS: Final = (
    _Attempt("a pipe", _pipe),
    _Attempt("a FIFO", _fifo),
    _Attempt("a Unix socket", _socket(socket.AF_UNIX, socket.SOCK_STREAM, "socket(AF_UNIX, SOCK_STREAM, 0)")),
    _Attempt("a UDP socket", _socket(socket.AF_INET, socket.SOCK_DGRAM, "socket(AF_INET, SOCK_DGRAM, 0)")),
    _Attempt("a terminal", _terminal),
)
_OTHERS: Final = (
    _Attempt("a TCP socket", _socket(socket.AF_INET, socket.SOCK_STREAM, "socket(AF_INET, SOCK_STREAM, 0)")),
    _Attempt("a directory", _directory),
    _Attempt("an epoll instance", _epoll),
    _Attempt("/dev/null", _path("/dev/null")),
    _Attempt("/dev/zero, private", _path("/dev/zero", os.O_RDWR), _BOTH, MAP_PRIVATE),
    _Attempt("/proc/self/maps", _path("/proc/self/maps")),
    _Attempt("a file", _own(os.O_RDONLY)),
)
_RIGHTS: Final = (
    _Attempt("write-only file, to read", _own(os.O_WRONLY)),
    _Attempt("read-only file, shared, to write", _own(os.O_RDONLY), _BOTH),
    _Attempt("read-only file, private, to write", _own(os.O_RDONLY), _BOTH, MAP_PRIVATE),
    _Attempt("sealed memory, shared, to write", _sealed, _BOTH),
    _Attempt("sealed memory, private, to write", _sealed, _BOTH, MAP_PRIVATE),
)
_SHAPES: Final = (
    _Attempt("a descriptor of O_PATH", _own(os.O_RDONLY | os.O_PATH)),
    _Attempt("a closed descriptor", _closed),
    _Attempt("length 0", _own(os.O_RDONLY), length=0),
    _Attempt("an offset inside a page", _own(os.O_RDONLY), offset=1),
    _Attempt("neither shared nor private", _own(os.O_RDONLY), flags=0),
    _Attempt("an offset beyond the end", _own(os.O_RDONLY), offset=16 * PAGE_SIZE),
)
_GROUPS: Final = (
    ("streams", "What has no offsets: bytes come once, in order, and are gone when read.", _STREAMS),
    (
        "other things",
        "A socket of another kind, things that are no file, devices, and a plain file.",
        _OTHERS,
    ),
    ("rights", "The descriptor's mode limits the mapping: a mapping is no way around it.", _RIGHTS),
    ("shapes", "Requests that make no sense, and one that only seems to.", _SHAPES),
)


def _attempt(bench: Bench, one: _Attempt) -> str:
    """Try it for real; its answer."""
    with ExitStack() as stack:
        try:
            fd = one.open(bench, stack)
        except OSError as error:
            return f"not here: {error.strerror}"
        try:
            memory = bench.mmap(one.length, one.protection, one.flags, fd, one.offset)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        else:
            syscalls.munmap(*memory)
            return "mapped"
        finally:
            if one.open is not _closed:
                os.close(fd)


def _run(bench: Bench) -> Generator[Step, None, Seen]:
    path = bench.file("file", b"x" * 100)
    answers: dict[str, str] = {}
    for name, did, attempts in _GROUPS:
        for one in attempts:
            answers[one.what] = _attempt(bench, one)
        rows = tuple((one.what, answers[one.what], _MEANING.get(answers[one.what], "")) for one in attempts)
        yield Step(
            name, did, bench.calls(), tables=(Table("The answers", ("what", "mmap says", "that is"), rows),)
        )

    def touch(calls: Calls) -> Generator[Any, None, None]:
        fd = calls.open(path, os.O_RDONLY)
        memory = calls.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 16 * PAGE_SIZE)
        yield memory.address
        calls.load(memory.address)

    child = bench.child("a child", touch)
    address, made = child.next()
    bench.record(made, "child")
    beyond = bench.fatal(child, f"load 1 at {address:#x}")
    yield Step(
        "beyond the end",
        "The file has 100 bytes. A child maps it from page 16 on, which works, and touches that.",
        bench.calls(),
        (f"{beyond or 'Nothing'}: mmap does not ask how long the file is; the fault does.",),
    )
    return Seen(answers, beyond)


_MEANING: Final = {
    "ENODEV": "it has no mmap operation",
    "EACCES": "opened without that right",
    "EPERM": "the seal forbids it",
    "EBADF": "no descriptor to use",
    "EINVAL": "the request makes no sense",
}


# ---------------------------------------------------------------------------------------- claims
def _all(seen: Seen, wanted: dict[str, str]) -> Finding:
    """Whether each thing has its answer; what is not here is not counted, unless nothing is."""
    found = {what: seen.answers.get(what, "not here: not tried") for what in wanted}
    here = {what: answer for what, answer in found.items() if not answer.startswith("not here")}
    expected, observed = _by_answer(wanted), _by_answer(found)
    if any(answer != wanted[what] for what, answer in here.items()):
        return Finding(False, expected, observed)
    if len(here) < len(found):
        missing = [what for what in found if what not in here]
        return Finding(None, expected, observed, f"{', '.join(missing)} could not be made here")
    return Finding(True, expected, observed)


def _by_answer(answers: dict[str, str]) -> str:
    """``ENODEV: a pipe, a FIFO; mapped: a file``."""
    return "; ".join(
        f"{answer}: {', '.join(what for what, own in answers.items() if own == answer)}"
        for answer in dict.fromkeys(answers.values())
    )


def _streams(seen: Seen) -> Finding:
    return _all(seen, {one.what: "ENODEV" for one in _STREAMS})


def _tcp(seen: Seen) -> Finding:
    return _all(seen, {"a TCP socket": "mapped"})


def _files(seen: Seen) -> Finding:
    nothing = ("a directory", "an epoll instance", "/dev/null", "/proc/self/maps")
    return _all(seen, dict.fromkeys(nothing, "ENODEV") | {"/dev/zero, private": "mapped", "a file": "mapped"})


def _rights(seen: Seen) -> Finding:
    answers = ("EACCES", "EACCES", "mapped", "EPERM", "mapped")
    return _all(seen, {one.what: answer for one, answer in zip(_RIGHTS, answers, strict=True)})


def _shapes(seen: Seen) -> Finding:
    answers = ("EBADF", "EBADF", "EINVAL", "EINVAL", "EINVAL", "mapped")
    return _all(seen, {one.what: answer for one, answer in zip(_SHAPES, answers, strict=True)})


def _beyond(seen: Seen) -> Finding:
    return Finding(seen.beyond == "SIGBUS", "SIGBUS", seen.beyond or "nothing happened")


_SNIPPET = """\
import mmap, os

reading, writing = os.pipe()
os.write(writing, b"a stream, all of it")

try:
    memory = mmap.mmap(reading, 19, prot=mmap.PROT_READ)
except OSError as error:
    print(error)                   # a pipe cannot be mapped
    memory = b""
"""


def _check(names: dict[str, Any]) -> Answer:
    memory = names["memory"]
    good = type(memory).__name__ == "mmap" and bytes(memory[:19]) == b"a stream, all of it"
    if good:
        return Answer(True, "the stream's bytes lie in a mapping")
    return Answer(False, "memory should be a mapping that begins with the bytes that went into the pipe")


CHAPTER = Chapter(
    id="unmappable",
    number=6,
    title="What cannot be mapped",
    claim="Pipes, sockets and terminals are streams: they have no pages to map.",
    surprise="A TCP socket can be mapped: the kernel can show received pages without copying them.",
    claims=(
        Statement("streams-refuse", "Pipes, FIFOs, sockets and terminals refuse", _streams),
        Statement("tcp-maps", "A TCP socket is the exception", _tcp),
        Statement("things-without-pages", "What has no pages refuses; files and /dev/zero do not", _files),
        Statement("rights-count", "The descriptor's mode and seals limit the mapping", _rights),
        Statement("shape-counts", "Requests that make no sense are refused", _shapes),
        Statement("beyond-the-end", "Mapping beyond the end works; touching it is SIGBUS", _beyond),
    ),
    question=Question(
        "Which of these can be given to mmap?",
        (
            Choice(
                "A pipe", "ENODEV. What has been read from a pipe is gone; there is no byte 0 to go back to."
            ),
            Choice(
                "A TCP socket", "Since Linux 4.18: for zero-copy receive. Data still has to be asked for."
            ),
            Choice("/dev/null", "ENODEV. It has nothing to show. /dev/zero can be mapped."),
        ),
        1,
    ),
    explanation=(
        "To be mapped, a file has to say what is at each offset, again and again. A stream cannot: a byte is "
        "read once. So the drivers of pipes, most sockets and terminals have no mmap operation, and the "
        "kernel answers ENODEV.",
        '"Sockets cannot be mapped" is too broad: TCP has an operation, for TCP_ZEROCOPY_RECEIVE, and packet '
        "sockets have one for their ring buffers.",
        "What can be mapped is mapped within one's rights: shared and writable needs a descriptor that may "
        "write. Private and writable needs only one that may read, since nothing reaches the file.",
    ),
    sources=("mmap(2), ERRORS", "net/ipv4/tcp.c, tcp_mmap()", "packet(7), PACKET_RX_RING", "memfd_create(2)"),
    exercise=Exercise(
        "A pipe cannot be mapped. Change the snippet so that memory is a mapping with the pipe's 19 bytes.",
        _SNIPPET,
        _SNIPPET.replace(
            '    memory = b""\n', "    memory = mmap.mmap(-1, 19)\n    memory[:] = os.read(reading, 19)\n"
        ),
        _check,
    ),
    run=_run,
)
