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
    (6)  p_c >= pinned_c,  at most K configs with p_c > 0   where the user says so

Solved in four steps.
1. `planner.relaxation` finds the T from which fractional patterns serve everything: the best a bound can be, and near
   what good plans need when there are many replicas.
2. At about the T that would be near enough, replicas are given patterns one after the other until all is served
   (`planner.rounding`); their counts are chosen while diving or, as a whole, before (`planner.choice`). The best
   plan is polished.
3. The prices found in 1 prove the bound.
4. What gap is left is closed at the T that would be better than the best plan by the target gap: replica counts that no
   pricing rules out are named (`planner.choice`), priced, and ruled out or settled: their integers n_rj are found
   (`planner.balance_model`), with a bound of their own. When none are left, that T or the least of those bounds is
   proven.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from planner import balance, balance_model, choice, rounding
from planner.balance import Share
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.relaxation import STRICT, Level, Relaxation, bracket, least_conceivable_s
from planner.rounding import RoundedShare

__all__ = ["Settled", "homogeneous", "least_conceivable_s", "settle", "solve"]

TARGET_GAP = 0.01
"""(step_s - bound_s) / step_s at which the search ends."""

FREE, SETTLED, CHOSEN = "free", "settled", "chosen"
"""How a dive comes by its replica counts: while diving; those settled that took least; or as a whole, before."""

FIRST_DIVES = ((1.0, FREE),)
"""Where plans are looked for first: the T as a multiple of that which would be near enough to the bound."""

DIVES = ((1.0, SETTLED), (0.998, FREE), (1.0, CHOSEN), (1.004, FREE), (1.005, SETTLED), (1.005, CHOSEN),
         (1.01, SETTLED), (1.01, CHOSEN), (1.015, FREE))  # fmt: skip
"""Where they are looked for next."""

MORE_DIVES = tuple(
    (factor, origin)
    for factor in (0.999, 1.003, 0.997, 1.001, 0.996, 1.002, 0.995, 1.006, 1.008, 1.012)
    for origin in (FREE, SETTLED)
)
"""Where they are looked for when all else leaves a gap, with cuts."""

MOST_RETREATS = 12
SHORTEST_RETREAT = 5e-4
"""How often, and by how much less at the least than the T before, a proof is tried; the relaxation's T is only nearly a
bound."""

SETTLED_RETREATS = (1e-3, 2e-3, 4e-3, 6e-3)
"""By how much less than the T that was decided on it is tried for replica counts that may be within it."""

CLOSING_SHARE = 0.95
"""The last step asks for a little less than the target gap, so that its "no" is enough."""

CERTAIN = 1e-5
"""SCIP's tolerances are well below this: a share that it bounds below 1 by this much is below 1."""

PROMISING = 1.03
"""Share-outs within this ratio of what is wanted are polished."""

MOST_SETTLED = 8
"""Replica counts that are settled before the search gives up proving more."""

MOST_RULED_OUT = 100
"""Replica counts that are ruled out one by one before the search gives up proving more."""

HOPELESS = 0.99
"""Replica counts that serve less than this share of the counts, fractionally, are not dived for."""

RISE = 0.25
"""T is raised by this power of the share: what one replica more would serve, the T needs to rise little for."""

SETTLE_LIMIT_S = 0.5
LOCAL_SEARCH_LIMIT_S = 0.2
CHOICE_LIMIT_S = 1.0
SHORTEST_SOLVE_S = 0.02

