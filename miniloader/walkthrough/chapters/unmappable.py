"""Chapter 7: what cannot be mapped."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any, Final

from miniloader.kernel import syscalls
from miniloader.kernel.syscalls import MAP_PRIVATE, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE
from miniloader.values import NamedTuple, dataclass
from miniloader.walkthrough.chapter import Answer, Chapter, Choice, Exercise, Finding, Quiz, Statement, equal
from miniloader.walkthrough.step import ChapterStep, Figures
from miniloader.walkthrough.traced_calls import Calls
from miniloader.walkthrough.workbench import Workbench

__all__ = ["CHAPTER", "MmapAnswers"]

_READ_WRITE = PROT_READ | PROT_WRITE


@dataclass(frozen=True)
class MmapAnswers:
    """The answer to each attempt: "mapped", the name of an errno, or "not here: …" when it could not be made.

    ``beyond`` is the signal that touching a page beyond the end of the file gave.
    """

    answers: dict[str, str]
    beyond: str


class _Attempt(NamedTuple):
    """One thing to map: how to open it, how to map it, and the answer that is expected of mmap."""

    thing: str
    open: Callable[[Workbench, ExitStack], int]
    expected: str
    protection: int = PROT_READ
    flags: int = MAP_SHARED
    length: int = PAGE_SIZE
    offset: int = 0


def _pipe(bench: Workbench, stack: ExitStack) -> int:
    reading, writing = bench.do("pipe2(…, O_CLOEXEC)", os.pipe)
    stack.callback(os.close, writing)
    return reading


def _fifo(bench: Workbench, stack: ExitStack) -> int:
    path = os.path.join(bench.place().directory, "fifo")
    bench.do('mkfifo("fifo", 0600)', lambda: os.mkfifo(path, 0o600), lambda _: "0")
    return bench.open(path, os.O_RDWR)


def _socket(family: str, kind: str) -> Callable[[Workbench, ExitStack], int]:
    def make(bench: Workbench, stack: ExitStack) -> int:
        text, arguments = f"socket({family}, {kind}, 0)", (getattr(socket, family), getattr(socket, kind))
        new: socket.socket = bench.do(text, lambda: socket.socket(*arguments), lambda s: str(s.fileno()))
        return new.detach()

    return make


def _terminal(bench: Workbench, stack: ExitStack) -> int:
    leader, follower = bench.do("openpty(…)", os.openpty)
    stack.callback(os.close, leader)
    return follower


def _epoll(bench: Workbench, stack: ExitStack) -> int:
    epoll = bench.do("epoll_create1(EPOLL_CLOEXEC)", select.epoll, lambda e: str(e.fileno()))
    stack.callback(epoll.close)
    return bench.do(f"dup({epoll.fileno()})", lambda: os.dup(epoll.fileno()))


def _path(path: str, flags: int = os.O_RDONLY) -> Callable[[Workbench, ExitStack], int]:
    return lambda bench, stack: bench.open(path, flags)


def _file(flags: int = os.O_RDONLY) -> Callable[[Workbench, ExitStack], int]:
    return lambda bench, stack: bench.open(os.path.join(bench.place().directory, "file"), flags)


def _directory(bench: Workbench, stack: ExitStack) -> int:
    return bench.open(bench.place().directory, os.O_RDONLY | os.O_DIRECTORY)


def _closed(bench: Workbench, stack: ExitStack) -> int:
    fd = _file()(bench, stack)
    bench.close(fd)
    return fd


def _sealed(bench: Workbench, stack: ExitStack) -> int:
    text = "memfd_create(…, MFD_ALLOW_SEALING)"
    fd = bench.do(text, lambda: os.memfd_create("sealed", os.MFD_ALLOW_SEALING))
    bench.ftruncate(fd, PAGE_SIZE)
    text = f"fcntl({fd}, F_ADD_SEALS, F_SEAL_WRITE)"
    bench.do(text, lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))
    return fd


_STREAMS: Final = (
    _Attempt("a pipe", _pipe, "ENODEV"),
    _Attempt("a FIFO", _fifo, "ENODEV"),
    _Attempt("a Unix socket", _socket("AF_UNIX", "SOCK_STREAM"), "ENODEV"),
    _Attempt("a UDP socket", _socket("AF_INET", "SOCK_DGRAM"), "ENODEV"),
    _Attempt("a terminal", _terminal, "ENODEV"),
)
_TCP: Final = (_Attempt("a TCP socket", _socket("AF_INET", "SOCK_STREAM"), "mapped"),)
_THINGS: Final = (
    _Attempt("a directory", _directory, "ENODEV"),
    _Attempt("an epoll instance", _epoll, "ENODEV"),
    _Attempt("/dev/null", _path("/dev/null"), "ENODEV"),
    _Attempt("/dev/zero, private", _path("/dev/zero", os.O_RDWR), "mapped", _READ_WRITE, MAP_PRIVATE),
    _Attempt("/proc/self/maps", _path("/proc/self/maps"), "ENODEV"),
    _Attempt("a file", _file(), "mapped"),
)
_RIGHTS: Final = (
    _Attempt("write-only file, to read", _file(os.O_WRONLY), "EACCES"),
    _Attempt("read-only file, shared, to write", _file(), "EACCES", _READ_WRITE),
    _Attempt("read-only file, private, to write", _file(), "mapped", _READ_WRITE, MAP_PRIVATE),
    _Attempt("sealed memory, shared, to write", _sealed, "EPERM", _READ_WRITE),
    _Attempt("sealed memory, private, to write", _sealed, "mapped", _READ_WRITE, MAP_PRIVATE),
)
_SHAPES: Final = (
    _Attempt("a descriptor of O_PATH", _file(os.O_RDONLY | os.O_PATH), "EBADF"),
    _Attempt("a closed descriptor", _closed, "EBADF"),
    _Attempt("length 0", _file(), "EINVAL", length=0),
    _Attempt("an offset inside a page", _file(), "EINVAL", offset=1),
    _Attempt("neither shared nor private", _file(), "EINVAL", flags=0),
    _Attempt("an offset beyond the end", _file(), "mapped", offset=16 * PAGE_SIZE),
)
_GROUPS: Final = (
    ("streams", "What has no offsets: bytes come once, in order, and are gone when read.", _STREAMS),
    (
        "other things",
        "A socket of another kind, things that are no file, devices, and a plain file.",
        _TCP + _THINGS,
    ),
    ("rights", "The descriptor's mode limits the mapping: a mapping is no way around it.", _RIGHTS),
    ("shapes", "Requests that make no sense, and one that only seems to.", _SHAPES),
)

_MEANING: Final = {
    "ENODEV": "it has no mmap operation",
    "EACCES": "opened without that right",
    "EPERM": "the seal forbids it",
    "EBADF": "no descriptor to use",
    "EINVAL": "the request makes no sense",
}


def _run(bench: Workbench) -> Generator[ChapterStep, None, MmapAnswers]:
    path = bench.file("file", b"x" * 100)
    answers: dict[str, str] = {}
    for name, did, attempts in _GROUPS:
        group = {attempt.thing: _answer(bench, attempt) for attempt in attempts}
        rows = tuple((thing, answer, _MEANING.get(answer, "")) for thing, answer in group.items())
        table = Figures("The answers", ("what", "mmap says", "that is"), rows)
        yield ChapterStep(name, did, bench.taken(), tables=(table,))
        answers |= group
    return MmapAnswers(answers, beyond=(yield from _beyond_the_end(bench, path)))


def _answer(bench: Workbench, attempt: _Attempt) -> str:
    """What mmap answers."""
    with ExitStack() as stack:
        try:
            fd = attempt.open(bench, stack)
        except OSError as error:
            return f"not here: {error.strerror}"
        try:
            memory = bench.mmap(attempt.length, attempt.protection, attempt.flags, fd, attempt.offset)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        else:
            syscalls.munmap(*memory)
            return "mapped"
        finally:
            if attempt.open is not _closed:
                os.close(fd)


def _beyond_the_end(bench: Workbench, path: str) -> Generator[ChapterStep, None, str]:
    def touch(calls: Calls) -> Generator[Any, None, None]:
        fd = calls.open(path, os.O_RDONLY)
        memory = calls.mmap(PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 16 * PAGE_SIZE)
        yield memory.address
        calls.load(memory.address)

    child = bench.child("child", touch)
    beyond = bench.fatal(child, f"load 1 at {bench.resume(child):#x}")
    yield ChapterStep(
        "beyond the end",
        "The file has 100 bytes. A child maps it from page 16 on, which works, and touches that.",
        bench.taken(),
        (f"{beyond or 'Nothing'}: mmap does not ask how long the file is; the fault does.",),
    )
    return beyond


# ---------------------------------------------------------------------------------------- claims
def _all(id: str, text: str, attempts: tuple[_Attempt, ...]) -> Statement[MmapAnswers]:
    """Whether each attempt has its answer; what is not here is not counted, unless nothing is."""
    wanted = {attempt.thing: attempt.expected for attempt in attempts}

    def finding(seen: MmapAnswers) -> Finding:
        answers = {thing: seen.answers.get(thing, "not here: not tried") for thing in wanted}
        missing = [thing for thing, answer in answers.items() if answer.startswith("not here")]
        wrong = [thing for thing in wanted if thing not in missing and answers[thing] != wanted[thing]]
        holds = False if wrong else None if missing else True
        reason = f"{', '.join(missing)} could not be made here"
        return Finding(holds, _by_answer(wanted), _by_answer(answers), reason)

    return Statement(id, text, finding)


def _by_answer(answers: dict[str, str]) -> str:
    """``ENODEV: a pipe, a FIFO; mapped: a file``."""
    return "; ".join(
        f"{answer}: {', '.join(thing for thing in answers if answers[thing] == answer)}"
        for answer in dict.fromkeys(answers.values())
    )


@equal("beyond-the-end", "Mapping beyond the end works; touching it is SIGBUS", "SIGBUS")
def _beyond(seen: MmapAnswers) -> str:
    return seen.beyond or "nothing happened"


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


CHAPTER: Final[Chapter[MmapAnswers]] = Chapter(
    id="unmappable",
    number=7,
    title="What cannot be mapped",
    claim="Pipes, sockets and terminals are streams: they have no pages to map.",
    surprise="A TCP socket can be mapped: the kernel can show received pages without copying them.",
    claims=(
        _all("streams-refuse", "Pipes, FIFOs, sockets and terminals refuse", _STREAMS),
        _all("tcp-maps", "A TCP socket is the exception", _TCP),
        _all("things-without-pages", "What has no pages refuses; files and /dev/zero do not", _THINGS),
        _all("rights-count", "The descriptor's mode and seals limit the mapping", _RIGHTS),
        _all("shape-counts", "Requests that make no sense are refused", _SHAPES),
        _beyond,
    ),
    question=Quiz(
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
        hints=(
            "The bytes of a pipe are read once. Where could they be put, to be mapped?",
            "Make an anonymous mapping of 19 bytes, and put what os.read(reading, 19) gives into it.",
        ),
    ),
    source_of={
        "streams-refuse": (
            "mmap(2), ENODEV; mm/mmap.c, do_mmap(): no mmap operation; net/core/sock.c, sock_no_mmap()"
        ),
        "tcp-maps": "net/ipv4/tcp.c, tcp_mmap()",
        "things-without-pages": (
            "mmap(2), ENODEV; drivers/char/mem.c: null_fops has no mmap operation, zero_fops has mmap_zero()"
        ),
        "rights-count": "mmap(2), EACCES, EPERM; fcntl(2), F_SEAL_WRITE",
        "shape-counts": "mmap(2), EBADF, EINVAL",
        "beyond-the-end": "mmap(2), SIGBUS",
    },
    run=_run,
    later=(
        Quiz(
            "A file is opened read-only, and mapped MAP_PRIVATE with PROT_WRITE. What does mmap say?",
            (
                Choice("EACCES", "That is for MAP_SHARED: a private write never reaches the file."),
                Choice("It is mapped", "Writes go to copies, so the right to read is enough."),
                Choice("EPERM", "That is what a seal says."),
            ),
            1,
            step="rights",
        ),
        Quiz(
            "A file has 100 bytes. Page 16 of it is mapped, and touched. What happens?",
            (
                Choice("mmap fails", "mmap does not ask how long the file is."),
                Choice("It reads zeros", "Only the rest of the last page is zeros."),
                Choice("SIGBUS at the touch", "The mapping is there, and the file has no such page."),
            ),
            2,
            step="beyond the",
        ),
    ),
)
