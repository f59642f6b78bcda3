"""A process of ours leaves out what it does not use, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fixtures import build

PROBE = """
import sys
from miniloader.startup import travel_light
travel_light()
import numpy, numpy.linalg, numpy.ma
assert numpy.arange(4).reshape(2, 2).sum() == 6
assert numpy.ma.masked_array([1, 2], [0, 1]).sum() == 1
print(numpy.ndarray.__doc__ is None)
print(len(__import__("os").listdir("/proc/self/task")))
"""


def test_numpy_without_its_docstrings_and_threads() -> None:
    pytest.importorskip("numpy", "2")
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**environment, "PYTHONPATH": str(build.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == ["True", "1"]