STRICTLY = 1e-7
"""With a target gap of 0, "better" means better by this share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """A deployment with its share-out of the planned counts. Seconds are of the slowest replica, without overhead."""

    replica_counts: tuple[int, ...]
    max_s: float
    bound_s: float


@dataclasses.dataclass(kw_only=True)
class _Search:
    """Where the search stands: the best plan so far, the proven bound, and what it took."""

    problem: PlanningProblem
    relaxation: Relaxation
    target_gap: float
    deadline: float
    bound_s: float
    best: Settled | None = None
    best_share: RoundedShare | None = None
    level: Level | None = None
    settled: dict[tuple[int, ...], Settled] = dataclasses.field(default_factory=dict)
    hurries: bool = False
    num_nodes: int = 0

    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def gap(self) -> float:
        """The best plan's gap to the bound; infinite without a plan."""
        return np.inf if self.best is None else _gap(self.problem, self.best.max_s, self.bound_s)

    def is_done(self) -> bool:
        return self.gap() <= max(self.target_gap, STRICTLY) or self.left_s() <= SHORTEST_SOLVE_S

    def status(self) -> str:
        if self.gap() <= STRICTLY:
            return "optimal"
        if self.gap() <= self.target_gap:
            return "gap limit"
        return "time limit" if self.left_s() <= SHORTEST_SOLVE_S else "gap left"

    def better(self) -> float:
        """The share by which step 4 asks for a better plan."""
        return max(self.target_gap * CLOSING_SHARE, STRICTLY)

    def trial_s(self) -> float:
        """The T of step 4."""
        overhead_s = self.problem.costs.step_overhead_s
        return (self.best.max_s + overhead_s) * (1 - self.better()) - overhead_s

    def goal_s(self) -> float:
        """The T that would be near enough to the bound."""
        wanted = self.target_gap * CLOSING_SHARE
        return (self.bound_s + wanted * self.problem.costs.step_overhead_s) / (1 - wanted)

    def decided_s(self) -> float:
        """The T at which to decide whether there are plans: the goal, or what is asked for if that is less.

        A "no" at the goal raises the bound, and with it the goal; one for whole replica counts alone may hold for much
        more, which is looked at next.
        """
        step = max(self.target_gap, TARGET_GAP) * CLOSING_SHARE
        overhead_s = self.problem.costs.step_overhead_s
        goal_s = (self.bound_s + step * overhead_s) / (1 - step)
        return self.trial_s() if self.hurries else min(self.trial_s(), goal_s)

    def offer(self, replica_counts: Sequence[int], max_s: float, share: RoundedShare | None = None) -> None:
        """Takes a plan that is better than the best so far; `share` where it is known how it shares out."""
        if self.best is None or max_s < self.best.max_s:
            self.best = Settled(replica_counts=tuple(replica_counts), max_s=max_s, bound_s=0.0)
            self.best_share = share

    def offer_share(self, rounded: RoundedShare) -> None:
        counts = np.bincount(rounded.replicas, minlength=len(self.problem.configs)).tolist()
        self.offer(counts, rounded.share.max_s, rounded)


def solve(problem: PlanningProblem, *, target_gap: float = TARGET_GAP) -> Plan:
    """The exact planner. Ends at `target_gap`, or at the problem's time limit with the best plan and its honest gap.

    The plan's status: "optimal", "gap limit" (within `target_gap`), "time limit", or "gap left" where the search ran
    out of ideas before the time.
    """
    started = time.perf_counter()
    search = _Search(
        problem=problem,
        relaxation=Relaxation(problem),
        target_gap=target_gap,
        deadline=started + problem.time_limit_s,
        bound_s=least_conceivable_s(problem),
    )
    low_s, prices, high_s = bracket(search.relaxation, search.deadline)
    _prove(search, low_s, prices)
    if np.isfinite(high_s):
        _search(search, FIRST_DIVES)
        _tighten(search)
        _search(search, FIRST_DIVES, cutting=True)
        _close(search, most_settled=1)
        _search(search, DIVES)
    if search.best is None:
        fallback = settle(problem, homogeneous(problem), deadline=search.deadline)
        search.offer(fallback.replica_counts, fallback.max_s)
    _close(search, most_settled=1)  # often quick; polishing many replicas is not
    _polish(search)
    _close(search, most_settled=MOST_SETTLED)
    if not search.is_done():
        _search(search, MORE_DIVES, cutting=True)
        _close(search, most_settled=MOST_SETTLED)
    overhead_s = problem.costs.step_overhead_s
    return problem.make_plan(
        search.best.replica_counts,
        step_s=search.best.max_s + overhead_s,
        bound_s=min(search.bound_s, search.best.max_s) + overhead_s,
        planner="exact",
        solve_s=time.perf_counter() - started,
        num_nodes=search.num_nodes + search.relaxation.num_rounds,
        status=search.status(),
    )


