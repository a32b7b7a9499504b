"""Fills like replicas up to a target time: the share-out that prices suggest, made of whole micro-batches.

`planner.prices` says which kind of replica should serve how much of each bucket and what a sequence is worth. Kinds are
filled widest first, since wide replicas are few and their slots long: they take what fits nothing narrower and end as
near the target as slots allow, and the many narrow replicas take the rest. Every replica of a kind gets the same whole
slots of each bucket, and then up to four more that are worth most in the time left, alike for many replicas at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numba import float64

from planner.balance import Tables, list_schedule
from planner.compiled import FLOATS, INTS, compiled
from planner.prices import Relaxed

MAX_CLOSING_SLOTS = 4
"""Slots chosen together to close a replica; before them, slots of the most plentiful bucket are added."""

ROOM_TO_CLOSE = 3.0
"""Largest slots that every replica keeps open when slots are given out evenly: enough choice to end near the target."""

MAX_TRIES = 16
"""Best choices of closing slots looked at: some want more of a bucket than there is."""

SAME_PATTERN_SHARE = 0.25
"""Share of a kind's replicas still open that are closed alike before slots are chosen anew."""

PLENTY = 0.02
"""Extra worth of a slot per slot that each open replica would get of its bucket: plentiful buckets go first."""

MUST_BONUS = 0.2
"""Extra worth of a bucket that fits no kind which is filled later."""

FEW = 4
"""A kind of so few replicas is given what fits no later kind before anything else: too little to choose among."""

FOREIGN = 0.95
"""Worth of a bucket that the prices give to other kinds, as a share of its price."""

FREE = 1e-9
"""Worth of all of a replica's time up to which its kind has time to spare, and its share need not be packed."""

WORTHWHILE = 0.7
"""Slots whose worth a second is below this share of the best are not used to close a replica."""

