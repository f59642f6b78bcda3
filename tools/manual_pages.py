"""A build hook of hatchling: the wheel installs manual pages, made from the parser, in ``share/man/man1``."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManualPages(BuildHookInterface):
    """Writes the pages to a directory that lasts as long as the build."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the pages; ``version`` is that of the wheel: ``standard`` or ``editable``."""
        self._directory = tempfile.TemporaryDirectory()
        os.environ["COLUMNS"] = "80"
        sys.path.insert(0, self.root)
        try:
            from miniloader.cli import COMMANDS
            from miniloader.cli.manual import pages
            from miniloader.cli.parser import build
        finally:
            sys.path.remove(self.root)
        for name, text in pages(build(COMMANDS)).items():
            path = Path(self._directory.name, name)
            path.write_text(text)
            build_data["shared_data"][str(path)] = f"share/man/man1/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove them."""
        self._directory.cleanup()
