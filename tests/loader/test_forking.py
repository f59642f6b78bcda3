"""A program that has threads and forks: the child can load, whatever the other threads were doing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fixtures.build import ROOT, build
from miniloader import native
from miniloader.errors import LoadError
from miniloader.native import functions

_THREADS = """
    import faulthandler, os, sys, threading, time
    import miniloader
    stop, faults = [], []
    def work():
        while not stop:
            try:
                with miniloader.load(sys.argv[1], init=False):
                    pass
                image = miniloader.inspect(sys.argv[1])
                len(image.symbols), len(image.relocations), image.sections
                image.source.close()
            except BaseException as error:
                faults.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(30, exit=True)
            for _ in range(2):
                with miniloader.load(sys.argv[1], init=False) as library:
                    assert library.base
                assert len(miniloader.inspect(sys.argv[1]).symbols)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            faults.append(f"child {turn}: {status}")
            break
        time.sleep(0.002)
    stop.append(1)
    for thread in threads:
        thread.join()
    print(faults)
"""


def _run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_child_of_a_program_with_threads_can_load() -> None:
    """The first forks come while the loader itself is being imported."""
    assert _run(_THREADS, build("demo")) == "[]"


def test_a_child_can_ask_what_ld_so_has_loaded() -> None:
    """Others ask without a pause, and glibc 2.36 leaves its lock for that as it is in a child."""
    script = """
        import faulthandler, os, sys, threading
        import miniloader
        stop = []
        with miniloader.load(sys.argv[1]) as library:
            def work():
                while not stop:
                    library.address("demo_add")
            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            for turn in range(60):
                child = os.fork()
                if child == 0:
                    faulthandler.dump_traceback_later(20, exit=True)
                    os._exit(0 if library.address("demo_add") else 3)
                _, status = os.waitpid(child, 0)
                if status:
                    break
            stop.append(1)
            for thread in threads:
                thread.join()
            print(turn, status)
    """
    assert _run(script, build("demo")) == "59 0"


def test_a_fork_within_a_load_waits_for_nobody() -> None:
    """In the same thread: who listens forks, and both go on."""
    script = """
        import os, sys
        import miniloader
        children = []
        def listen(event):
            if event.stage == "map" and not children:
                children.append(os.fork())
        with miniloader.load(sys.argv[1], on_event=listen) as library:
            assert library.base
        if children[0] == 0:
            with miniloader.load(sys.argv[1]):
                os._exit(0)
        print(os.waitpid(children[0], 0)[1])
    """
    assert _run(script, build("demo")) == "0"


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_of_multiprocessing_can_load(method: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import multiprocessing, sys
            import miniloader
            def work(path):
                with miniloader.load(path) as library:
                    return library.base > 0
            if __name__ == "__main__":
                assert work(sys.argv[1])
                with multiprocessing.get_context({method!r}).Pool(2) as pool:
                    print(pool.map(work, [sys.argv[1]] * 4))
        """)
    )
    done = subprocess.run(
        [sys.executable, program, build("demo")],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("[True, True, True, True]\n", "", 0)


@pytest.mark.parametrize("ending", ["", "sys.exit()", "sys.stdout.flush(); os._exit(0)"])
def test_the_interpreter_ends_while_threads_load(ending: str) -> None:
    """Daemon threads are stopped where they are: no signal, nothing said."""
    script = """
        import os, sys, threading, time
        import miniloader
        def work():
            while True:
                with miniloader.load(sys.argv[1]):
                    pass
        for _ in range(6):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.5)
        print("done")
    """
    assert _run(f"{textwrap.dedent(script)}{ending}", build("demo")) == "done"


def test_tasks_of_asyncio_can_load() -> None:
    script = """
        import asyncio, sys
        import miniloader
        def work():
            with miniloader.load(sys.argv[1]) as library:
                return library.function("demo_add")(2, 3)
        async def main():
            print(sum(await asyncio.gather(*(asyncio.to_thread(work) for _ in range(20)))))
        asyncio.run(main())
    """
    assert _run(script, build("demo")) == "100"


def test_subinterpreters_in_threads_can_load() -> None:
    """Each imports miniloader for itself, while the main one loads."""
    pytest.importorskip("_xxsubinterpreters", reason="this machine lacks _xxsubinterpreters")
    script = """
        import sys, threading
        import _xxsubinterpreters as interpreters
        import miniloader
        code = f"import sys; sys.path[:0] = {sys.path!r}; path = {sys.argv[1]!r}" + '''
        import miniloader
        for _ in range(5):
            with miniloader.load(path) as library:
                assert library.function("demo_add")(2, 3) == 5
        '''
        def work():
            interpreter = interpreters.create(isolated=False)
            interpreters.run_string(interpreter, code)
            interpreters.destroy(interpreter)
            ended.append(interpreter)
        ended = []
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            miniloader.load(sys.argv[1]).close()
        for thread in threads:
            thread.join()
        print(len(ended))
    """
    assert _run(script, build("demo")) == "3"


def test_a_python_without_its_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(LoadError, match="runs without its global lock"):
        functions.__wrapped__()


@pytest.mark.parametrize("name", ["another", "none"])
def test_loops_that_are_not_ours_are_named_and_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in their place is another library, or nothing."""
    place = tmp_path / "native" / "loops-x86_64.so"
    place.parent.mkdir()
    if name == "another":
        shutil.copy(build("demo"), place)
    monkeypatch.setattr(native.gate, "__file__", str(place.with_name("__init__.py")))
    with pytest.raises(LoadError, match=re.escape(str(place))) as refused:
        functions.__wrapped__()
    assert (refused.value.hint or "").startswith("install miniloader again")
