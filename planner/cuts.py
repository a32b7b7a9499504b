"""Cuts that know of whole slots: a bucket takes a whole number of them, on all replicas together.

For a bucket j and a share a / k < 1 every share-out has

    sum over its slots of bucket j of ceil(a o / k)  >=  ceil(a N_j / k)            o sequences in a slot

since ceil(x) + ceil(y) >= ceil(x + y): rounding of (1) of `planner.master` (Chvatal, "Edmonds polytopes and a hierarchy
of combinatorial problems", 1973). Fractions of patterns violate it where few slots hold all of a bucket: three
sequences in slots of two are one slot and a half to the master, and two by the cut of 1 / 2. The left side is a sum
over slots, so a price on a cut is a price on slots, and patterns are priced as without.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence

import numpy as np
from numba import float64, int64

from planner.compiled import FLOATS, INT_TABLE, compiled
from planner.patterns import Lattice, Pattern, Slots

VIOLATED = 1e-3
"""A cut joins the master when its left side falls short by this share."""

MOST_A_BUCKET = 2
"""Cuts of one bucket that join at once: those that fall shortest."""

LARGEST_SIZE = 256
"""Largest k of the cuts with a = 1: with more sequences in a slot the last one of a bucket hardly matters."""

LARGEST_FRACTION = 25
"""Largest k of the cuts with a > 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The cut of a bucket j and `times` a / `size` k."""

    bucket: int
    size: int
    times: int = 1

    def least(self, counts: Sequence[int]) -> int:
        """What the slots of any share-out of `counts` add up to at the least."""
        return -(-counts[self.bucket] * self.times // self.size)

    def of_slots(self, bucket: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What slots of so many rows of these buckets add."""
        return np.where(bucket == self.bucket, -(-rows * self.times // self.size), 0)


class SlotWorths:
    """What the slots of every config are worth at prices of sequences and of cuts.

    `slots` are the `slots_of` each config; arrays [C, S] are padded with slots worth nothing.
    """

    def __init__(self, slots: Sequence[Slots], num_buckets: int) -> None:
        shape = (len(slots), max(len(mine) for mine in slots))
        self._bucket, self._rows = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._order = np.zeros(shape, dtype=np.int64) + np.arange(shape[1])
        self._seconds, self._most = np.ones(shape), np.zeros(shape)
        self._is_remainder = np.zeros(shape, dtype=bool)
        for index, mine in enumerate(slots):
            own = (index, slice(len(mine)))
            self._bucket[own], self._rows[own], self._order[own] = mine.bucket, mine.rows, mine.order
            self._seconds[own], self._most[own] = mine.seconds, mine.most
            self._is_remainder[own] = mine.is_remainder
        self._num_buckets = num_buckets
        self._steps = np.zeros((0, *shape))

    def add(self, cuts: Sequence[Cut]) -> None:
        """Prices are of these cuts too from now on."""
        new = [cut.of_slots(self._bucket, self._rows) for cut in cuts]
        self._steps = np.concatenate([self._steps, np.array(new).reshape(-1, *self._rows.shape)])

    def at(self, prices: np.ndarray) -> np.ndarray:
        """[C, S] worth of each slot; `prices` [J + K], K at most as many as there are cuts."""
        paid = np.flatnonzero(prices[self._num_buckets :])
        of_cuts = np.tensordot(prices[self._num_buckets + paid], self._steps[paid], axes=1)
        return prices[self._bucket] * self._rows + of_cuts

    def seconds(self, worths: np.ndarray, config: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([Q, J] most that a second of each bucket is worth, [Q, J] seconds that may be worth it).

        Of a replica of config[q] that uses no slot after position end[q] of the config's `order`: the full slots of a
        bucket and one remainder.
        """
        every = np.arange(len(worths))[:, None]
        place = (every, np.arange(worths.shape[1])[None, :], self._bucket[every, self._order])
        worth = worths[every, self._order]
        is_rest = self._is_remainder[every, self._order]
        best, rest, full = np.zeros((3, *worths.shape, self._num_buckets))
        best[place] = worth / self._seconds[every, self._order]
        rest[place] = np.where(is_rest, worth, 0.0)
        full[place] = np.where(is_rest, 0.0, worth * self._most[every, self._order])
        ratio = np.maximum.accumulate(best, axis=1)[config, end]
        all_of_it = (np.maximum.accumulate(rest, axis=1) + np.cumsum(full, axis=1))[config, end]
        return ratio, np.where(ratio > 0, all_of_it / np.where(ratio > 0, ratio, 1.0), 0.0)


def of_patterns(cuts: Sequence[Cut], rows: np.ndarray, full: np.ndarray) -> np.ndarray:
    """[P, K] what patterns add to cuts that serve `rows` [P, J] in slots of at most `full` [P, J] each."""
    table = np.array([(cut.bucket, cut.times, cut.size) for cut in cuts], dtype=np.int64)
    return _of_patterns(table.reshape(-1, 3), rows, full)


def violated(
    counts: Sequence[int],
    lattices: Sequence[Lattice],
    patterns: Sequence[Pattern],
    uses: np.ndarray,
    scale: float,
    known: Collection[Cut],
) -> list[Cut]:
    """The cuts not `known` that patterns used `uses` times violate where they serve `scale` times the counts."""
    used = np.flatnonzero(uses > 0)
    if not len(used) or scale <= 0:
        return []
    rows = np.stack([patterns[index].rows for index in used])
    full = np.stack([lattices[patterns[index].config].full for index in used])
    out = []
    for bucket, count in enumerate(counts):
        largest = min(int(count), int(full[rows[:, bucket] > 0, bucket].max(initial=0)))
        shares = _shares(largest)
        if not len(shares):
            continue
        short = _shortfalls(shares, rows[:, bucket], full[:, bucket], uses[used], count, scale)
        worst = [at for at in np.argsort(-short)[: MOST_A_BUCKET + len(known)].tolist() if short[at] > VIOLATED]
        cuts = (Cut(bucket=bucket, times=int(shares[at, 0]), size=int(shares[at, 1])) for at in worst)
        out += [cut for cut in cuts if cut not in known][:MOST_A_BUCKET]
    return out


@functools.lru_cache(maxsize=512)
def _shares(largest: int) -> np.ndarray:
    """[n, 2] all a and k worth looking at with at most `largest` sequences in a slot: smaller shares round all to 1."""
    simple = [(1, k) for k in range(2, min(largest, LARGEST_SIZE) + 1)]
    fractions = [
        (a, k) for k in range(3, LARGEST_FRACTION + 1) for a in range(2, k) if math.gcd(a, k) == 1 and k <= a * largest
    ]
    return np.array(simple + fractions if largest > 1 else [], dtype=np.int64).reshape(-1, 2)


@compiled(FLOATS, INT_TABLE, int64[:], int64[:], FLOATS, int64, float64)
def _shortfalls(
    shares: np.ndarray, rows: np.ndarray, full: np.ndarray, uses: np.ndarray, count: int, scale: float
) -> np.ndarray:
    """[n] the share of a cut's right side that its left side lacks, for each a and k of `shares` [n, 2].

    Of patterns used `uses` [P] times, with rows [P] of the bucket in slots of `full` [P]; together they serve `scale`
    times its `count`.
    """
    out = np.empty(len(shares))
    for index in range(len(shares)):
        times, size = shares[index]
        left = 0.0
        for pattern in range(len(rows)):
            num_full, rest = divmod(rows[pattern], full[pattern])
            left += uses[pattern] * (num_full * -(-full[pattern] * times // size) + -(-rest * times // size))
        out[index] = 1 - left / (scale * -(-count * times // size))
    return out


@compiled(INT_TABLE, INT_TABLE, INT_TABLE, INT_TABLE)
def _of_patterns(cuts: np.ndarray, rows: np.ndarray, full: np.ndarray) -> np.ndarray:
    """`of_patterns` for cuts (bucket, a, k) [K, 3]."""
    out = np.empty((len(rows), len(cuts)), dtype=np.int64)
    for index in range(len(cuts)):
        bucket, times, size = cuts[index]
        for pattern in range(len(rows)):
            num_full, rest = divmod(rows[pattern, bucket], full[pattern, bucket])
            out[pattern, index] = num_full * -(-full[pattern, bucket] * times // size) + -(-rest * times // size)
    return out
