"""Take a load one step at a time, and ask the kernel after each which pages were copied for this process.

python load_step_by_step.py [LIB]
"""

import sys

import miniloader
from miniloader.kernel.pagemap import PageMap


def copied(start: int, end: int) -> int:
    """How many pages of [start, end) are in memory and are not the file's own any more."""
    with PageMap() as pages:
        table = pages.table(start, end)
    return int((table.present & ~table.file).sum())


def main(path: str) -> None:
    """Mapping copies nothing; linking copies what it relocates."""
    with miniloader.Loading(path) as steps:
        library, *_ = steps.map()
        start, end = library.bias + library.plan.start, library.bias + library.plan.end
        print(
            f"mapped:      {copied(start, end):4} of {(end - start) // library.plan.page_size} pages copied"
        )
        bound = steps.link()[library]
        print(f"linked:      {copied(start, end):4}, {len(bound.wanted)} symbols bound")
        constructors = steps.initialise()[library]
        print(f"initialised: {copied(start, end):4}, {len(constructors)} constructors run")
    steps.library.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["libz.so.1"])
