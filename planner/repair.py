"""Brings a share-out under a target time: what is over it, or not placed yet, is placed by chains of ejections.

A micro-batch that fits no replica in the target takes the place of a less worthy one of a shorter bucket, which is then
placed in the same way. Shorter buckets fit more replicas, so a chain ends where there is room, or with what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import boolean, float64, int64
from numba.types import NamedTuple as NamedTupleType
from numba.types import UniTuple, void

from planner.balance import ROUNDING, TABLES, Tables, list_schedule
from planner.compiled import FLOAT_TABLE, FLOATS, INT_TABLE, INTS, compiled

MAX_PLACEMENTS = 400
"""Rounds of placing before the rest goes wherever it ends earliest: a limit that does not depend on the machine."""

CHOICES = 4
"""What could leave a replica of a bucket: its remainder, a slot, both, two slots."""


def repair(
    table: Tables,
    loads: np.ndarray,
    left: np.ndarray,
    prices: np.ndarray,
    kind_worth: np.ndarray,
    target_s: float,
    *,
    max_placements: int = MAX_PLACEMENTS,
) -> np.ndarray:
    """Loads [R, J] of all of `loads` and `left` [J], as many replicas as can be within `target_s`.

    Args:
      prices: [J] worth of a sequence; what is ejected is worth little.
      kind_worth: [K] worth of a second on a replica of each kind; what is placed goes where it costs little.
    """
    loads, left = loads.copy(), left.copy()
    _repair(table, loads, left, prices, kind_worth, target_s, max_placements)
    return list_schedule(table, left.tolist(), loads)


class _State(NamedTuple):
    """Loads [R, J] and what they take: `sums` [R, J], `top_s` [R] and `seconds` [R], an idle replica's fixed_s too."""

    loads: np.ndarray
    sums: np.ndarray
    top_s: np.ndarray
    seconds: np.ndarray


_STATE = NamedTupleType((INT_TABLE, FLOAT_TABLE, FLOATS, FLOATS), _State)


@compiled(void, TABLES, _STATE, int64, int64, int64)
def _add(table: Tables, state: _State, r: int, bucket: int, number: int) -> None:
    """Adds so many of a bucket to a replica."""
    kind = table.kind[r]
    state.loads[r, bucket] += number
    state.sums[r, bucket] = table.sums[kind, bucket, state.loads[r, bucket]]
    seconds, top_s = table.fixed_s[kind], 0.0
    for each in range(state.loads.shape[1]):
        seconds += state.sums[r, each]
        top_s = max(top_s, table.tops[kind, each, state.loads[r, each]])
    state.top_s[r] = top_s
    state.seconds[r] = seconds + table.bubbles[kind] * top_s


@compiled(float64, TABLES, _STATE, int64, int64, int64)
def _added_s(table: Tables, state: _State, r: int, bucket: int, number: int) -> float:
    """More seconds of a replica with so many more of a bucket."""
    kind, after = table.kind[r], state.loads[r, bucket] + number
    seconds = table.sums[kind, bucket, after] - state.sums[r, bucket]
    if table.bubbles[kind] > 0:
        seconds += table.bubbles[kind] * max(table.tops[kind, bucket, after] - state.top_s[r], 0.0)
    return seconds


@compiled(UniTuple(int64, CHOICES), TABLES, _STATE, int64, int64)
def _leaving(table: Tables, state: _State, r: int, bucket: int) -> tuple[int, ...]:
    """Sequences of each of the CHOICES, 0 where a replica has fewer."""
    load, full = state.loads[r, bucket], max(table.rows[table.kind[r], bucket, -1], 1)
    rest = load % full
    return rest, full * (full <= load), (rest + full) * (rest + full <= load), 2 * full * (2 * full <= load)


@compiled(float64, TABLES, _STATE, int64, int64, int64)
def _saved_s(table: Tables, state: _State, r: int, bucket: int, number: int) -> float:
    """Seconds saved at the least where so many of a bucket leave a replica."""
    return state.sums[r, bucket] - table.sums[table.kind[r], bucket, state.loads[r, bucket] - number]


@compiled(boolean, TABLES, _STATE, int64, INTS, FLOATS, float64)
def _eject(table: Tables, state: _State, r: int, left: np.ndarray, prices: np.ndarray, target_s: float) -> bool:
    """Takes off a replica what is worth least of all that brings it under the target, else what saves most."""
    over_s = state.seconds[r] - target_s
    best_bucket, best_number, is_enough, least_worth, most_s = -1, 0, False, np.inf, -np.inf
    for choice in range(CHOICES):
        for bucket in range(len(left)):
            number = _leaving(table, state, r, bucket)[choice]
            if number == 0:
                continue
            saved_s, worth = _saved_s(table, state, r, bucket, number), number * prices[bucket]
            if saved_s >= over_s:
                better = not is_enough or worth < least_worth
                is_enough = True
            else:
                better = not is_enough and saved_s > most_s
            if better:
                best_bucket, best_number, least_worth, most_s = bucket, number, worth, saved_s
    if best_bucket < 0:
        return False
    left[best_bucket] += best_number
    _add(table, state, r, best_bucket, -best_number)
    return True


