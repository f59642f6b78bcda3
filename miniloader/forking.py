"""Locks that nobody else holds while the process forks, so that the child can use what they guard.

A child has only the thread that forked: what another one held stays locked there, and what it was changing
half changed.  So whoever forks waits until nobody is inside.
"""

from __future__ import annotations

import os
from _thread import RLock, get_ident
from time import monotonic, sleep

TYPE_CHECKING = False  # typing is slow to import, and `import miniloader` imports this module
if TYPE_CHECKING:
    from functools import cached_property as cached_property
    from typing import Any, Final

__all__ = ["ForkLock", "SharedForkLock", "cached_property", "importing", "listing", "loading", "making"]

_PATIENCE: Final = 5.0  # seconds: a constructor that waits for the thread that forks must not wait for ever
_PAUSE: Final = 0.001  # seconds


class ForkLock:
    """A lock, which its thread may take again, that os.fork() takes for as long as it lasts.

    Of several, the one made last is taken first: whoever needs two takes them in that order, too.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._taken: dict[int, bool] = {}  # by whoever is forking: the thread, and whether it has the lock
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._in_child)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _before(self) -> None:
        self._taken[get_ident()] = self._take()

    def _take(self) -> bool:
        return self._lock.acquire(timeout=_PATIENCE)

    def _after(self) -> None:
        if self._taken.pop(get_ident(), False):
            self._lock.release()

    def _in_child(self) -> None:
        taken = self._taken.pop(get_ident(), False)
        self._taken.clear()  # other threads that were about to fork are not here
        if taken:
            self._lock.release()
        else:
            self._lock = RLock()


class SharedForkLock(ForkLock):
    """A lock that any number of threads have at once; os.fork() takes it when no other thread has it.

    For what has locks of its own, such as importing: a second one around it would be taken in another order
    by whoever comes to it from inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: dict[int, int] = {}  # by thread: how often; whoever changes it has the lock for that

    def __enter__(self) -> None:
        with self._lock:
            self._inside[get_ident()] = self._inside.get(get_ident(), 0) + 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            times = self._inside.pop(get_ident()) - 1
            if times:
                self._inside[get_ident()] = times

    def _take(self) -> bool:
        end = monotonic() + _PATIENCE
        while (left := end - monotonic()) > 0 and self._lock.acquire(timeout=left):
            if self._inside.keys() <= {get_ident()}:
                return True
            self._lock.release()
            sleep(_PAUSE)
        return False

    def _in_child(self) -> None:
        super()._in_child()
        self._inside = {get_ident(): self._inside[get_ident()]} if get_ident() in self._inside else {}


class _CachedProperty:
    """:class:`functools.cached_property` as it is from Python 3.12 on: without a lock.

    That of 3.11 is one for all instances, and stays locked in the child of a program whose other thread was
    computing any of them.  Two threads may compute a value at once; both get the first one's.
    """

    def __init__(self, function: Any) -> None:
        self.func, self.__doc__, self._name = function, function.__doc__, function.__name__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self.func(instance))


if not TYPE_CHECKING:
    cached_property = _CachedProperty

#: Held while a class of values is made.
making: Final = ForkLock()
#: Held by whoever imports something when it is needed: whoever imports in a function takes it.
importing: Final = SharedForkLock()
#: Held by whoever has glibc list its libraries: what that locks (dl_load_write_lock) stays locked in a child
#: that another thread forks meanwhile.
listing: Final = ForkLock()
#: Held by whoever changes which libraries of ours this process has, or looks at them.  Made here, before
#: any thread is on its way to it: who forks already does not learn of another lock.
loading: Final = ForkLock()
