"""Which processes are meant."""

from __future__ import annotations

import os

import pytest

from miniloader.errors import ProcessGone, UsageError
from miniloader.lab.audit.select import choose
from tests.conftest import NOBODY
from tests.lab.audit.told_processes import (
    told,
    told_children,
)


def test_choosing() -> None:
    with told() as parent, told_children(parent, 2) as children:
        assert choose(tree=parent.pid) == tuple(sorted([parent.pid, *children]))
        assert {parent.pid, *children} <= {*choose(name="*python*")}
        assert parent.pid in choose(user=str(os.geteuid()), tree=parent.pid)
        assert choose(user=str(NOBODY + 1), tree=parent.pid) == ()
    with pytest.raises(UsageError, match="no such user"):
        choose(user="nobody-is-called-so")
    with pytest.raises(ProcessGone):
        choose(tree=parent.pid)
