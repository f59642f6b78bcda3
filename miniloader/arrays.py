"""numpy, imported when something of it is first used.

Loading a library needs none: its tables are looked at by :mod:`miniloader.native` where they lie.  But the
modules that loading imports use arrays for other ends: inspection and evidence, and what few libraries ask
for.  Importing numpy takes three times as long as starting Python, and starts threads.

>>> np.arange(3).tolist()
[0, 1, 2]
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it: typing, too, takes long to import
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    from miniloader.later import Later

    class NDArray:
        """Stands for :data:`numpy.typing.NDArray` where an alias is made of it."""

        def __class_getitem__(cls, _: object) -> type:
            return cls

    np = Later("numpy")

__all__ = ["NDArray", "np"]
