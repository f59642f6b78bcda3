"""What does the file say?  ELF files, decoded into frozen values and numpy tables; nothing is mapped."""

from importlib import import_module
from typing import TYPE_CHECKING, Final

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
from miniloader.elf.plan import LoadPlan, PlannedCall, PlannedMapping, Span
from miniloader.elf.source import Source

if TYPE_CHECKING:
    from miniloader.elf.checks import Problem, problems_of
    from miniloader.elf.inspecting import inspect, kind_of

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
    """What few ask for is imported by who does: what is wrong with a file, or which other kind it is."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importing:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


_HOMES: Final = {
    "Problem": "checks",
    "problems_of": "checks",
    "inspect": "inspecting",
    "kind_of": "inspecting",
}
