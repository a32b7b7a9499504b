"""Where the least T lies that the relaxation lets through: the T of plans if replicas and slots came in fractions.

A `planner.relaxation.Level` says of one T whether fractional patterns serve everything; the next T is guessed from the
shares served on both sides.
"""

from __future__ import annotations

import math
import time

import numpy as np

from planner.pricing import NUM_CELLS, NUM_COARSE_CELLS
from planner.relaxation import STRICT, Level, Relaxation, least_conceivable_s

BRACKET_RATIO = 1.003
"""The bracket ends when the attainable T is within this ratio of the unattainable one."""

NEAR = 0.9
"""A T that is not let through is looked at until as much as this share of the bound is served: else the next T would be
a guess."""

SHY = 0.9985
"""Share of the T that seems to be the least let through which is looked at next: at that T itself a "no" takes long."""

MOST_OVER = 1.1
"""What a T that is let through serves is not known, only that it is more than 1; it is taken for no more than this."""

LARGEST_STEP = 2.0
"""Largest factor by which T grows at once."""

FIRST_STEP = 1.02
"""First factor by which T grows while some bucket cannot be served at all; squared each time."""

MOST_RETREATS = 12
SHORTEST_RETREAT = 5e-4
"""How often, and by how much less at the least than the T before, a proof is tried; the relaxation's T is only nearly a
bound."""


def bracket(
    relaxation: Relaxation,
    deadline: float,
    *,
    low_s: float | None = None,
    first_s: float | None = None,
    enough_s: float = math.inf,
    ratio: float = BRACKET_RATIO,
    cutting: bool = False,
) -> tuple[float, np.ndarray, float]:
    """(T that the relaxation does not let through, prices that say so, about the T that it does; inf if time ran out).

    Unproven: see `Relaxation.proven_served`.

    Args:
      low_s: a T that it does not let through, where one is known.
      first_s: the T to look at first.
      enough_s: the bracket ends when this T is not let through.
      ratio: the bracket ends when the T that is let through is within this ratio of the one that is not.
      cutting: with cuts of whole slots.
    """
    low = least_conceivable_s(relaxation.problem) if low_s is None else low_s
    low_prices, high, served = relaxation.prices, math.inf, (math.nan, math.nan)
    trial, step = (low * BRACKET_RATIO if first_s is None else first_s), FIRST_STEP
    cells = NUM_CELLS if cutting else NUM_COARSE_CELLS
    while high / low > ratio and time.perf_counter() < deadline:
        answer = Level(relaxation, trial, num_cells=cells).solve(
            decide=True, cutting=cutting, near=NEAR, deadline=deadline
        )
        if answer.bound < 1 - STRICT:
            low, low_prices = trial, answer.prices
            if low >= enough_s or answer.scale * ratio >= 1:
                high = min(high, low * ratio)
                break
            served = (math.sqrt(max(answer.bound, 0.0) * max(answer.scale, 0.0)), served[1])  # it is between the two
            if served[0] < STRICT:
                trial, step = trial * step, step * step
        elif answer.scale >= 1 or time.perf_counter() < deadline:
            high = trial  # the share served is 1 or just below: no more patterns are worthwhile
            if low_s is None:
                relaxation.limit(answer.prices, high * ratio, num_cells=NUM_COARSE_CELLS)
            served = (served[0], math.sqrt(max(answer.scale, 1.0) * min(max(answer.bound, 1.0), MOST_OVER)))
        trial = min(_next_trial(low, high, *served, otherwise=trial), enough_s)
    return low, low_prices, high


def _next_trial(low: float, high: float, low_served: float, high_served: float, *, otherwise: float) -> float:
    """Just below the T that seems to be the least let through, by the shares served at T on both sides."""
    if not low_served >= STRICT:  # nothing is known, or next to nothing served
        return otherwise if otherwise < high else math.sqrt(low * high)
    power = 1.0  # of T, that the share served goes with
    if high_served > low_served:
        power = math.log(high_served / low_served) / math.log(high / low)
    step = min(low_served ** (-1 / power) * SHY, LARGEST_STEP)
    trial = low * max(step, math.sqrt(BRACKET_RATIO))
    return trial if trial < high else math.sqrt(low * high)


def proven_s(relaxation: Relaxation, low_s: float, prices: np.ndarray, bound_s: float) -> float:
    """`low_s`, or as near as these prices [J + K] of it prove that no plan is within it; `bound_s` if that is more."""
    trial_s = low_s
    for _ in range(MOST_RETREATS):
        if trial_s <= bound_s:
            break
        served = relaxation.proven_served(prices, trial_s)
        if served < 1 - STRICT:
            return trial_s
        trial_s *= 1 - max(served - 1, SHORTEST_RETREAT)  # the share served falls by as much as T at the least
    return bound_s
