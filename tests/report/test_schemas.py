"""The table of schemas: each is one, every command has its own, and none lets a stray key pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from miniloader import cli
from miniloader.report.schemas import ERROR, SCHEMAS
from tests.json_schemas import validate


def test_every_command_has_a_schema() -> None:
    assert set(SCHEMAS) == set(cli.COMMANDS)


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


@pytest.mark.parametrize("command", SCHEMAS)
def test_each_is_a_schema_and_strict(command: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[command])
    found = list(objects({"any": [SCHEMAS[command], ERROR]}))
    assert found
    assert all("additionalProperties" in schema for schema in found)


def test_a_stray_key_a_lost_key_and_a_wrong_type_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    right = json.loads(capsys.readouterr().out)
    validate(["doctor"], right)
    lost = {key: value for key, value in right.items() if key != "kernel"}
    for wrong in (right | {"colour": 1}, lost, right | {"page_size": "4096"}):
        with pytest.raises(AssertionError, match="doctor --json"):
            validate(["doctor"], wrong)
