"""Closes the gap of the exact planner from below: proves that no plan is within a T. See `planner.deployment`.

A T is decided in turn by prices (`prove`), by cuts of whole slots (`tighten`, `planner.cuts`), and by whole replica
counts (`close`): those that no pricing so far rules out are named (`planner.choice`), priced with cuts, and ruled out
or settled. When none are left but settled ones, nothing is faster than the T or the least of their own bounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from planner import balance_model, choice
from planner.balance import Share
from planner.bracket import bracket, proven_s
from planner.relaxation import Level
from planner.search import SHORTEST_SOLVE_S, Search, Settled, dive, settle

HORIZON = 1.03
"""Replicas are left out that no plan within this multiple of the bound has."""

SETTLED_RETREATS = (0.0, 5e-4, 1e-3, 2e-3, 4e-3)
"""By how much less than the T that was decided on it is tried for replica counts that may be within it."""

CERTAIN = 1e-5
"""SCIP's tolerances are well below this: a share that it bounds below 1 by this much is below 1."""


def prove(search: Search, low_s: float, prices: np.ndarray) -> None:
    """Raises the bound to `low_s`, or as near as prices [J + K] of it can."""
    search.raise_bound(proven_s(search.relaxation, low_s, prices, search.bound_s))


def limit(search: Search, prices: np.ndarray, low_s: float) -> None:
    """Leaves out the replicas that no plan within some more than `low_s` has, by prices [J + K] found at about that."""
    horizon_s = max(low_s, search.bound_s) * HORIZON
    while not search.relaxation.limit(prices, horizon_s):
        search.raise_bound(horizon_s)
        horizon_s *= HORIZON


def tighten(search: Search) -> None:
    """Raises the bound by cuts."""
    if search.is_done():
        return
    low_s, prices, _ = bracket(
        search.relaxation,
        search.deadline,
        low_s=search.bound_s,
        first_s=search.decided_s(),
        enough_s=search.trial_s(),
        cutting=True,
    )
    prove(search, low_s, prices)


def close(search: Search, *, most_settled: int, most_ruled_out: int, patient: bool = False, reach: float = 1.0) -> None:
    """Decides about T after T until the gap is closed, or so many replica counts are settled in vain or ruled out.

    With `most_settled` 0 they are only ruled out, and the first that cannot be ends it.
    `patient`: replica counts that were settled in too short a time are settled again, in twice that.
    `reach`: the part of the way from the bound to that T which is decided about: less is ruled out sooner.
    """
    problem, relaxation, settled = search.problem, search.relaxation, search.settled
    num_ruled_out = num_vain = 0
    dived: dict[tuple[int, ...], tuple[Share, float]] = {}
    while not search.is_done():
        decided_s = search.bound_s + reach * (search.decided_s() - search.bound_s)
        if decided_s > relaxation.horizon_s:
            limit(search, relaxation.prices, decided_s)  # a horizon beyond it, whatever the rounding
            continue
        level = search.level
        if level is None or decided_s != level.replica_s:
            # What replicas are worth in more time, they are at most worth in less.
            worths = level.worths if level is not None and decided_s < level.replica_s else ()
            level = search.level = Level(relaxation, decided_s, proven=True, worths=worths)
            answer = level.solve(decide=True, cutting=True, deadline=search.deadline)
            if answer.bound < 1 - CERTAIN:
                search.raise_bound(decided_s)
                continue
            if answer.scale < 1:  # just below
                prove(search, decided_s, answer.prices)
                continue
        chosen = choice.from_worths(relaxation, level.worths, ruled_out=tuple(settled), time_limit_s=search.left_s())
        search.num_nodes += chosen.num_nodes
        if chosen.bound < 1 - CERTAIN:
            if not _raise(search, decided_s) and not (patient and _settle_longer(search)):
                return
            search.hurries = True
            continue
        if chosen.replica_counts is None or num_ruled_out >= most_ruled_out or num_vain >= max(most_settled, 1):
            return
        served = level.solve(replica_counts=chosen.replica_counts, decide=True, cutting=True, deadline=search.deadline)
        if served.bound < 1 - CERTAIN:
            level.rule_out(served.prices)
            num_ruled_out += 1
            continue
        if most_settled == 0:
            return
        if chosen.replica_counts not in dived:
            before_s = search.best.max_s
            start = dive(search, chosen.replica_counts, chosen.replica_counts, decided_s)
            dived[chosen.replica_counts] = start, before_s
            if search.best.max_s < before_s and start.loads.size <= balance_model.MAX_SINGLE_CELLS:
                continue  # less time is to be decided about now, in which these may be ruled out
        start, before_s = dived[chosen.replica_counts]
        one = Settled(replica_counts=chosen.replica_counts, share=start, bound_s=search.bound_s)
        if not search.is_done() and start.loads.size <= balance_model.MAX_SINGLE_CELLS:  # larger models tell little
            one = settle(
                problem,
                chosen.replica_counts,
                bound_s=search.bound_s,
                target_gap=search.better() / 2,
                deadline=search.deadline,
                start=start,
            )
            search.offer(one.replica_counts, one.share)
        settled[one.replica_counts] = one
        if search.best.max_s >= before_s:
            search.hurries = False
            num_vain += 1


def _raise(search: Search, decided_s: float) -> bool:
    """Raises the bound where only settled replica counts can be within `decided_s`; whether it did."""
    for counts, known in search.settled.items():
        for retreat in SETTLED_RETREATS:
            trial_s = decided_s * (1 - retreat)
            if trial_s <= max(known.bound_s, search.bound_s) or search.left_s() <= SHORTEST_SOLVE_S:
                break
            level = Level(search.relaxation, trial_s, proven=True) if retreat else search.level
            answer = level.solve(replica_counts=counts, decide=True, cutting=True, deadline=search.deadline)
            if answer.bound < 1 - CERTAIN:
                search.settled[counts] = dataclasses.replace(known, bound_s=trial_s)
                break
    least_s = min([decided_s, *(known.bound_s for known in search.settled.values())])
    if least_s <= search.bound_s:
        return False
    search.raise_bound(least_s)
    return True


def _settle_longer(search: Search) -> bool:
    """Settles anew, for longer, the replica counts that hold the bound down; False if it was not time that ended it."""
    lowest = min(search.settled.values(), key=lambda known: known.bound_s, default=None)
    if lowest is None or lowest.limit_s == 0 or lowest.bound_s >= lowest.max_s:
        return False
    again = settle(
        search.problem,
        lowest.replica_counts,
        bound_s=lowest.bound_s,
        target_gap=search.better() / 2,
        deadline=search.deadline,
        start=lowest.share,
        limit_s=2 * lowest.limit_s,
    )
    search.offer(again.replica_counts, again.share)
    search.settled[again.replica_counts] = again
    return True
