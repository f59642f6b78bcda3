"""A Linux shared-library loader that shows its work.

::

    image = miniloader.inspect(path)        # ElfImage; maps nothing, runs nothing, any architecture
    lib = miniloader.load(path)             # Library: mapped, linked and initialised by us
    steps = miniloader.Loading(path)        # the same in three steps: .map(), .link(), .initialise()
    tree = miniloader.tree(path)            # Tree: what a program or library needs, where found and why
    checked = miniloader.check(path)        # Checked: whether it will load, and all that is wrong
    proof = miniloader.prove(path)          # Proof: what several processes share, and what they copied
    audit = miniloader.audit([pid, other])  # Audit: which pages running processes copied, and why

Importing this package is nearly free: each public name is imported from its home when first used.

PYTEST_DONT_REWRITE: pytest need not warn that ``miniloader run -m pytest`` has imported us before it did.
"""

from __future__ import annotations

from miniloader.forking import importing as _importing

__version__ = "0.1.0"

TYPE_CHECKING = (
    False  # as type checkers know it; importing typing would cost as much as all of Python's start
)
if TYPE_CHECKING:
    from miniloader.elf import ElfImage as ElfImage
    from miniloader.elf import LoadPlan as LoadPlan
    from miniloader.elf import Source as Source
    from miniloader.errors import ElfError as ElfError
    from miniloader.errors import EvidenceError as EvidenceError
    from miniloader.errors import LoadError as LoadError
    from miniloader.errors import MiniloaderError as MiniloaderError
    from miniloader.errors import SymbolError as SymbolError
    from miniloader.errors import UnsupportedError as UnsupportedError
    from miniloader.errors import UsageError as UsageError
    from miniloader.errors import WorkerError as WorkerError
    from miniloader.lab.audit.audit import audit as audit
    from miniloader.lab.audit.result import Audit as Audit
    from miniloader.lab.check.check import Checked as Checked
    from miniloader.lab.check.check import check as check
    from miniloader.lab.check.tree import Tree as Tree
    from miniloader.lab.check.tree import tree as tree
    from miniloader.lab.proof.proof import Proof as Proof
    from miniloader.lab.proof.prove import prove as prove
    from miniloader.loader import Library as Library
    from miniloader.loader import Loading as Loading
    from miniloader.loader import inspect as inspect
    from miniloader.loader import load as load
    from miniloader.loader.prepare import prepare as prepare
    from miniloader.loader.running.importing import importing as importing

#: Where each public name lives (PEP 562 below).
_HOMES = {
    "Audit": "miniloader.lab.audit.result",
    "Checked": "miniloader.lab.check.check",
    "ElfError": "miniloader.errors",
    "ElfImage": "miniloader.elf",
    "EvidenceError": "miniloader.errors",
    "Library": "miniloader.loader",
    "LoadError": "miniloader.errors",
    "LoadPlan": "miniloader.elf",
    "Loading": "miniloader.loader",
    "MiniloaderError": "miniloader.errors",
    "Proof": "miniloader.lab.proof.proof",
    "Source": "miniloader.elf",
    "SymbolError": "miniloader.errors",
    "Tree": "miniloader.lab.check.tree",
    "UnsupportedError": "miniloader.errors",
    "UsageError": "miniloader.errors",
    "WorkerError": "miniloader.errors",
    "audit": "miniloader.lab.audit.audit",
    "check": "miniloader.lab.check.check",
    "importing": "miniloader.loader.running.importing",
    "inspect": "miniloader.loader",
    "load": "miniloader.loader",
    "prepare": "miniloader.loader.prepare",
    "tree": "miniloader.lab.check.tree",
    "prove": "miniloader.lab.proof.prove",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    with _importing:
        from importlib import import_module

        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
