"""Shares out counts of sequences among given replicas so that the slowest is as fast as can be.

Given replicas r (each of a config) and counts N_j, choose integers n_rj: sum over r of n_rj = N_j, n_rj = 0 where
bucket j exceeds the replica's capacity, least max over r of `UsableConfig.replica_s(n_r)`. Used on the expected batch
when planning and on every step's batch when training.

List scheduling (longest bucket first, each full micro-batch to the replica that would finish it first) always returns
a valid share-out. `planner.local_search` makes it better, `planner.balance_model` proves a bound and looks further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import void
from numba.types import NamedTuple as NamedTupleType

from planner.compiled import FLOAT_CUBE, FLOATS, INT_CUBE, INT_TABLE, INTS, compiled
from planner.problem import UsableConfig

ROUNDING = 1e-9
"""Relative room left for floating point in bounds computed without a solver."""

IMPROVEMENT = 1e-9
"""A move must shorten the slowest replica by this share of its time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A share-out. `loads` [R, J] sequences of each bucket on each replica, `replica_s` [R] seconds of each."""

    loads: np.ndarray
    replica_s: np.ndarray

    @property
    def max_s(self) -> float:
        return float(self.replica_s.max(initial=0.0))


class Tables(NamedTuple):
    """Seconds of every load of one bucket, so that local search only looks up.

    Attributes:
      kind: [R] which config each replica is of.
      sums: [K, J, max N + 1] seconds of the slots that n sequences of bucket j become; inf where it does not fit.
      tops: [K, J, max N + 1] the largest of those slots.
      bubbles: [K] pp - 1.
      fixed_s: [K].
      rows: [K, J, O] each kind's row options, ascending, the last repeated; all 0 where a bucket does not fit.
    """

    kind: np.ndarray
    sums: np.ndarray
    tops: np.ndarray
    bubbles: np.ndarray
    fixed_s: np.ndarray
    rows: np.ndarray

    @property
    def full(self) -> np.ndarray:
        """[K, J] rows of a full slot; 0 where a bucket does not fit."""
        return self.rows[:, :, -1]

    def replica_s(self, loads: np.ndarray) -> np.ndarray:
        """[R] seconds of loads [R, J]."""
        kind, bucket = self.kind[:, None], np.arange(loads.shape[1])[None, :]
        busy = loads.any(axis=1)
        top = self.tops[kind, bucket, loads].max(axis=1)
        total = self.sums[kind, bucket, loads].sum(axis=1) + self.bubbles[self.kind] * top
        return np.where(busy, self.fixed_s[self.kind] + total, 0.0)


TABLES = NamedTupleType((INTS, FLOAT_CUBE, FLOAT_CUBE, FLOATS, FLOATS, INT_CUBE), Tables)
"""What Numba calls them."""


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
    rows = np.zeros((len(kinds), len(counts), max((len(o) for u in kinds for o in u.rows), default=1)), dtype=np.int64)
    for index, usable in enumerate(kinds):
        fitting = [bucket for bucket in range(len(counts)) if usable.fits(bucket)]
        own, slot_s = (
            _padded([of[bucket] for bucket in fitting], rows.shape[2]) for of in (usable.rows, usable.slot_s)
        )
        rows[index, fitting] = own
        most = np.array([counts[bucket] for bucket in fitting], dtype=np.int64)
        sums[index, fitting], tops[index, fitting] = _slots_of(own.astype(np.int64), slot_s, most, width)
    return Tables(
        kind=np.array(kind, dtype=np.int64),
        sums=sums,
        tops=tops,
        bubbles=np.array([usable.config.pp - 1.0 for usable in kinds]),
        fixed_s=np.array([usable.cost.fixed_s for usable in kinds]),
        rows=rows,
    )


def _padded(options: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """[n, width]: each with its last repeated."""
    return np.array([(*own, *own[-1:] * (width - len(own))) for own in options]).reshape(-1, width)


def _slots_of(rows: np.ndarray, slot_s: np.ndarray, counts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """([n, width] seconds in all, the same of the largest) of the slots of 0, 1, ... sequences of each of n buckets.

    `rows` and `slot_s` [n, O] are their row options and seconds, `counts` [n] the most sequences.
    """
    number = np.arange(width)
    num_full, rest = np.divmod(number, rows[:, -1:])
    rest_s = np.zeros(rest.shape)
    for option in reversed(range(rows.shape[1])):
        rest_s = np.where(rest <= rows[:, option, None], slot_s[:, option, None], rest_s)
    rest_s[rest == 0] = 0.0
    sums = num_full * slot_s[:, -1:] + rest_s
    tops = np.maximum(np.where(num_full > 0, slot_s[:, -1:], 0.0), rest_s)
    beyond = number > counts[:, None]
    sums[beyond] = tops[beyond] = np.inf
    return sums, tops


def list_schedule(table: Tables, counts: Sequence[int], loads: np.ndarray | None = None) -> np.ndarray:
    """Loads [R, J], added to `loads` if given: longest bucket first, each micro-batch to where it ends earliest.

    Raises:
      ValueError: a bucket with counts[j] > 0 fits no replica.
    """
    shape = len(table.kind), len(counts)
    loads = np.zeros(shape, dtype=np.int64) if loads is None else loads.astype(np.int64)
    _list_schedule(table, loads, np.array(counts, dtype=np.int64))
    return loads


@compiled(void, TABLES, INT_TABLE, INTS)
def _list_schedule(table: Tables, loads: np.ndarray, counts: np.ndarray) -> None:
    """Adds counts [J] to loads [R, J].

    Full slots of a bucket are given out by when each would end after those of its kind before it; only then is the
    largest slot of a replica, which its bubbles are of, looked at anew.
    """
    num_replicas, num_buckets = loads.shape
    kind, fixed_s, bubbles, sums, tops = table.kind, table.fixed_s, table.bubbles, table.sums, table.tops
    largest = table.rows[:, :, -1]
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
