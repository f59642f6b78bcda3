"""The table of relocation kinds, against the names that pyelftools has from binutils."""

from __future__ import annotations

import pytest

from miniloader.elf.relocations import kind_name
from miniloader.machine.relocation import KINDS

EVERY = [(machine, code) for machine, kinds in KINDS.items() for code in kinds]


@pytest.mark.parametrize(("machine", "code"), EVERY)
def test_a_kind_has_the_name_that_its_number_has(machine: str, code: int) -> None:
    """Where pyelftools knows the number; it lacks a few."""
    kind = KINDS[machine][code]
    assert kind_name(machine, code) in (kind.name, hex(code))
    assert kind.name.startswith(f"R_{machine}_")
    assert (kind.size == 0) == (kind.formula == "none")
