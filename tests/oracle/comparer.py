"""Comparisons in a process of their own: a worker whose program is :mod:`tests.oracle.compare`.

Apart from that module, so that the worker does not load what leading one takes.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

from miniloader.errors import MiniloaderError, WorkerError
from miniloader.lab.workers.crew import Crew
from tests.oracle.compare import Comparison, Difference

__all__ = ["Comparer"]


class Comparer:
    """A process that compares, started when first needed and again when it died.

    A context manager that ends it.  ``prepared``: each library is prepared first, and loaded so.  ``seconds``
    is how long each of the two children that load a library may take.
    """

    def __init__(self, *, seconds: float = 60, prepared: bool = False) -> None:
        self._seconds = seconds
        self._cache = TemporaryDirectory(prefix="miniloader-compare-") if prepared else None
        self._crew: Crew | None = None

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        if self._cache is not None:
            self._cache.cleanup()

    def _end(self) -> None:
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def compare(self, path: str) -> Comparison:
        """As :func:`tests.oracle.compare.compare`; WorkerError when the comparing process itself fails."""
        if self._crew is None:
            self._crew = Crew(1, timeout=10 * self._seconds, program="tests.oracle.compare")
        cache = self._cache.name if self._cache is not None else None
        try:
            (reply,) = self._crew.ask("compare", path=path, seconds=self._seconds, cache=cache)
        except MiniloaderError as error:
            self._end()
            raise WorkerError(f"{path}: {error}") from error
        fields = dict(reply)
        for key in ("layout", "differing"):
            fields[key] = tuple(Difference(**difference) for difference in fields[key])
        return Comparison(**fields)
