"""The exact planner: replica counts that minimise the step time, with a proven lower bound.

The problem (`planner.problem` defines N_j, slots and replica times): choose replica counts p_c >= 0 and, for each
replica r, integers n_rj of sequences of each bucket, to

    minimise  T + step_overhead_s
    (1)  sum over c of g_c p_c <= D                         devices, some may idle
    (2)  sum over r of n_rj = N_j                           every sequence is served
    (3)  n_rj = 0 where bucket j exceeds r's capacity
    (4)  replica_s(n_r) <= T                                fixed_s + its slots + (pp - 1) x its largest; 0 without work
    (5)  p_c >= 1 for a c that fits bucket J                the longest length that the workload lists fits a replica,
                                                            also where N_J = 0
    (6)  p_c >= pinned_c,  at most K configs with p_c > 0   where the user says so (`planner.config_subsets`)

Configs that another does all for are left out (`planner.dominance`). Solved in four steps.
1. `planner.relaxation` finds the T from which fractional patterns serve everything: near what good plans need when
   there are many replicas. The prices found prove it (`planner.closing`) and tell which replicas no plan near that T
   has; these are left out from there on.
2. At about the T that would be near enough, replicas are given patterns one after the other until all is served
   (`planner.rounding`); their counts are chosen while diving or, as a whole, before (`planner.choice`). What is then
   over T is moved between replicas, pair by pair (`planner.resplit`).
3. With few replicas the bound is at fault as much as the plan: cuts of whole slots (`planner.cuts`) and whole replica
   counts, named, priced and ruled out or settled, raise it (`planner.closing`), and plans are looked for anew.
4. Plans are looked for between that T and the best one's, and parts of the best are rebuilt (`planner.rebuild`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import numpy as np

from planner import balance, choice, closing, config_subsets, one_kind, rebuild
from planner.bracket import bracket
from planner.config_subsets import Found
from planner.dominance import without_dominated
from planner.local_search import improve
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.relaxation import Level, Relaxation, least_conceivable_s
from planner.search import (
    LAST_CLOSING_SHARE,
    LOCAL_SEARCH_LIMIT_S,
    SHORTEST_SOLVE_S,
    STRICTLY,
    TARGET_GAP,
    Search,
    dive,
    dive_key,
    gap_of,
    settle,
    status_of,
)

__all__ = ["TARGET_GAP", "homogeneous", "least_conceivable_s", "solve"]

FREE, SETTLED, CHOSEN = "free", "settled", "chosen"
"""How a dive comes by its replica counts: while diving; those settled that took least; or as a whole, before."""

NEARER = (0.0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875)
"""Where dives look: parts of the way from the T that would be near enough to the bound back to the best plan's."""

AT_THE_GOAL, FIRST_NEARER = NEARER[:1], NEARER[:4]

FIRST_RATIO = 1.012
"""How near the T that the relaxation lets through is found before replicas are left out (`closing.limit`)."""

QUICKLY = {"most_settled": 1, "most_ruled_out": 40}
AT_ONCE = {"most_settled": 0, "most_ruled_out": 10}
THOROUGHLY = {"most_settled": 8, "most_ruled_out": 200, "patient": True}
"""Replica counts that are settled and ruled out one by one before the search gives up proving more for now."""

COARSE = 1.01
"""Where cuts raise the bound by more than this, dives need them too: few slots are all that a replica has time for."""

HALFWAY = 0.5
"""What cannot be decided near the goal may be decided here: a bound that is higher by half puts the goal higher too."""

NEARLY = 1.6
"""Multiple of the wanted gap within which a better plan may do: what it leaves to decide is tried at once."""

FLEET_ROUNDS = 32
"""Rounds of local search on fleets of one kind: enough to tell whether one is of interest."""

HOPELESS = 0.99
"""Replica counts that serve less than this share of the counts, fractionally, are not dived for."""

MOST_VAIN, LAST_MOST_VAIN = 12, 20
"""Rebuilt parts in a row that end no earlier, after which it is given up for now, and for good."""

RISE = 0.25
"""T is raised by this power of the share: what one replica more would serve, the T needs to rise little for."""

CHOICE_LIMIT_S = 1.0

WITH_SUBSETS = 0.6
"""Share of the time for the search over all configs where subsets of them are looked at after it."""


def solve(problem: PlanningProblem, *, target_gap: float = TARGET_GAP) -> Plan:
    """The exact planner. Ends at `target_gap`, or at the problem's time limit with the best plan and its honest gap.

    The plan's status: "optimal", "gap limit" (within `target_gap`), "time limit", or "gap left" where the search ran
    out of ideas before the time.
    """
    started = time.perf_counter()
    deadline = started + problem.time_limit_s
    needed, kept = without_dominated(problem)
    found = _found(needed, target_gap, deadline)
    replica_counts = np.zeros(len(problem.configs), dtype=np.int64)
    replica_counts[kept] = found.replica_counts
    overhead_s = problem.costs.step_overhead_s
    late = deadline - time.perf_counter() <= SHORTEST_SOLVE_S
    return problem.make_plan(
        replica_counts.tolist(),
        step_s=found.max_s + overhead_s,
        bound_s=found.bound_s + overhead_s,
        planner="exact",
        solve_s=time.perf_counter() - started,
        num_nodes=found.num_nodes,
        status=status_of(gap_of(problem, found.max_s, found.bound_s), target_gap, late=late),
    )


