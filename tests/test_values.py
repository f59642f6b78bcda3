"""Our frozen dataclasses against the standard library's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pathlib
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, field
from threading import Barrier
from typing import Any, ClassVar

import pytest

from miniloader import values


def _defined(decorate: Callable[..., Any]) -> tuple[type, type, type]:
    @decorate(frozen=True)
    class Point:
        """Two numbers, a list, a secret, a name."""

        x: int
        y: int = 2
        many: list[int] = field(default_factory=list, compare=False)
        secret: str = field(default="", repr=False)
        name: str = field(default="", kw_only=True)

        @property
        def sum(self) -> int:
            return self.x + self.y

    @decorate(frozen=True)
    class Further(Point):
        """And one more."""

        z: int = 3

    @decorate(frozen=True, eq=False)
    class Alone:
        """Equal to itself only."""

        x: int

        def __repr__(self) -> str:
            return "alone"

    return Point, Further, Alone


OURS, THEIRS = _defined(values.dataclass), _defined(dataclasses.dataclass)


@pytest.mark.parametrize("number", [0, 1])
def test_as_the_standard_library_does(number: int) -> None:
    ours, theirs = OURS[number], THEIRS[number]
    assert [one.name for one in dataclasses.fields(ours)] == [one.name for one in dataclasses.fields(theirs)]
    assert ours.__match_args__ == theirs.__match_args__  # type: ignore[attr-defined]
    for arguments, named in (((1,), {}), ((1, 5, [4], "s"), {"name": "n"}), ((), {"x": 3, "many": [1]})):
        one, other = ours(*arguments, **named), theirs(*arguments, **named)
        assert repr(one) == repr(other)
        assert dataclasses.asdict(one) == dataclasses.asdict(other)
        assert hash(one) == hash(other)
        assert one.sum == other.sum
        for same in (ours(*arguments, **named), copy.deepcopy(one), dataclasses.replace(one)):
            assert one == same
            assert hash(one) == hash(same)
        assert one == dataclasses.replace(one, many=[7])
        assert one != dataclasses.replace(one, y=9)
        assert one != other
        for change in (lambda one: setattr(one, "x", 1), lambda one: setattr(one, "new", 1)):
            with pytest.raises(FrozenInstanceError):
                change(one)
        with pytest.raises(FrozenInstanceError):
            del one.x
    assert ours(1).many is not ours(1).many
    for wrong in (lambda kind: kind(), lambda kind: kind(1, 2, [], "", 5, 6), lambda kind: kind(1, w=2)):
        with pytest.raises(TypeError):
            wrong(ours)
        with pytest.raises(TypeError):
            wrong(theirs)


def test_it_is_called_as_often_as_one_likes() -> None:
    """The first calls are made by what is not compiled, the others by what is."""
    ours, theirs = (_defined(decorate)[1] for decorate in (values.dataclass, dataclasses.dataclass))
    for number in range(40):
        for arguments, named in (((number,), {}), ((1, number), {"z": 5, "name": "n"}), ((), {"x": number})):
            one, other = ours(*arguments, **named), theirs(*arguments, **named)
            assert dataclasses.asdict(one) == dataclasses.asdict(other)
    kind = _defined(values.dataclass)[0]
    assert kind(1).many is not kind(1).many


def test_what_is_no_field() -> None:
    @values.dataclass(frozen=True)
    class Counted:
        """Two fields; a number that all have."""

        made: ClassVar[int] = 0
        x: int
        _: dataclasses.KW_ONLY
        y: int = 4

        def __post_init__(self) -> None:
            type(self).made += 1

    @values.dataclass(frozen=True)
    class Again(Counted):
        z: int = 5

    assert (Counted(1).y, Counted(1, y=2).y, Again(1).z, Again(1, 2).z, Counted.made, Again.made) == (
        *(4, 2, 5, 2),
        *(2, 4),
    )
    with pytest.raises(TypeError):
        Counted(1, 2)  # type: ignore[misc]
    assert [field.name for field in dataclasses.fields(Again)] == ["x", "y", "z"]


@pytest.mark.parametrize("cls", [int, type("Bare", (), {}), Exception, pathlib.Path])
def test_annotations_are_told_as_inspect_tells_them(cls: type) -> None:
    """Of what has none, inherits them, or has its own: Python 3.13 asks for them by inspect."""
    has_own = type("Own", (cls,), {"__annotations__": {"x": "int"}})
    for asked in (cls, has_own, type("Heir", (has_own,), {})):
        told = values._annotations(asked)
        assert told == inspect.get_annotations(asked)
        assert told is not vars(asked).get("__annotations__")


def test_without_equality() -> None:
    for kind in (OURS[2], THEIRS[2]):
        one = kind(1)
        assert one != kind(1)
        assert one == one
        assert len({one, kind(1)}) == 2
        assert repr(one) == "alone"


def _first_built(kind: type) -> object:
    return kind(1)


def _first_matched(kind: type) -> object:
    one = object.__new__(kind)
    one.__dict__.update(x=1, y=2, many=[], secret="", name="")
    match one:
        case kind(x, y):  # type: ignore[misc]
            assert (x, y) == (1, 2)
    return one


def _first_compared(kind: type) -> object:
    one, other = object.__new__(kind), object.__new__(kind)  # as unpickling makes them
    for made in (one, other):
        made.__dict__.update(x=1, y=2, many=[], secret="", name="")
    assert one == other
    return one


def _first_hashed(kind: type) -> object:
    one = object.__new__(kind)
    one.__dict__.update(x=1, y=2, many=[], secret="", name="")
    assert isinstance(hash(one), int)
    return one


def _first_asked_for_its_fields(kind: type) -> object:
    assert [field.name for field in dataclasses.fields(kind)] == ["x", "y", "many", "secret", "name"]
    return kind(1)


@pytest.mark.parametrize(
    "use", [_first_built, _first_matched, _first_compared, _first_hashed, _first_asked_for_its_fields]
)
def test_whatever_is_asked_first_makes_it(use: Callable[[type], object]) -> None:
    kind, further, _ = _defined(values.dataclass)
    one = use(kind)
    assert one == kind(1)
    assert hash(one) == hash(kind(1))
    assert further(1, 2, z=4).z == 4
    with pytest.raises(FrozenInstanceError):
        setattr(one, "x", 3)  # noqa: B010


def test_a_derived_one_may_be_used_first() -> None:
    kind, further, _ = _defined(values.dataclass)
    assert further(1).sum == 3
    assert kind(1).many is not kind(1).many


def test_threads_may_use_it_first_together() -> None:
    """They take turns as often as they can; without the lock most rounds fail."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _use_first_together()
    finally:
        sys.setswitchinterval(before)