def settle(
    problem: PlanningProblem,
    replica_counts: tuple[int, ...],
    *,
    bound_s: float = 0.0,
    target_gap: float = TARGET_GAP,
    deadline: float | None = None,
    start: Share | None = None,
) -> Settled:
    """Shares the planned counts out over a deployment that has a replica for every bucket.

    `bound_s` is what is known to be the least for any deployment: within `target_gap` of it there is nothing to prove.
    `start` is a share-out over its replicas, configs in order, to improve on.
    """
    replicas = [u for u, count in zip(problem.configs, replica_counts, strict=True) for _ in range(count)]
    table = balance.tables(replicas, problem.counts)
    share = start or balance.heuristic(table, problem.counts, time_limit_s=LOCAL_SEARCH_LIMIT_S)
    own_bound_s = bound_s
    left_s = SETTLE_LIMIT_S if deadline is None else min(SETTLE_LIMIT_S, deadline - time.perf_counter())
    if left_s > SHORTEST_SOLVE_S and _gap(problem, share.max_s, bound_s) > target_gap:
        share, proven_s = balance_model.refine(
            replicas, table, problem.counts, share, time_limit_s=left_s, gap_limit=target_gap / 2
        )
        own_bound_s = max(bound_s, proven_s)
    return Settled(replica_counts=tuple(replica_counts), max_s=share.max_s, bound_s=min(own_bound_s, share.max_s))


def homogeneous(problem: PlanningProblem) -> tuple[int, ...]:
    """The pinned replicas, and every other device on the narrowest config that fits the longest bucket."""
    counts = list(problem.pinned_counts)
    chosen = problem.narrowest_for_longest
    used = sum(count * usable.num_devices for count, usable in zip(counts, problem.configs, strict=True))
    counts[chosen] += (problem.num_devices - used) // problem.configs[chosen].num_devices
    return tuple(counts)


def _gap(problem: PlanningProblem, max_s: float, bound_s: float) -> float:
    return (max_s - bound_s) / (max_s + problem.costs.step_overhead_s)


def _search(search: _Search, dives: Sequence[tuple[float, str]], *, cutting: bool = False) -> None:
    """Step 2: dives at about the T that would do."""
    relaxation, tried = search.relaxation, []
    goal_s = search.goal_s()
    for factor, origin in dives:
        replica_s = goal_s * factor
        if search.is_done():
            return
        if search.best is not None and search.best.max_s <= replica_s:
            continue
        lower, upper = relaxation.lower, relaxation.upper
        if origin == SETTLED:
            if not search.settled:
                continue
            lower = upper = min(search.settled, key=lambda counts: search.settled[counts].max_s)
        elif origin == CHOSEN or search.problem.max_configs is not None:
            counts, served = _choose(search, replica_s)
            if counts is None or counts in tried:
                continue
            if served < HOPELESS:  # whole replicas need more time than fractional ones
                goal_s = replica_s / max(served, STRICTLY) ** RISE
                continue
            tried.append(counts)
            lower, upper = (counts, counts) if origin == CHOSEN else (lower, np.where(np.array(counts) > 0, upper, 0))
        found = _dive(search, lower, upper, replica_s, cutting=cutting)
        if found.loads.size <= rounding.POLISH_CELLS:  # one small model
            _polish(search)


def _choose(search: _Search, replica_s: float) -> tuple[tuple[int, ...] | None, float]:
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


def _dive(
    search: _Search, lower: Sequence[int], upper: Sequence[int], replica_s: float, *, cutting: bool = False
) -> Share:
    """Looks for a plan within `replica_s` and these bounds on replica counts."""
    rounded = rounding.dive(
        search.problem,
        replica_s,
        search.relaxation.pool,
        lower=lower,
        upper=upper,
        deadline=search.deadline,
        improve_s=LOCAL_SEARCH_LIMIT_S,
        cutting=cutting,
    )
    search.offer_share(rounded)
    return rounded.in_order()


