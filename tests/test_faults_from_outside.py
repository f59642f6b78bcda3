"""Faults from outside: a kernel that refuses, too little memory, a full disk, processes that die."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import miniloader
from fixtures import build
from miniloader.elf import Source, problems_of
from miniloader.errors import EvidenceError, MiniloaderError, WorkerError
from miniloader.evidence.snapshot import ProcessRange, take
from miniloader.files import write_whole
from miniloader.kernel import syscalls
from miniloader.kernel.maps import read_maps
from miniloader.lab.audit.audit import audit
from miniloader.lab.audit.select import choose
from miniloader.lab.workers.crew import Crew
from miniloader.loader import surroundings
from tests.failing_calls import ERRNOS, Footprint, failing, label, start_threads, uncollected
from tests.lab.conftest import lives, wait_until_gone

COMMAND = [sys.executable, "-m", "miniloader"]


# --------------------------------------------------------------------------- whichever call fails, and how
def forget() -> None:
    """Have the search look again at what it asks once for a process."""
    for function in (
        surroundings._program,
        surroundings._library_path,
        surroundings._environment,
        surroundings._read_built_in,
        surroundings._hwcaps,
    ):
        function.cache_clear()


def load(name: str, **options: bool | str) -> Callable[[], object]:
    path = build.build(name) if name in build.FIXTURES else name

    def go() -> None:
        forget()
        miniloader.load(path, **options).close()  # type: ignore[arg-type]  # any of the options

    return go


def load_bytes() -> Callable[[], object]:
    data = build.build("demo").read_bytes()
    return lambda: miniloader.load(Source.from_bytes(data)).close()


def inspect() -> None:
    forget()
    image = miniloader.inspect("libz.so.1")
    image.plan(syscalls.PAGE_SIZE)
    assert image.needed
    assert len(image.symbols)
    assert len(image.relocations.targets())  # all are read: what cannot be read is a problem to the rules
    assert problems_of(image) == ()


def library() -> tuple[int, int, int]:
    """Where this process has its C library: pid, load bias, end as a vaddr."""
    vmas = [vma for vma in read_maps() if vma.path.endswith("/libc.so.6")]
    return os.getpid(), vmas[0].start, vmas[-1].end - vmas[0].start


def snapshot() -> None:
    pid, base, end = library()
    take([ProcessRange(pid, base, 0, end)])


def audit_one(pid: int) -> Callable[[], object]:
    """Whatever fails while one process is looked at, the audit of the others goes on."""

    def go() -> None:
        assert audit([pid], library="demo").to_json()

    return go


@pytest.fixture(scope="module", autouse=True)
def memory_of_threads() -> None:
    """What glibc keeps of threads is there before anybody looks at how much memory there is."""
    start_threads()


@pytest.fixture(scope="module")
def quiet() -> Iterator[int]:
    """A process that has the demonstration library and little else; it does nothing."""
    path = build.build("demo")
    handle = ctypes.CDLL(str(path))
    child = os.fork()
    if child == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pause()
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    del handle


SCENARIOS: dict[str, Callable[[int], Callable[[], object]]] = {
    "load-chain": lambda _: load("chain_a"),
    "load-lazy": lambda _: load("lazy", bind="lazy"),
    "load-tls": lambda _: load("tls_general"),
    "load-c++": lambda _: load("cxx"),
    "load-over-aligned": lambda _: load("overaligned_2m"),
    "load-by-name": lambda _: load("libz.so.1"),
    "load-bytes": lambda _: load_bytes(),
    "inspect": lambda _: inspect,
    "snapshot": lambda _: snapshot,
    "audit": audit_one,
}
#: Of the whole grid (each errno at each call) every so many-th is tried, another one for each scenario.
SAMPLED = 9


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_the_kernel_refuses_is_an_error_and_undone(scenario: str, quiet: int) -> None:
    go = SCENARIOS[scenario](quiet)
    go()
    go()
    grid = []
    for call, numbers in ERRNOS.items():
        with failing(call, 1, 0) as counted:
            go()
        grid += [(call, number, at) for at in range(1, counted.calls + 1) for number in numbers]
    every = SAMPLED if len(grid) < 700 else len(grid) // 40
    with uncollected():
        before = Footprint.now()
        for call, number, at in grid[[*SCENARIOS].index(scenario) % every :: every]:
            message = ""
            try:
                with failing(call, number, at):
                    go()
            except MiniloaderError as error:
                message = str(error)
            assert "\n" not in message, (call, label(number), at)
            before.check()


@pytest.mark.parametrize(
    ("call", "number", "at"),
    [("open", errno.EMFILE, 9), ("read", errno.EIO, 9), ("ioctl", errno.EINVAL, 2), ("preadv", errno.EIO, 5),
     ("memfd_create", errno.EMFILE, 2)],
)  # fmt: skip
def test_a_proof_that_the_kernel_refuses_leaves_nobody(call: str, number: int, at: int) -> None:
    demo, pids = build.build("demo"), set[int]()
    with uncollected():
        before = Footprint.now()
        with suppress(MiniloaderError), failing(call, number, at):
            miniloader.prove(demo, 2, on_step=lambda _, now: pids.update(now))
        before.check()
    assert not any(map(lives, pids))


def test_what_is_read_at_the_end_was_read_before(quiet: int) -> None:
    """No read fails while a library is closed: its finalisers could not run, and their memory would go."""
    with miniloader.load(build.build("cxx")) as loaded, failing("pread", errno.EIO, 0) as reads:
        loaded.close()
    assert reads.calls == 0


def test_one_file_that_cannot_be_read_spoils_no_audit(quiet: int) -> None:
    with failing("pread", errno.EIO, 0) as counted:
        whole = audit([quiet])
    with failing("pread", errno.EIO, counted.calls):
        found = audit([quiet])
    assert [one.pid for one in found.processes] == [quiet]
    assert {one.path for one in found.libraries} == {one.path for one in whole.libraries}


# ----------------------------------------------------------------------------------------- too little
def limited(limit: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    # Python would keep what it compiles, cut short, for all the others.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=build.ROOT, preexec_fn=limit, timeout=60,
        env=environment,
    )  # fmt: skip


def address_space(megabytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


@pytest.mark.parametrize("name", ["bss", "overaligned_2m", "demo"])
def test_too_little_address_space_is_an_error(name: str) -> None:
    """In a child, down to where not even the reservation fits: refused in one line, everything undone."""
    path = build.build(name)
    load(name)()

    def tight() -> int:
        before = Footprint.now()
        used = sum(vma.size for vma in read_maps() if vma.path != "[vsyscall]")
        failed = 0
        for room in (0, 1, 4, 16, 64, 256, 1024, 4096, 16384):
            resource.setrlimit(resource.RLIMIT_AS, (used + (room << 10), resource.RLIM_INFINITY))
            try:
                miniloader.load(path).close()
            except (MiniloaderError, MemoryError):
                failed += 1
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            before.check()
        return failed

    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if tight() else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_command_line_with_little_address_space() -> None:
    done = limited(address_space(40), "inspect", build.build("demo"))
    assert done.returncode != 0
    assert done.returncode > 0, done.stderr  # no signal


# ------------------------------------------------------------------------------------- files that are whole
def everything_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_no_half_file_whichever_call_fails(call: str, tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_bytes(b"before")
    for number in ERRNOS[call]:
        if number == 0:
            continue
        for at in (1, 2):
            with failing(call, number, at) as fault, suppress(OSError):
                write_whole(path, [b"x" * 100_000])
            expected = b"before" if fault.calls >= at else b"x" * 100_000
            assert everything_in(tmp_path) == {"report": expected}
            path.write_bytes(b"before")


def test_a_written_file_has_the_permissions_that_are_due(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        write_whole(path, [b"one"])
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        link.symlink_to(path)
        write_whole(link, [b"two", np.frombuffer(b"three", np.uint8)])
        assert (path.stat().st_mode & 0o777, path.read_bytes(), link.is_symlink()) == (
            0o604,
            b"twothree",
            True,
        )
        write_whole(tmp_path / "own", [b""], mode=0o400)
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o400
    finally:
        os.umask(mask)


def no_room() -> None:
    """As on a full disk, at 4 KiB; SIGXFSZ is ignored by Python."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("option", ["--save", "--html"])
