'''A pytest plugin: start workers, lead them step by step, and assert what they share and what they copied.

It comes with the package: every test may ask for the fixture :func:`crew`.  A complete example, of somebody
who keeps the shared memory of a worker pool from eroding.  The program, ``shop.py``::

    """What each worker of the pool runs; its library is the one that miniloader ships for demonstrations."""
    import ctypes
    import platform
    from pathlib import Path

    import miniloader

    demo = Path(miniloader.__file__).parent / f"lab/demo/libdemo-{platform.machine()}.so"
    library = ctypes.CDLL(str(demo))

    def handle(request):
        library.demo_next()  # counts requests: writes to demo_counters
        return library.demo_add(request, 1)

And its test, ``test_shop.py``; run it with ``pytest``, as any user::

    from miniloader.testing import assert_copied_only, assert_private, assert_private_pages, assert_shared

    def test_requests_cost_each_worker_one_page(crew):
        server = crew(1, module="shop")     # a process of its own, which imports the program once,
        workers = server.fork(4)            # and then forks, as servers do
        before = workers.snapshot("forked", library="libdemo")
        for request in range(10):
            assert workers.call("handle", request) == [request + 1] * 4
        after = workers.snapshot("ten requests later", library="libdemo")

        assert_shared(after, section=".text")                          # code: one copy for all
        assert_shared(after, symbols=["demo_operations"], level="flags")  # relocated once, before the fork
        assert_private(after, symbols=["demo_counters"])               # what is written is each one's own
        assert_copied_only([before, after], symbols=["demo_counters"])  # ... and nothing else was written
        assert_private_pages(after, at_most=1)                         # the budget of each worker

The whole memory of each worker, its heap above all, has a budget, too: ``assert_memory(after, own_at_most="8
MiB", still_shared_at_least="20 MiB")``; and so has what it shares no longer with the server that forked it:
``assert_memory([forked, served], eroded_at_most="2 MiB")``, of snapshots of ``server + workers``.  What a
test leaves in its own process has one by a marker, ``@pytest.mark.limit_private("2 MiB")``: how much more
private memory (USS) there may be when it has run than before its fixtures were set up.

When somebody adds a global that every request updates, the last two fail, name the symbol, and show the
pages of all workers.

**Evidence.**  Every snapshot has a level (``snapshot.level``; ``miniloader doctor`` says what works here),
each failure states it, and the test's report has it as the property ``miniloader_level``.  Nothing passes
because the kernel does not tell: then an assertion raises :class:`~miniloader.errors.EvidenceError`, which
says why and what would help.  How much evidence a test wants is its ``level``:

- ``None``: whatever proves it.  Mostly ``flags`` does, which needs no privilege.  It shows which pages are
  copies and that a copy is nobody else's, but not *with whom* a copy is shared after a fork.
- ``"frames"``: nothing less than page frame numbers will do.  They are for root.
- ``"flags"``: what flags suggest is enough: a copy mapped more than once counts as shared with the others.
- ``"totals"``: for :func:`assert_private_pages` alone: the sums of ``smaps`` are enough.
'''

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest

from miniloader.forking import importing

if TYPE_CHECKING:
    from miniloader.testing.assertions import assert_copied_only as assert_copied_only
    from miniloader.testing.assertions import assert_private as assert_private
    from miniloader.testing.assertions import assert_private_pages as assert_private_pages
    from miniloader.testing.assertions import assert_shared as assert_shared
    from miniloader.testing.budgets import assert_memory as assert_memory
    from miniloader.testing.limits import OwnByPath
    from miniloader.testing.loading import assert_loads as assert_loads
    from miniloader.testing.new_objects import OwnPages
    from miniloader.testing.snapshots import MemorySnapshot as MemorySnapshot
    from miniloader.testing.snapshots import snapshot as snapshot
    from miniloader.testing.workers import Workers as Workers

