"""Names of compiled programs, by which a profiler's trace tells what they do: `forward_layers0_15_8x2048`.

No replica's number is in them: replicas that are alike would no longer find each other's programs in the compilation
cache.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from lobra_jax.schedule import BACKWARD, FORWARD, FUSED

EVALUATION = "evaluation"
GRADIENT_SUM = "gradient_sum"
"""Zeros to add gradients to, what is sent to the layers' homes, their sums and norms."""

UPDATE = "update"
"""The optimiser's step on the homes, and the new adapters' way to every replica."""

PHASES = (FORWARD, BACKWARD, FUSED, GRADIENT_SUM, UPDATE, EVALUATION)
JIT_PREFIX = "jit_"
"""What JAX puts before a function's name to name its module."""

_PROGRAM = re.compile(
    rf"(?:{JIT_PREFIX})?(?P<phase>{'|'.join(PHASES)})(?:_layers\d+_\d+_(?P<rows>\d+)x(?P<length>\d+)|_.*)?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a name tells: the phase, and the micro-batch's (rows, length) where the program is of one shape."""

    phase: str
    shape: tuple[int, int] | None


def named(function: Callable[..., Any], phase: str, detail: str = "") -> Callable[..., Any]:
    """`function` under a name that says its phase, for `jax.jit` to take over."""

    def program(*arguments: Any) -> Any:
        return function(*arguments)

    program.__name__ = program.__qualname__ = f"{phase}_{detail}" if detail else phase
    return program


def stage_detail(layers: range, rows: int, length: int) -> str:
    """The part of a stage program's name that says which layers and which shape."""
    return f"layers{layers.start}_{layers.stop - 1}_{rows}x{length}"


def program_of(module: str) -> Program | None:
    """What an XLA module's name tells; None for programs that are not named here."""
    found = _PROGRAM.fullmatch(module)
    if found is None:
        return None
    shape = None if found["rows"] is None else (int(found["rows"]), int(found["length"]))
    return Program(phase=found["phase"], shape=shape)
