"""JSON Schema (2020-12) in few words: the shape of what ``--json`` prints stands beside what makes it.

Strict on purpose: an object has the keys that its shape names and no other, so that a new key is a change of
the shape.  Addresses, offsets and sizes are integers; a name that a file or a process brings along is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

__all__ = [
    "BOOL",
    "COUNT",
    "HEX",
    "INT",
    "NUMBER",
    "PROTECTION",
    "TEXT",
    "array",
    "by_name",
    "either",
    "keys",
    "misfit",
    "nullable",
    "record",
    "words",
]

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string"}
INT: Final[Schema] = {"type": "integer"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
NUMBER: Final[Schema] = {"type": "number"}
BOOL: Final[Schema] = {"type": "boolean"}
#: Bytes, in hexadecimal.
HEX: Final[Schema] = {"type": "string", "pattern": "^([0-9a-f]{2})*$"}

#: As ``/proc/PID/maps`` writes it: ``r-x``.
PROTECTION: Final[Schema] = {"type": "string", "pattern": "^[r-][w-][x-]b?$"}


def keys(schema: Schema, names: str) -> dict[str, Schema]:
    """Keys of one shape, for :func:`record`: ``names`` are separated by spaces.

    >>> keys(TEXT, "path name")
    {'path': {'type': 'string'}, 'name': {'type': 'string'}}
    """
    return dict.fromkeys(names.split(), schema)


def record(*shapes: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with the keys of all ``shapes``, perhaps some ``optional`` ones, and no other.

    >>> record(keys(COUNT, "pid rss"), {"pss": nullable(COUNT)})["required"]
    ['pid', 'rss', 'pss']
    """
    required = {name: schema for shape in shapes for name, schema in shape.items()}
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": [*required],
        "additionalProperties": False,
    }


def array(items: Schema) -> Schema:
    """A list of ``items``."""
    return {"type": "array", "items": items}


def by_name(values: Schema) -> Schema:
    """An object whose keys are names."""
    return {"type": "object", "additionalProperties": values}


def nullable(schema: Schema) -> Schema:
    """``schema``, or null."""
    return either(schema, {"type": "null"})


def either(*schemas: Schema) -> Schema:
    """One of several shapes."""
    return {"anyOf": [*schemas]}


_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list, tuple),
    "object": (dict,),
}
_MOST: Final = 1 << 64  # no count, address or time is larger
_SHOWN: Final = 60  # characters


def misfit(value: Any, schema: Schema, place: str = "") -> str | None:
    """Where ``value``, as JSON has it (or with tuples), has another shape, and what is there; None: nowhere.

    Keys that an object lacks, or has besides, are not looked at: another version may have others.

    >>> misfit({"pid": [1, "2"]}, record({"pid": array(COUNT)}))
    "pid[1]: found '2'"
    >>> misfit({"pid": None}, record(keys(nullable(COUNT), "pid rss")))
    """
    if "anyOf" in schema:
        misfits = [misfit(value, shape, place) for shape in schema["anyOf"]]
        return None if None in misfits else misfits[0]
    if not _fits(value, schema):
        return f"{place or 'all'}: found {repr(value)[:_SHOWN]}"
    return next((found for parts in _parts(value, schema, place) if (found := misfit(*parts))), None)


def _fits(value: Any, schema: Schema) -> bool:
    """Whether a value is such a one, whatever is in it."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind in ("integer", "number"):
        return bool(schema.get("minimum", -_MOST) <= value <= schema.get("maximum", _MOST))
    return kind != "string" or re.search(str(schema.get("pattern", "")), str(value)) is not None


def _parts(value: Any, schema: Schema, place: str) -> Iterator[tuple[Any, Schema, str]]:
    """What is in a list or an object, each with its shape and its place."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield item, schema["items"], f"{place}[{index}]"
    elif isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            shape = properties.get(key, others)
            if shape:
                yield item, shape, f"{place}.{key}".lstrip(".")


def words(text: str) -> Schema:
    """One of these words, which are separated by spaces."""
    return {"enum": text.split()}
