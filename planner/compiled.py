"""How the planner's innermost loops are compiled: by Numba, for the types that each names.

Done when the module that has them is imported. What was compiled is kept beside the package, or in the user's cache
where that cannot be written, and read from there the next time; where neither can, it is compiled anew in every
process. Compiled loops let go of the interpreter: other threads go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import boolean, float64, int64

BOOLS, INTS, FLOATS = boolean[::1], int64[::1], float64[::1]
INT_TABLE, FLOAT_TABLE = int64[:, ::1], float64[:, ::1]
INT_CUBE, FLOAT_CUBE = int64[:, :, ::1], float64[:, :, ::1]
"""Arrays as they come: rows one after the other, nothing between."""


def compiled(*signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function of these types, the first being what it returns."""
    returned, *taken = signature

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(returned(*taken), cache=True, nogil=True)(function)
        except (RuntimeError, OSError):  # no folder to keep it in, or none with room
            return numba.njit(returned(*taken), nogil=True)(function)

    return compile_
