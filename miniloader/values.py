"""Frozen dataclasses that are made when they are first used.

The standard library's ``dataclass(frozen=True)`` compiles six methods for every class: half a millisecond
for each of the sixty that a command defines, and uses a few of.  Here only ``__init__`` is compiled, and not
until the class is called, compared or asked for its fields.  What is made is a dataclass to
:mod:`dataclasses` and to type checkers, and behaves as theirs; but a class with an ``__eq__`` of its own has
no hash, one derived without the decorator is frozen, too, and ``__init__`` is not annotated.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from miniloader.forking import making
from miniloader.later import leaving_out

with leaving_out("inspect"):
    import dataclasses
    from dataclasses import MISSING, FrozenInstanceError

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool, eq: bool = True) -> Callable[[type], type]:
        """:func:`dataclasses.dataclass` for values: ``frozen`` says that they are, and has to be true."""
        assert frozen

        def make(cls: type) -> type:
            _Unmade(cls, eq=eq)
            return cls

        return make


class _Unmade:
    """A class to be made: until then :class:`_Later` stands for all that it will have."""

    def __init__(self, cls: type, *, eq: bool) -> None:
        self.cls, self._made = cls, False
        self._inherits = any(_DESCRIBING[0] in base.__dict__ for base in cls.__mro__[1:])
        wanted = (*_DESCRIBING, "__init__", *(_COMPARING if eq else ()))
        self._later = [name for name in wanted if name not in cls.__dict__]
        for name in self._later:
            setattr(cls, name, _Later(self, name))
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = _repr  # type: ignore[method-assign,assignment]
        self._freeze()

    def _freeze(self) -> None:
        self.cls.__setattr__ = _refuse_set  # type: ignore[method-assign,assignment]
        self.cls.__delattr__ = _refuse_delete  # type: ignore[method-assign,assignment]

    def make(self) -> None:
        """Make it, once."""
        with making:
            if self._made:
                return
            cls = self.cls
            if self._inherits:  # from what is frozen: the standard library insists on freezing it as well
                del cls.__setattr__, cls.__delattr__
            cls.__doc__ = (
                cls.__doc__ or cls.__name__
            )  # or the standard library asks for the signature, too early
            make = dataclasses.dataclass(
                init=False, repr=False, eq=False, match_args=False, frozen=self._inherits
            )
            fields = dataclasses.fields(make(cls))
            self._freeze()
            cls.__dataclass_params__.frozen = True  # type: ignore[attr-defined]
            compared = [field.name for field in fields if field.compare]
            key = attrgetter(*compared) if compared else lambda _: ()
            made = {
                "__match_args__": tuple(field.name for field in fields if field.init and not field.kw_only),
                "__init__": _initialiser(cls, fields),
                "__eq__": _equality(key),
                "__hash__": lambda self: hash(key(self)),
            }
            for name in self._later:
                if name in made:
                    setattr(cls, name, made[name])
            self._made = True


class _Later:
    """Stands for something of a class; to look at it makes the class."""

    def __init__(self, unmade: _Unmade, name: str) -> None:
        self._unmade, self._name = unmade, name

    def __get__(self, instance: object, owner: type) -> Any:
        self._unmade.make()
        made = self._unmade.cls.__dict__[self._name]
        return made.__get__(instance, owner) if callable(made) else made


def _initialiser(cls: type, fields: tuple[dataclasses.Field[Any], ...]) -> Callable[..., None]:
    """``__init__`` of the class: the one method that is compiled, since it takes what the class has."""
    names: dict[str, Any] = {"_missing": MISSING}
    positional, by_name, values = ["self"], ["*"], []
    for field in fields:
        value, declared = field.name, field.name
        if field.default is not MISSING:
            names[f"_default_{field.name}"] = field.default
            declared += f"=_default_{field.name}"
        elif field.default_factory is not MISSING:
            names[f"_make_{field.name}"] = field.default_factory
            declared += "=_missing"
            value = f"_make_{field.name}() if {field.name} is _missing else {field.name}"
        (by_name if field.kw_only else positional).append(declared)
        values.append(f"{field.name}={value}")
    # One call for all fields: setting seven one by one, past the refusal to be set, takes half as long again,
    # sixteen more than twice as long.  The price: an object takes twice the room, with names of its own.
    body = [f" self.__dict__.update({', '.join(values)})"] if values else [" pass"]
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    arguments = ", ".join(positional + (by_name if len(by_name) > 1 else []))
    made: dict[str, Any] = {}
    exec(f"def __init__({arguments}):\n" + "\n".join(body), names, made)
    initialise: Callable[..., None] = made["__init__"]
    initialise.__qualname__ = f"{cls.__qualname__}.__init__"
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


_DESCRIBING: Final = ("__dataclass_fields__", "__dataclass_params__", "__match_args__")
_COMPARING: Final = ("__eq__", "__hash__")
