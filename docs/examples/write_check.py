"""A rule of one's own over libraries: search paths may lead nowhere but beside the library itself.

python write_check.py LIB...     exit status 1 where a library breaks it
"""

import sys
from collections.abc import Iterator

import miniloader


def strange_search_paths(image: miniloader.ElfImage) -> Iterator[str]:
    """Each directory of DT_RUNPATH and DT_RPATH that is not below ``$ORIGIN``, with the field it is in."""
    for field, directories in (("DT_RUNPATH", image.runpath), ("DT_RPATH", image.rpath)):
        for directory in directories:
            if not directory.startswith("$ORIGIN"):
                yield f"{field} has {directory}; expected $ORIGIN/..."


def main(paths: list[str]) -> int:
    """Print what is wrong with each library; the exit status."""
    faults = [
        f"{path}: {fault}" for path in paths for fault in strange_search_paths(miniloader.inspect(path))
    ]
    print("\n".join(faults) or f"{len(paths)} libraries keep the rule")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
