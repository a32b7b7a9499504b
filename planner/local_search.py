"""Local search on a share-out: pieces of the slowest replica's load move, or are swapped, while that makes it faster.

A piece is some sequences of one bucket: whole slots, or what drops a remainder to a smaller row option. Every move to
another replica is looked at first; where none helps, every swap with the least loaded ones.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
from numba import boolean, float64, int64
from numba.types import NamedTuple as NamedTupleType
from numba.types import Tuple, void

from planner.balance import IMPROVEMENT, TABLES, Share, Tables
from planner.compiled import FLOAT_TABLE, FLOATS, INT_TABLE, INTS, compiled

MAX_CHUNKS = 8
"""Sizes of pieces that local search tries to move, for each bucket of the slowest replica."""

MAX_ROUNDS = 500
"""Moves and swaps after which local search ends: far more than it usually finds, and a limit that does not depend on
the machine's speed."""

ROUNDS_AT_ONCE = 16
"""Of these between two looks at the clock."""

SWAP_PARTNERS = 8
"""Least loaded replicas that local search tries to swap pieces with."""

NUM_TOPS = 3
"""Largest slots of a replica, of unlike buckets, that are known: one of them stays whichever two buckets change."""


def improve(
    table: Tables,
    loads: np.ndarray,
    *,
    time_limit_s: float = math.inf,
    max_rounds: int = MAX_ROUNDS,
    good_s: float = 0.0,
) -> Share:
    """Moves, then swaps, pieces of the slowest replica's load while that makes it faster and it takes over `good_s`.

    `loads` [R, J] fit their replicas. The result depends on the machine's speed only where `time_limit_s` cuts in.
    """
    deadline = time.perf_counter() + time_limit_s
    loads = np.array(loads, dtype=np.int64, order="C")
    for done in range(0, max_rounds, ROUNDS_AT_ONCE):
        asked = min(ROUNDS_AT_ONCE, max_rounds - done)
        if time.perf_counter() >= deadline or _rounds(table, loads, asked, good_s) < asked:
            break
    return Share(loads=loads, replica_s=table.replica_s(loads))


class _State(NamedTuple):
    """Loads [R, J] and what they take: `seconds` [R] of a replica, `work_s` [R] of its slots, fixed seconds too, and
    the largest of its slots in the buckets `top_bucket` [R, NUM_TOPS], `top_s` [R, NUM_TOPS]; bucket -1 for none."""

    loads: np.ndarray
    seconds: np.ndarray
    work_s: np.ndarray
    top_bucket: np.ndarray
    top_s: np.ndarray


_STATE = NamedTupleType((INT_TABLE, FLOATS, FLOATS, INT_TABLE, FLOAT_TABLE), _State)
_PIECES = Tuple((INTS, INTS))
"""Bucket [Q] and sequences [Q] of each."""


@compiled(void, TABLES, _STATE, int64)
def _weigh(table: Tables, state: _State, r: int) -> None:
    """Looks at a replica's load anew."""
    kind = table.kind[r]
    state.top_bucket[r] = -1
    state.top_s[r] = 0.0
    work_s, is_idle = table.fixed_s[kind], True
    for bucket in range(state.loads.shape[1]):
        load = state.loads[r, bucket]
        if load == 0:
            continue
        is_idle = False
        work_s += table.sums[kind, bucket, load]
        top_s, at = table.tops[kind, bucket, load], NUM_TOPS
        while at > 0 and (state.top_bucket[r, at - 1] < 0 or state.top_s[r, at - 1] < top_s):
            if at < NUM_TOPS:
                state.top_s[r, at], state.top_bucket[r, at] = state.top_s[r, at - 1], state.top_bucket[r, at - 1]
            at -= 1
        if at < NUM_TOPS:
            state.top_s[r, at], state.top_bucket[r, at] = top_s, bucket
    state.work_s[r] = work_s
    state.seconds[r] = 0.0 if is_idle else work_s + table.bubbles[kind] * state.top_s[r, 0]


