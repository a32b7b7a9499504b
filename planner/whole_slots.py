"""Bounds that count whole slots: of a bucket (`least_covers`), a kind (`kind_bound_s`), a replica (`replica_bound_s`).

`planner.prices` lets a replica's time be shared out in fractions. Where a kind has few replicas and long slots, its
time cannot be filled exactly without taking more from the other kinds than fractions would. Given the worth v_k of a
replica's time, and for bucket j the integers n of its sequences that kind q serves,

    tau_j(n)   least share of a replica's time on q that whole slots for n sequences take
    C_j(n)     least worth of whole slots on the other kinds that hold the N_j - n others

T is too little as long as

    (1)  min over n of { sum over j of C_j(n_j) : sum over j of tau_j(n_j) <= mu_q }  >  sum over k != q of mu_k v_k

a knapsack with a choice for every bucket, solved by dynamic programming over a grid of times on q, rounded down. Shares
of T seconds grow at least as T falls, so one solution, at `at_s`, tells for all T below with mu and v times T / at_s.
Where replicas run few slots each, no time is filled exactly. With pi_j >= 0 the price of a sequence, T is too little if

    (2)  sum over k of mu_k W_k(T)  <  sum over j of N_j pi_j

where W_k(T) is the most that whole slots which one replica of kind k runs within T can be worth: a knapsack again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numba import float64

from planner.balance import ROUNDING
from planner.compiled import FLOAT_TABLE, FLOATS, INT_TABLE, INTS, compiled

MOST_SLOTS = 96
"""Slots up to which a bucket is counted in whole ones; more come near to fractions."""

MOST_ROWS = 8
"""Sequences in one of those slots, at the most."""

GRID = 4096
"""Cells that the time of a kind is divided into."""

HALVINGS = 14
"""Bisections of T: to 1e-4 of the gap between the bound so far and `at_s`."""


def least_covers(rows: np.ndarray, cost: np.ndarray, number: np.ndarray) -> np.ndarray:
    """[P, max number + 1] least cost of whole slots that hold 0, 1, ... number[p] sequences; inf beyond.

    Args:
      rows: [P, I] sequences that a slot holds, >= 1 where there is one.
      cost: [P, I] of each slot; inf where there is none.
      number: [P] integers.
    """
    kinds = (np.int64, np.float64, np.int64)
    return _least_covers(
        *(np.ascontiguousarray(x, dtype) for x, dtype in zip((rows, cost, number), kinds, strict=True))
    )


@compiled(FLOAT_TABLE, INT_TABLE, FLOAT_TABLE, INTS)
def _least_covers(rows: np.ndarray, cost: np.ndarray, number: np.ndarray) -> np.ndarray:
    most = 0
    for own in number:
        most = max(most, own)
    least = np.full((len(number), most + 1), np.inf)
    for p in range(len(number)):
        least[p, 0] = 0.0
        for n in range(1, number[p] + 1):
            for slot in range(rows.shape[1]):
                total = cost[p, slot] + least[p, max(n - rows[p, slot], 0)]
                if total < least[p, n]:
                    least[p, n] = total
    return least


def num_slots(rows: np.ndarray, cost: np.ndarray, number: np.ndarray) -> np.ndarray:
    """[..., P] how many of the smallest slots `number` [P] sequences fill, from rows and cost [..., P, I] of each."""
    smallest = np.where(np.isfinite(cost), rows, np.inf).min(axis=-1, initial=np.inf)
    return np.ceil(number / np.minimum(smallest, MOST_ROWS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """What one kind may take off the others, at T = at_s.

    Attributes:
      least_s: share of its time that buckets counted in fractions, which fit no other kind, take.
      least_cost: worth on the others of all buckets counted in fractions that fit them.
      choices: for each other bucket, (share of time [n], worth left to the others [n]) of the numbers worth taking.
      line_s, line_gain: of buckets in `least_cost` that fit the kind, share of its time and worth that a unit saves.
    """

    least_s: float
    least_cost: float
    choices: tuple[tuple[np.ndarray, np.ndarray], ...]
    line_s: np.ndarray
    line_gain: np.ndarray


def kind_bound_s(
    kind: int,
    fraction: np.ndarray,
    rows: np.ndarray,
    number: np.ndarray,
    mu: np.ndarray,
    paid: np.ndarray,
    known_s: float,
    at_s: float,
) -> float:
    """A bound of at least `known_s` and at most `at_s`: the largest T found that (1) rules out.

    Args:
      kind: q.
      fraction: [K, J, options] share of a replica's time of each slot at T = `at_s`; inf where there is none.
      rows: [K, J, options] sequences of each slot, >= 1 where there is one.
      number: [J] N_j >= 1.
      mu: [K] replicas of each kind.
      paid: [K] v_k >= 0.
      known_s: a bound.
    """
    total = float(mu @ paid)
    rest = float(np.delete(mu * paid, kind).sum())  # the difference of two sums may cancel to nothing
    split = _split(kind, fraction, rows, number, mu, paid)
    if split is None:
        return max(known_s, at_s)
    room = float(mu[kind]) * (1 + ROUNDING) - split.least_s
    least = _least_worth(split.choices, room)
    order = np.argsort(-split.line_gain, kind="stable")
    line_s = np.concatenate([[0.0], np.cumsum(split.line_s[order])])
    line_worth = np.concatenate([[0.0], np.cumsum((split.line_gain * split.line_s)[order])])
    grid_s = np.arange(GRID + 1) * (room / GRID)

    def ruled_out(seconds: float) -> bool:
        have, worth = mu[kind] * (seconds / at_s + ROUNDING) - split.least_s, rest * seconds / at_s - split.least_cost
        if have < 0:
            return True
        inside = int(min(np.floor(have / room * GRID * (1 + ROUNDING)), GRID)) + 1 if room > 0 else 1
        left = least[:inside]
        if len(split.line_s):
            left = left - np.interp(have - grid_s[:inside], line_s, line_worth)
        return float(left.min()) > worth + ROUNDING * total

    if ruled_out(at_s):
        return max(known_s, at_s)
    low_s, high_s = known_s, at_s
    for _ in range(HALVINGS):
        middle_s = (low_s + high_s) / 2
        if ruled_out(middle_s):
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s


def _split(
    kind: int, fraction: np.ndarray, rows: np.ndarray, number: np.ndarray, mu: np.ndarray, paid: np.ndarray
) -> _Split | None:
    """None where a slot of some bucket fits no kind, or where the worth of all time is too little already."""
    slot_rows, slot_cost = _two_sides(kind, fraction, rows, paid)
    fractional = number * (slot_cost / slot_rows).min(axis=2)
    own_able, other_able = np.isfinite(fractional)
    if not (own_able | other_able).all():
        return None
    few = (num_slots(slot_rows, slot_cost, number) <= MOST_SLOTS).all(axis=0)
    line = ~few & own_able & other_able
    least_s = float(fractional[0, ~few & ~other_able].sum())
    least_cost = float(fractional[1, ~few & ~own_able].sum())
    # Each choice's value at the kind's worth: what exceeds the bucket's least by more than the slack is none.
    choices = _choices(slot_rows[:, few], slot_cost[:, few], number[few])
    values = [left + paid[kind] * own_s for own_s, left in choices]
    slack = float(mu @ paid) * (1 + ROUNDING) - paid[kind] * least_s - least_cost
    slack -= float(np.minimum(fractional[1, line], paid[kind] * fractional[0, line]).sum())
    slack -= sum(float(value.min()) for value in values)
    if slack < 0:
        return None
    kept = [value <= value.min() + slack for value in values]
    return _Split(
        least_s=least_s,
        least_cost=least_cost + float(fractional[1, line].sum()),
        choices=tuple((own_s[k], left[k]) for (own_s, left), k in zip(choices, kept, strict=True)),
        line_s=fractional[0, line],
        line_gain=fractional[1, line] / fractional[0, line],
    )


def _two_sides(kind: int, fraction: np.ndarray, rows: np.ndarray, paid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows [2, J, I], cost [2, J, I]) of the kind's slots, by their share of its time, and the others', by worth."""
    num_buckets = rows.shape[1]
    finite = np.isfinite(fraction)
    cost = np.where(finite, np.where(finite, fraction, 0.0) * paid[:, None, None], np.inf)
    others = np.delete(np.arange(len(fraction)), kind)
    options = max(len(others), 1) * rows.shape[2]
    slot_rows = np.ones((2, num_buckets, options), dtype=np.int64)
    slot_cost = np.full((2, num_buckets, options), np.inf)
    slot_rows[0, :, : rows.shape[2]], slot_cost[0, :, : rows.shape[2]] = rows[kind], fraction[kind]
    if len(others):
        slot_rows[1] = np.moveaxis(rows[others], 1, 0).reshape(num_buckets, options)
        slot_cost[1] = np.moveaxis(cost[others], 1, 0).reshape(num_buckets, options)
    return np.maximum(slot_rows, 1), slot_cost


