"""Capacity: the most tokens that a micro-batch may hold on a config, found from compiled programs' memory analysis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from planner.lattice import Shape
from profiling.grid import align_capacity, between_shapes, full_shapes, probe_shapes

MAX_TRIES = 6
"""Capacities that are tried at most; each costs a compilation or two."""
WORTH_GROWING = 1.25
"""A capacity that fits is given up for a larger one only if that is this many times larger."""
AIM = 0.97
"""Share of the limit that a guess aims at, so that it does not miss by a hair."""
WORST_EXPONENT = 2.0
"""How bytes grow with the length of a row where nothing else is known: attention's scores."""


class DoesNotFitError(Exception):
    """A config that cannot hold even the smallest micro-batch; the text says why."""


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
    expected: int | None = None,
) -> Capacity:
    """The largest capacity found, at most `max_tokens`, whose full micro-batches were compiled and fit.

    Args:
      measure_bytes: compiles shapes and tells the bytes of each on the fullest device.
      limit_bytes: what a micro-batch may use on a device.
      fixed_bytes: weights, adapters and gradients, whatever the shape.
      lengths: ascending; single rows of these are compiled to foretell the rest.
      expected: a capacity found otherwise, at least the shortest length, which is the answer if its micro-batches,
        compiled with the first ones, fit.

    Raises:
      DoesNotFitError: one row of the shortest length is too much.
    """
    shortest = lengths[0]
    measured: dict[Shape, int] = {}

    def measure(shapes: Sequence[Shape]) -> int:
        new = [shape for shape in dict.fromkeys(shapes) if shape not in measured]
        if new:
            measured.update(zip(new, measure_bytes(new), strict=True))
        return max(measured[shape] for shape in shapes)

    if fixed_bytes > limit_bytes:
        raise DoesNotFitError(f"weights and adapters alone need {fixed_bytes:,} bytes of {limit_bytes:,}")
    if shortest > max_tokens:
        raise DoesNotFitError(f"the shortest length {shortest} exceeds the largest micro-batch of {max_tokens} tokens")
    of_expected = () if expected is None else full_shapes(lengths, expected)
    measure((*probe_shapes(lengths, expected or max_tokens), *of_expected))
    if measured[1, shortest] > limit_bytes:
        raise DoesNotFitError(f"1 x {shortest} tokens need {measured[1, shortest]:,} bytes of {limit_bytes:,}")
    if expected is not None and measure(of_expected) <= limit_bytes:
        return Capacity(tokens=expected, bytes=measured)

    fits = shortest
    tokens_without_room = (rows * length for (rows, length), size in measured.items() if size > limit_bytes)
    too_large = min(tokens_without_room, default=max_tokens + 1)
    for _ in range(MAX_TRIES):
        foretold = foretold_tokens(measured, AIM * limit_bytes, fixed_bytes, lengths=lengths)
        limit = min(foretold, too_large - 1)
        guess = max_tokens if limit >= max_tokens else align_capacity(limit)
        confirmed = fits > shortest
        if guess <= fits or (confirmed and guess < WORTH_GROWING * fits):
            break
        # Shapes between the extremes usually need most: where they do not fit, the others need no compiling.
        steps = (between_shapes(lengths, guess), full_shapes(lengths, guess))
        if all(measure(shapes) <= limit_bytes for shapes in steps):
            fits = guess
        else:
            too_large = guess
    return Capacity(tokens=fits, bytes=measured)


def foretold_tokens(measured: Mapping[Shape, int], limit: float, fixed: float, *, lengths: Sequence[int] = ()) -> float:
    """How many tokens should fit into `limit` bytes, as far as the `measured` shapes tell.

    Bytes beyond `fixed` (weights, adapters, gradients) follow a power of the length for single rows, interpolated
    between those measured, and the number of rows for each measured length. `lengths` are measured whatever the
    capacity, so that whole rows count; a length between them moves with the capacity, so that parts of a row count too.
    """
    free = limit - fixed
    singles = {length: size - fixed for (rows, length), size in measured.items() if rows == 1}
    bounds = [_inverse_power_law(singles, free)]
    for length in singles.keys() | {length for _, length in measured}:
        rows, size = max((rows, size) for (rows, its), size in measured.items() if its == length)
        rows_that_fit = free * rows / max(size - fixed, 1)
        if length in lengths or rows_that_fit < 1:
            bounds.append((math.floor(rows_that_fit) + 1) * length - 1)
        elif rows > 1:
            bounds.append(rows_that_fit * length)
    return min(bounds)


def _inverse_power_law(points: Mapping[int, float], value: float) -> float:
    """x for which y = `value`, y being a power of x between neighbouring points (x, y) and on beyond the last two."""
    x = np.log(sorted(points))
    y = np.log(np.maximum(np.maximum.accumulate([points[key] for key in sorted(points)]), 1))
    target = math.log(max(value, 1))
    if target <= y[-1]:
        last = int(np.searchsorted(y, target, side="left"))
        return float(np.exp(np.interp(target, y[: last + 1], x[: last + 1])))
    exponent = WORST_EXPONENT if len(x) == 1 else max((y[-1] - y[-2]) / (x[-1] - x[-2]), 1.0)
    return float(np.exp(x[-1] + (target - y[-1]) / exponent))