def test_a_report_that_does_not_fit_is_one_line_and_no_file(option: str, quiet: int, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"before")
    done = limited(no_room, "audit", quiet, option, kept)
    assert done.returncode == 1
    assert done.stderr.startswith(f"miniloader: {kept}: cannot write the ")
    assert done.stderr.endswith(": File too large\n")
    assert everything_in(tmp_path) == {"kept": b"before"}


def test_a_full_device(quiet: int) -> None:
    done = limited(lambda: None, "audit", quiet, "--save", "/dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "miniloader: /dev/full: cannot write the audit: No space left on device\n",
    )


# --------------------------------------------------------------------------------- processes that come to die
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGHUP,
           signal.SIGQUIT, signal.SIGILL, signal.SIGFPE, signal.SIGSYS, signal.SIGALRM, signal.SIGUSR1,
           signal.SIGXCPU, signal.SIGTRAP, signal.SIGRTMIN]  # fmt: skip
STEPS = ("start", "mapped", "linked", "loaded", "touched", "written")


@pytest.mark.parametrize(("number", "step"), [(n, STEPS[i % len(STEPS)]) for i, n in enumerate(SIGNALS)])
def test_a_worker_killed_at_any_step_is_named(number: signal.Signals, step: str) -> None:
    path = str(build.build("misbehaves"))
    asks: list[tuple[str, dict[str, object]]] = [
        ("map", {"path": path}),
        ("link", {}),
        ("initialise", {}),
        ("touch", {"ranges": [[0, 4096]]}),
        ("fetch", {"vaddr": 0}),
        ("fetch", {"vaddr": 0}),
    ]
    with Crew(2) as crew:
        pids = [worker.pid for worker in crew.workers]
        for command, arguments in asks[: STEPS.index(step)]:
            crew.ask(command, **arguments)
        os.kill(pids[1], number)
        end = time.monotonic() + 20
        while os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        command, arguments = asks[STEPS.index(step)]
        with pytest.raises(
            WorkerError, match=rf"^step {step}: worker 2 of 2 \(pid {pids[1]}\) was killed by \S+"
        ):
            crew.ask(command, step=step, **arguments)
    assert not any(map(lives, pids))


