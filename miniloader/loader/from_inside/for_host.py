"""What the program, and libraries that ld.so has loaded, get when they call dlopen(3) and are led to us."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from miniloader.errors import LoadError, MiniloaderError
from miniloader.loader.beside_glibc import dynamic_linker
from miniloader.loader.events import OnEvent
from miniloader.loader.from_inside.caller import Caller
from miniloader.loader.from_inside.opening import open_library
from miniloader.loader.policy import Policy
from miniloader.shortage import fault
from miniloader.values import dataclass

__all__ = ["Rules", "in_force", "open_for_host"]


@dataclass(frozen=True)
class Rules:
    """What is ours: a name or a path that ``takes`` accepts, loaded as ``policy`` allows.

    What cannot be loaded falls back to ld.so, of which ``fell_back`` is told, unless ``strict``.
    """

    policy: Policy
    takes: Callable[[str], bool]
    strict: bool
    fell_back: Callable[[str, MiniloaderError], None]
    tell: OnEvent | None = None


#: The rules that hold, the last one's; without any all is glibc's.
in_force: Final[list[Rules]] = []


def open_for_host(name: bytes, flags: int, caller: Caller) -> int | None:
    """The handle of the library ``name``; None where it is left to glibc."""
    text = os.fsdecode(name)
    if not in_force or not in_force[-1].takes(text):
        return None
    rules = in_force[-1]
    try:
        asking = Caller(caller.name, caller.library, caller.asker, rules.policy, rules.tell, None)
        return open_library(name, flags, asking)
    except MiniloaderError as error:
        reason: MiniloaderError = error
    except Exception as error:  # noqa: BLE001 - told; the program can go on with ld.so
        reason = LoadError(f"{text}: {fault(error)}")
    if rules.strict:
        raise reason
    handle = dynamic_linker.open_host(text, load=True, flags=flags)
    rules.fell_back(text, reason)
    return handle