def _use_first_together() -> None:
    for _ in range(40):

        @values.dataclass(frozen=True)
        class Base:
            x: int

        @values.dataclass(frozen=True)
        class kind(Base):  # noqa: N801
            y: int = 2

        together = Barrier(4)

        def build(kind: type = kind, together: Barrier = together) -> object:
            together.wait()
            return kind(1)

        with ThreadPoolExecutor(4) as threads:
            built = [threads.submit(build) for _ in range(4)]
            assert {one.result() for one in built} == {kind(1)}


def test_values_can_be_pickled() -> None:
    from miniloader.kernel.maps import read_maps

    first = read_maps()[0]
    assert pickle.loads(pickle.dumps(first)) == first


class _Named(values.NamedTuple):
    """A tuple with a default, and a method."""

    x: int
    nowhere: NoSuchType  # type: ignore[name-defined]  # noqa: F821 - nobody asks what it is
    y: int = 2

    @property
    def sum(self) -> int:
        """Of both."""
        return self.x + self.y


def test_a_named_tuple_is_that_of_the_standard_library_but_for_its_annotations() -> None:
    named = _Named(1, None)
    assert (named, named.sum, named._replace(y=5).sum) == ((1, None, 2), 3, 6)
    assert repr(named) == "_Named(x=1, nowhere=None, y=2)"
    assert str(_Named.__doc__).startswith("A tuple")
    assert _Named._field_defaults == {"y": 2}
    assert _Named.__match_args__ == ("x", "nowhere", "y")
    assert pickle.loads(pickle.dumps(named)) == named
    assert type(copy.copy(named)) is _Named
    assert _Named.__annotations__ == {"x": "int", "nowhere": "NoSuchType", "y": "int"}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'nowhere'"):
        _Named(1)  # type: ignore[call-arg]