def _found(problem: PlanningProblem, target_gap: float, deadline: float) -> Found:
    """Searches all configs at once, or subsets of them where distinct configs are limited, or one after the other."""
    found: Found | None = None
    num_subsets = config_subsets.count_subsets(problem)
    if not 0 < num_subsets <= config_subsets.FEW:
        share = WITH_SUBSETS if 0 < num_subsets <= config_subsets.MOST else 1.0
        now = time.perf_counter()
        search = _relaxed(problem, target_gap, now + share * (deadline - now))
        _searched(search)
        found = Found(
            replica_counts=search.best.replica_counts,
            max_s=search.best.max_s,
            bound_s=min(search.bound_s, search.best.max_s),
            num_nodes=search.num_nodes + search.relaxation.num_rounds,
        )
    if 0 < num_subsets <= config_subsets.MOST:
        relaxed = functools.partial(_relaxed, target_gap=target_gap, deadline=deadline)
        found = config_subsets.solve(problem, relaxed, _searched, target_gap=target_gap, deadline=deadline, start=found)
    if found is None:
        counts = homogeneous(problem)
        alone = settle(problem, counts, deadline=deadline)
        found = Found(replica_counts=counts, max_s=alone.max_s, bound_s=least_conceivable_s(problem), num_nodes=0)
    return found


def _relaxed(problem: PlanningProblem, target_gap: float, deadline: float) -> Search:
    """Step 1."""
    search = Search(
        problem=problem,
        relaxation=Relaxation(problem),
        target_gap=target_gap,
        deadline=deadline,
        bound_s=least_conceivable_s(problem),
    )
    low_s, prices, high_s = bracket(search.relaxation, search.deadline, ratio=FIRST_RATIO)
    if np.isfinite(high_s):
        closing.limit(search, prices, low_s)
        first_s = low_s * FIRST_RATIO**0.5
        low_s, prices, high_s = bracket(search.relaxation, search.deadline, low_s=low_s, first_s=first_s)
    closing.prove(search, low_s, prices)
    search.is_bracketed = bool(np.isfinite(high_s))
    return search


def _searched(search: Search) -> None:
    """Steps 2 to 4, what is quick and often enough first; there is a best plan then."""
    if search.is_bracketed:
        _search(search, FREE, deciding=False)
    _try_one_kind(search)
    if search.best is None:
        fallback = settle(search.problem, homogeneous(search.problem), deadline=search.deadline)
        search.offer(fallback.replica_counts, fallback.share)
    fractional_s = search.bound_s
    closing.tighten(search)
    _search(search, FREE, cutting=True)
    closing.close(search, **QUICKLY)
    _nearer(search, AT_THE_GOAL, cutting=search.bound_s > fractional_s * COARSE)
    closing.close(search, **AT_ONCE, reach=HALFWAY)
    is_coarse = search.bound_s > fractional_s * COARSE
    _search(search, SETTLED, cutting=is_coarse)
    _nearer(search, FIRST_NEARER, cutting=is_coarse)
    _search(search, CHOSEN, cutting=is_coarse)
    closing.close(search, **QUICKLY)
    search.closing_share = LAST_CLOSING_SHARE
    _nearer(search, NEARER, cutting=True)
    closing.close(search, **THOROUGHLY)
    before_s = search.best.max_s
    _rebuild(search, most_vain=MOST_VAIN)
    _nearer(search, NEARER, cutting=False)
    _nearer(search, NEARER, cutting=True)
    _rebuild(search, most_vain=LAST_MOST_VAIN)
    if search.best.max_s < before_s:
        closing.close(search, **THOROUGHLY)


def _try_one_kind(search: Search) -> None:
    """Takes a fleet of one kind where that is better than what a dive found: these it may miss by far."""
    problem = search.problem
    if any(problem.pinned_counts):
        return
    for bound_s, config, count in one_kind.fleets(problem):
        if search.best is not None and (bound_s >= search.best.max_s or search.is_done()):
            return
        table = balance.tables([problem.configs[config]] * count, problem.counts)
        share = improve(table, balance.list_schedule(table, problem.counts), max_rounds=FLEET_ROUNDS)
        search.offer([count if number == config else 0 for number in range(len(problem.configs))], share)


