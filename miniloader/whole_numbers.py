"""Whole numbers: as others write them, who may write any number of digits; and with what they count."""

from __future__ import annotations

__all__ = ["count", "whole_number"]

_MOST_DIGITS = 20  # of an integer of 64 bits


def whole_number(text: str) -> int | None:
    """The number that decimal digits are; None for other text, and for more digits than 64 bits have.

    ``str.isdigit`` lets pass what ``int`` refuses: superscripts, and more than 4,300 digits
    (sys.set_int_max_str_digits).

    >>> whole_number("4711"), whole_number("x"), whole_number("\N{SUPERSCRIPT TWO}"), whole_number("9" * 5000)
    (4711, None, None, None)
    """
    digits = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if digits else None


def count(number: int, singular: str, plural: str | None = None) -> str:
    """``1 page``, ``2 pages``, ``1,024 pages``.

    >>> count(1, "page"), count(1024, "page"), count(2, "process", "processes")
    ('1 page', '1,024 pages', '2 processes')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
