"""Numbers in words, and the styles and signs that mean the same in every drawing."""

from __future__ import annotations

from typing import Final

from miniloader.whole_numbers import count

__all__ = ["PROTECTION_STYLES", "count", "level", "size"]

#: What a page of each protection looks like in a drawing.
PROTECTION_STYLES: Final = {
    "r--": "cyan",
    "r-x": "green",
    "rw-": "yellow",
    "rwx": "red",
    "---": "bright_black",
}


def size(number: int) -> str:
    """A number of bytes in the largest binary unit that keeps it at least one: ``4.5 MiB``."""
    value, units = float(number), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{number:,} {units[0]}" if units[0] == "bytes" else f"{_three(value)} {units[0]}"


def _three(value: float) -> str:
    """Three digits, yet never an exponent: below 1024 there may be four."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def level(part: float) -> str:
    """A block as high as ``part``, 0 to 1: ``·`` for nothing at all, else one of eight."""
    return "·" if part <= 0 else "▁▂▃▄▅▆▇█"[min(int(part * 8), 7)]
