"""The package's face: its public names and where they come from."""

from __future__ import annotations

import pytest

import miniloader


@pytest.mark.parametrize("name", miniloader.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(miniloader, name)
    assert value is getattr(miniloader, name)
    assert getattr(value, "__name__", name) == name
    assert name in dir(miniloader)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = miniloader.nonsense  # type: ignore[attr-defined]


def test_errors_are_one_family() -> None:
    errors = [getattr(miniloader, name) for name in miniloader.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, miniloader.MiniloaderError) for error in errors)