def _polish(search: _Search) -> None:
    """Improves on the best plan's share-out where that could end the search, once."""
    if search.best_share is None or search.is_done() or search.best.max_s > PROMISING * search.goal_s():
        return
    share, search.best_share = search.best_share, None
    search.offer_share(rounding.polished(search.problem, share, search.goal_s(), deadline=search.deadline))


def _prove(search: _Search, low_s: float, prices: np.ndarray) -> None:
    """Step 3."""
    trial_s = low_s
    for _ in range(MOST_RETREATS):
        if trial_s <= search.bound_s:
            return
        served = search.relaxation.proven_served(prices, trial_s)
        if served < 1 - STRICT:
            search.bound_s = trial_s
            return
        trial_s *= 1 - max(served - 1, SHORTEST_RETREAT)  # the share served falls by as much as T at the least


def _tighten(search: _Search) -> None:
    """A better bound with cuts."""
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
    _prove(search, low_s, prices)


def _raise(search: _Search, decided_s: float) -> bool:
    """Raises the bound where only settled replica counts can be within `decided_s`; whether it did."""
    for counts, known in search.settled.items():
        for retreat in SETTLED_RETREATS:
            trial_s = decided_s * (1 - retreat)
            if trial_s <= max(known.bound_s, search.bound_s) or search.left_s() <= SHORTEST_SOLVE_S:
                break
            level = Level(search.relaxation, trial_s, proven=True)
            answer = level.solve(replica_counts=counts, decide=True, cutting=True, deadline=search.deadline)
            if answer.bound < 1 - CERTAIN:
                search.settled[counts] = dataclasses.replace(known, bound_s=trial_s)
                break
    least_s = min([decided_s, *(known.bound_s for known in search.settled.values())])
    if least_s <= search.bound_s:
        return False
    search.bound_s = least_s
    return True


def _close(search: _Search, *, most_settled: int) -> None:
    """Step 4, until so many replica counts have been settled in vain."""
    problem, relaxation, settled = search.problem, search.relaxation, search.settled
    num_ruled_out = num_vain = 0
    while not search.is_done():
        decided_s = search.decided_s()
        level = search.level
        if level is None or decided_s != level.replica_s:
            # What replicas are worth in more time, they are at most worth in less.
            worths = level.worths if level is not None and decided_s < level.replica_s else ()
            level = search.level = Level(relaxation, decided_s, proven=True, worths=worths)
            answer = level.solve(decide=True, cutting=True, deadline=search.deadline)
            if answer.bound < 1 - CERTAIN:
                search.bound_s = max(search.bound_s, decided_s)
                continue
            if answer.scale < 1:  # just below
                _prove(search, decided_s, answer.prices)
                continue
        chosen = choice.from_worths(relaxation, level.worths, ruled_out=tuple(settled), time_limit_s=search.left_s())
        search.num_nodes += chosen.num_nodes
        if chosen.bound < 1 - CERTAIN:
            if not _raise(search, decided_s):
                return
            search.hurries = True
            continue
        if chosen.replica_counts is None or num_vain >= most_settled or num_ruled_out >= MOST_RULED_OUT:
            return
        served = level.solve(replica_counts=chosen.replica_counts, decide=True, cutting=True, deadline=search.deadline)
        if served.bound < 1 - CERTAIN:
            level.rule_out(served.prices)
            num_ruled_out += 1
            continue
        before_s = search.best.max_s
        start = _dive(search, chosen.replica_counts, chosen.replica_counts, decided_s)
        one = Settled(replica_counts=chosen.replica_counts, max_s=start.max_s, bound_s=search.bound_s)
        if start.loads.size <= balance_model.MAX_SINGLE_CELLS:  # larger models tell little
            one = settle(
                problem,
                chosen.replica_counts,
                bound_s=search.bound_s,
                target_gap=search.better() / 2,
                deadline=search.deadline,
                start=start,
            )
            search.offer(one.replica_counts, one.max_s)
        settled[one.replica_counts] = one
        if search.best.max_s >= before_s:
            search.hurries = False
            num_vain += 1