@compiled(int64, TABLES, int64, int64, int64, boolean)
def _slot(table: Tables, r: int, bucket: int, waiting: int, is_single: bool) -> int:
    """Sequences that are placed at once: a full slot, or what waits, or one; 0 where the bucket does not fit."""
    return min(table.rows[table.kind[r], bucket, -1], 1 if is_single else waiting)


@compiled(boolean, TABLES, _STATE, int64, INTS, FLOATS, float64)
def _place(
    table: Tables, state: _State, bucket: int, left: np.ndarray, kind_worth: np.ndarray, target_s: float
) -> bool:
    """Places what waits of a bucket where it costs least a sequence within the target, a slot at the most on each of
    the replicas that are alike in this."""
    cost = np.empty(len(state.seconds))
    for is_single in (False, True):
        least = np.inf
        for r in range(len(cost)):
            cost[r] = np.inf
            number = _slot(table, r, bucket, left[bucket], is_single)
            if number:
                added_s = _added_s(table, state, r, bucket, number)
                if state.seconds[r] + added_s <= target_s:
                    cost[r] = added_s * kind_worth[table.kind[r]] / number
                    least = min(least, cost[r])
        if least == np.inf:
            continue
        waiting = left[bucket]
        for r in range(len(cost)):
            if cost[r] <= least * (1 + ROUNDING):
                number = _slot(table, r, bucket, waiting, is_single)
                if number > left[bucket]:
                    break
                left[bucket] -= number
                _add(table, state, r, bucket, number)
        return True
    return False


@compiled(boolean, TABLES, _STATE, int64, INTS, FLOATS, float64)
def _exchange(table: Tables, state: _State, bucket: int, left: np.ndarray, prices: np.ndarray, target_s: float) -> bool:
    """Places what waits of a bucket, a slot at the most, in the stead of something shorter that is worth least."""
    for is_single in (False, True):
        best_replica, best_bucket, best_number, least_worth = -1, 0, 0, np.inf
        for choice in range(CHOICES):
            for r in range(len(state.seconds)):
                number = _slot(table, r, bucket, left[bucket], is_single)
                if number == 0:
                    continue
                over_s = state.seconds[r] + _added_s(table, state, r, bucket, number) - target_s
                for other in range(bucket):
                    leaving = _leaving(table, state, r, other)[choice]
                    if leaving == 0 or _saved_s(table, state, r, other, leaving) < over_s:
                        continue
                    worth = leaving * prices[other] - prices[bucket] * number
                    if worth < least_worth:
                        best_replica, best_bucket, best_number, least_worth = r, other, leaving, worth
        if best_replica >= 0:
            number = _slot(table, best_replica, bucket, left[bucket], is_single)
            left[bucket] -= number
            left[best_bucket] += best_number
            _add(table, state, best_replica, best_bucket, -best_number)
            _add(table, state, best_replica, bucket, number)
            return True
    return False


@compiled(void, TABLES, INT_TABLE, INTS, FLOATS, FLOATS, float64, int64)
def _repair(
    table: Tables,
    loads: np.ndarray,
    left: np.ndarray,
    prices: np.ndarray,
    kind_worth: np.ndarray,
    target_s: float,
    max_placements: int,
) -> None:
    """Changes `loads` and `left`, of which what could not be placed remains."""
    num_replicas, num_buckets = loads.shape
    state = _State(loads, np.zeros(loads.shape), np.zeros(num_replicas), np.zeros(num_replicas))
    for r in range(num_replicas):
        for bucket in range(num_buckets):
            _add(table, state, r, bucket, 0)
    for r in range(num_replicas):
        while state.seconds[r] > target_s and _eject(table, state, r, left, prices, target_s):
            pass
    unplaced = np.zeros_like(left)
    for _ in range(max_placements):
        bucket = num_buckets - 1
        while bucket >= 0 and left[bucket] == 0:
            bucket -= 1
        if bucket < 0:
            break
        placed = _place(table, state, bucket, left, kind_worth, target_s)
        if not placed and not _exchange(table, state, bucket, left, prices, target_s):
            unplaced[bucket] += left[bucket]
            left[bucket] = 0
    left += unplaced
