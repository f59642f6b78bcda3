"""``miniloader check`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miniloader import cli
from miniloader.testing import assert_loads
from tests.lab.check.test_check import compile_library, duplicate_symbol, undefined_symbol


def test_what_loads_and_what_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = undefined_symbol(tmp_path)
    assert cli.main(["check", "libz.so.1"]) == 0
    assert cli.main(["check", "libz.so.1", str(library)]) == 1
    said = capsys.readouterr().out
    assert "undefined symbol strlenn" in said
    assert "caller in .text" in said
    assert "did you mean strlen?" in said
    assert said.endswith("1 of 2 load\n")


def test_json_has_a_row_for_each_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = undefined_symbol(tmp_path)
    assert cli.main(["check", "--json", str(library)]) == 1
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["path"], file["host"], file["root"], file["loads"]) == (str(library), None, "/", False)
    (problem,) = file["problems"]
    assert (problem["kind"], problem["symbol"], problem["function"]) == (
        "undefined-symbol",
        "strlenn",
        "caller",
    )


def test_a_file_that_is_not_there_or_no_elf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert cli.main(["check", str(script), str(tmp_path / "none")]) == 1
    assert "0 of 2 load" in capsys.readouterr().out


def test_who_serves_a_symbol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = duplicate_symbol(tmp_path)
    assert cli.main(["check", "--json", "--symbol", "twice", str(library)]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    first, second = (str(tmp_path / f"lib{name}.so") for name in ("one", "two"))
    rows = [(row["referrer"], row["provider"], row["also"]) for row in file["bindings"]]
    assert rows == [(first, first, [second]), (second, first, [second])]


def test_assert_loads_says_all_that_is_wrong(tmp_path: Path) -> None:
    assert_loads("libz.so.1")
    with pytest.raises(AssertionError, match="undefined symbol strlenn"):
        assert_loads(undefined_symbol(tmp_path))
    library = compile_library(tmp_path / "libnew.so", "int f;")
    assert_loads(library, policy="manylinux_2_17")


def test_inspect_says_who_would_serve_each_symbol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    library = duplicate_symbol(tmp_path)
    assert cli.main(["inspect", "--json", "--bindings", str(library)]) == 0
    rows = json.loads(capsys.readouterr().out)["bindings"]
    first, second = (str(tmp_path / f"lib{name}.so") for name in ("one", "two"))
    twice = [(row["referrer"], row["provider"], row["also"]) for row in rows if row["symbol"] == "twice"]
    assert twice == [(first, first, [second]), (second, first, [second])]
    assert cli.main(["inspect", "--bindings", str(library)]) == 0
    table = capsys.readouterr().out.partition("also defined by")[2]
    assert ["twice", "libtwo.so", "libone.so", "libtwo.so"] in [line.split() for line in table.splitlines()]
    assert ["libone.so", first] in [line.split() for line in table.splitlines()]
