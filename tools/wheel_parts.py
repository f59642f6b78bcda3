"""A build hook of hatchling: what a wheel has that no file of the repository is.

Manual pages, made from the parser, in ``share/man/man1``; and, where there is a C compiler, the compiled
code, made of its source.  Such a wheel is for its machine; with ``MINILOADER_NATIVE=shipped``, or without a
compiler, it has the copies that are in the tree, and is for any machine.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelParts(BuildHookInterface):
    """Writes them to a directory that lasts as long as the build."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make them; ``version`` of the wheel is ``standard``, or ``editable``, with the tree's code."""
        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        sys.path.insert(0, self.root)
        try:
            for path in _manual_pages(directory):
                build_data["shared_data"][str(path)] = f"share/man/man1/{path.name}"
            if version != "editable":
                self._compile(directory, build_data)
        finally:
            sys.path.remove(self.root)

    def _compile(self, directory: Path, build_data: dict[str, Any]) -> None:
        from miniloader.native.compiling import compile_here

        made, why = compile_here(directory, os.environ)
        for path in made:
            build_data["force_include"][str(path)] = f"miniloader/native/{path.name}"
        if not why:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"], build_data["tag"] = False, f"py3-none-{platform}"
        else:
            self.app.display_info(f"with the compiled code as it ships: {why}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove them."""
        self._directory.cleanup()


def _manual_pages(directory: Path) -> Iterator[Path]:
    os.environ["COLUMNS"] = "80"
    from miniloader.cli import COMMANDS
    from miniloader.cli.manual import pages
    from miniloader.cli.parser import build

    for name, text in pages(build(COMMANDS)).items():
        path = directory / name
        path.write_text(text)
        yield path
