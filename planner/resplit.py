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

from planner.balance import Share, Tables

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
        self._full = [np.array([rows[-1] if rows else 0 for rows in options]) for options in table.options]
        self._steps: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

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
        steps, costs = [], np.zeros(NUM_CELLS + 1)
        before = np.full(2 * (NUM_CELLS + 1), math.inf)
        windows = np.lib.stride_tricks.sliding_window_view(before, NUM_CELLS + 1)  # those shorter by so many cells
        for bucket in np.flatnonzero(pool).tolist():
            present = int(self.loads[replica, bucket])
            number, cells = self._options(kind, bucket, present, int(pool[bucket]), room_s, top_s)
            left_s = table.sums[other, bucket, pool[bucket] - number]
            cost = np.where(np.isfinite(left_s), slot_worth * np.where(np.isfinite(left_s), left_s, 0.0), math.inf)
            cost -= prices[bucket] * number
            steps.append((bucket, number, cells, cost, costs))
            before[NUM_CELLS + 1 :] = costs
            every = windows[NUM_CELLS + 1 - cells]
            every += cost[:, None]
            costs = every.min(axis=0)
        for end in range(NUM_CELLS, NUM_CELLS - MAX_RETREAT, -2):
            if not math.isfinite(costs[end]):
                return None
            kept, cell = np.zeros_like(pool), end
            for bucket, number, cells, cost, without in reversed(steps):
                fits = cells <= cell
                option = int((without[cell - cells[fits]] + cost[fits]).argmin())
                kept[bucket] = number[fits][option]
                cell -= int(cells[fits][option])
            if self._seconds(replica, kept) <= self.target_s * (1 + EDGE):
                return kept
        return None

    def _options(
        self, kind: int, bucket: int, present: int, most: int, room_s: float, top_s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of sequences, cells that they take): the most in each time, up to `most`, about those `present`."""
        if (kind, bucket) not in self._steps:
            sums, tops = self.table.sums[kind, bucket], self.table.tops[kind, bucket]
            last = np.append(sums[1:] > sums[:-1], True) & np.isfinite(sums)
            last[0] = True
            number = np.flatnonzero(last)
            self._steps[kind, bucket] = number, sums[number], tops[number]
        number, seconds, tops = self._steps[kind, bucket]
        fits = (number <= most) & (seconds <= room_s) & (tops <= top_s)
        number, seconds = number[fits], seconds[fits]
        at_most_s, top_most_s = self.table.sums[kind, bucket, most], self.table.tops[kind, bucket, most]
        if number[-1] < most and at_most_s <= room_s and top_most_s <= top_s:
            number, seconds = np.append(number, most), np.append(seconds, at_most_s)
        first = int(np.searchsorted(number, present)) - MOST_OPTIONS // 2
        first = max(min(first, len(number) - MOST_OPTIONS), 0)
        number, seconds = number[first : first + MOST_OPTIONS], seconds[first : first + MOST_OPTIONS]
        return number, np.rint(seconds * (NUM_CELLS / room_s)).astype(np.int64)
