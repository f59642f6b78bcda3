"""Crews: workers that are fresh, answer, fail in the open, and never outlive anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import build
from miniloader.errors import ElfError, LoadError, UsageError, WorkerError
from miniloader.kernel.maps import mappings_of, read_maps
from miniloader.lab.workers.crew import Crew
from tests.lab.conftest import children_of, lives, wait_until_gone


def test_workers_load_step_by_step_and_are_gone_afterwards(demo: Path) -> None:
    with Crew(2) as crew:
        pids = [worker.pid for worker in crew.workers]
        assert len({os.getpid(), *pids}) == 3
        replies = crew.ask("map", path=str(demo))
        for pid, reply in zip(pids, replies, strict=True):
            assert mappings_of(read_maps(pid), demo)[0].start == reply["base"]
        assert replies[0]["base"] != replies[1]["base"]  # they do not inherit a layout
        word = {"vaddr": 0x9000}  # demo_counters, of which the page is read when it is linked
        assert crew.ask("link") == [{}, {}]
        assert crew.ask("initialise") == [{}, {}]
        assert crew.ask("fetch", **word) == [{"value": 100}] * 2
    assert not any(map(lives, pids))


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_whose_standard_streams_are_closed_has_a_crew(
    closed: str, demo: Path, tmp_path: Path
) -> None:
    """As a service may be started: what a worker is told by comes in the place of none of them."""
    script = (
        "import sys; from pathlib import Path; from miniloader.lab.workers.crew import Crew\n"
        "with Crew(2) as crew: Path(sys.argv[1]).write_text(str(len(crew.ask('load', path=sys.argv[2]))))"
    )
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script]
    subprocess.run([*words, tmp_path / "answers", demo], check=True, cwd=build.ROOT)
    assert (tmp_path / "answers").read_text() == "2"


def test_no_constructor_runs_before_a_worker_initialises(
    misbehaves: Callable[[str], str],
) -> None:
    path = misbehaves("crash")
    with Crew(1) as crew:
        crew.ask("map", path=path)
        crew.ask("link")
        with pytest.raises(WorkerError, match=r"^step constructors: worker 1 of 1 .* was killed by SIGSEGV"):
            crew.ask("initialise", step="constructors")


def test_stores_are_each_worker_s_own(demo: Path) -> None:
    with Crew(2) as crew:
        crew.ask("load", path=str(demo))
        word = {"vaddr": 0x9000}  # demo_counters
        assert crew.ask_each("store", [word | {"value": 7}, word | {"value": 8}]) == [{"before": 100}] * 2
        assert crew.ask("fetch", vaddr=0x9000) == [{"value": 7}, {"value": 8}]


def test_what_the_library_prints_disturbs_nothing(misbehaves: Callable[[str], str], capfd) -> None:
    path = misbehaves("print")
    with Crew(1) as crew:
        assert crew.ask("load", path=path)[0]["base"]
    assert capfd.readouterr() == ("", "")


def test_a_worker_is_no_fork_and_no_relative(demo: Path, tmp_path: Path) -> None:
    """It has executed a program of its own, in a process group of its own, without our descriptors."""
    with (tmp_path / "ours").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        crew = Crew(1)
    with crew:
        crew.ask("load", path=str(demo))
        pid = crew.workers[0].pid
        assert b"miniloader.lab.workers.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert os.getpgid(pid) == pid
        files = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert not any(name.endswith("/ours") for name in files)
        assert len(os.listdir(f"/proc/{pid}/task")) == 1


# ---------------------------------------------------------------------------------------- what goes wrong
def test_the_loader_s_own_error_arrives_as_it_was_raised(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF, or not")
    with Crew(2) as crew, pytest.raises(ElfError) as caught:
        crew.ask("load", path=str(broken))
    assert caught.value.path == str(broken)
    assert caught.value.found
    assert str(caught.value).startswith(f"{broken}: ")
    with Crew(1) as crew, pytest.raises(LoadError, match=r"libc.so.6: .*only once"):
        crew.ask("load", path="libc.so.6")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "crash",
            r"was killed by SIGSEGV \(Segmentation fault\) writing address 0x0, in misbehave\+0x\w+"
            r" of libmisbehaves.so \(vaddr 0x\w+\)$",
        ),
        ("abort", r"was killed by SIGABRT \(Aborted\); the last line it printed: I cannot go on$"),
        ("exit", "ended with exit status 7$"),
        ("close", "ended with exit status (1|120)$"),  # 120: Python could not flush what is closed
    ],
)
def test_a_death_is_reported_with_its_cause(misbehaves: Callable[[str], str], how: str, message: str) -> None:
    path = misbehaves(how)
    with Crew(2) as crew:
        pids = [worker.pid for worker in crew.workers]
        with pytest.raises(WorkerError, match=rf"^step load: worker [12] of 2 \(pid \d+\) {message}"):
            crew.ask("load", path=path)
    assert not any(map(lives, pids))


def test_a_worker_that_hangs_is_given_up(misbehaves: Callable[[str], str]) -> None:
    path = misbehaves("hang")
    with Crew(1, timeout=2.5) as crew:
        pid = crew.workers[0].pid
        with pytest.raises(WorkerError, match=r"^step load: worker 1 of 1 .* has not answered within 2.5 s"):
            crew.ask("load", path=path)
    assert not lives(pid)


def test_a_death_is_seen_though_the_library_s_child_holds_the_connection(
    misbehaves: Callable[[str], str],
) -> None:
    path = misbehaves("child")
    with Crew(1) as crew:
        crew.ask("load", path=path)
        worker = crew.workers[0].pid
        (child,) = children_of(worker)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"^step fetch: .* was killed by SIGKILL"):
            crew.ask("fetch", vaddr=0)
    wait_until_gone([child])


def test_one_is_dismissed_the_others_stay(demo: Path) -> None:
    with Crew(3) as crew:
        pids = [worker.pid for worker in crew.workers]
        crew.dismiss(crew.workers[1])
        assert [lives(pid) for pid in pids] == [True, False, True]
        assert len(crew.ask("load", path=str(demo))) == 2
        crew.check("load")
        os.kill(pids[2], signal.SIGKILL)
        os.waitid(os.P_PID, pids[2], os.WEXITED | os.WNOWAIT)
        with pytest.raises(WorkerError, match=f"^step end: worker 3 of 3 .*{pids[2]}.* killed by SIGKILL"):
            crew.check("end")


def test_it_cannot_be_started() -> None:
    with pytest.raises(UsageError, match="0 processes: expected at least 1"):
        Crew(0)


def test_more_than_fit_in_memory_are_refused_before_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("one is started"))
    with pytest.raises(
        UsageError, match=r"999999999 processes: expected at most \d+, which fit in memory now"
    ):
        Crew(999_999_999)


def test_no_interpreter_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(WorkerError, match="cannot start worker 1 of 2: No such file or directory"):
        Crew(2)
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(WorkerError, match="no Python interpreter"):
        Crew(2)


def test_a_fault_of_the_worker_is_named(demo: Path) -> None:
    with Crew(1) as crew, pytest.raises(WorkerError, match=r"worker 1 of 1 .*: AttributeError: .*do_dance"):
        crew.ask("dance")
    with Crew(1) as crew, pytest.raises(WorkerError, match="no library is mapped yet"):
        crew.ask("fetch", vaddr=0)


# ----------------------------------------------------------------------------------- where it runs from
@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["as usual", "isolated"])
def test_workers_import_what_their_parent_imports(flags: list[str], demo: Path, tmp_path: Path) -> None:
    """From any directory, with a path that only the parent knows, and though there are misleading modules."""
    for name in ("miniloader", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    code = (
        f"import sys; sys.path[:] = {[str(build.ROOT), *sys.path[1:]]!r}\n"
        "from miniloader.lab.workers.crew import Crew\n"
        "with Crew(1) as crew: print(*crew.ask('load', path=sys.argv[1])[0])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *flags, "-c", code, str(demo)]
    (tmp_path / "json.py").unlink()  # the parent itself would import it
    (tmp_path / "socket.py").unlink()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("base\n", "")


def test_workers_die_with_a_killed_parent(misbehaves: Callable[[str], str]) -> None:
    """Nothing of ours runs in a parent that gets SIGKILL: the kernel has to end the workers."""
    code = (
        "import sys; from miniloader.lab.workers.crew import Crew\n"
        "with Crew(2) as crew:\n"
        "    print(*(worker.pid for worker in crew.workers), flush=True)\n"
        "    crew.ask('load', path=sys.argv[1])\n"
    )
    for wait in (0.0, 1.0):  # while they start; while the library's constructor hangs
        command = [sys.executable, "-c", code, misbehaves("hang")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=build.ROOT) as parent:
            assert parent.stdout is not None
            pids = [*map(int, parent.stdout.readline().split())]
            time.sleep(wait)
            assert all(map(lives, pids))
            parent.kill()
        wait_until_gone(pids)


def test_ctrl_c_waits_until_nothing_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt between a worker's start and its being known still ends that worker."""
    started: list[int] = []
    popen = subprocess.Popen

    def start_and_interrupt(*arguments, **options):
        process = popen(*arguments, **options)
        started.append(process.pid)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt), Crew(2):
        pytest.fail("the interrupt is delivered before")
    assert len(started) == 1, "there is no waiting for the others"
    assert not any(map(lives, started))
