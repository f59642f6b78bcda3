"""Frozen dataclasses that are made when they are first used, and named tuples that are not described.

The standard library's ``dataclass(frozen=True)`` compiles six methods for every class: half a millisecond
for each of the sixty that a command defines, and uses a few of.  Here only ``__init__`` is compiled, and not
until the class has been called a few times; what else a class has is made when it is asked for: it is
described to :mod:`dataclasses` when somebody wants its fields.  It is a dataclass to that and to type
checkers, and behaves as theirs; but a class with an ``__eq__`` of its own has no hash, one derived without
the decorator is frozen, too, and ``__init__`` is not annotated.

The standard library's ``typing.NamedTuple`` compiles the annotation of each field, for nobody here: four
times what :func:`collections.namedtuple` takes.  Here they stay as they are written.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from miniloader.forking import importing, making
from miniloader.later import Later, leaving_out

with leaving_out("inspect"):
    import dataclasses
    from dataclasses import MISSING, FrozenInstanceError, replace

__all__ = ["NamedTuple", "dataclass", "replace"]

if TYPE_CHECKING:
    from dataclasses import dataclass
    from typing import NamedTuple as NamedTuple
else:

    class _NamedTupleType(type):
        """Makes a named tuple of a class that is derived from :class:`NamedTuple`."""

        def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, space)
            fields = space.get("__annotations__", {})
            defaults = [space.pop(field) for field in [*fields] if field in space]
            made = namedtuple(name, fields, defaults=defaults, module=space["__module__"])
            for attribute, value in space.items():
                setattr(made, attribute, value)
            return made

    class NamedTuple(metaclass=_NamedTupleType):
        """:class:`typing.NamedTuple`."""

    def dataclass(*, frozen: bool, eq: bool = True) -> Callable[[type], type]:
        """:func:`dataclasses.dataclass` for values: ``frozen`` says that they are, and has to be true."""
        assert frozen

        def make(cls: type) -> type:
            _Unmade(cls, eq=eq)
            return cls

        return make


def _annotations(cls: type) -> dict[str, Any]:
    """:func:`inspect.get_annotations` of a class, without inspect where they are as they should be."""
    written = vars(cls).get("__annotations__", {})
    if isinstance(written, dict):
        return dict(written)
    with importing:
        from inspect import get_annotations
    return get_annotations(cls)


if isinstance(_inspect := vars(dataclasses).get("inspect"), Later):  # Python 3.13 asks it about every class
    vars(_inspect)["get_annotations"] = _annotations


class _Unmade:
    """A class to be made: :class:`_Later` stands for each of its methods until that is asked for."""

    def __init__(self, cls: type, *, eq: bool) -> None:
        self.cls = cls
        self._inherits = any(_FIELDS in base.__dict__ for base in cls.__mro__[1:])
        for name in (*_DESCRIBING, *(_COMPARING if eq else ())):
            if name not in cls.__dict__:
                setattr(cls, name, _Later(self, name))
        if "__init__" not in cls.__dict__:
            cls.__init__ = _initialiser(cls)  # type: ignore[misc]
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = _repr  # type: ignore[method-assign,assignment]
        self._freeze()

    def _freeze(self) -> None:
        self.cls.__setattr__ = _refuse_set  # type: ignore[method-assign,assignment]
        self.cls.__delattr__ = _refuse_delete  # type: ignore[method-assign,assignment]

    def make(self, name: str) -> None:
        """Make what is called ``name``, once."""
        with making:
            if not isinstance(self.cls.__dict__[name], _Later):
                return  # by another thread
            if name in _DESCRIBING:
                self._describe()
            else:
                compared = [name for name, (*_, is_compared) in _fields_of(self.cls).items() if is_compared]
                key = attrgetter(*compared) if compared else lambda _: ()
                made = _equality(key) if name == "__eq__" else lambda instance: hash(key(instance))
                setattr(self.cls, name, made)

    def _describe(self) -> None:
        """Have :mod:`dataclasses` know its fields."""
        cls = self.cls
        if self._inherits:  # from what is frozen: the standard library insists on freezing it as well
            del cls.__setattr__, cls.__delattr__
        cls.__doc__ = cls.__doc__ or cls.__name__  # or the standard library asks for the signature, too early
        make = dataclasses.dataclass(
            init=False, repr=False, eq=False, match_args=False, frozen=self._inherits
        )
        fields = dataclasses.fields(make(cls))
        self._freeze()
        cls.__dataclass_params__.frozen = True  # type: ignore[attr-defined]
        if isinstance(cls.__dict__["__match_args__"], _Later):
            names = tuple(field.name for field in fields if field.init and not field.kw_only)
            cls.__match_args__ = names  # type: ignore[misc,attr-defined]


class _Later:
    """Stands for something of a class; to look at it makes that."""

    def __init__(self, unmade: _Unmade, name: str) -> None:
        self._unmade, self._name = unmade, name

    def __get__(self, instance: object, owner: type) -> Any:
        self._unmade.make(self._name)
        made = self._unmade.cls.__dict__[self._name]
        return made.__get__(instance, owner) if callable(made) else made


_Known = tuple[Any, Any, bool, bool]
"""Of a field: its default, what makes one, whether it is given by name only, and compared."""


def _fields_of(cls: type) -> dict[str, _Known]:
    """The fields of a class and of those it is derived from, in order: without describing it, if possible."""
    fields: dict[str, _Known] = {}
    for base in reversed(cls.__mro__):
        described = base.__dict__.get(_FIELDS)
        if isinstance(described, _Later):
            annotations, space = base.__annotations__, base.__dict__
            written = " ".join(map(str, annotations.values()))
            if any(map(written.__contains__, _SPECIAL)):
                described = getattr(base, _FIELDS)  # those the standard library knows
            else:
                fields |= dict.fromkeys(annotations, _REQUIRED)
                fields |= {name: _known(space[name]) for name in annotations.keys() & space.keys()}
        if isinstance(described, dict):  # with those of its own bases
            fields |= {field.name: _known(field) for field in dataclasses.fields(base)}
    return fields


def _known(given: Any) -> _Known:
    if isinstance(given, dataclasses.Field):
        return given.default, given.default_factory, given.kw_only is True, given.compare
    return given, MISSING, False, True


def _initialiser(cls: type) -> Callable[..., None]:
    """``__init__`` of the class, which replaces itself by one that knows the fields when it is called."""

    def initialise(self: Any, /, *arguments: Any, **named: Any) -> None:
        cls.__init__ = initialiser = _called(_interpreted(cls, _fields_of(cls)), cls)  # type: ignore[misc]
        initialiser(self, *arguments, **named)

    return _called(initialise, cls)


def _interpreted(cls: type, fields: Mapping[str, _Known]) -> Callable[..., None]:
    """``__init__`` for these ``fields``, which gives way to a compiled one where the class is called often.

    Compiling pays after forty calls with defaults, or some seventy with all arguments in order; most classes
    are called less often in a process.
    """
    concludes, calls = hasattr(cls, "__post_init__"), count(1)
    names, template = list(fields), dict.fromkeys(fields, MISSING)  # in order
    required, factories = set(fields), list[tuple[str, Any]]()
    for name, (default, factory, by_name, _) in [item for item in fields.items() if item[1] is not _REQUIRED]:
        template[name] = default
        if factory is not MISSING:
            factories.append((name, factory))
        if default is not MISSING or factory is not MISSING:
            required.remove(name)
        if by_name:
            names.remove(name)
    whole = len(names) if len(names) == len(fields) and not concludes else -1  # all arguments, if in order

    def initialise(self: Any, /, *arguments: Any, **named: Any) -> None:
        if named or len(arguments) != whole or next(calls) > _MANY:
            compose(self, arguments, named)
        else:
            self.__dict__.update(zip(names, arguments, strict=True))

    def compose(self: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(names, arguments, strict=False))
        values = {**template, **given, **named}
        given_once = len(given) == len(arguments) and named.keys().isdisjoint(given)
        is_right = given_once and len(values) == len(fields) and required <= {*given, *named}
        if not is_right or next(calls) > _MANY:
            cls.__init__ = compiled = _called(_compiled(cls, fields), cls)  # type: ignore[misc]
            compiled(self, *arguments, **named)  # which says what is wrong with the arguments
            return
        for name, factory in factories:
            if values[name] is MISSING:
                values[name] = factory()
        self.__dict__.update(values)
        if concludes:
            self.__post_init__()

    return initialise


def _called(initialise: Callable[..., None], cls: type) -> Callable[..., None]:
    """``initialise``, named as it is called."""
    initialise.__qualname__ = f"{cls.__qualname__}.__init__"
    initialise.__name__ = "__init__"
    return initialise


def _compiled(cls: type, fields: Mapping[str, _Known]) -> Callable[..., None]:
    """``__init__`` of the class, compiled for its fields."""
    names: dict[str, Any] = {"_missing": MISSING}
    positional, keywords, values = ["self"], ["*"], []
    for name, (default, factory, by_name, _) in fields.items():
        value, declared = name, name
        if default is not MISSING:
            names[f"_default_{name}"] = default
            declared += f"=_default_{name}"
        elif factory is not MISSING:
            names[f"_make_{name}"] = factory
            declared += "=_missing"
            value = f"_make_{name}() if {name} is _missing else {name}"
        (keywords if by_name else positional).append(declared)
        values.append(f"{name}={value}")
    # One call for all fields: setting seven one by one, past the refusal to be set, takes half as long again,
    # sixteen more than twice as long.  The price: an object takes twice the room, with names of its own.
    body = [f" self.__dict__.update({', '.join(values)})"] if values else [" pass"]
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    arguments = ", ".join(positional + (keywords if len(keywords) > 1 else []))
    made: dict[str, Any] = {}
    exec(f"def __init__({arguments}):\n" + "\n".join(body), names, made)
    initialise: Callable[..., None] = made["__init__"]
    return initialise


def _equality(key: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def equal(self: Any, other: Any) -> Any:
        return key(self) == key(other) if other.__class__ is self.__class__ else NotImplemented

    return equal


def _refuse_set(self: Any, name: str, value: Any) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _repr(self: Any) -> str:
    shown = (
        f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr
    )
    return f"{type(self).__qualname__}({', '.join(shown)})"


_FIELDS: Final = "__dataclass_fields__"
_DESCRIBING: Final = (_FIELDS, "__dataclass_params__", "__match_args__")
_COMPARING: Final = ("__eq__", "__hash__")
#: Of a field without a default.
_REQUIRED: Final = (MISSING, MISSING, False, True)
#: What makes an annotation no field, or another kind of one.
_SPECIAL: Final = ("ClassVar", "InitVar", "KW_ONLY")
#: Calls of a class until it is compiled.
_MANY: Final = 64
