"""Processes of our own: how they are started, led, asked, and ended.

There are two ways to talk with one, by how it came to be.

- A **started program** (:mod:`~miniloader.lab.workers.crew`) is a fresh Python with a memory of its own.  It
  is asked by a line of JSON and answers by one, over a socket pair: ``{"command": NAME, …arguments}``, and
  the command's reply or ``{"error": {"kind", "message", "fields"}}``.  Its commands are the ``do_`` methods
  of a :class:`~miniloader.lab.workers.worker.Commands`: the worker of a proof, the one that a test leads
  (:mod:`~miniloader.lab.workers.scripted`, which passes the same lines on to what it forks), and the program
  that a chapter starts.  Whoever has to look at several processes' pages takes these.
- A **forked child** (:mod:`~miniloader.lab.workers.child`) knows all that its parent knows and does one
  function.  What it has to say is a pickled value in memory that both have
  (:class:`~miniloader.lab.workers.shared_value.SharedValue`): it is there though the child has crashed, and
  large arrays are not copied.  Code that may crash (:mod:`~miniloader.lab.workers.crash_guard`), a share of
  work (:mod:`~miniloader.lab.workers.fork_map`) and a learner's snippet run so.

However a process ends, :func:`~miniloader.lab.workers.child.death` says it.
"""
