"""A load step by step: what each step has done, and that nothing is left of one that goes no further."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import miniloader
from miniloader import Loading, Source, UsageError
from miniloader.errors import LoadError, MiniloaderError
from miniloader.kernel.maps import read_maps
from miniloader.loader import unload
from miniloader.loader.events import Event
from tests.loader.conftest import InChild

STEPS = ("map", "link", "initialise")


@pytest.fixture
def chain(fixture_library: Callable[[str], Path]) -> Path:
    """A library that needs another, which needs a third."""
    return fixture_library("chain_a")


@pytest.fixture
def with_constructors(fixture_library: Callable[[str], Path]) -> Path:
    return fixture_library("init_fini")


def footprint() -> tuple[int, list[tuple[int, int, str, str]]]:
    """How many files are open; what is mapped of fixtures, and of code that is in no file."""
    gc.collect()  # what an exception's traceback still refers to
    mapped = [(vma.start, vma.end, vma.protection, vma.path) for vma in read_maps()]
    kept = [row for row in mapped if "miniloader-fixtures" in row[3] or (not row[3] and "x" in row[2])]
    return len(os.listdir("/proc/self/fd")), kept


@pytest.fixture(autouse=True)
def nothing_left(chain: Path) -> Iterator[None]:
    """Whatever a test does, afterwards the process has what it had."""
    with Loading(chain) as steps:  # what is kept from the first load on is there
        take(steps, 3)
        steps.library.close()
    before = footprint()
    yield
    assert footprint() == before
    assert not unload.unfinished


def take(steps: Loading, count: int) -> None:
    """Take the first ``count`` steps."""
    for name in STEPS[:count]:
        getattr(steps, name)()


def copied(path: Path) -> int:
    """KiB of the mappings of ``path`` in this process that are no longer the file's."""
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    return sum(
        int(count)
        for block in blocks
        if str(path) in block
        for count in re.findall(r"^Anonymous: +(\d+) kB", block, re.MULTILINE)
    )


# ------------------------------------------------------------------------------------------ the steps
def test_map_maps_what_is_needed_and_touches_no_page(chain: Path) -> None:
    with Loading(chain) as steps:
        mapped = steps.map()
        assert mapped == steps.mapped
        assert [os.path.basename(library.name) for library in mapped] == [
            "libchain_a.so", "libchain_b.so", "libchain_c.so"
        ]  # fmt: skip
        for library in mapped:
            assert copied(Path(library.name)) == 0
            first = library.plan.mappings[0]
            assert library.mapped.read(first.start, 4) == b"\x7fELF"
        assert not steps.bindings


def test_a_load_begins_with_what_is_there_at_its_first_step(
    chain: Path, fixture_library: Callable[[str], Path]
) -> None:
    """Another thread may close what is needed after the load was asked for, or open it."""
    needed = miniloader.load(fixture_library("chain_c"))
    with Loading(chain) as steps:
        needed.close()
        with miniloader.load(fixture_library("chain_b")) as opened:
            names = [os.path.basename(library.name) for library in steps.map()]
            assert names == ["libchain_a.so"]
            steps.link()
            steps.initialise()
            assert opened.loaded in steps.library.libraries
            steps.library.close()


def test_map_writes_no_bss(fixture_library: Callable[[str], Path]) -> None:
    path = fixture_library("bss")
    with Loading(path) as steps:
        (library,) = steps.map()
        assert library.plan.zeroed
        assert copied(path) == 0
        steps.link()
        assert copied(path) > 0
        for span in library.plan.zeroed:
            assert not any(library.mapped.read(span.start, span.end - span.start))


def test_link_binds_and_relocates_and_runs_nothing(with_constructors: Path) -> None:
    with Loading(with_constructors) as steps:
        (library,) = steps.map()
        bindings = steps.link()[library]
        bound = [bindings.label(place) for place in np.flatnonzero(bindings.owner >= 0).tolist()]
        assert "__cxa_atexit" in bound
        assert event_count(steps) == 0
        assert not steps.constructors


def test_initialise_runs_the_constructors_and_gives_the_library(with_constructors: Path) -> None:
    with Loading(with_constructors) as steps:
        (library,) = steps.map()
        steps.link()
        addresses = steps.initialise()[library]
        assert len(addresses) >= 4
        assert all(library.mapped.start <= address < library.mapped.end for address in addresses)
        assert event_count(steps) == 4
    with steps.library as loaded:  # still there: it is the caller's
        assert loaded.base == library.bias
        assert list(loaded.stages_ms) == ["parse", "map", "relocate", "init"]


def event_count(steps: Loading) -> int:
    """How many of its constructors the library has counted."""
    library = steps.mapped[0]
    index = library.symbols.find("event_count")
    assert index is not None
    address = library.bias + int(library.symbols.rows["value"][index])
    return ctypes.c_int.from_address(address).value


def test_without_initialising_no_constructor_runs(with_constructors: Path) -> None:
    with Loading(with_constructors, init=False) as steps:
        take(steps, 3)
        assert steps.constructors == {}
        assert event_count(steps) == 0
        steps.library.close()


def test_time_between_the_steps_is_nobodys(chain: Path) -> None:
    import time

    with Loading(chain) as steps:
        for name in STEPS:
            getattr(steps, name)()
            time.sleep(0.3)
        assert sum(steps.library.stages_ms.values()) < 300
        steps.library.close()


