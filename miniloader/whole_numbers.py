"""Whole numbers as they are written by others, who may write any number of digits."""

from __future__ import annotations

__all__ = ["whole_number"]

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
