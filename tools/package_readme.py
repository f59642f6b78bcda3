"""A metadata hook of hatchling: the README as a package index has it, without the files beside it.

A picture becomes what it shows, in words; a link into the repository becomes the file's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

WHERE = "\nFiles named here, such as `docs/tutorial.md`, are in the source distribution.\n"
_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)]*)\)")
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)")


def alone(readme: str) -> str:
    """The text of ``readme`` with nothing in it that leads to a file beside it.

    >>> alone("# Name\\n[A book](docs/book.md), [a word](#word)\\n![A grid](grid.webp)").splitlines()[-2:]
    ['A book (`docs/book.md`), [a word](#word)', '*A grid (picture: `grid.webp`).*']
    """
    text = _PICTURE.sub(r"*\1 (picture: `\2`).*", readme)
    text = _LINK.sub(_named, text)
    title, _, rest = text.partition("\n")
    return f"{title}\n{WHERE}{rest}"


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if text == path else f"{text} (`{path}`)"


class PackageReadme(MetadataHookInterface):
    """Gives the package its long description."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the README into ``metadata``."""
        text = alone(Path(self.root, "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
