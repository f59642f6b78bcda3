"""The process that watches whom a program forks (``run --writers``), and tells of it at the end."""

from __future__ import annotations

import os
import signal

from miniloader.cli.aside import tell_aside
from miniloader.startup import import_numpy, travel_light

__all__ = ["main"]


def main(pid: str, name: str, telling: str, path: str, form: str) -> None:
    """Watch process ``pid``, and tell in ``form`` (text or json) on standard error, or in the file ``path``.

    This process forks at once, and ends: who goes on is nobody's child.  ``telling`` is a descriptor: an
    octet says that it watches, its end that it cannot.
    """
    if os.fork():
        os._exit(0)
    travel_light()
    import_numpy()
    from miniloader.errors import EvidenceError
    from miniloader.kernel.open_files import allow_open_files
    from miniloader.lab.erosion.fork_watch import ForkWatch
    from miniloader.lab.erosion.forked_writes import FamilyWrites
    from miniloader.report import forked_writes as shown

    allow_open_files()  # two for each process that lives
    for interrupt in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(interrupt, signal.SIG_IGN)
    try:
        if pid == "1":
            raise EvidenceError("process 1 would be the parent of who watches (docker run --init)")
        watch = ForkWatch(int(pid), name)
    except EvidenceError as refused:
        family = FamilyWrites((), refused=refused.message)
        os.close(int(telling))
    else:
        os.write(int(telling), b"y")
        os.close(int(telling))
        family = watch.watch()
    tell_aside(path, shown.lines(family), shown.as_json(family) if form == "json" else None)
