"""What several tests of the loader need: children, and what a process has mapped and open."""

from __future__ import annotations

import faulthandler
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import pytest

T = TypeVar("T")


class InChild(Protocol):
    def __call__(self, function: Callable[..., T], /, *arguments: Any) -> T: ...


@pytest.fixture(scope="session")
def in_child() -> InChild:
    """``in_child(function, *arguments)``: its result, from a forked child that ends afterwards."""
    return call_in_child


def call_in_child(function: Callable[..., T], /, *arguments: Any) -> T:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        faulthandler.disable()
        try:
            answer: tuple[bool, Any] = (True, function(*arguments))
            message = pickle.dumps(answer)
        except BaseException as error:  # noqa: BLE001 - handed to the parent, whatever it is
            message = pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(message)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    assert message, f"the child ended without an answer, status {os.waitstatus_to_exitcode(status)}"
    good, result = pickle.loads(message)
    assert good, result
    return result  # type: ignore[no-any-return]  # what function returned, as it was pickled
