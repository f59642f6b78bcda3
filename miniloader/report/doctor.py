"""What the kernel tells here, for people and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from miniloader.json_schema import BOOL, COUNT, TEXT, array, keys, nullable, record
from miniloader.kernel.features import LEVEL_SCHEMA
from miniloader.kernel.privileges import CAPABILITIES, Privileges
from miniloader.kernel.syscalls import PAGE_SIZE
from miniloader.native.gate import compiled_code, lacks_for_loading
from miniloader.report.text import Cell, Part, Table

if TYPE_CHECKING:
    from miniloader.kernel.probe import Capabilities

__all__ = ["SCHEMA", "as_json", "lines"]

_NAMESPACES = {True: "the initial user namespace", False: "a user namespace of its own", None: "not known"}


def as_json(system: os.uname_result, capabilities: Capabilities, rights: Privileges) -> dict[str, Any]:
    """The object that ``doctor --json`` prints; ``next`` is null where the best level works."""
    above = capabilities.next_level
    return {
        "kernel": system.release,
        "architecture": system.machine,
        "page_size": PAGE_SIZE,
        "loading": {"works": lacks_for_loading() is None, "why": lacks_for_loading() or ""},
        "compiled_code": dict(zip(("path", "sha256", "origin"), compiled_code(), strict=True)),
        "privileges": {
            "uid": rights.uid,
            "capabilities": list(rights.capabilities),
            "initial_user_namespace": rights.initial_user_namespace,
            "ptrace_scope": rights.ptrace_scope,
            "hidepid": rights.hidepid,
        },
        "features": [
            {
                "name": trial.feature.name,
                "works": trial.works,
                "what": trial.feature.what,
                "why": trial.why,
                "get": trial.feature.get,
            }
            for trial in capabilities.trials
        ],
        "evidence": capabilities.level.name,
        "shows": capabilities.level.shows,
        "next": None if above is None else {"evidence": above.name, "shows": above.shows, "get": above.get},
    }


SCHEMA: Final = record(
    keys(TEXT, "kernel architecture shows"),
    {"page_size": COUNT, "evidence": LEVEL_SCHEMA, "loading": record({"works": BOOL, "why": TEXT})},
    {"compiled_code": record(keys(TEXT, "path origin"), {"sha256": nullable(TEXT)})},
    {"privileges": record(
        {"uid": COUNT, "capabilities": array(TEXT), "initial_user_namespace": nullable(BOOL)},
        {"ptrace_scope": nullable(COUNT), "hidepid": nullable(TEXT)},
    )},
    {"features": array(record(keys(TEXT, "name what why get"), {"works": BOOL}))},
    {"next": nullable(record({"evidence": LEVEL_SCHEMA}, keys(TEXT, "shows get")))},
)  # fmt: skip
"""What :func:`as_json` gives."""


def lines(system: os.uname_result, capabilities: Capabilities, rights: Privileges) -> Iterator[Part]:
    """The machine, each feature, and the level of evidence that this gives."""
    yield Table((), [*_machine(system, rights)])
    yield ()
    yield Table(("feature", "works", "what it tells, or why it does not"), [*_features(capabilities)])
    yield ()
    level, above = capabilities.level, capabilities.next_level
    yield "Evidence here: ", (level.name, "bold"), f" — {level.shows}."
    if above is not None:
        yield "Next level:    ", (above.name, "bold"), f" — {above.shows}."
        yield (f"To get it:     {above.get}.",)


def _machine(system: os.uname_result, rights: Privileges) -> Iterator[tuple[str, str]]:
    """The kernel, and who we are to it."""
    held = "no, but in its own namespace" if rights.initial_user_namespace is False else "yes"
    yield "kernel", f"{system.sysname} {system.release}, {system.machine}"
    yield "page size", f"{PAGE_SIZE} bytes"
    lack, (path, checksum, origin) = lacks_for_loading(), compiled_code()
    yield "libraries", "can be loaded" if lack is None else f"cannot be loaded: {lack}"
    yield "compiled code", path if checksum is not None else f"missing: no file {path}"
    if checksum is not None:
        yield "  whose", origin
        yield "  its SHA-256", checksum
    yield "user", f"uid {rights.uid}, in {_NAMESPACES[rights.initial_user_namespace]}"
    for name, (_, purpose) in CAPABILITIES.items():
        yield name, f"{held if name in rights.capabilities else 'no'}: to {purpose}"
    yield "ptrace scope", "no Yama" if rights.ptrace_scope is None else f"Yama, {rights.ptrace_scope}"
    yield "hidepid", "not set" if rights.hidepid is None else rights.hidepid


def _features(capabilities: Capabilities) -> Iterator[tuple[Cell, Cell, Cell]]:
    """One row a feature; below one that does not work, why not and how to get it."""
    for trial in capabilities.trials:
        feature = trial.feature
        works = ("yes", "green") if trial.works else ("no", "red")
        yield feature.name, works, feature.what
        if not trial.works:
            yield "", "", (trial.why, "dim")
            yield "", "", (f"to get it: {feature.get}", "dim")
