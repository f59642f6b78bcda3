"""Where text for people goes: a terminal, drawn by rich, or a pipe, which gets plain text.

Nothing else imports rich, and here it is imported only for a terminal: it costs as much as reading a library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from miniloader.forking import cached_property, importing
from miniloader.report.text import Line, Part, laid_out, more, plain
from miniloader.whole_numbers import whole_number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["COLOURS", "Output"]

#: What makes rich write anything but plain text, in lines of any length, into a pipe.
_ASKS_FOR_RICH: Final = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
#: Drawings in a pipe are as wide as this, since a person may look at them.
_PIPE_DRAWING: Final = 100
_MOST: Final = 160
#: Wide enough that nothing is wrapped or cut in a pipe: what reads there wants one thing a line.
_PIPE_WIDTH: Final = 10_000


class Output:
    """Standard output, or standard error, for people.

    rich takes the width from the terminal and honours ``NO_COLOR``, ``TERM`` and ``COLUMNS``; a pipe gets
    plain text, and lines as long as they need to be unless ``COLUMNS`` says otherwise.  ``widest`` is for
    prose, which reads badly in long lines: in a pipe, too, no line is longer.
    """

    def __init__(self, *, stderr: bool = False, widest: int | None = None) -> None:
        self._stderr, self._widest = stderr, widest

    @cached_property
    def width(self) -> int | None:
        """Columns for text; None: any number."""
        if self._widest is not None:
            return self.drawing
        return None if self._console is None or self._console.width == _PIPE_WIDTH else self._console.width

    @cached_property
    def drawing(self) -> int:
        """Columns for a drawing."""
        wide = _PIPE_WIDTH if self._console is None else self._console.width
        return min(_PIPE_DRAWING if wide == _PIPE_WIDTH else wide, self._widest or _MOST)

    @property
    def is_terminal(self) -> bool:
        """Whether a person looks at it now."""
        return self._console is not None and self._console.is_terminal

    def show(self, parts: Iterable[Part], *, wrap: bool = True) -> None:
        """Print lines and tables; without ``wrap`` a terminal breaks long lines, and copies them whole."""
        lines = laid_out(parts, self.width if wrap or self._console is None else None)
        if self._stderr:
            with suppress(OSError):  # nobody hears of it
                self._print(lines)
        else:
            self._print(lines)

    def _print(self, lines: Iterable[Line]) -> None:
        stream = sys.stderr if self._stderr else sys.stdout
        if stream is None:  # closed, and print would take the other one
            return
        for line in lines:
            if self._console is None:
                print(plain(line).rstrip(), file=stream)
            else:
                self._console.print(_text(line), soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[Callable[[Iterable[Part]], None]]:
        """A function that shows parts in the place of those before, which are gone at the end.

        They have the terminal's other screen to themselves, as wide and high as it is at the moment: a window
        that changes its size tears nothing.  What has no room below is said.
        """
        with importing:
            from rich.console import Group
            from rich.live import Live

        console = self._console or _console(self._stderr)
        with Live(console=console, auto_refresh=False, screen=True) as live:

            def show(parts: Iterable[Part]) -> None:
                width, height = console.size
                lines = [*laid_out(parts, width)]
                if len(lines) > height:
                    hidden = f"… {more(len(lines) - height + 1)} lines; a higher terminal shows them"
                    lines = [*lines[: height - 1], ((hidden, "dim"),)]
                live.update(Group(*map(_text, lines)), refresh=True)

            yield show

    @cached_property
    def _console(self) -> Console | None:
        """What draws; None where plain text will do."""
        stream = sys.stderr if self._stderr else sys.stdout
        terminal = stream is not None and stream.isatty()
        asked = any(os.environ.get(name) for name in _ASKS_FOR_RICH)
        return _console(self._stderr) if terminal or asked else None


#: Colours of the 256 that are legible on white and on black, where the eight of a terminal often are not.
COLOURS: Final = {
    "red": "color(160)",
    "green": "color(28)",
    "yellow": "color(130)",
    "blue": "color(32)",
    "magenta": "color(133)",
    "cyan": "color(30)",
    "bright_black": "color(243)",
    "bright_red": "color(167)",
    "bright_blue": "color(62)",
    "bright_cyan": "color(31)",
}


def _text(line: Line) -> Text:
    with importing:
        from rich.text import Text

    return Text.assemble(
        *(piece if isinstance(piece, str) else (piece[0], _legible(piece[1])) for piece in line)
    )


def _legible(style: str) -> str:
    """``style`` with its colour as COLOURS has it.

    >>> _legible("bold yellow")
    'bold color(130)'
    """
    return " ".join(COLOURS.get(word, word) for word in style.split())


def _console(stderr: bool) -> Console:
    """rich's, which shows strings as they are: names such as ``[heap]`` come from outside."""
    with importing:
        from rich.console import Console

    class Drawn(Console):
        def on_broken_pipe(self) -> None:
            """Let the BrokenPipeError go on when nobody reads any more; rich's own leaves by SystemExit."""
            raise

    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES") or whole_number(value) is not None
    }
    console = Drawn(stderr=stderr, markup=False, emoji=False, highlight=False, _environ=environment)
    if not console.is_terminal and "COLUMNS" not in environment:
        console.width = _PIPE_WIDTH
    return console