def homogeneous(problem: PlanningProblem) -> tuple[int, ...]:
    """The pinned replicas, and every other device on the narrowest config that fits the longest bucket."""
    counts = list(problem.pinned_counts)
    chosen = problem.narrowest_for_longest
    used = sum(count * usable.num_devices for count, usable in zip(counts, problem.configs, strict=True))
    counts[chosen] += (problem.num_devices - used) // problem.configs[chosen].num_devices
    return tuple(counts)


def _search(search: Search, origin: str, *, cutting: bool = False, deciding: bool = True) -> None:
    """Step 2: a dive at about the T that would do; with `deciding`, what a better plan leaves to decide is tried."""
    relaxation, replica_s = search.relaxation, search.goal_s()
    if search.is_done() or (search.best is not None and search.best.max_s <= replica_s):
        return
    lower, upper = relaxation.lower, relaxation.upper
    if origin == SETTLED:
        if not search.settled:
            return
        lower = upper = min(search.settled, key=lambda counts: search.settled[counts].max_s)
    elif origin == CHOSEN or search.problem.max_configs is not None:
        counts, served = _choose(search, replica_s)
        if counts is not None and served < HOPELESS:  # whole replicas need more time than fractional ones
            replica_s /= max(served, STRICTLY) ** RISE
            if search.best is not None and search.best.max_s <= replica_s:
                return
            counts, served = _choose(search, replica_s)
        if counts is None or served < HOPELESS:
            return
        lower, upper = (counts, counts) if origin == CHOSEN else (lower, np.where(np.array(counts) > 0, upper, 0))
    before_s = np.inf if search.best is None else search.best.max_s
    dive(search, lower, upper, replica_s, cutting=cutting)
    if deciding:
        _decide_at_once(search, before_s)


def _choose(search: Search, replica_s: float) -> tuple[tuple[int, ...] | None, float]:
    """(whole replica counts that serve most within a time, the share that they serve); the pool gains patterns."""
    level = Level(search.relaxation, replica_s)
    answer = level.solve(deadline=search.deadline)
    if answer.solution is None:
        return None, 0.0
    chosen = choice.from_patterns(
        search.relaxation, level.patterns, [answer.solution], time_limit_s=min(CHOICE_LIMIT_S, search.left_s())
    )
    search.num_nodes += chosen.num_nodes
    if chosen.replica_counts is None:
        return None, 0.0
    served = level.solve(replica_counts=chosen.replica_counts, deadline=search.deadline)
    return chosen.replica_counts, served.scale


def _nearer(search: Search, fractions: Sequence[float], *, cutting: bool) -> None:
    """Step 4: dives between the T that would do and the best plan's, with its replica counts too, until none helps.

    Near the best plan's T a dive finds another, little better plan: again and again, until that one does. `fractions`
    are parts of the way from the T that would do.
    """
    turns = [(fraction, again) for fraction in fractions for again in (False, True)]
    turn = num_vain = 0
    while not search.is_done() and num_vain < len(turns):
        fraction, again = turns[turn % len(turns)]
        before_s, goal_s = search.best.max_s, search.goal_s()
        replica_s = goal_s + fraction * (min(before_s, search.cutoff_s) - goal_s)
        lower, upper = search.relaxation.lower, _allowed(search)
        if again:
            lower = upper = search.best.replica_counts
        if dive_key(search, lower, upper, replica_s, cutting=cutting) not in search.dived:
            dive(search, lower, upper, replica_s, cutting=cutting)
        if search.best.max_s < before_s * (1 - balance.IMPROVEMENT):
            num_vain = 0  # the same part of what is left may be gained again
        else:
            turn, num_vain = turn + 1, num_vain + 1
        _decide_at_once(search, before_s)


def _rebuild(search: Search, *, most_vain: int) -> None:
    """Step 4: rebuilds parts of the best plan, each with its slowest replica, until none of so many ends earlier."""
    share, num_vain = search.best.rounded(), 0
    if len(share.replicas) <= rebuild.MOST:
        return  # no part, but a dive
    while not search.is_done() and num_vain < most_vain:
        better = rebuild.rebuilt(
            search.problem,
            share,
            search.goal_s(),
            search.relaxation.pool,
            upper=_allowed(search),
            rng=search.rng,
            deadline=search.deadline,
            improve_s=LOCAL_SEARCH_LIMIT_S,
        )
        if better is None:
            num_vain += 1
            continue
        share, num_vain, before_s = better, 0, search.best.max_s
        search.offer_share(share)
        _decide_at_once(search, before_s)


def _allowed(search: Search) -> np.ndarray:
    """[C] the most replicas of each config; where distinct configs are limited, of those that the best plan has."""
    if search.problem.max_configs is None:
        return search.relaxation.upper
    return np.where(np.array(search.best.replica_counts) > 0, search.relaxation.upper, 0)


def _decide_at_once(search: Search, before_s: float) -> None:
    """Tries what a plan better than `before_s` leaves to decide."""
    if search.best.max_s < before_s and search.gap() <= NEARLY * search.target_gap:
        closing.close(search, **AT_ONCE)
