"""The calls of a load plan: what is made, what is told, and what the kernel then has."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import miniloader
from fixtures.build import build
from miniloader.elf import PlannedCall
from miniloader.errors import LoadError
from miniloader.kernel import syscalls
from miniloader.kernel.maps import read_maps
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.loader.memory import flag_bits, map_plan, protection_bits
from tests.memory import failing


@pytest.mark.parametrize("name", ["demo", "bss", "overaligned_2m", "cxx"])
@pytest.mark.parametrize("address", [None, 0x2000000000])
def test_exactly_the_calls_of_the_plan_are_made(
    monkeypatch: pytest.MonkeyPatch, name: str, address: int | None
) -> None:
    image = miniloader.inspect(build(name))
    plan, made = image.plan(PAGE_SIZE), []
    mmap, mprotect = syscalls.mmap, syscalls.mprotect

    def recorded_mmap(start: int, length: int, protection: int, flags: int, *file: int) -> int:
        made.append(("mmap", start, length, protection, flags, *(file or (-1, 0))))
        return mmap(start, length, protection, flags, *file)

    def recorded_mprotect(start: int, length: int, protection: int) -> None:
        made.append(("mprotect", start, length, protection))
        mprotect(start, length, protection)

    monkeypatch.setattr(syscalls, "mmap", recorded_mmap)
    monkeypatch.setattr(syscalls, "mprotect", recorded_mprotect)
    memory = map_plan(plan, image.source, address=address)
    memory.perform_step("zero")
    memory.perform_step("protect")
    fd, bias = image.source.fd, memory.bias

    def expected(call: PlannedCall) -> tuple[Any, ...]:
        start = bias + call.start if call.is_placed else 0
        if call.call == "mprotect":
            return "mprotect", start, call.length, protection_bits(call.protection)
        file = (-1, 0) if call.file_offset is None else (fd, call.file_offset)
        return "mmap", start, call.length, protection_bits(call.protection), flag_bits(call.flags), *file

    try:
        calls = plan.calls(placed=address is not None)
        assert made == [expected(call) for call in calls if call.call != "memset"]
        for call in calls:
            if call.call == "memset":
                assert not any(memory.read(call.start, call.length))
    finally:
        memory.unmap()
        image.source.close()


@pytest.mark.parametrize("name", ["demo", "bss", "overaligned_64k"])
def test_the_calls_are_told_as_events(name: str) -> None:
    events: list[miniloader.Event] = []
    path = str(build(name))
    with miniloader.load(path, on_event=events.append) as library:
        calls = library.plan.calls()
        told = [event for event in events if event.library == path and "call" in event.data]
        assert [event.data["call"] for event in told] == list(calls)
        assert [event.stage for event in told] == [call.step for call in calls]
        assert all(call.text(library.base) in event.text for call, event in zip(calls, told, strict=True))


def test_an_aligned_plan_reserves_more_and_gives_it_back() -> None:
    image = miniloader.inspect(build("demo"))
    plan = image.plan(PAGE_SIZE)
    wide = type(plan)(plan.page_size, 1 << 21, plan.mappings, plan.zeroed, plan.relro)
    room, reserve = wide.calls()[:2]
    assert (room.length, room.is_placed, room.file_offset) == (wide.length + (1 << 21), False, None)
    assert (reserve.start, reserve.length, reserve.is_placed) == (wide.start, wide.length, True)
    before = sum(vma.size for vma in read_maps())
    memory = map_plan(wide, image.source)
    try:
        assert memory.bias % (1 << 21) == 0
        assert sum(vma.size for vma in read_maps()) - before == wide.length
    finally:
        memory.unmap()
        image.source.close()


def test_a_refused_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mmap = syscalls.mmap

    def refused(start: int, length: int, protection: int, flags: int, *file: int) -> int:
        if flags & syscalls.MAP_FIXED:
            raise OSError(1, "Operation not permitted")
        return mmap(start, length, protection, flags, *file)

    image = miniloader.inspect(build("demo"))
    before = len(read_maps())
    monkeypatch.setattr(syscalls, "mmap", refused)
    with pytest.raises(LoadError, match=r"mmap\(0x[0-9a-f]+, .*, fd, 0x0\): Operation not permitted$"):
        map_plan(image.plan(PAGE_SIZE), image.source)
    assert len(read_maps()) == before
    image.source.close()


@pytest.mark.parametrize("call", ["mmap", "mprotect"])
def test_too_little_memory_says_which_limits_there_are(call: str, demo: Path) -> None:
    with (
        syscalls.injected(call, failing(errno.ENOMEM)),
        pytest.raises(LoadError, match=r"Cannot allocate memory.*; too little memory, .* vm\.max_map_count"),
    ):
        miniloader.load(demo)
