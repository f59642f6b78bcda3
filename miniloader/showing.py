"""Values that a person looks at show themselves: ``str()``, and in a notebook as a table or a drawing.

How a value looks is the report's to say, which stands above all values and imports them.  So the report is
asked when it is needed, and never imported by what is below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from miniloader.errors import MiniloaderError
from miniloader.forking import importing
from miniloader.later import Later

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["REPORT", "Showing", "dataframe"]

#: :mod:`miniloader.report.showing`, imported when it is first asked for something.
REPORT: Final[ModuleType | Any] = Later("miniloader.report.showing")


class Showing:
    """A value with a short text (``str``) and a table or drawing for notebooks (``_repr_html_``)."""

    def __str__(self) -> str:
        text: str = REPORT.text_of(self)
        return text

    def _repr_html_(self) -> str:
        html: str = REPORT.html_of(self)
        return html


def dataframe(rows: list[dict[str, Any]]) -> Any:
    """``rows`` as a pandas ``DataFrame``; MiniloaderError where pandas is not installed."""
    try:
        with importing:
            import pandas
    except ImportError as error:
        raise MiniloaderError(
            f"to_dataframe() needs pandas, which cannot be imported: {error}",
            hint="pip install pandas, or use to_json()",
        ) from None
    return pandas.DataFrame(rows)
