"""Code of our own beside a library: a page that is written, then made executable, never both."""

from __future__ import annotations

import ctypes

from miniloader.errors import LoadError
from miniloader.kernel import syscalls as sys
from miniloader.native import functions
from miniloader.native.gate import require_loading

__all__ = ["CodePage"]


class CodePage:
    """A page at ``address`` that holds code once it is ``filled``.

    Raises :class:`UnsupportedError` where code of ours does not run.
    """

    def __init__(self) -> None:
        require_loading()
        self.filled = False
        try:
            protection = sys.PROT_READ | sys.PROT_WRITE
            self.address = sys.mmap(0, sys.PAGE_SIZE, protection, sys.MAP_PRIVATE | sys.MAP_ANONYMOUS)
        except OSError as error:
            raise LoadError(f"mapping a page for code of our own: {error.strerror}") from None

    def fill(self, code: bytes) -> None:
        """Put ``code`` (at most a page) there, once."""
        self.filled = True
        ctypes.memmove(self.address, code, len(code))
        functions().flush_code(self.address, self.address + len(code))
        try:
            sys.mprotect(self.address, sys.PAGE_SIZE, sys.PROT_READ | sys.PROT_EXEC)
        except OSError as error:
            raise LoadError(f"making a page of our own executable: {error.strerror}") from None

    def unmap(self) -> None:
        """Give the page back."""
        sys.munmap(self.address, sys.PAGE_SIZE)
