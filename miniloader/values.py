"""Frozen dataclasses, made in a fifth of the time.

The standard library's ``dataclass(frozen=True)`` compiles six methods for every class: half a millisecond for
each of the sixty that a command defines.  All of them but ``__init__`` can be the same for every class.  What
is made here is a dataclass to :mod:`dataclasses` and to type checkers, and behaves as theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool, eq: bool = True) -> Callable[[type], type]:
        """:func:`dataclasses.dataclass` for values: ``frozen`` says that they are, and has to be true."""
        assert frozen

        def make(cls: type) -> type:
            inherited = any(dataclasses.is_dataclass(base) for base in cls.__bases__)
            dataclasses.dataclass(init=False, repr=False, eq=False, frozen=inherited)(cls)
            fields = dataclasses.fields(cls)
            methods = _METHODS | {"__init__": _initialiser(cls, fields)}
            if eq:
                compared = [field.name for field in fields if field.compare]
                key = attrgetter(*compared) if compared else lambda _: ()
                methods |= {"__eq__": _equality(key), "__hash__": lambda self: hash(key(self))}
            for name, method in methods.items():
                if name not in cls.__dict__ or name in _FREEZING:
                    setattr(cls, name, method)
            cls.__dataclass_params__.frozen = True
            return cls

        return make


def _initialiser(cls: type, fields: tuple[dataclasses.Field[Any], ...]) -> Callable[..., None]:
    """``__init__`` of the class: the one method that is compiled, since it takes what the class has."""
    names: dict[str, Any] = {"_set": object.__setattr__, "_missing": MISSING}
    positional, by_name, body = ["self"], ["*"], []
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
        body.append(f" _set(self, {field.name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    arguments = ", ".join(positional + (by_name if len(by_name) > 1 else []))
    made: dict[str, Any] = {}
    exec(f"def __init__({arguments}):\n" + "\n".join(body or [" pass"]), names, made)
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


_FREEZING: Final = ("__setattr__", "__delattr__")
_METHODS: Final = {"__setattr__": _refuse_set, "__delattr__": _refuse_delete, "__repr__": _repr}
