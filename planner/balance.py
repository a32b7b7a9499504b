"""Shares out counts of sequences among given replicas so that the slowest is as fast as can be.

Given replicas r (each of a config) and counts N_j, choose integers n_rj: sum over r of n_rj = N_j, n_rj = 0 where
bucket j exceeds the replica's capacity, least max over r of `UsableConfig.replica_s(n_r)`. Used on the expected batch
when planning and on every step's batch when training.

`heuristic` is list scheduling (longest bucket first, each full micro-batch to the replica that would finish it first)
and then local search on the slowest replica; it always returns a valid share-out. `planner.balance_model` proves a
bound and looks further, starting from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import numpy as np
from numba import void

from planner.compiled import FLOAT_CUBE, FLOATS, INT_TABLE, INTS, compiled
from planner.problem import UsableConfig

ROUNDING = 1e-9
"""Relative room left for floating point in bounds computed without a solver."""

IMPROVEMENT = 1e-9
"""A move must shorten the slowest replica by this share of its time."""

MAX_CHUNKS = 8
"""Sizes of pieces that local search tries to move, for each bucket of the slowest replica."""

MAX_ROUNDS = 500
"""Moves and swaps after which local search ends: far more than it usually finds, and a limit that does not depend on
the machine's speed."""

SWAP_PARTNERS = 8
"""Least loaded replicas that local search tries to swap pieces with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A share-out. `loads` [R, J] sequences of each bucket on each replica, `replica_s` [R] seconds of each."""

    loads: np.ndarray
    replica_s: np.ndarray

    @property
    def max_s(self) -> float:
        return float(self.replica_s.max(initial=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Seconds of every load of one bucket, so that local search only looks up.

    Attributes:
      kind: [R] which config each replica is of.
      sums: [kinds, J, max N + 1] seconds of the slots that n sequences of bucket j become; inf where it does not fit.
      tops: [kinds, J, max N + 1] the largest of those slots.
      bubbles: [kinds] pp - 1.
      fixed_s: [kinds].
      options: for each kind and bucket the row options.
    """

    kind: np.ndarray
    sums: np.ndarray
    tops: np.ndarray
    bubbles: np.ndarray
    fixed_s: np.ndarray
    options: tuple[tuple[tuple[int, ...], ...], ...]

    def replica_s(self, loads: np.ndarray) -> np.ndarray:
        """[R] seconds of loads [R, J]."""
        kind, bucket = self.kind[:, None], np.arange(loads.shape[1])[None, :]
        busy = loads.any(axis=1)
        top = self.tops[kind, bucket, loads].max(axis=1)
        total = self.sums[kind, bucket, loads].sum(axis=1) + self.bubbles[self.kind] * top
        return np.where(busy, self.fixed_s[self.kind] + total, 0.0)


def tables(replicas: Sequence[UsableConfig], counts: Sequence[int]) -> Tables:
    """Tables for `replicas`, any order, and at most counts[j] sequences of each bucket on one of them."""
    kinds: list[UsableConfig] = []
    kind = []
    for usable in replicas:
        known = next((index for index, other in enumerate(kinds) if other is usable), None)
        if known is None:
            known = len(kinds)
            kinds.append(usable)
        kind.append(known)
    width = max(counts, default=0) + 1
    sums = np.full((len(kinds), len(counts), width), np.inf)
    tops = np.full((len(kinds), len(counts), width), np.inf)
    sums[:, :, 0] = tops[:, :, 0] = 0.0
    for index, usable in enumerate(kinds):
        fitting = [bucket for bucket in range(len(counts)) if usable.fits(bucket)]
        sums[index, fitting], tops[index, fitting] = _slots_of(usable, fitting, counts, width)
    return Tables(
        kind=np.array(kind, dtype=np.int64),
        sums=sums,
        tops=tops,
        bubbles=np.array([usable.config.pp - 1.0 for usable in kinds]),
        fixed_s=np.array([usable.cost.fixed_s for usable in kinds]),
        options=tuple(usable.rows for usable in kinds),
    )


def _slots_of(
    usable: UsableConfig, buckets: Sequence[int], counts: Sequence[int], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """([n, width] seconds in all, the same of the largest) of the slots of 0, 1, ... sequences of each of n buckets."""
    most = max((len(usable.rows[bucket]) for bucket in buckets), default=1)
    # Buckets with fewer options than others repeat their largest.
    rows = np.array([(*usable.rows[j], *usable.rows[j][-1:] * (most - len(usable.rows[j]))) for j in buckets])
    slot_s = np.array([(*usable.slot_s[j], *usable.slot_s[j][-1:] * (most - len(usable.slot_s[j]))) for j in buckets])
    rows, slot_s = rows.reshape(-1, most, 1), slot_s.reshape(-1, most, 1)
    number = np.arange(width)
    num_full, rest = np.divmod(number, rows[:, -1])
    rest_s = np.zeros(rest.shape)
    for option in reversed(range(most)):
        rest_s = np.where(rest <= rows[:, option], slot_s[:, option], rest_s)
    rest_s[rest == 0] = 0.0
    sums = num_full * slot_s[:, -1] + rest_s
    tops = np.maximum(np.where(num_full > 0, slot_s[:, -1], 0.0), rest_s)
    beyond = number > np.array([counts[bucket] for bucket in buckets], dtype=np.int64).reshape(-1, 1)
    sums[beyond] = tops[beyond] = np.inf
    return sums, tops


def heuristic(table: Tables, counts: Sequence[int], *, time_limit_s: float = math.inf) -> Share:
    """A valid share-out; every bucket with counts[j] > 0 must fit some replica. `time_limit_s` as in `improve`."""
    return improve(table, list_schedule(table, counts), time_limit_s=time_limit_s)


def list_schedule(table: Tables, counts: Sequence[int], loads: np.ndarray | None = None) -> np.ndarray:
    """Loads [R, J], added to `loads` if given: longest bucket first, each micro-batch to where it ends earliest.

    Raises:
      ValueError: a bucket with counts[j] > 0 fits no replica.
    """
    shape = len(table.kind), len(counts)
    loads = np.zeros(shape, dtype=np.int64) if loads is None else loads.astype(np.int64)
    largest = np.array([[rows[-1] if rows else 0 for rows in options] for options in table.options])
    _list_schedule(loads, np.array(counts), table.kind, table.fixed_s, table.bubbles, table.sums, table.tops, largest)
    return loads


@compiled(void, INT_TABLE, INTS, INTS, FLOATS, FLOATS, FLOAT_CUBE, FLOAT_CUBE, INT_TABLE)
def _list_schedule(
    loads: np.ndarray,
    counts: np.ndarray,
    kind: np.ndarray,
    fixed_s: np.ndarray,
    bubbles: np.ndarray,
    sums: np.ndarray,
    tops: np.ndarray,
    largest: np.ndarray,
) -> None:
    """Adds counts [J] to loads [R, J]; `largest` [K, J] are the full rows of each kind, 0 where a bucket does not fit.

    Full slots of a bucket are given out by when each would end after those of its kind before it; only then is the
    largest slot of a replica, which its bubbles are of, looked at anew.
    """
    num_replicas, num_buckets = loads.shape
    work, top = np.zeros(num_replicas), np.zeros(num_replicas)
    for r in range(num_replicas):
        work[r] = fixed_s[kind[r]]
        for bucket in range(num_buckets):
            work[r] += sums[kind[r], bucket, loads[r, bucket]]
            top[r] = max(top[r], tops[kind[r], bucket, loads[r, bucket]])
    start_s, slot_s, number = np.zeros(num_replicas), np.zeros(num_replicas), np.zeros(num_replicas, dtype=np.int64)
    for bucket in range(num_buckets - 1, -1, -1):
        rest = counts[bucket]
        for r in range(num_replicas):
            full = largest[kind[r], bucket]
            number[r] = 0 if 0 < full <= rest else -1
            if number[r] == 0:
                slot_s[r] = sums[kind[r], bucket, full]
                start_s[r] = work[r] + bubbles[kind[r]] * max(top[r], slot_s[r])
        while rest > 0:  # full slots
            chosen, least_s = -1, np.inf
            for r in range(num_replicas):
                if number[r] >= 0 and start_s[r] + slot_s[r] * (number[r] + 1) < least_s:
                    chosen, least_s = r, start_s[r] + slot_s[r] * (number[r] + 1)
            if chosen < 0 or largest[kind[chosen], bucket] > rest:
                break
            number[chosen] += 1
            rest -= largest[kind[chosen], bucket]
        for r in range(num_replicas):
            if number[r] > 0:
                loads[r, bucket] += number[r] * largest[kind[r], bucket]
                work[r] += number[r] * slot_s[r]
                top[r] = max(top[r], slot_s[r])
        while rest > 0:  # what is less than the next full one
            chosen, least_s, rows = -1, np.inf, 0
            for r in range(num_replicas):
                piece = min(largest[kind[r], bucket], rest)
                if piece == 0:
                    continue
                piece_s = sums[kind[r], bucket, piece]
                ends_s = work[r] + piece_s + bubbles[kind[r]] * max(top[r], piece_s)
                if chosen < 0 or ends_s < least_s:
                    chosen, least_s, rows = r, ends_s, piece
            if chosen < 0:
                raise ValueError("list_schedule: a bucket with sequences fits no replica")
            loads[chosen, bucket] += rows
            work[chosen] += sums[kind[chosen], bucket, rows]
            top[chosen] = max(top[chosen], sums[kind[chosen], bucket, rows])
            rest -= rows


def improve(
    table: Tables,
    loads: np.ndarray,
    *,
    time_limit_s: float = math.inf,
    max_rounds: int = MAX_ROUNDS,
    good_s: float = 0.0,
) -> Share:
    """Moves, then swaps, pieces of the slowest replica's load while that makes it faster and it takes over `good_s`.

    The result depends on the machine's speed only where `time_limit_s` cuts in.
    """
    deadline = time.perf_counter() + time_limit_s
    loads = loads.copy()
    replica_s = table.replica_s(loads)
    for _ in range(max_rounds):
        if time.perf_counter() >= deadline or replica_s.max() <= good_s:
            break
        slowest = int(replica_s.argmax())
        change = _best_move(table, loads, replica_s, slowest) or _best_swap(table, loads, replica_s, slowest)
        if change is None:
            break
        for replica, bucket, amount in change:
            loads[replica, bucket] += amount
        touched = np.array(sorted({replica for replica, _, _ in change}))
        replica_s[touched] = _some_replica_s(table, loads, touched)
    return Share(loads=loads, replica_s=replica_s)


Change = list[tuple[int, int, int]]
"""(replica, bucket, sequences added) of one move or swap."""


def _some_replica_s(table: Tables, loads: np.ndarray, which: np.ndarray) -> np.ndarray:
    return dataclasses.replace(table, kind=table.kind[which]).replica_s(loads[which])


def _pieces(table: Tables, loads: np.ndarray, replica: int) -> tuple[np.ndarray, np.ndarray]:
    """(bucket [Q], sequences [Q]) worth moving off a replica: whole slots, or what drops its remainder an option."""
    buckets, amounts = [], []
    options = table.options[table.kind[replica]]
    for bucket, load in enumerate(loads[replica].tolist()):
        if load:
            useful = _amounts(options[bucket], load)
            buckets += [bucket] * len(useful)
            amounts += useful
    return np.array(buckets, dtype=np.int64), np.array(amounts, dtype=np.int64)


@functools.lru_cache(maxsize=1 << 16)
def _amounts(options: tuple[int, ...], load: int) -> tuple[int, ...]:
    rest = load % options[-1]
    sizes = {1, rest, *options, *(rest - o for o in options), *(rest + options[-1] - o for o in options)}
    return tuple(sorted(size for size in sizes if 0 < size <= load)[:MAX_CHUNKS])


def _times_with(
    table: Tables, loads: np.ndarray, which: np.ndarray, buckets: np.ndarray, amounts: np.ndarray
) -> np.ndarray:
    """[len(which), Q] seconds of each replica if amounts[q] (negative: fewer) of buckets[q] were added to its load."""
    kind = table.kind[which]
    mine = loads[which]
    every = np.arange(mine.shape[1])[None, :]
    sums, tops = table.sums[kind[:, None], every, mine], table.tops[kind[:, None], every, mine]
    order = np.argsort(tops, axis=1)
    first = np.take_along_axis(tops, order[:, -1:], axis=1)
    second = np.take_along_axis(tops, order[:, -2:-1], axis=1) if tops.shape[1] > 1 else np.zeros_like(first)
    other_top = np.where(order[:, -1:] == buckets[None, :], second, first)
    changed = mine[:, buckets] + amounts[None, :]
    inside = (changed >= 0) & (changed < table.sums.shape[2])
    changed = np.where(inside, changed, 0)
    new_sum = table.sums[kind[:, None], buckets[None, :], changed]
    new_top = np.maximum(other_top, table.tops[kind[:, None], buckets[None, :], changed])
    rest_sum = sums.sum(axis=1)[:, None] - sums[:, buckets]
    busy = (mine.sum(axis=1)[:, None] + amounts[None, :]) > 0
    bubble = np.where(new_top < np.inf, table.bubbles[kind][:, None] * np.where(new_top < np.inf, new_top, 0), np.inf)
    total = table.fixed_s[kind][:, None] + rest_sum + new_sum + bubble
    return np.where(inside, np.where(busy, total, 0.0), np.inf)


def _best_move(table: Tables, loads: np.ndarray, replica_s: np.ndarray, slowest: int) -> Change | None:
    buckets, amounts = _pieces(table, loads, slowest)
    others = np.delete(np.arange(len(replica_s)), slowest)
    if not len(buckets) or not len(others):
        return None
    left = _times_with(table, loads, np.array([slowest]), buckets, -amounts)
    right = _times_with(table, loads, others, buckets, amounts)
    worst = np.maximum(left, right)
    other, piece = np.unravel_index(int(worst.argmin()), worst.shape)
    if not worst[other, piece] < replica_s[slowest] * (1 - IMPROVEMENT):
        return None
    bucket, amount = int(buckets[piece]), int(amounts[piece])
    return [(slowest, bucket, -amount), (int(others[other]), bucket, amount)]


def _best_swap(table: Tables, loads: np.ndarray, replica_s: np.ndarray, slowest: int) -> Change | None:
    """Gives a piece to another replica and takes one of another bucket back."""
    others = [other for other in np.argsort(replica_s, kind="stable")[:SWAP_PARTNERS].tolist() if other != slowest]
    given = _pieces(table, loads, slowest)
    taken = [_pieces(table, loads, other) for other in others]
    who = np.repeat(np.arange(len(others)), [len(amounts) for _, amounts in taken])
    if not len(given[0]) or not len(who):
        return None
    buckets, amounts = (np.concatenate([piece[side] for piece in taken]) for side in (0, 1))
    here, there = np.array([slowest]), np.array(others)
    left = _exchanged_s(table, loads, here, given, np.zeros_like(who), (buckets, amounts), sign=-1)
    right = _exchanged_s(table, loads, there, given, who, (buckets, amounts), sign=1)
    worst = np.where(given[0][:, None] == buckets[None, :], np.inf, np.maximum(left, right))
    give, take = np.unravel_index(int(worst.argmin()), worst.shape)
    if not worst[give, take] < replica_s[slowest] * (1 - IMPROVEMENT):
        return None
    other = others[int(who[take])]
    mine, theirs = (int(given[0][give]), int(given[1][give])), (int(buckets[take]), int(amounts[take]))
    return [
        (slowest, mine[0], -mine[1]),
        (other, mine[0], mine[1]),
        (slowest, theirs[0], theirs[1]),
        (other, theirs[0], -theirs[1]),
    ]


def _exchanged_s(
    table: Tables,
    loads: np.ndarray,
    which: np.ndarray,
    given: tuple[np.ndarray, np.ndarray],
    who: np.ndarray,
    taken: tuple[np.ndarray, np.ndarray],
    *,
    sign: int,
) -> np.ndarray:
    """[G, T] seconds of replica which[who[t]] when piece g of `given` comes (sign 1; -1: goes), piece t of `taken` goes
    (comes), of unlike buckets."""
    kind, every = table.kind[which], np.arange(loads.shape[1])[None, :]
    mine, most = loads[which], table.sums.shape[2] - 1
    (in_bucket, in_size), (out_bucket, out_size) = given, taken
    after_in = np.minimum(mine[:, in_bucket] + sign * in_size, most)  # [P, G]
    after_out = np.minimum(mine[who, out_bucket] - sign * out_size, most)  # [T]
    sums = table.sums[kind[:, None], every, mine]
    in_s = table.sums[kind[:, None], in_bucket, after_in] - sums[:, in_bucket]
    out_s = table.sums[kind[who], out_bucket, after_out] - sums[who, out_bucket]
    own_s = table.fixed_s[kind] + sums.sum(axis=1)
    total = (in_s.T + own_s)[:, who] + out_s
    bubbles = table.bubbles[kind]
    if not bubbles.any():
        return total
    tops = table.tops[kind[:, None], every, mine]
    order = np.argsort(-tops, axis=1, kind="stable")[:, :3]
    ranked = np.take_along_axis(tops, order, axis=1)
    top = np.zeros_like(total)
    for rank in reversed(range(order.shape[1])):
        bucket = order[who, rank]
        untouched = (bucket != in_bucket[:, None]) & (bucket != out_bucket)
        top = np.where(untouched, ranked[who, rank], top)
    top = np.maximum(top, table.tops[kind[:, None], in_bucket, after_in].T[:, who])
    top = np.maximum(top, table.tops[kind[who], out_bucket, after_out])
    return total + bubbles[who] * np.where(np.isfinite(top), top, 0.0)


def quick_bound_s(replicas: Sequence[UsableConfig], counts: Sequence[int]) -> float:
    """A bound on the least max seconds without a solver."""
    kinds = list({id(usable): usable for usable in replicas}.values())
    work, quickest = work_and_quickest_s(kinds, counts)
    num_devices = sum(usable.num_devices for usable in replicas)
    return max(work / num_devices, quickest) * (1 - ROUNDING)


def work_and_quickest_s(kinds: Sequence[UsableConfig], counts: Sequence[int]) -> tuple[float, float]:
    """(device-seconds that the counts take at each bucket's best rate, seconds of the slowest bucket's quickest slot).

    No share-out over D devices is faster than the first over D, nor than the second.
    """
    work, quickest = 0.0, 0.0
    for bucket, count in enumerate(counts):
        fitting = [usable for usable in kinds if usable.fits(bucket)]
        if count > 0:
            work += count * min(usable.num_devices * usable.per_sequence_s(bucket) for usable in fitting)
            one = min(usable.cost.fixed_s + usable.config.pp * min(usable.slot_s[bucket]) for usable in fitting)
            quickest = max(quickest, one)
    return work, quickest
