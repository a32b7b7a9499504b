"""Raises the bound of `planner.prices` where slots are long, by `planner.whole_slots` at the prices that it found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.prices import Relaxed, slot_lines
from planner.problem import UsableConfig
from planner.whole_slots import kind_bound_s, replica_bound_s


def slot_shares(kinds: Sequence[UsableConfig], relaxed: Relaxed) -> np.ndarray:
    """[K] share of a replica's time that the longest of the full slots that the relaxation uses of its kind takes."""
    longest = np.zeros(len(kinds))
    for kind, usable in enumerate(kinds):
        used = np.flatnonzero(relaxed.shares[kind]).tolist()
        longest[kind] = max((usable.slot_s[j][-1] for j in used), default=0.0)
    return longest / relaxed.bound_s


def by_kind(
    kinds: Sequence[UsableConfig],
    multiplicity: Sequence[int],
    counts: Sequence[int],
    relaxed: Relaxed,
    kind: int,
    at_s: float,
) -> float:
    """A bound of at least `relaxed.bound_s` and at most `at_s` that counts the whole slots of one kind of replica.

    Args:
      kinds, multiplicity, counts: as given to `prices.relax`, which returned `relaxed`.
      at_s: seconds, at least `relaxed.bound_s`; the nearer, the quicker.
    """
    used = np.flatnonzero(counts)
    number = np.asarray(counts, dtype=np.int64)[used]
    slots = slot_lines(kinds, used, number.astype(np.float64))
    return kind_bound_s(
        kind,
        np.where(slots.rows > 0, slots.fraction(at_s), np.inf),
        slots.rows.astype(np.int64),
        number,
        np.asarray(multiplicity, dtype=np.float64),
        relaxed.kind_prices,
        relaxed.bound_s,
        at_s,
    )


def by_replica(
    kinds: Sequence[UsableConfig], multiplicity: Sequence[int], counts: Sequence[int], relaxed: Relaxed, at_s: float
) -> float:
    """A bound, at least `relaxed.bound_s`, that counts the whole slots of every replica, up to about `at_s`.

    Once at the prices found, once with the longest bucket's sequences alone worth anything. Arguments as of `by_kind`.
    """
    number = np.asarray(counts, dtype=np.int64)
    slots, able = [], []
    for kind, usable in enumerate(kinds):
        fitting = [
            (j, min(rows, int(number[j])), seconds)
            for j in np.flatnonzero(number).tolist()
            for rows, seconds in zip(usable.rows[j], usable.slot_s[j], strict=True)
        ]
        if fitting:
            slots.append(tuple(np.array(column) for column in zip(*fitting, strict=True)))
            able.append(kind)
    longest = np.zeros(len(number))
    longest[np.flatnonzero(number)[-1]] = 1.0
    return max(
        replica_bound_s(
            slots,
            np.array([kinds[kind].config.pp - 1 for kind in able]),
            np.array([kinds[kind].cost.fixed_s for kind in able]),
            np.array([multiplicity[kind] for kind in able]),
            prices,
            float(number @ prices),
            relaxed.bound_s,
            at_s,
        )
        for prices in (longest, relaxed.prices)
    )
