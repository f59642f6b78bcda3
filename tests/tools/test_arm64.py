"""The short version of ``tools/arm64 --test``: an aarch64 kernel is booted, and a few things are done there.

It is started first, since it takes longest; another process does the work.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 12
_NOTHING_SAID = 75  # EX_TEMPFAIL


@pytest.mark.first
@pytest.mark.needs_root("makes a disk image")
@pytest.mark.skipif(os.environ.get("CI") != "true", reason="takes minutes: tools/arm64 --test --short")
def test_the_short_version() -> None:
    """Only what ran in the guest and failed there is a failure."""
    environment = {**os.environ, "ARM64_MINUTES": str(MINUTES - 4), "ARM64_NICE": "0"}
    with subprocess.Popen(
        [ROOT / "tools" / "arm64", "--test", "--short"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            said, _ = started.communicate(timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            pytest.skip(f"this machine lacks the time for an aarch64 guest: {MINUTES} minutes")
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
    if started.returncode == _NOTHING_SAID:
        reason = next(
            (line for line in reversed(said.splitlines()) if line.startswith("tools/arm64: ")), said
        )
        pytest.skip(f"this machine lacks an aarch64 guest: {reason.removeprefix('tools/arm64: ')}")
    assert started.returncode == 0, said
    assert said.count(": exit status 0, ") == 13, said
