"""How does a file become running code?  Mapping, symbol scope, relocation, life; nothing is ld.so's."""

from miniloader.loader.events import Event
from miniloader.loader.library import Library, load

__all__ = ["Event", "Library", "load"]