#: Where each public name lives.  They are imported when first used (PEP 562): pytest loads this module for
#: every user of an environment that has it, and most of their runs never ask for it.
_HOMES = {
    "MemorySnapshot": "miniloader.testing.snapshots",
    "Workers": "miniloader.testing.workers",
    "assert_copied_only": "miniloader.testing.assertions",
    "assert_memory": "miniloader.testing.budgets",
    "assert_private": "miniloader.testing.assertions",
    "assert_private_pages": "miniloader.testing.assertions",
    "assert_loads": "miniloader.testing.loading",
    "assert_shared": "miniloader.testing.assertions",
    "snapshot": "miniloader.testing.snapshots",
}

_BEFORE: pytest.StashKey[tuple[int, OwnPages, OwnByPath]] = pytest.StashKey()
_MARKER = (
    "limit_private(limit): fail a test after which its process has more private memory (USS) than before its"
    " fixtures were set up, by more than this: bytes, or a text like '2 MiB'"
)

__all__ = ["StartCrew", "crew", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> None:
    """Leave our own source out of a failure: the test is of interest, and the error says what it must.

    A fault that we did not raise on purpose is shown whole; ``--full-trace`` shows everything.
    """
    if call.excinfo is not None:
        for entry in call.excinfo.traceback:
            names = entry.frame.f_globals
            if str(names.get("__name__")).startswith("miniloader."):
                names["__tracebackhide__"] = _is_on_purpose


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, for ``--strict-markers`` and ``--markers``."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Sum the private memory of this process before a test whose marker bounds it."""
    if item.get_closest_marker("limit_private") is None:
        return
    with importing:
        from miniloader.testing.limits import limit_of, own_by_path
        from miniloader.testing.new_objects import own_pages

    limit, pages = limit_of(item), own_pages()
    own_by_path()  # what summing itself takes the first time is not the test's
    item.stash[_BEFORE] = limit, pages, own_by_path()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that has run and left more private memory than its marker allows."""
    result = yield
    if _BEFORE in item.stash:
        with importing:
            from miniloader.testing.limits import excess, own_by_path
            from miniloader.testing.new_objects import own_pages, said_of_objects

        limit, pages, before = item.stash[_BEFORE]
        after, pages_after = own_by_path(), own_pages()
        said = excess(before, after, limit)
        if said:
            pytest.fail("\n".join(filter(None, (said, said_of_objects(pages, pages_after)))), pytrace=False)
    return result


def _is_on_purpose(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    with importing:
        from miniloader.errors import MiniloaderError

    return excinfo.errisinstance((MiniloaderError, AssertionError))


class StartCrew(Protocol):
    """What the fixture :func:`crew` is."""

    def __call__(
        self,
        processes: int = 2,
        *,
        library: str | os.PathLike[str] | None = None,
        module: str | None = None,
        by: Literal["miniloader", "dlopen"] = "miniloader",
        timeout: float = 60.0,
    ) -> Workers:
        """Start ``processes`` fresh workers that load ``library`` or import the Python ``module``.

        ``by`` says who loads it: this package, or the system's loader.  ``timeout`` is how many seconds a
        step may take.  Raises UsageError, WorkerError, and whatever loading the library raises.
        """


@pytest.fixture
def crew(request: pytest.FixtureRequest) -> Iterator[StartCrew]:
    """``crew(4, library="libz.so.1")`` or ``crew(4, module="shop")``: worker processes to lead and look at.

    They, and what they fork, are ended with the test, however it ends; see :class:`Workers` for the steps.
    """
    with ExitStack() as started:

        def on_level(level: str) -> None:
            seen = ("miniloader_level", level)
            if seen not in request.node.user_properties:
                request.node.user_properties.append(seen)

        def start_crew(
            processes: int = 2,
            *,
            library: str | os.PathLike[str] | None = None,
            module: str | None = None,
            by: Literal["miniloader", "dlopen"] = "miniloader",
            timeout: float = 60.0,
        ) -> Workers:
            __tracebackhide__ = True
            with importing:
                from miniloader.testing.workers import start

            return start(
                processes,
                library=library,
                module=module,
                by=by,
                timeout=timeout,
                keep=started.enter_context,
                on_level=on_level,
            )

        yield start_crew
