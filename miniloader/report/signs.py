"""Signs for terminals and files whose encoding lacks ours: ASCII has something like each."""

from __future__ import annotations

from typing import Final

__all__ = ["SIGNS", "spelled"]

#: What stands for each sign that the output has: one for one where they are drawn with.
SIGNS: Final[dict[str, str]] = {
    "✔": "+", "✘": "x", "→": "->", "←": "<-", "↔": "<->", "▶": ">", "▲": "^", "×": "x", "·": ".", "–": "-",
    "—": "-", "…": "...", "’": "'", "‘": "'", "“": '"', "”": '"', "│": "|", "─": "-", "└": "`", "┘": "'",
    "├": "|", "┌": ".", "┐": ".", "█": "#", "░": ":", "▁": "_", "▂": ",", "▃": "~", "▄": "=", "▅": "+",
    "▆": "*", "▇": "%", "≤": "<=", "≥": ">=", "≠": "!=", "µ": "u", "½": "1/2", "ä": "a", "é": "e", "ö": "o",
    "ü": "u", "§": "section ", "┤": "|", "┈": ".", "▓": "%", "▒": ";", "▚": "/", "▞": "\\", "═": "=",
    "³": "^3", "⁶": "^6", "↳": ">", "≡": "=", "◆": "*", "◇": "o", "°": " degrees",
}  # fmt: skip


def spelled(text: str) -> str:
    """``text`` in ASCII: signs by those that stand for them, other characters escaped.

    >>> spelled("4 × 2 → ж")
    '4 x 2 -> \\\\u0436'
    """
    return "".join(SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text)
