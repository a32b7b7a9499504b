"""One step's share-out, near its proven bound in milliseconds: prices, then fills towards rising targets.

`planner.prices` bounds the slowest replica and prices every bucket; `planner.fill` makes loads that end by a target a
little over that bound, `planner.repair` places what did not fit, and `planner.balance.improve` moves slots about. The
first share-out within the wanted gap is taken. Nothing here looks at a clock: the same step gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner import balance, prices
from planner.balance import Share, Tables
from planner.fill import fill, own_worth
from planner.problem import UsableConfig
from planner.repair import repair

import os
JUST_INSIDE = float(os.environ.get("JI",".95"))
"""The first target is the bound and this share of the wanted gap."""

import os
MAX_ATTEMPTS = int(os.environ.get("A","4"))

MAX_ROUNDS = int(os.environ.get("M","16"))
"""Rounds of local search on each share-out."""

COARSE = 0.02
"""Share of all time, by worth, that a slot of a kind takes from which its whole slots are counted before any fill."""

TIGHTEN_UP_TO = float(os.environ.get("TU","1.03"))
"""Multiple of the bound up to which whole slots may raise it."""

LEAST_WORTH = 0.01
"""Worth of a sequence that prices say is free, as a share of what its time would be worth on its best kind."""


def share_out(
    replicas: Sequence[UsableConfig], table: Tables, counts: Sequence[int], *, gap_limit: float
) -> tuple[Share, float]:
    """(a valid share-out, proven least seconds of the slowest replica); looks until `gap_limit` is met or it gives up.

    Every bucket with counts[j] > 0 must fit some replica.
    """
    kinds = [replicas[int(index)] for index in np.unique(table.kind, return_index=True)[1]]
    multiplicity = np.bincount(table.kind).tolist()
    relaxed = prices.relax(kinds, multiplicity, counts)
    bound_s, good = relaxed.bound_s, 1 + gap_limit
    if bound_s <= 0:
        return _listed(table, counts), 0.0
    slot_worth = prices.slot_worth(kinds, counts, relaxed)
    coarsest = int(slot_worth.argmax())
    tightened = slot_worth[coarsest] >= COARSE
    if tightened:
        bound_s = prices.tighten(kinds, multiplicity, counts, relaxed, coarsest, bound_s * TIGHTEN_UP_TO)
    own = np.max([own_worth(table, kind, counts) for kind in range(len(kinds))], axis=0)
    worth = np.maximum(relaxed.prices, LEAST_WORTH * own)
    second = relaxed.kind_prices + LEAST_WORTH * relaxed.kind_prices.max()

    def attempt(target_s: float, widest_first: bool) -> Share:
        loads, left = fill(table, counts, relaxed, target_s, widest_first=widest_first)
        loads = repair(table, loads, left, worth, second, target_s)
        return balance.improve(table, loads, max_rounds=MAX_ROUNDS, good_s=bound_s * good)

    failed_s = (1 + JUST_INSIDE * gap_limit) * bound_s
    best = attempt(failed_s, True)
    if best.max_s > bound_s * good:
        best = min(best, _listed(table, counts), key=lambda share: share.max_s)
        if not tightened:
            up_to_s = min(best.max_s, bound_s * TIGHTEN_UP_TO)
            bound_s = prices.tighten(kinds, multiplicity, counts, relaxed, coarsest, up_to_s)
        bound_s = max(bound_s, prices.tighten_by_replica(kinds, multiplicity, counts, relaxed, best.max_s))
    for number in range(1, MAX_ATTEMPTS):
        if best.max_s <= bound_s * good:
            break
        if number == 1 and os.environ.get("S2","ff")[0]=="f":
            target_s = max(failed_s, (1 + JUST_INSIDE * gap_limit) * bound_s)
        else:
            target_s = (failed_s + best.max_s) / 2
        found = attempt(target_s, (number % 2 == 0) ^ (os.environ.get("S2","ff")[1]=="t"))
        if found.max_s > target_s:
            failed_s = target_s
        best = min(best, found, key=lambda share: share.max_s)
    return best, min(bound_s, best.max_s)


def _listed(table: Tables, counts: Sequence[int]) -> Share:
    loads = balance.list_schedule(table, counts)
    return Share(loads=loads, replica_s=table.replica_s(loads))
