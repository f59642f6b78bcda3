"""What does a library need, and which mmap calls will map it?  Nothing is mapped, nothing runs.

python inspect_library.py [LIB]     a path, or a name such as libz.so.1; of any machine
"""

import sys

import miniloader
from miniloader.elf import problems_of


def main(library: str) -> None:
    """Print what the file says that matters to who loads it."""
    image = miniloader.inspect(library)
    print(f"{image.path}: {image.header.machine}, needs {', '.join(image.needed) or 'nothing'}")
    for call in image.plan().calls():
        print(f"  {call.text()}    {call.why}")
    for problem in problems_of(image):
        print(f"  {problem.severity}: {problem.field} is {problem.found}, expected {problem.expected}")
    relocated = {table.name: len(table.rows) for table in image.relocations.tables}
    print(f"  relocations {relocated}, and {len(image.relocations.relr)} packed ones")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["libz.so.1"])
