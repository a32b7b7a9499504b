"""Local search that shares the loads of two replicas out anew, exactly but for cells of time.

One replica holds what the others have no room for. Every other one in turn pools its load with the holder's and keeps
what fills its time best: by a dynamic programme over its time in equal cells it ends by the target, and what is left
to the holder costs least,

    lambda v t  +  (1 - lambda) sum over j of pi_j n_j        n_j sequences that the holder takes t seconds for

where v is the worth of a second of the holder and pi_j that of a sequence (`planner.prices`). The first term counts
whole slots as they are, the second knows which buckets are hard to place elsewhere; lambda is drawn anew for each pair,
so that the search does not settle. It ends when the holder ends by the target too.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numba import float64, int64
from numba.types import Tuple

from planner.balance import Share, Tables
from planner.compiled import FLOAT_TABLE, FLOATS, INT_TABLE, INTS, compiled

NUM_CELLS = 1024

SLOT_SHARES = (0.3, 0.5, 0.7, 0.9)
"""lambda: how much a holder's seconds count against the worth of its sequences."""

NEW_HOLDER = 0.3
"""Chance of another holder after each round over all others; without a change in a round it is certain."""

LEAST_WORTH = 0.1
"""Worth of a replica with time to spare, as a share of the most that one is worth."""

NEARER = 0.5
"""Share of the way from what was asked for to what was found at which the next target lies."""

PATIENCE = 2
PROGRESS = 0.8
"""Rounds in which what is over a target must fall by this factor; else the target rises by what is over it."""

LEAST_RISE = 3e-4
"""And by this share more."""

FURTHER, LEAST_FURTHER = 0.5, 48
"""Rounds in which a better share-out must be found again, as a share of those before, and the least number of pairs."""

MOST_OPTIONS = 24
"""Numbers of sequences of a bucket that are looked at: those nearest to what a replica has."""

MAX_RETREAT = 12
"""Cells that a replica ends earlier where rounding to cells made it too long."""

EDGE = 1e-9


def resplit(
    table: Tables,
    start: Share,
    target_s: float,
    prices: np.ndarray,
    kind_worth: np.ndarray,
    *,
    max_pairs: int,
    seed: int = 0,
    deadline: float = math.inf,
) -> Share:
    """The share-out `start` or a better one: looks for one that ends by `target_s`, where there is none for one nearer.

    Args:
      prices: [J] worth of a sequence, kind_worth: [K] of all the time of a replica of each kind, as `prices.relax` has
        them.
      max_pairs: pairs shared out anew, at the most.
      deadline: (of `time.perf_counter`); without one the result does not depend on the machine.
    """
    num_replicas = len(start.replica_s)
    if num_replicas < 2 or start.max_s <= target_s:
        return start
    search = _Pairs(table, start.loads.copy(), target_s, prices, kind_worth, np.random.default_rng(seed))
    best, least_over, waited = start, math.inf, 0
    holder = int(search.replica_s.argmax())
    number, last = 0, math.inf
    for left in range(max_pairs, 0, 1 - num_replicas):
        if time.perf_counter() >= deadline or number > last:
            break
        number += 1
        moved = search.round(holder, left, deadline)
        over = search.over()
        if over == 0:
            if search.replica_s.max() < best.max_s:
                best = Share(loads=search.loads.copy(), replica_s=table.replica_s(search.loads))
                last = number + max(number * FURTHER, LEAST_FURTHER / (num_replicas - 1))
            if best.max_s <= target_s:
                break
            search.target_s = target_s + NEARER * (best.max_s - target_s)
            holder, least_over, waited = int(search.replica_s.argmax()), math.inf, 0
            continue
        waited = 0 if over < least_over * PROGRESS else waited + 1
        least_over = min(over, least_over)
        if waited >= PATIENCE:
            reachable_s = search.target_s * (1 + least_over + LEAST_RISE)
            search.target_s = reachable_s if reachable_s < best.max_s else target_s
            least_over, waited = math.inf, 0
        if not moved or search.rng.random() < NEW_HOLDER:
            holder = int(search.rng.integers(num_replicas))
    return best


