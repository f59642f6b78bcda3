"""Every ``--json`` that a test makes miniloader print is held to the schema of its command."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from miniloader import cli
from miniloader.report import json as report_json
from miniloader.report.schemas import ERROR, SCHEMAS

_VALIDATORS = {
    name: jsonschema.Draft202012Validator({"anyOf": [schema, ERROR]}) for name, schema in SCHEMAS.items()
}


def validate(words: Sequence[str], value: object) -> None:
    """AssertionError where ``value`` is not what ``miniloader WORDS`` may print."""
    command = next((word for word in words if word in SCHEMAS), None)
    if command is None:
        return
    error = jsonschema.exceptions.best_match(_VALIDATORS[command].iter_errors(value))
    assert error is None, f"{command} --json: {error.json_path}: {error.message}"


@pytest.fixture(autouse=True, scope="session")
def every_json_fits_its_schema() -> Any:
    """Wrap what prints JSON in this process and in its forks, and what starts miniloader in another one."""
    patch = pytest.MonkeyPatch()
    words: list[str] = []
    dispatch, dump, run = cli._dispatch, report_json.dump, subprocess.run

    def noted(line: list[str]) -> int:
        words[:] = line
        return dispatch(line)

    def checked(value: object, **options: Any) -> None:
        validate(words, json.loads(json.dumps(value, default=report_json._plain)))
        dump(value, **options)

    def ran(command: Any, *arguments: Any, **options: Any) -> Any:
        done = run(command, *arguments, **options)
        given = [] if isinstance(command, (str, bytes)) else [os.fsdecode(word) for word in command]
        words = given[given.index("miniloader") + 1 :] if "miniloader" in given else []
        if "--json" in words and words[0] != "run" and done.stdout:  # what a program prints is its own
            validate(words, _first_object(done.stdout))
        return done

    patch.setattr(cli, "_dispatch", noted)
    patch.setattr(report_json, "dump", checked)
    patch.setattr(subprocess, "run", ran)
    yield
    patch.undo()


def _first_object(text: str | bytes) -> object:
    decoded = os.fsdecode(text)
    value, _ = json.JSONDecoder().raw_decode(decoded[decoded.index("{") :])
    return value