@pytest.mark.parametrize("command", ["load", "disasm"])
def test_ctrl_c_while_its_code_runs(command: str) -> None:
    """The child that runs a library's code is gone with its parent, whatever ends it."""
    arguments = [str(build.build("misbehaves"))]
    if command == "disasm":
        arguments += ["misbehave", "--loaded"]
    for how in (signal.SIGINT, signal.SIGKILL):
        environment = os.environ | {"MINILOADER_MISBEHAVE": "hang"}
        parent = subprocess.Popen(
            [*COMMAND, command, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=build.ROOT, env=environment,
        )  # fmt: skip
        with parent:
            children = _wait_for_child(parent)
            parent.send_signal(how)
            _, err = parent.communicate(timeout=20)
        if how == signal.SIGINT:
            assert (parent.returncode, err) == (130, "miniloader: interrupted\n")
        wait_until_gone(children)


def _wait_for_child(parent: subprocess.Popen[str]) -> list[int]:
    """Its child, once that has the library mapped."""
    end = time.monotonic() + 20
    while time.monotonic() < end and parent.poll() is None:
        text = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        for pid in map(int, text.split()):
            try:
                if "libmisbehaves" in Path(f"/proc/{pid}/maps").read_text():
                    return [pid]
            except OSError:
                continue
        time.sleep(0.005)
    raise AssertionError(f"no child: {parent.communicate() if parent.poll() is not None else 'too slow'}")


# --------------------------------------------------------------------------------------- under audit
def test_zombies_kernel_threads_and_the_vanished_are_listed(quiet: int) -> None:
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    try:
        found = audit([zombie, quiet, gone])
        assert [one.pid for one in found.processes] == [quiet]
        reasons = {one.pid: one.reason for one in found.unreadable}
        assert reasons.keys() == {zombie, gone}
        assert "has no memory" in reasons[zombie]
        assert "there is none" in reasons[gone]
        assert zombie not in choose(tree=os.getpid())
    finally:
        os.waitpid(zombie, 0)


@pytest.mark.parametrize("call", ["open", "read", "preadv", "pread", "ioctl"])
def test_a_process_that_vanishes_at_any_moment_is_listed(call: str, quiet: int) -> None:
    """It ends at the ``at``-th call: the audit either had seen enough, or lists it; nothing else happens."""
    with failing(call, errno.ESRCH, 0) as counted:
        audit([quiet], library="demo")
    for at in {1, 2, counted.calls // 2, counted.calls} - {0}:
        victim = os.fork()
        if victim == 0:
            signal.pause()
        with failing(call, 0, 0) as killer:
            real = killer.real

            def kill(
                *arguments: object, fault=killer, real=real, at=at, victim=victim, **options: object
            ) -> object:
                if fault.calls == at:
                    os.kill(victim, signal.SIGKILL)
                    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
                result = real(*arguments, **options)
                return int(result or 0) if fault.declared else result

            killer.real = kill
            before = Footprint.now()
            found = audit([victim, quiet], library="demo")
            before.check()
        assert [one.pid for one in found.processes if one.pid != victim] == [quiet]
        listed = {one.pid for one in (*found.processes, *found.unreadable)}
        assert listed == {victim, quiet}
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)


def test_other_people_s_processes_are_unreadable(as_nobody) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: to have a process that an ordinary user may not read")

    def look(pid: int) -> tuple[int, str]:
        try:
            found = audit([pid])
        except EvidenceError as error:
            return 0, str(error)
        return len(found.processes), found.unreadable[0].reason + found.unreadable[0].needed

    processes, why = as_nobody(look, os.getpid())
    assert processes == 0
    assert "Permission denied" in why
    assert "CAP_SYS_PTRACE" in why