LEAST_WORTH = 0.01
"""Worth of a sequence where its kind has time to spare, as a share of what its slot's time would be worth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Slots:
    """Slots that a replica of a kind may be closed with, [n] each, and all pairs of them by time, [P] each.

    The first is nothing, so that pairs stand for single slots too. `room_s`: seconds that a replica has for slots, its
    pipeline's largest paid for. `shortest_s`: of the shortest slot.
    """

    bucket: np.ndarray
    rows: np.ndarray
    seconds: np.ndarray
    worth: np.ndarray
    first: np.ndarray
    second: np.ndarray
    pair_s: np.ndarray
    full: np.ndarray
    room_s: float
    shortest_s: float


def fill(
    table: Tables, counts: Sequence[int], relaxed: Relaxed, target_s: float, *, widest_first: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(loads [R, J] that end every replica by `target_s`, what did not fit [J])."""
    loads = np.zeros((len(table.kind), len(counts)), dtype=np.int64)
    left = np.asarray(counts, dtype=np.int64).copy()
    quotas = _quotas(table, counts, relaxed.shares)
    fitting = table.full > 0
    order = np.argsort(fitting.sum(axis=1) * (-1 if widest_first else 1), kind="stable")
    for position, kind in enumerate(order.tolist()):
        members = np.flatnonzero(table.kind == kind)
        later = order[position + 1 :]
        must = fitting[kind] & ~fitting[later].any(axis=0)
        full = table.full[kind]
        spare = -(-len(members) // 4) * full
        offered = np.clip(left - quotas[later].sum(axis=0) + spare, 0, np.where(fitting[kind], left, 0))
        offered = np.where(must, left, offered)
        own = table._replace(kind=table.kind[members])
        if relaxed.kind_prices[kind] <= FREE:
            share = np.minimum(np.where(must, left, quotas[kind]), np.where(fitting[kind], left, 0))
            loads[members] = _listed(own, share)
            left -= share
            continue
        if len(members) <= FEW and len(later):
            loads[members] = _listed(own, np.where(must, left, 0))
            offered = np.where(must, 0, offered)
        prices = np.maximum(relaxed.prices, LEAST_WORTH * own_worth(table, kind, offered))
        prices = np.where(must, 1 + MUST_BONUS, np.where(quotas[kind] > 0, 1.0, FOREIGN)) * prices
        loads[members] = _fill_kind(table, kind, loads[members], offered, full, prices, target_s)
        left -= loads[members].sum(axis=0)
    return loads, left


def _listed(table: Tables, share: np.ndarray) -> np.ndarray:
    """Loads [R, J] of `share` [J] on replicas that fit it; one alone takes all."""
    return share[None, :] if len(table.kind) == 1 else list_schedule(table, share.tolist())


def own_worth(table: Tables, kind: int, offered: Sequence[int]) -> np.ndarray:
    """[J] share that a sequence takes of the time in which one replica of a kind would serve all `offered`."""
    rows = np.minimum(table.rows[kind], np.asarray(offered)[:, None])
    seconds = np.take_along_axis(table.sums[kind], rows, axis=1)
    worth = np.where(rows > 0, seconds / np.maximum(rows, 1), 0.0).min(axis=1)
    return worth / max(float(worth @ offered), np.finfo(float).tiny)


def _quotas(table: Tables, counts: Sequence[int], shares: np.ndarray) -> np.ndarray:
    """[K, J] integers near `shares`: whole slots for all kinds but the one with the largest share of a bucket."""
    quotas = np.zeros(shares.shape, dtype=np.int64)
    for bucket, count in enumerate(counts):
        left = int(count)
        for kind in np.argsort(shares[:, bucket], kind="stable").tolist():
            if shares[kind, bucket] > 0:
                options = table.rows[kind, bucket].tolist()
                slots, rest = divmod(float(shares[kind, bucket]), options[-1])
                nearest = min((0, *options), key=lambda rows, rest=rest: abs(rows - rest))
                quotas[kind, bucket] = min(left, round(slots) * options[-1] + nearest)
                left -= int(quotas[kind, bucket])
        quotas[shares[:, bucket].argmax(), bucket] += left
    return quotas


def _fill_kind(
    table: Tables,
    kind: int,
    loads: np.ndarray,
    offered: np.ndarray,
    full: np.ndarray,
    prices: np.ndarray,
    target_s: float,
) -> np.ndarray:
    """Loads [n, J] of one kind's replicas with at most `offered` added so that they end by `target_s`."""
    number = len(loads)
    slots = _slots(table, kind, offered, prices, target_s)
    if slots is None:
        return loads
    whole = np.zeros(len(full), dtype=bool)
    whole[slots.bucket[slots.rows == full[slots.bucket]]] = True
    whole &= full > 0
    full_s = np.where(whole, table.sums[kind, np.arange(len(full)), np.where(whole, full, 0)], 0.0)
    each = np.where(whole, offered // np.maximum(full * number, 1), 0)
    typical_s = float(np.average(full_s, weights=np.where(whole, offered / np.maximum(full, 1), 0.0) + 1e-9))
    every = np.arange(len(full))
    room_s = slots.room_s - float(each @ full_s) - table.sums[kind, every, loads].sum(axis=1)
    order = np.argsort(room_s, kind="stable")
    loads, room_s = loads[order], room_s[order]
    while room_s[0] < ROOM_TO_CLOSE * typical_s and each.any():
        bucket = int(each.argmax())
        each[bucket] -= 1
        room_s += full_s[bucket]
    loads += each * full
    left = offered - each * full * number
    at = 0
    while at < number:
        if at and table.bubbles[kind]:
            again = _slots(table, kind, left, prices, target_s)
            if again is None:
                break
            room_s = room_s + (again.room_s - slots.room_s)
            slots = again
            whole[:] = False
            whole[slots.bucket[slots.rows == full[slots.bucket]]] = True
            whole &= full > 0
        pattern, open_s = np.zeros_like(left), float(room_s[at])
        while open_s > MAX_CLOSING_SLOTS * typical_s:
            plenty = np.where(whole & (full <= left - pattern), (left - pattern) / np.maximum(full, 1), 0.0)
            bucket = int(plenty.argmax())
            if plenty[bucket] < 1:
                break
            pattern[bucket] += full[bucket]
            open_s -= full_s[bucket]
        while open_s >= slots.shortest_s:
            closing = _closing(slots, left - pattern, open_s, number - at)
            if not closing.any():
                break
            pattern += closing
            open_s -= _added_s(table, kind, closing)
        alike = int(np.searchsorted(room_s, room_s[at], side="right")) - at
        if pattern.any():
            wanted = pattern > 0
            most = int((left[wanted] // pattern[wanted]).min())
            alike = max(1, min(most, alike, round((number - at) * SAME_PATTERN_SHARE)))
        loads[at : at + alike] += pattern
        left -= alike * pattern
        at += alike
    return loads[np.argsort(order, kind="stable")]


def _added_s(table: Tables, kind: int, sequences: np.ndarray) -> float:
    return float(table.sums[kind, np.arange(len(sequences)), sequences].sum())


def _slots(table: Tables, kind: int, offered: np.ndarray, prices: np.ndarray, target_s: float) -> _Slots | None:
    """The slots worth using on replicas of a kind."""
    options = table.rows[kind]
    bucket, option = np.nonzero((np.diff(options, axis=1, prepend=0) > 0) & (offered > 0)[:, None])
    if not len(bucket):
        return None
    rows = np.minimum(options[bucket, option], offered[bucket])
    seconds = table.sums[kind, bucket, rows]
    rate = prices[bucket] * rows / seconds
    # A pipeline's replica pays for its largest slot once more a bubble: which slots to allow at all is chosen first.
    order = np.argsort(seconds, kind="stable")
    rooms = target_s - table.fixed_s[kind] - table.bubbles[kind] * seconds[order]
    best = int((rooms * np.maximum.accumulate(rate[order])).argmax()) if table.bubbles[kind] else len(order) - 1
    room_s = float(rooms[best])
    kept = (seconds <= seconds[order[best]]) & (seconds <= room_s)
    if not kept.any():
        return None
    kept &= rate >= WORTHWHILE * rate[kept].max()
    bucket, rows, seconds = np.append(0, bucket[kept]), np.append(0, rows[kept]), np.append(0.0, seconds[kept])
    first, second = np.triu_indices(len(bucket))
    pair_s = seconds[first] + seconds[second]
    order = np.argsort(pair_s, kind="stable")
    return _Slots(
        bucket=bucket,
        rows=rows,
        seconds=seconds,
        worth=prices[bucket] * rows,
        first=first[order],
        second=second[order],
        pair_s=pair_s[order],
        full=table.full[kind],
        room_s=room_s,
        shortest_s=float(seconds[1:].min()),
    )


def _closing(slots: _Slots, left: np.ndarray, room_s: float, number: int) -> np.ndarray:
    """[J] sequences of the at most four slots that are worth most in `room_s` seconds and that `left` [J] allows."""
    plenty = np.minimum(left / np.maximum(slots.full * number, 1), MAX_CLOSING_SLOTS)
    worth = slots.worth * (1 + PLENTY * plenty[slots.bucket])
    worth[slots.rows > left[slots.bucket]] = -np.inf
    return _best_of_pairs(slots.bucket, slots.rows, worth, slots.first, slots.second, slots.pair_s, left, room_s)


@compiled(INTS, INTS, INTS, FLOATS, INTS, INTS, FLOATS, INTS, float64)
def _best_of_pairs(
    bucket: np.ndarray,
    rows: np.ndarray,
    worth: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    pair_s: np.ndarray,
    left: np.ndarray,
    room_s: float,
) -> np.ndarray:
    """[J] sequences of the two pairs of slots, of `pair_s` seconds each, ascending, that are worth most together.

    A pair's best partner is the one worth most of those that end in time beside it; the best of MAX_TRIES pairs is
    taken that with its partner holds no more than is `left`; none if none does.
    """
    inside = np.searchsorted(pair_s, room_s, side="right")
    value, best = np.empty(inside), np.empty(inside, dtype=np.int64)  # best: worth most of the pairs up to each
    for at in range(inside):
        a, b = first[at], second[at]
        value[at] = worth[a] + worth[b]
        if bucket[a] == bucket[b] and rows[a] + rows[b] > left[bucket[a]]:
            value[at] = -np.inf
        best[at] = at if at == 0 or value[at] >= value[best[at - 1]] else best[at - 1]
    total, partner = np.empty(inside), np.empty(inside, dtype=np.int64)
    last = inside - 1
    for at in range(inside):
        while last > 0 and pair_s[last] > room_s - pair_s[at]:
            last -= 1
        partner[at] = best[last]
        total[at] = value[at] + value[partner[at]]
    chosen = np.zeros(len(left), dtype=np.int64)
    for _ in range(min(MAX_TRIES, inside)):
        at = np.argmax(total)
        total[at] = -np.inf
        chosen[:] = 0
        for pair in (at, partner[at]):
            chosen[bucket[first[pair]]] += rows[first[pair]]
            chosen[bucket[second[pair]]] += rows[second[pair]]
        if (chosen <= left).all():
            return chosen
    chosen[:] = 0
    return chosen
