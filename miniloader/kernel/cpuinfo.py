"""What the processor can do, as ``/proc/cpuinfo`` names it (``arch/x86/include/asm/cpufeatures.h``)."""

from __future__ import annotations

from functools import lru_cache

from miniloader.errors import EvidenceError
from miniloader.kernel.procfs import read_proc_file

__all__ = ["features", "vendor"]


@lru_cache(maxsize=1)
def _lines() -> tuple[str, ...]:
    """What is said of the first processor; () where ``/proc`` does not tell."""
    try:
        text = read_proc_file("/proc/cpuinfo").decode("ascii", "replace")
    except EvidenceError:
        return ()
    return tuple(text.partition("\n\n")[0].split("\n"))


def _value(name: str) -> str:
    return next((line.partition(":")[2].strip() for line in _lines() if line.startswith(name)), "")


@lru_cache(maxsize=1)
def features() -> frozenset[str] | None:
    """The processor's flags (``avx2``, on aarch64 ``bti``, …); None where ``/proc`` does not tell."""
    return frozenset((_value("flags") or _value("Features")).split()) if _lines() else None


def vendor() -> str:
    """Who made the processor (``GenuineIntel``); "" where ``/proc`` does not tell."""
    return _value("vendor_id")
