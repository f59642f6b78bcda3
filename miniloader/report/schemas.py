"""The JSON Schema (2020-12) of what each command prints with ``--json``, which the tests hold it to.

A shape stands beside what makes it (see :mod:`miniloader.json_schema`); here they are by command.
"""

from __future__ import annotations

from typing import Final

from miniloader.json_schema import BOOL, NUMBER, TEXT, Schema, array, by_name, either, keys, nullable, record
from miniloader.lab.audit.diff import CHANGE_SCHEMA
from miniloader.lab.audit.grouping import GROUP_SCHEMA
from miniloader.lab.audit.growth import GROWTH_KEYS
from miniloader.lab.audit.live_bindings import LIVE_SCHEMA
from miniloader.lab.audit.page_words import PAGE_SCHEMA
from miniloader.lab.audit.result import AUDIT_KEYS
from miniloader.lab.erosion.advice import ADVICE_SCHEMA
from miniloader.lab.proof.proof import PROOF_SCHEMA
from miniloader.report import (
    bill,
    bindings,
    check,
    disasm,
    doctor,
    forked_writes,
    inspect,
    load,
    prepared,
    tree,
)
from miniloader.walkthrough.run_chapter import CHAPTER_SCHEMA

__all__ = ["ERROR", "SCHEMAS"]

ERROR: Final = record({"error": record(keys(TEXT, "kind message"))})
"""What every command prints when it fails."""

SCHEMAS: Final[dict[str, Schema]] = {
    "inspect": inspect.SCHEMA,
    "tree": tree.SCHEMA,
    "check": either(check.SCHEMA, bindings.SCHEMA),
    "load": load.SCHEMA,
    "run": either(bill.SCHEMA, forked_writes.SCHEMA),
    "disasm": disasm.SCHEMA,
    "prove": PROOF_SCHEMA,
    "audit": either(
        record(
            AUDIT_KEYS,
            optional={
                "since": NUMBER,
                "changes": array(CHANGE_SCHEMA),
                "groups": array(GROUP_SCHEMA),
                "advice": ADVICE_SCHEMA,
            },
        ),
        PAGE_SCHEMA,
        LIVE_SCHEMA,
    ),
    "diff": record(keys(NUMBER, "since until"), GROWTH_KEYS, {"changes": array(CHANGE_SCHEMA)}),
    "walkthrough": either(
        record({"chapters": array(CHAPTER_SCHEMA)}),
        record(keys(TEXT, "id task snippet")),
        record(keys(TEXT, "id message printed"), {"passed": BOOL}),
        record({"id": TEXT, "hints": array(TEXT)}),
        record({"words": by_name(TEXT)}),
        record(
            {
                "graded": array(
                    record(keys(TEXT, "student id path message printed"), {"passed": nullable(BOOL)})
                )
            }
        ),
    ),
    "prepare": prepared.SCHEMA,
    "cache": prepared.SCHEMA,
    "doctor": doctor.SCHEMA,
}
"""By command, what ``--json`` prints when it succeeds."""
