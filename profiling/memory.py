"""Capacity: the most tokens that a micro-batch may hold on a config, found from compiled programs' memory analysis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from profiling.grid import Shape, align_capacity, extreme_shapes, probe_shapes

MAX_TRIES = 6
"""Capacities that are tried at most; each costs a compilation or two."""
WORTH_GROWING = 1.25
"""A capacity that fits is given up for a larger one only if that is this many times larger."""
AIM = 0.97
"""Share of the limit that a guess aims at, so that it does not miss by a hair."""


class DoesNotFitError(Exception):
    """A config that cannot hold even the smallest micro-batch; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Bytes of a micro-batch: fixed + per_token x B L + per_pair x B L^2 + per_row x B."""

    fixed: float
    per_token: float
    per_pair: float
    per_row: float

    def bytes(self, rows: int, length: int) -> float:
        return (
            self.fixed + self.per_token * rows * length + self.per_pair * rows * length * length + self.per_row * rows
        )

    def max_tokens(self, limit: float, shortest: int) -> float:
        """The largest C for which 1 x C and (C / shortest) x shortest stay within `limit` bytes; may be infinite."""
        free = limit - self.fixed
        return min(
            _positive_root(self.per_pair, self.per_token, self.per_row - free),
            _positive_root(0.0, self.per_token + self.per_pair * shortest + self.per_row / shortest, -free),
        )


def _positive_root(a: float, b: float, c: float) -> float:
    """x >= 0 with a x^2 + b x + c = 0 for a, b >= 0: 0 if c > 0, infinite if nothing grows."""
    if c >= 0:
        return 0.0
    if a == 0:
        return math.inf if b == 0 else -c / b
    return 2 * -c / (b + math.sqrt(b * b - 4 * a * c))


def fit_memory(measured: Mapping[Shape, int], fixed: float) -> MemoryModel:
    """Least squares on relative error, no term negative; `fixed` (weights, adapters, gradients) is known."""
    shapes = np.array(list(measured), dtype=np.float64)
    total = np.array(list(measured.values()), dtype=np.float64)
    rows, lengths = shapes[:, 0], shapes[:, 1]
    terms = np.stack([rows * lengths, rows * lengths**2, rows], axis=1) / total[:, None]
    norms = np.linalg.norm(terms, axis=0)
    solution, _ = nnls(terms / norms, np.maximum(total - fixed, 0) / total)
    per_token, per_pair, per_row = (solution / norms).tolist()
    return MemoryModel(fixed=fixed, per_token=per_token, per_pair=per_pair, per_row=per_row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """`tokens` a micro-batch may hold, and the bytes of every shape that was compiled to find it."""

    tokens: int
    bytes: Mapping[Shape, int]


def find_capacity(
    measure_bytes: Callable[[Sequence[Shape]], Sequence[int]],
    *,
    limit_bytes: int,
    fixed_bytes: int,
    lengths: Sequence[int],
    max_tokens: int,
) -> Capacity:
    """The largest capacity, at most `max_tokens`, whose extreme micro-batches were compiled and fit.

    Args:
      measure_bytes: compiles shapes and tells the bytes of each on the fullest device.
      limit_bytes: what a micro-batch may use on a device.
      fixed_bytes: weights, adapters and gradients, whatever the shape.
      lengths: ascending; single rows of these are compiled to foretell the rest.

    Raises:
      DoesNotFitError: one row of the shortest length is too much.
    """
    shortest = lengths[0]
    measured: dict[Shape, int] = {}

    def measure(shapes: Sequence[Shape]) -> int:
        new = [shape for shape in shapes if shape not in measured]
        measured.update(zip(new, measure_bytes(new), strict=True))
        return max(measured[shape] for shape in shapes)

    if fixed_bytes > limit_bytes:
        raise DoesNotFitError(f"weights and adapters alone need {fixed_bytes:,} bytes of {limit_bytes:,}")
    if shortest > max_tokens:
        raise DoesNotFitError(f"the shortest length {shortest} exceeds the largest micro-batch of {max_tokens} tokens")
    measure(probe_shapes(lengths, max_tokens))
    if measured[1, shortest] > limit_bytes:
        raise DoesNotFitError(f"1 x {shortest} tokens need {measured[1, shortest]:,} bytes of {limit_bytes:,}")

    fits = shortest
    too_large = min((tokens for (_, tokens), size in measured.items() if size > limit_bytes), default=max_tokens + 1)
    guess = _guess(measured, None, limit_bytes, fixed_bytes, shortest, too_large - 1)
    for _ in range(MAX_TRIES):
        if not fits < guess < too_large:
            break
        shapes = extreme_shapes(shortest, guess)
        if measure(shapes) > limit_bytes:
            too_large = guess
            guess = _guess(measured, shapes, limit_bytes, fixed_bytes, shortest, too_large - 1)
            continue
        grown, fits = fits > shortest, guess
        guess = _guess(measured, shapes, limit_bytes, fixed_bytes, shortest, too_large - 1)
        if grown or guess < WORTH_GROWING * fits:
            break
    return Capacity(tokens=fits, bytes=measured)


def _guess(
    measured: Mapping[Shape, int],
    nearest: Sequence[Shape] | None,
    limit: int,
    fixed: int,
    shortest: int,
    max_tokens: int,
) -> int:
    """The fitted model's capacity, the model being scaled to pass above the `nearest` shapes' measured bytes."""
    model = fit_memory(measured, fixed)
    scale = max(((measured[s] - fixed) / max(model.bytes(*s) - fixed, 1) for s in nearest or ()), default=1.0)
    free = (AIM * limit - fixed) / max(scale, 1e-9)
    return align_capacity(min(model.max_tokens(fixed + free, shortest), max_tokens))
