"""What libraries of ours ask while they run: dlopen(3), dlsym(3) and their like, answered by us.

So what a library opens comes through us, too, and finds what it needs among what we have loaded: there is no
second copy of it from ld.so.  :mod:`~miniloader.loader.from_inside.answers` begins; ``inside.c`` of
:mod:`miniloader.native` is what the libraries call.  What glibc opens inside itself (modules for iconv(3),
and for names of users and hosts) does not come here.
"""

from __future__ import annotations

from miniloader.loader.from_inside.answers import answer

__all__ = ["answer"]
