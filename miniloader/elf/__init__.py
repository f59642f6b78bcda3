"""What does the file say?  ELF files, decoded into frozen values and numpy tables; nothing is mapped."""

from typing import TYPE_CHECKING

from miniloader.forking import importing
from miniloader.later import leaving_out

with leaving_out(
    *("inspect", "pdb", "traceback"),  # by which dataclasses and pyelftools look into themselves
    # For bits of a kind that no record has: to make its tables takes a fifth of importing the declarations.
    **{
        "elftools.construct.lib.binary": (
            "int_to_bin",
            "bin_to_int",
            "swap_bytes",
            "encode_bin",
            "decode_bin",
        ),
        "pprint": ("pformat",),  # by which records show themselves
    },
):
    import dataclasses as _dataclasses  # noqa: F401

    import elftools.construct as _construct  # noqa: F401

from miniloader.elf.image import ElfImage, Tls, read_image
from miniloader.elf.inspecting import inspect, kind_of
from miniloader.elf.plan import LoadPlan, PlannedCall, PlannedMapping, Span
from miniloader.elf.source import Source

if TYPE_CHECKING:
    from miniloader.elf.checks import Problem, problems_of

__all__ = [
    "ElfImage",
    "LoadPlan",
    "PlannedCall",
    "PlannedMapping",
    "Problem",
    "Source",
    "Span",
    "Tls",
    "inspect",
    "kind_of",
    "problems_of",
    "read_image",
]


def __getattr__(name: str) -> object:
    """What is wrong with files: imported by who asks for it, an audit does not."""
    if name not in ("Problem", "problems_of"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing:
        from miniloader.elf import checks
    return getattr(checks, name)
