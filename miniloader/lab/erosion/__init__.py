"""Erosion: memory that a process had in common with a relative since a fork, and has not any more.

Data moves down this list.  Nothing here stops a process, writes to it, or maps anything into it.

- ``memory``: the pages of one process that erosion can happen to.
- ``lineage``: who is whose nearest living relative, and which copies must have been one at a fork.
- ``pairs``: a process beside that relative: what is one frame still, what no more, what of it is proven.
- ``contents``: which of these pages hold the same bytes.
- ``present_memory``: their bytes; ``interpreter``, ``pools``, ``types``, ``objects``, ``census``: what
  CPython has put there; ``causes``: what differs; ``chunks``: what glibc's malloc has there.
- ``erode``: all of that for the processes of an audit; ``result`` has it as frozen values.
- ``since``: what an earlier look proves.
- ``advice``: what would save memory, and how much.
- ``writers``, ``writers_by_faults``: in workers of ours, who writes first to each page.
"""
