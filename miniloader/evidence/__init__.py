"""What do the kernel's answers prove?  Snapshots of processes, what they share, and verdicts.

``snapshot`` asks the kernel once, ``sharing`` and ``verdict`` are pure functions of the answer.
"""