def test_what_the_process_has_already_is_shared(chain: Path) -> None:
    with miniloader.load(chain) as library, Loading(chain) as steps:
        assert steps.map() == ()
        assert steps.link() == {}
        assert steps.initialise() == {}
        assert steps.library.loaded is library.loaded
        steps.library.close()
        assert library.address("chain_a")


def test_a_source_is_taken_too(chain: Path) -> None:
    with Loading(Source.open(str(chain))) as steps:
        take(steps, 3)
        assert steps.library.function("chain_a")() == 100 + steps.library.function("chain_b")()
        steps.library.close()


# -------------------------------------------------------------------------------------------- undoing
@pytest.mark.parametrize("name", ["chain_a", "init_fini", "tls_user", "unique", "ifunc", "lazy", "bss"])
@pytest.mark.parametrize("init", [True, False])
def test_leaving_before_the_end_takes_everything_back(
    fixture_library: Callable[[str], Path], in_child: InChild, name: str, init: bool
) -> None:
    path = fixture_library(name)

    def leave(count: int) -> None:
        with Loading(path, init=init, bind="lazy") as steps:
            take(steps, count)
        before = footprint()
        with Loading(path, init=init, bind="lazy") as steps:
            take(steps, count)
            assert (footprint() != before) == (count > 0)
        assert footprint() == before
        with pytest.raises(UsageError, match="is undone"):
            take(steps, 1)

    def work() -> int:
        for count in range(3):
            leave(count)
        with miniloader.load(path, init=init) as library:
            assert library.base
        return len(unload.unfinished)

    assert in_child(work) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_handle_of_what_is_shared_is_given_back(chain: Path, count: int) -> None:
    library = miniloader.load(chain)
    with Loading(chain) as steps:
        take(steps, count)
        library.close()
        assert "libchain_a" in str(footprint())
    assert "libchain_a" not in str(footprint())


@pytest.mark.parametrize(
    "stage", ["parse", "search", "need", "reserve", "map", "bind", "relocate", "initialise"]
)
def test_a_step_that_fails_takes_everything_back(chain: Path, with_constructors: Path, stage: str) -> None:
    before = footprint()

    def fail(event: Event) -> None:
        if event.stage == stage:
            raise MiniloaderError("stop here")

    steps = Loading(with_constructors if stage == "initialise" else chain, on_event=fail)
    with pytest.raises(MiniloaderError, match="stop here"):
        take(steps, 3)
    assert footprint() == before
    with pytest.raises(UsageError, match=r"map\(\) is called out of turn: what was done is undone"):
        steps.map()


def test_what_it_needs_is_not_found(tmp_path: Path, chain: Path) -> None:
    lonely = tmp_path / "libchain_a.so"
    lonely.write_bytes(chain.read_bytes())
    with Loading(lonely) as steps, pytest.raises(LoadError, match=r"needs libchain_b.so, .* none of the \d+"):
        steps.map()


# ------------------------------------------------------------------------------------ what is out of turn
@pytest.mark.parametrize(
    ("done", "name", "state"),
    [
        (0, "link", r"map\(\) comes next"),
        (0, "initialise", r"map\(\) comes next"),
        (1, "map", r"link\(\) comes next"),
        (1, "initialise", r"link\(\) comes next"),
        (2, "map", r"initialise\(\) comes next"),
        (2, "link", r"initialise\(\) comes next"),
        (3, "map", "all steps are taken"),
        (3, "initialise", "all steps are taken"),
    ],
)
def test_a_step_out_of_turn_is_refused_and_changes_nothing(
    chain: Path, done: int, name: str, state: str
) -> None:
    with Loading(chain) as steps:
        take(steps, done)
        before = footprint()
        with pytest.raises(UsageError, match=rf"{name}\(\) is called out of turn: {state}") as caught:
            getattr(steps, name)()
        assert "map(), link() and initialise(), each once" in str(caught.value)
        assert footprint() == before
        for step in STEPS[done:]:
            getattr(steps, step)()
        steps.library.close()


def test_a_step_is_no_place_to_take_another(chain: Path) -> None:
    def again(event: Event) -> None:
        steps.map()

    with Loading(chain, on_event=again) as steps, pytest.raises(UsageError, match=r"map\(\) has begun"):
        steps.map()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_library_is_there_after_the_last_step(chain: Path, count: int) -> None:
    with Loading(chain) as steps:
        take(steps, count)
        with pytest.raises(UsageError, match=r"is not loaded: \w+\(\) comes next"):
            _ = steps.library


@pytest.mark.parametrize("options", [{"bind": "later"}, {"prepared": True, "bind": "lazy"}])
def test_options_that_make_no_sense_are_refused_at_once(chain: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="bind"):
        Loading(chain, **options)  # type: ignore[arg-type]  # wrong on purpose


# ---------------------------------------------------------------------------------- others, meanwhile
def test_what_is_needed_stays_while_the_load_is_under_way(
    chain: Path, fixture_library: Callable[[str], Path]
) -> None:
    needed = miniloader.load(fixture_library("chain_b"))
    with Loading(chain) as steps:
        assert [os.path.basename(library.name) for library in steps.map()] == ["libchain_a.so"]
        needed.close()
        steps.link()
        steps.initialise()
        assert steps.library.function("chain_a")() == 123
        steps.library.close()


def test_another_load_meanwhile_has_a_copy_of_its_own(chain: Path) -> None:
    with Loading(chain) as steps:
        take(steps, 2)
        with miniloader.load(chain) as library:
            assert library.base != steps.mapped[0].bias
            steps.initialise()
            assert steps.library.base == steps.mapped[0].bias
        assert steps.library.function("chain_a")() == 123
        steps.library.close()
