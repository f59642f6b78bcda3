"""What ``--json`` prints, command by command: a JSON Schema (2020-12) for each, which the tests hold it to.

Strict on purpose: where keys are fixed no other may appear, so that a new key is a change of this table.
Addresses, offsets and sizes are integers; a name that a file or a process brings along is any string.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["ERROR", "SCHEMAS"]

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_INT: Final[Schema] = {"type": "integer"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_NUMBER: Final[Schema] = {"type": "number"}
_BOOL: Final[Schema] = {"type": "boolean"}
_HEX: Final[Schema] = {"type": "string", "pattern": "^([0-9a-f]{2})*$"}
_PROTECTION: Final[Schema] = {"type": "string", "pattern": "^[r-][w-][x-]$"}


def _object(_optional: Schema | None = None, /, **keys: Schema) -> Schema:
    """An object with all of ``keys``, perhaps some ``_optional`` ones, and no other.

    >>> _object(pid=_COUNT)["required"]
    ['pid']
    """
    return {
        "type": "object",
        "properties": keys | (_optional or {}),
        "required": list(keys),
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _by_name(values: Schema) -> Schema:
    """An object whose keys are names."""
    return {"type": "object", "additionalProperties": values}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


_LEVEL: Final = _one_of("frames", "flags", "totals", "none")
_VERDICT: Final = _one_of("proven", "refuted", "unknown")
_SEVERITY: Final = _one_of("error", "warning")
_STATE: Final = _TEXT

# --------------------------------------------------------------------------------------------- inspect
_PROBLEM: Final = _object(rule=_TEXT, severity=_SEVERITY, field=_TEXT, found=_TEXT, expected=_TEXT)
_RULE: Final[Schema] = {"name": _TEXT, "protects": _TEXT, "source": _TEXT, "severity": _SEVERITY}
_SYMBOL: Final = _object(
    name=_TEXT,
    value=_COUNT,
    size=_COUNT,
    type=_TEXT,
    bind=_TEXT,
    visibility=_one_of("default", "internal", "hidden", "protected"),
    section=_one_of("undefined", "absolute", "defined"),
    version=_or_null(_TEXT),
    default=_BOOL,
    file=_or_null(_TEXT),
)
_CHECK: Final = _object(**_RULE, outcome=_TEXT, problems=_array(_PROBLEM))
_SEARCHED: Final = _object(
    needed=_TEXT,
    needed_by=_TEXT,
    path=_or_null(_TEXT),
    steps=_array(_object(rule=_TEXT, path=_TEXT, outcome=_TEXT)),
)
_IMAGE: Final[Schema] = {
    "path": _TEXT,
    "machine": _TEXT,
    "class": {"enum": [32, 64]},
    "byte_order": _one_of("little", "big"),
    "type": _TEXT,
    "soname": _or_null(_TEXT),
    "build_id": _or_null(_HEX),
    "segments": _array(
        _object(
            type=_TEXT,
            flags=_PROTECTION,
            file_offset=_COUNT,
            vaddr=_COUNT,
            filesz=_COUNT,
            memsz=_COUNT,
            align=_COUNT,
        )
    ),
    "plan": _array(
        _object(
            start=_COUNT,
            end=_COUNT,
            file_offset=_COUNT,
            protection=_PROTECTION,
            kind=_one_of("file", "zero", "gap"),
        )
    ),
    "calls": _array(
        _object(
            call=_one_of("mmap", "mprotect", "memset", "munmap"),
            start=_INT,
            length=_COUNT,
            protection=_or_null(_PROTECTION),
            flags=_array(_TEXT),
            file_offset=_or_null(_COUNT),
            why=_TEXT,
        )
    ),
    "needed": _array(_TEXT),
    "runpath": _array(_TEXT),
    "relocations": _by_name(_COUNT),
    "symbols": _object({"table": _array(_SYMBOL)}, defined=_COUNT, undefined=_COUNT),
    "tls": _or_null(_object(vaddr=_COUNT, filesz=_COUNT, memsz=_COUNT, align=_COUNT)),
    "problems": _array(_PROBLEM),
}
_INSPECT: Final = _either(
    _object({"checks": _array(_CHECK), "search": _array(_SEARCHED)}, **_IMAGE),
    _object(checks=_array(_object(**_RULE))),
)

# ------------------------------------------------------------------------------------------------ load
_VALUE: Final[Schema] = {"type": ["null", "boolean", "number", "string"]}
_LOAD: Final = _object(
    path=_TEXT,
    base=_INT,
    mappings=_array(
        _object(
            start=_COUNT,
            end=_COUNT,
            protection=_PROTECTION,
            file_offset=_COUNT,
            kind=_one_of("file", "zero", "gap"),
        )
    ),
    result=_VALUE,
    results=_array(
        _object(call=_TEXT, type=_TEXT, value=_VALUE, written=_array(_object(argument=_TEXT, value=_VALUE)))
    ),
    stages_ms=_by_name(_NUMBER),
    libraries=_array(_object(name=_TEXT, path=_TEXT, base=_INT, ours=_BOOL)),
)

# ---------------------------------------------------------------------------------------------- disasm
_TARGET: Final = _object(
    kind=_TEXT,
    name=_TEXT,
    vaddr=_COUNT,
    slot=_or_null(
        _object(vaddr=_COUNT, relocation=_TEXT, symbol=_or_null(_TEXT), version=_or_null(_TEXT), addend=_INT)
    ),
    holds=_or_null(_COUNT),
    stand_in=_BOOL,
    owner=_or_null(_object(path=_TEXT, name=_or_null(_TEXT), vaddr=_or_null(_INT), ifunc=_BOOL)),
)
_DISASM: Final = _object(
    path=_TEXT,
    symbol=_TEXT,
    vaddr=_COUNT,
    size=_COUNT,
    machine=_TEXT,
    ifunc=_BOOL,
    base=_or_null(_INT),
    instructions=_array(
        _object(vaddr=_COUNT, bytes=_HEX, mnemonic=_TEXT, operands=_TEXT, target=_or_null(_TARGET))
    ),
)

# ----------------------------------------------------------------------------------------------- prove
_CLAIM: Final = _object(
    {"reason": _TEXT}, id=_TEXT, statement=_TEXT, verdict=_VERDICT, observed=_TEXT, expected=_TEXT
)
_PAGE: Final = _object(
    vaddr=_COUNT,
    state=_array(_STATE),
    present=_array(_or_null(_BOOL)),
    file=_array(_or_null(_BOOL)),
    exclusive=_array(_or_null(_BOOL)),
    frame=_array(_or_null(_COUNT)),
    map_count=_array(_or_null(_COUNT)),
    flags=_array(_or_null(_COUNT)),
)
_PROVE: Final = _object(
    path=_TEXT,
    verdict=_VERDICT,
    evidence=_LEVEL,
    page_size=_COUNT,
    processes=_array(_object(pid=_COUNT, base=_INT)),
    claims=_array(_CLAIM),
    written=_or_null(_object(vaddr=_COUNT, place=_TEXT)),
    memory=_object(used=_COUNT, unshared=_COUNT, estimated=_BOOL),
    steps=_array(_object({"totals": _array(_or_null(_by_name(_COUNT)))}, name=_TEXT, pages=_array(_PAGE))),
)

# ----------------------------------------------------------------------------------------------- audit
_COPY: Final = _object(
    vaddr=_COUNT,
    section=_TEXT,
    symbols=_array(_TEXT),
    written=_array(_TEXT),
    causes=_array(_TEXT),
    kinds=_by_name(_COUNT),
    pids=_array(_COUNT),
    groups=_array(_array(_COUNT)),
    reason=_TEXT,
    common=_array(_COUNT),
)
_CHANGE: Final = _object(
    path=_TEXT,
    build_id=_or_null(_HEX),
    vaddr=_COUNT,
    section=_TEXT,
    change=_one_of("private", "rewritten", "returned"),
    causes=_array(_TEXT),
    symbols=_array(_TEXT),
    processes=_COUNT,
    pids=_array(_COUNT),
)
_AUDIT: Final = _object(
    {"since": _NUMBER, "changes": _array(_CHANGE)},
    format=_TEXT,
    level=_LEVEL,
    when=_NUMBER,
    page_size=_COUNT,
    explained=_BOOL,
    processes=_array(
        _object(
            pid=_COUNT,
            name=_TEXT,
            parent=_COUNT,
            started=_COUNT,
            rss=_COUNT,
            pss=_or_null(_COUNT),
            uss=_COUNT,
            anonymous=_COUNT,
            anonymous_shared=_COUNT,
            ksm=_or_null(_COUNT),
            zero=_COUNT,
            huge=_COUNT,
            swapped=_COUNT,
        )
    ),
    libraries=_array(
        _object(
            path=_TEXT,
            build_id=_or_null(_HEX),
            files=_COUNT,
            frames=_COUNT,
            processes=_array(
                _object(
                    pid=_COUNT,
                    base=_INT,
                    mapped=_COUNT,
                    present=_COUNT,
                    shared=_COUNT,
                    private=_COUNT,
                    inherited=_COUNT,
                    bss=_COUNT,
                    swapped=_COUNT,
                    beforehand=_COUNT,
                    merged=_or_null(_COUNT),
                )
            ),
            private_pages=_array(_COPY),
            bss_pages=_array(_COPY),
            swapped_pages=_array(_COPY),
        )
    ),
    unreadable=_array(_object(pid=_COUNT, reason=_TEXT, needed=_TEXT)),
)
_AUDITED_PAGE: Final = _object(
    pid=_COUNT,
    path=_TEXT,
    build_id=_or_null(_HEX),
    base=_INT,
    vaddr=_COUNT,
    section=_TEXT,
    state=_one_of("private", "swapped", "shared", "absent", "unknown"),
    causes=_array(_TEXT),
    words=_array(
        _object(
            vaddr=_COUNT,
            size=_COUNT,
            cause=_TEXT,
            symbol=_TEXT,
            kind=_TEXT,
            file=_COUNT,
            old=_COUNT,
            new=_COUNT,
        )
    ),
    reason=_TEXT,
)

# ----------------------------------------------------------------------------------------- walkthrough
_EXERCISE: Final[Schema] = {"task": _TEXT, "snippet": _TEXT}
_STEP: Final = _object(
    name=_TEXT,
    did=_TEXT,
    calls=_array(_object(text=_TEXT, result=_TEXT, process=_TEXT, access=_BOOL)),
    saw=_array(_TEXT),
    evidence=_array(
        _object(
            title=_TEXT,
            source=_TEXT,
            rows=_array(_object(name=_TEXT, before=_TEXT, after=_TEXT, changed=_BOOL)),
        )
    ),
    tables=_array(_object(title=_TEXT, columns=_array(_TEXT), rows=_array(_array(_TEXT)))),
    grid=_or_null(
        _object(
            title=_TEXT,
            rows=_array(_TEXT),
            page_size=_COUNT,
            parts=_array(_object(vaddr=_COUNT, name=_TEXT)),
            runs=_array(_object(vaddr=_COUNT, pages=_COUNT, states=_array(_STATE), frames=_array(_INT))),
        )
    ),
    bytes=_array(
        _object(
            title=_TEXT,
            start=_COUNT,
            before=_HEX,
            after=_HEX,
            words=_array(_object(offset=_COUNT, length=_COUNT, name=_TEXT)),
        )
    ),
    listing=_or_null(
        _object(
            title=_TEXT,
            lines=_array(_object(vaddr=_COUNT, code=_HEX, text=_TEXT, slot=_or_null(_COUNT))),
            slots=_array(_object(vaddr=_COUNT, name=_TEXT, before=_TEXT, after=_TEXT)),
        )
    ),
)
_CHAPTER: Final = _object(
    id=_TEXT,
    number=_COUNT,
    title=_TEXT,
    claim=_TEXT,
    surprise=_TEXT,
    verdict=_VERDICT,
    evidence=_LEVEL,
    facts=_object(
        kernel=_TEXT,
        machine=_TEXT,
        page_size=_COUNT,
        file_systems=_array(_TEXT),
        privilege=_TEXT,
        shows=_TEXT,
    ),
    claims=_array(_CLAIM),
    question=_object(text=_TEXT, choices=_array(_object(text=_TEXT, why=_TEXT)), answer=_COUNT),
    steps=_array(_STEP),
    explanation=_array(_TEXT),
    sources=_array(_TEXT),
    exercise=_object(**_EXERCISE),
)
_WALKTHROUGH: Final = _either(
    _object(chapters=_array(_CHAPTER)),
    _object(id=_TEXT, **_EXERCISE),
    _object(id=_TEXT, passed=_BOOL, message=_TEXT, printed=_TEXT),
)

# --------------------------------------------------------------------------------- prepare, cache, doctor
_PREPARED: Final = _object(
    directory=_TEXT,
    removed=_BOOL,
    libraries=_array(
        _object(
            name=_TEXT,
            path=_TEXT,
            build_id=_TEXT,
            address=_COUNT,
            length=_COUNT,
            words=_COUNT,
            pages=_COUNT,
            filled=_COUNT,
            size=_COUNT,
            fault=_or_null(_TEXT),
        )
    ),
)
_DOCTOR: Final = _object(
    kernel=_TEXT,
    architecture=_TEXT,
    page_size=_COUNT,
    privileges=_object(
        uid=_COUNT,
        capabilities=_array(_TEXT),
        initial_user_namespace=_or_null(_BOOL),
        ptrace_scope=_or_null(_COUNT),
        hidepid=_or_null(_TEXT),
    ),
    features=_array(_object(name=_TEXT, works=_BOOL, what=_TEXT, why=_TEXT, get=_TEXT)),
    evidence=_LEVEL,
    shows=_TEXT,
    next=_or_null(_object(evidence=_LEVEL, shows=_TEXT, get=_TEXT)),
)

ERROR: Final = _object(error=_object(kind=_TEXT, message=_TEXT))
"""What every command prints when it fails."""

SCHEMAS: Final[dict[str, Schema]] = {
    "inspect": _INSPECT,
    "load": _LOAD,
    "disasm": _DISASM,
    "prove": _PROVE,
    "audit": _either(_AUDIT, _AUDITED_PAGE),
    "diff": _object(since=_NUMBER, until=_NUMBER, changes=_array(_CHANGE)),
    "walkthrough": _WALKTHROUGH,
    "prepare": _PREPARED,
    "cache": _PREPARED,
    "doctor": _DOCTOR,
}
"""By command, what ``--json`` prints when it succeeds."""