@compiled(_PIECES, TABLES, _STATE, int64)
def _pieces(table: Tables, state: _State, r: int) -> tuple[np.ndarray, np.ndarray]:
    """What is worth moving off a replica, smallest first in each bucket."""
    num_buckets = state.loads.shape[1]
    options = table.rows[table.kind[r]]
    buckets = np.empty(num_buckets * MAX_CHUNKS, dtype=np.int64)
    amounts = np.empty(num_buckets * MAX_CHUNKS, dtype=np.int64)
    size = 0
    for bucket in range(num_buckets):
        load, full = state.loads[r, bucket], options[bucket, -1]
        if load == 0:
            continue
        rest, first = load % full, size
        for option in range(-2, 3 * options.shape[1]):
            if option < 0:
                amount = 1 if option == -2 else rest
            else:
                rows = options[bucket, option // 3]
                amount = rows if option % 3 == 0 else rest - rows + (full if option % 3 == 2 else 0)
            if not 0 < amount <= load:
                continue
            at = size  # ascending, each once, the first MAX_CHUNKS
            while at > first and amounts[at - 1] > amount:
                at -= 1
            if (at > first and amounts[at - 1] == amount) or at == first + MAX_CHUNKS:
                continue
            size = min(size + 1, first + MAX_CHUNKS)
            for later in range(size - 1, at, -1):
                amounts[later] = amounts[later - 1]
            amounts[at] = amount
        buckets[first:size] = bucket
    return buckets[:size], amounts[:size]


@compiled(float64, TABLES, _STATE, int64, int64, int64)
def _with_s(table: Tables, state: _State, r: int, bucket: int, amount: int) -> float:
    """Seconds of a replica with so many more of a bucket (negative: fewer); inf where they do not fit."""
    kind, load = table.kind[r], state.loads[r, bucket]
    if amount < 0 and load + amount == 0 and state.top_bucket[r, 1] < 0:
        return 0.0  # nothing is left
    top_s = state.top_s[r, 1] if state.top_bucket[r, 0] == bucket else state.top_s[r, 0]
    top_s = max(top_s, table.tops[kind, bucket, load + amount])
    if top_s == np.inf:
        return np.inf
    changed_s = table.sums[kind, bucket, load + amount] - table.sums[kind, bucket, load]
    return state.work_s[r] + changed_s + table.bubbles[kind] * top_s


@compiled(float64, TABLES, _STATE, int64, int64, int64, int64, int64)
def _exchanged_s(
    table: Tables, state: _State, r: int, bucket: int, amount: int, other_bucket: int, other_amount: int
) -> float:
    """Seconds of a replica with so many more, or fewer, of two buckets; inf where they do not fit."""
    kind = table.kind[r]
    load, other_load = state.loads[r, bucket] + amount, state.loads[r, other_bucket] + other_amount
    seconds = state.work_s[r] + table.sums[kind, bucket, load] - table.sums[kind, bucket, load - amount]
    seconds += table.sums[kind, other_bucket, other_load] - table.sums[kind, other_bucket, other_load - other_amount]
    if table.bubbles[kind] == 0 or seconds == np.inf:
        return seconds
    top_s = max(table.tops[kind, bucket, load], table.tops[kind, other_bucket, other_load])
    for at in range(NUM_TOPS):
        if state.top_bucket[r, at] != bucket and state.top_bucket[r, at] != other_bucket:
            top_s = max(top_s, state.top_s[r, at])
            break
    return seconds + table.bubbles[kind] * top_s


@compiled(boolean, TABLES, _STATE, int64, _PIECES, INTS)
def _best_move(
    table: Tables, state: _State, slowest: int, given: tuple[np.ndarray, np.ndarray], change: np.ndarray
) -> bool:
    """Whether a piece of the slowest replica's is better off elsewhere; `change` then says which, and where."""
    buckets, amounts = given
    best_s = state.seconds[slowest] * (1 - IMPROVEMENT)
    left_s = np.empty(len(buckets))
    for at in range(len(buckets)):
        left_s[at] = _with_s(table, state, slowest, buckets[at], -amounts[at])
    found = False
    for other in range(len(state.seconds)):
        for at in range(len(buckets) if other != slowest else 0):
            if left_s[at] >= best_s:
                continue
            worst_s = max(left_s[at], _with_s(table, state, other, buckets[at], amounts[at]))
            if worst_s < best_s:
                best_s, found = worst_s, True
                change[0], change[1], change[2], change[4] = other, buckets[at], amounts[at], 0
    return found


@compiled(boolean, TABLES, _STATE, int64, _PIECES, INTS)
def _best_swap(
    table: Tables, state: _State, slowest: int, given: tuple[np.ndarray, np.ndarray], change: np.ndarray
) -> bool:
    """Whether giving one of the least loaded replicas a piece for one of another bucket is better; `change` as above,
    and then what is taken back."""
    best_s = state.seconds[slowest] * (1 - IMPROVEMENT)
    first, found = (len(given[0]), 0), False  # of equally good ones the first piece given, then the first partner
    is_partner = np.zeros(len(state.seconds), dtype=np.bool_)
    for number in range(min(SWAP_PARTNERS, len(state.seconds))):
        other = -1
        for r in range(len(state.seconds)):
            if not is_partner[r] and (other < 0 or state.seconds[r] < state.seconds[other]):
                other = r
        is_partner[other] = True
        if other == slowest:
            continue
        taken = _pieces(table, state, other)
        for give in range(len(given[0])):
            bucket, amount = given[0][give], given[1][give]
            for take in range(len(taken[0])):
                back, back_amount = taken[0][take], taken[1][take]
                if back == bucket:
                    continue
                worst_s = _exchanged_s(table, state, slowest, bucket, -amount, back, back_amount)
                if worst_s > best_s or (worst_s == best_s and not (found and (give, number) < first)):
                    continue
                worst_s = max(worst_s, _exchanged_s(table, state, other, bucket, amount, back, -back_amount))
                if worst_s < best_s or (found and worst_s == best_s and (give, number) < first):
                    best_s, found, first = worst_s, True, (give, number)
                    change[0], change[1], change[2], change[3], change[4] = other, bucket, amount, back, back_amount
    return found


@compiled(int64, TABLES, INT_TABLE, int64, float64)
def _rounds(table: Tables, loads: np.ndarray, max_rounds: int, good_s: float) -> int:
    """Changes `loads`; how many moves and swaps it made, fewer than `max_rounds` where no more are wanted or found."""
    num_replicas = len(loads)
    state = _State(
        loads,
        np.zeros(num_replicas),
        np.zeros(num_replicas),
        np.zeros((num_replicas, NUM_TOPS), dtype=np.int64),
        np.zeros((num_replicas, NUM_TOPS)),
    )
    for r in range(num_replicas):
        _weigh(table, state, r)
    change = np.zeros(5, dtype=np.int64)  # other replica; bucket and sequences given; bucket and sequences taken back
    for done in range(max_rounds):
        slowest = np.argmax(state.seconds)
        if state.seconds[slowest] <= good_s:
            return done
        given = _pieces(table, state, slowest)
        found = _best_move(table, state, slowest, given, change)
        if not found and not _best_swap(table, state, slowest, given, change):
            return done
        other = change[0]
        loads[other, change[1]] += change[2]
        loads[slowest, change[1]] -= change[2]
        loads[other, change[3]] -= change[4]
        loads[slowest, change[3]] += change[4]
        _weigh(table, state, slowest)
        _weigh(table, state, other)
    return max_rounds
