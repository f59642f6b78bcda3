"""JSON Schema (2020-12) in few words: the shape of what ``--json`` prints stands beside what makes it.

Strict on purpose: an object has the keys that its shape names and no other, so that a new key is a change of
the shape.  Addresses, offsets and sizes are integers; a name that a file or a process brings along is text.
"""

from __future__ import annotations

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


def words(text: str) -> Schema:
    """One of these words, which are separated by spaces."""
    return {"enum": text.split()}
