"""What the processor can do, as ``/proc/cpuinfo`` names it (``arch/x86/include/asm/cpufeatures.h``)."""

from __future__ import annotations

from functools import lru_cache

from miniloader.errors import EvidenceError
from miniloader.kernel.procfs import read_proc_file

__all__ = ["features"]


@lru_cache(maxsize=1)
def features() -> frozenset[str] | None:
    """The processor's flags (``avx2``, ``xsave``, …); None where ``/proc`` does not tell."""
    try:
        lines = read_proc_file("/proc/cpuinfo").decode("ascii", "replace").split("\n")
    except EvidenceError:
        return None
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