def _choices(slot_rows: np.ndarray, slot_cost: np.ndarray, number: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each bucket (tau_j [n], C_j [n]) of every n after which the kind would need another slot."""
    _, num_buckets, options = slot_rows.shape
    tables = least_covers(
        slot_rows.reshape(2 * num_buckets, options), slot_cost.reshape(2 * num_buckets, options), np.tile(number, 2)
    )
    out = []
    for own, other, count in zip(tables[:num_buckets], tables[num_buckets:], number.tolist(), strict=True):
        own_s, left = own[: count + 1], other[count::-1]
        last = np.flatnonzero(np.append(own_s[1:] > own_s[:-1], True) & np.isfinite(own_s) & np.isfinite(left))
        out.append((own_s[last], left[last]))
    return out


def _least_worth(choices: Sequence[tuple[np.ndarray, np.ndarray]], room: float) -> np.ndarray:
    """[GRID + 1] least worth left to the others when the choices take at most so many cells of `room` on the kind."""
    least = np.zeros(GRID + 1)
    for own_s, left in sorted(choices, key=lambda choice: len(choice[0])):
        cells = np.floor(own_s / room * GRID * (1 - ROUNDING)) if room > 0 else np.where(own_s > 0, GRID + 1, 0)
        least = _with_choice(least, np.minimum(cells, GRID + 1).astype(np.int64), left)
    return least


@compiled(FLOATS, FLOATS, INTS, float64[:])
def _with_choice(least: np.ndarray, cells: np.ndarray, left: np.ndarray) -> np.ndarray:
    """`least` with one more choice to make, each of `cells` [n] cells and worth `left` [n] to the others."""
    longer = np.full(len(least), np.inf)
    for choice in range(len(cells)):
        for cell in range(cells[choice], len(least)):
            worth = least[cell - cells[choice]] + left[choice]
            longer[cell] = worth if worth < longer[cell] else longer[cell]
    return longer


def replica_bound_s(
    slots: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    bubbles: np.ndarray,
    fixed_s: np.ndarray,
    mu: np.ndarray,
    prices: np.ndarray,
    need: float,
    known_s: float,
    at_s: float,
) -> float:
    """A bound of at least `known_s` and at most `at_s`: the largest time on a grid that (2) rules out.

    Args:
      slots: for each kind (bucket [n], rows [n], seconds [n]) of its slots.
      bubbles, fixed_s, mu: [K] pp - 1, fixed seconds and replicas of each kind.
      prices: [J] pi_j.
      need: sum over j of N_j pi_j.
    """
    cell_s = at_s / GRID
    worth = np.zeros(GRID + 1)
    for (bucket, rows, seconds), idle, first_s, replicas in zip(slots, bubbles, fixed_s, mu, strict=True):
        worth += replicas * _most_worth(rows * prices[bucket], seconds / cell_s, idle, first_s / cell_s)
    enough = np.flatnonzero(worth >= need * (1 - ROUNDING))
    cells = int(enough[0]) if len(enough) else GRID
    return max(known_s, min(cells * cell_s * (1 - ROUNDING), at_s))


def _most_worth(worth: np.ndarray, cells: np.ndarray, idle: float, first: float) -> np.ndarray:
    """[GRID + 1] most that whole slots of `worth` [n] and `cells` [n] are worth on one replica within so many cells.

    The replica spends `first` cells on no slot, and `idle` times its largest slot.
    """
    if cells.min(initial=1.0) < 1:  # too short for the grid: fractions
        return np.arange(GRID + 1) * float((worth / cells).max())
    order = np.lexsort((-worth, cells))
    worth, cells = worth[order], cells[order]
    better = worth > np.maximum.accumulate(np.append(0.0, worth))[:-1]
    most, within = np.zeros(GRID + 1), np.zeros(GRID + 1)
    for value, length in zip(worth[better].tolist(), cells[better].tolist(), strict=True):
        cell = int(length)
        while cell <= GRID:
            np.maximum(most[cell:], most[:-cell] + value, out=most[cell:])
            cell, value = 2 * cell, 2 * value
        start = int(first + idle * length)
        if start <= GRID:
            np.maximum(within[start:], most[: GRID + 1 - start], out=within[start:])
    return within
