"""What does the kernel say?  Its records of processes and pages, read in bulk; nothing is concluded here.

``syscalls`` makes the calls; ``maps``, ``smaps``, ``pagemap``, ``scan`` and ``query`` ask about a process,
``frames`` about page frames; ``userfault`` watches writes, ``page_faults`` faults; ``probe`` finds out what
works here.
"""