class _Pairs:
    """Loads [R, J] on their way, and each replica's seconds; `kind_worth` [K] is that of all its time."""

    def __init__(
        self,
        table: Tables,
        loads: np.ndarray,
        target_s: float,
        prices: np.ndarray,
        kind_worth: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        self.table, self.loads, self.target_s, self.rng = table, loads, target_s, rng
        self.replica_s = table.replica_s(loads)
        devices = np.bincount(table.kind, minlength=len(kind_worth))
        worth = np.maximum(kind_worth, LEAST_WORTH * kind_worth.max())
        self._prices, self._worth = prices, worth / float(devices @ worth)
        self._every = np.arange(loads.shape[1])
        self._full = table.full
        self._most: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def over(self) -> float:
        """By how much replicas end after the target, as a share of all replicas' time, by worth."""
        late_s = np.maximum(self.replica_s - self.target_s * (1 + EDGE), 0.0)
        return float(self._worth[self.table.kind] @ late_s) / self.target_s

    def round(self, holder: int, most: int, deadline: float) -> bool:
        """Pairs the holder with up to `most` others, in an order drawn anew; whether any pair was changed."""
        moved = False
        for replica in self.rng.permutation(len(self.loads)).tolist()[: most + 1]:
            if self.replica_s.max() <= self.target_s or time.perf_counter() >= deadline:
                break
            if replica != holder and self._pair(replica, holder):
                moved = True
        return moved

    def _pair(self, replica: int, holder: int) -> bool:
        """Shares the two loads out anew where that leaves less to the holder, or the replica was too long."""
        share = float(self.rng.choice(SLOT_SHARES))
        slot_worth = share * self._worth[self.table.kind[holder]] / self.target_s
        prices = (1 - share) * self._prices
        pool = self.loads[replica] + self.loads[holder]
        best, cost = None, slot_worth * self.replica_s[holder] + float(prices @ self.loads[holder])
        if self.replica_s[replica] > self.target_s:
            cost = math.inf
        for top_s in self._tops(replica, pool):
            kept = self._kept(replica, holder, pool, top_s, slot_worth, prices)
            if kept is None:
                continue
            left_s = self._seconds(holder, pool - kept)
            worth = slot_worth * left_s + float(prices @ (pool - kept))
            if worth < cost * (1 - EDGE):
                best, cost = (kept, left_s), worth
        if best is None:
            return False
        self.loads[replica], self.loads[holder] = best[0], pool - best[0]
        self.replica_s[replica], self.replica_s[holder] = self._seconds(replica, best[0]), best[1]
        return True

    def _seconds(self, replica: int, load: np.ndarray) -> float:
        kind, table = self.table.kind[replica], self.table
        total = table.fixed_s[kind] + table.sums[kind, self._every, load].sum()
        if table.bubbles[kind]:
            total += table.bubbles[kind] * table.tops[kind, self._every, load].max()
        return float(total) if load.any() else 0.0

    def _tops(self, replica: int, pool: np.ndarray) -> list[float]:
        """Largest slots to allow the replica: as it has, and one drawn among the pool's full slots."""
        kind, table = self.table.kind[replica], self.table
        if not table.bubbles[kind]:
            return [math.inf]
        own = float(table.tops[kind, self._every, self.loads[replica]].max())
        full = table.tops[kind, self._every, np.minimum(self._full[kind], pool)]
        other = float(self.rng.choice(full[pool > 0])) if pool.any() else 0.0
        return [top for top in {own, other} if 0 < top < math.inf]

    def _kept(
        self, replica: int, holder: int, pool: np.ndarray, top_s: float, slot_worth: float, prices: np.ndarray
    ) -> np.ndarray | None:
        """[J] what the replica keeps of the pool, no slot longer than `top_s`; None if that cannot end in time."""
        kind, other, table = self.table.kind[replica], self.table.kind[holder], self.table
        room_s = self.target_s - table.fixed_s[kind]
        if table.bubbles[kind]:
            room_s -= table.bubbles[kind] * top_s
        if room_s <= 0:
            return None
        number, starts = self._numbers(kind)
        programme = _cost_of_rest(
            pool,
            self.loads[replica],
            number,
            starts,
            table.sums[kind],
            table.tops[kind],
            table.sums[other],
            room_s,
            top_s,
            slot_worth,
            prices,
        )
        for end in range(NUM_CELLS, NUM_CELLS - MAX_RETREAT, -2):
            kept = _kept_in(end, *programme)
            if not len(kept):
                return None
            if self._seconds(replica, kept) <= self.target_s * (1 + EDGE):
                return kept
        return None

    def _numbers(self, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of sequences that are the most of a bucket in some time, one bucket after the other; [J + 1] where
        each bucket's start)."""
        if kind not in self._most:
            sums = self.table.sums[kind]
            is_most = np.isfinite(sums)
            is_most[:, :-1] &= sums[:, 1:] > sums[:, :-1]
            is_most[:, 0] = True
            self._most[kind] = np.flatnonzero(is_most) % is_most.shape[1], np.append(0, np.cumsum(is_most.sum(axis=1)))
        return self._most[kind]


@compiled(
    Tuple((FLOAT_TABLE, INT_TABLE, INT_TABLE, FLOAT_TABLE)),
    *(INTS, INTS, INTS, INTS, FLOAT_TABLE, FLOAT_TABLE, FLOAT_TABLE, float64, float64, float64, FLOATS),
)
def _cost_of_rest(
    pool: np.ndarray,
    present: np.ndarray,
    number: np.ndarray,
    starts: np.ndarray,
    sums: np.ndarray,
    tops: np.ndarray,
    other_sums: np.ndarray,
    room_s: float,
    top_s: float,
    slot_worth: float,
    prices: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the holder's part of a pool [J] costs when the other replica of the pair uses so many cells of its time.

    Args:
      present: [J] what that replica has now: it may keep the `MOST_OPTIONS` numbers of each bucket nearest to it.
      number, starts: as `_Pairs._numbers` has them, of the replica.
      sums, tops: [J, N + 1] of the replica, as in `Tables`; other_sums: of the holder.
      room_s, top_s: the replica's time for slots, and its largest slot at the most.
      slot_worth, prices: lambda v and (1 - lambda) pi [J].

    Returns:
      (least costs [J + 1, NUM_CELLS + 1] of the buckets before each, numbers that may be kept [J, MOST_OPTIONS], -1
      where there are fewer, their cells, their costs); a replica that keeps n sequences spares the holder as many.
    """
    num_buckets, size = len(pool), NUM_CELLS + 1
    costs = np.zeros((num_buckets + 1, size))
    options = np.full((num_buckets, MOST_OPTIONS), -1)
    cells = np.zeros((num_buckets, MOST_OPTIONS), dtype=np.int64)
    option_costs = np.zeros((num_buckets, MOST_OPTIONS))
    for bucket in range(num_buckets):
        most, first, end = pool[bucket], starts[bucket], starts[bucket]
        while end < starts[bucket + 1] and number[end] <= most:
            if sums[bucket, number[end]] > room_s or tops[bucket, number[end]] > top_s:
                break
            end += 1
        ends_early = number[end - 1] < most and sums[bucket, most] <= room_s and tops[bucket, most] <= top_s
        num_all = end - first + (1 if ends_early else 0)
        at = first
        while at < end and number[at] < present[bucket]:
            at += 1
        skipped = max(min(at - first - MOST_OPTIONS // 2, num_all - MOST_OPTIONS), 0)
        before, row = costs[bucket], costs[bucket + 1]
        for cell in range(size):
            row[cell] = np.inf
        for option in range(min(num_all - skipped, MOST_OPTIONS)):
            index = first + skipped + option
            kept = number[index] if index < end else most
            width = int(np.rint(sums[bucket, kept] * NUM_CELLS / room_s))
            cost = slot_worth * other_sums[bucket, most - kept] - prices[bucket] * kept
            options[bucket, option], cells[bucket, option], option_costs[bucket, option] = kept, width, cost
            for cell in range(width, size):
                value = before[cell - width] + cost
                row[cell] = value if value < row[cell] else row[cell]
    return costs, options, cells, option_costs


@compiled(INTS, int64, FLOAT_TABLE, INT_TABLE, INT_TABLE, FLOAT_TABLE)
def _kept_in(
    cell: int, costs: np.ndarray, options: np.ndarray, cells: np.ndarray, option_costs: np.ndarray
) -> np.ndarray:
    """[J] the numbers behind the last of `costs` in so many cells, of what `_cost_of_rest` says; empty for none."""
    num_buckets, num_options = options.shape
    if not np.isfinite(costs[num_buckets, cell]):
        return np.zeros(0, dtype=np.int64)
    kept = np.zeros(num_buckets, dtype=np.int64)
    for bucket in range(num_buckets - 1, -1, -1):
        least, chosen = np.inf, 0
        for option in range(num_options):
            width = cells[bucket, option]
            if options[bucket, option] < 0 or width > cell:
                continue
            cost = costs[bucket, cell - width] + option_costs[bucket, option]
            if cost < least:
                least, chosen = cost, option
        kept[bucket] = options[bucket, chosen]
        cell -= cells[bucket, chosen]
    return kept
