"""How does a file become running code?  Mapping, symbol scope, relocation, life; nothing is ld.so's."""

from miniloader.loader.events import Event
from miniloader.loader.library import Library, load
from miniloader.loader.search import inspect

__all__ = ["Event", "Library", "inspect", "load"]
