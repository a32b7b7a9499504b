"""Fits the six coefficients of `planner.config_cost` to measured shapes and reports the held-out error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from planner.config_cost import NUM_COEFFICIENTS, ConfigCost, CostPoint, FitError, PackedPoint
from planner.plan import ParallelConfig

HOLD_OUT_EVERY = 5
"""One of this many measured shapes is held out of the fit, to tell its error."""

MIN_POINTS_TO_HOLD_OUT = NUM_COEFFICIENTS + 4
"""With fewer shapes than this all of them are fitted and no held-out error is reported."""

TERMS_BY_WORTH = (2, 5, 0, 4, 3, 1)
"""Columns of `features` in the order in which few points get them: b s, 1, b s^2, b, s, s^2. Work is done row by row,
so the terms without b matter least, and with as many terms as points they would take the place of those with b."""


def features(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The cost model's terms [n, 6] of micro-batches of `rows` [n] sequences padded to `lengths` [n] tokens."""
    b, s = np.asarray(rows, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    return np.stack([b * s * s, s * s, b * s, s, b, np.ones_like(b)], axis=1)


def hold_out(points: Sequence[CostPoint]) -> tuple[CostPoint, ...]:
    """The points by tokens, every fifth marked as held out; never the smallest or the largest, which the fit needs."""
    ordered = sorted(points, key=lambda point: (point.rows * point.length, point.length, point.rows))
    last = len(ordered) - 1
    few = len(ordered) < MIN_POINTS_TO_HOLD_OUT
    return tuple(
        dataclasses.replace(
            point, held_out=not few and 0 < index < last and index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2
        )
        for index, point in enumerate(ordered)
    )


def fit_coefficients(points: Sequence[CostPoint]) -> tuple[tuple[float, ...], FitError | None]:
    """Coefficients (c1..c6), none negative, that minimise the squared relative error over the points not held out.

    None negative: a time can then neither be negative nor fall as rows or lengths grow, inside or outside what was
    measured. With few points some terms stay zero (`num_terms`). Returns the error over the held-out points too, or
    None where none is held out.

    Raises:
      ValueError: there is no point to fit or a time is not positive.
    """
    fitted = [point for point in points if not point.held_out]
    if not fitted:
        raise ValueError("fit_coefficients: no point to fit")
    if any(not point.seconds > 0 for point in points):
        raise ValueError("fit_coefficients: expected positive seconds")
    used = list(TERMS_BY_WORTH[: num_terms(len(fitted))])
    scaled = _terms(fitted)[:, used] / np.array([[point.seconds] for point in fitted])
    coefficients = np.zeros(NUM_COEFFICIENTS)
    coefficients[used] = _least_squares(scaled)
    return tuple(coefficients.tolist()), _held_out_error(coefficients, [point for point in points if point.held_out])


def fitted_cost(
    config: ParallelConfig, capacity_tokens: int, points: Sequence[CostPoint], *, fixed_s: float = 0.0
) -> ConfigCost:
    """A config's costs from its points; where there are many, some are held out to test the fit."""
    points = hold_out(points) if len(points) >= MIN_POINTS_TO_HOLD_OUT else tuple(points)
    coefficients, error = fit_coefficients(points)
    return ConfigCost(
        config=config,
        capacity_tokens=capacity_tokens,
        coefficients=coefficients,
        fixed_s=fixed_s,
        points=points,
        fit_error=error,
    )


def fit_packed(points: Sequence[PackedPoint]) -> tuple[float, ...]:
    """Coefficients (p1..p4) of packed micro-batches, none negative, of least squared relative error."""
    seconds = np.array([point.seconds for point in points])
    terms = np.array([[p.rows * p.length**2, p.squares, p.rows * p.length, 1.0] for p in points])
    return tuple(_least_squares(terms / seconds[:, None]).tolist())


def _least_squares(scaled: np.ndarray) -> np.ndarray:
    """The coefficients, none negative, with which the terms of each point, over its seconds, come nearest to one."""
    from scipy.optimize import nnls  # SciPy is loaded only where something is fitted

    norms = np.linalg.norm(scaled, axis=0)
    solution, _ = nnls(scaled / norms, np.ones(len(scaled)))
    return solution / norms


def num_terms(num_points: int) -> int:
    """How many terms so many points can tell apart: three, or one fewer than the points, as far as there are."""
    return min(num_points, max(3, num_points - 1), NUM_COEFFICIENTS)


def _terms(points: Sequence[CostPoint]) -> np.ndarray:
    return features(np.array([point.rows for point in points]), np.array([point.length for point in points]))


def _held_out_error(coefficients: np.ndarray, points: Sequence[CostPoint]) -> FitError | None:
    if not points:
        return None
    measured = np.array([point.seconds for point in points])
    errors = np.abs(_terms(points) @ coefficients - measured) / measured
    return FitError(mean=float(errors.mean()), max=float(errors.max()), num_held_out=len(points))
