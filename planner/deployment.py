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
2. A little above that T, whole replica counts are chosen (`planner.choice`) and dived for a share-out
   (`planner.rounding`), at growing T until the best plan is near enough.
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
from planner.master import MasterSolution
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.relaxation import Level, Relaxation, bracket, least_conceivable_s

__all__ = ["Settled", "homogeneous", "least_conceivable_s", "settle", "solve"]

TARGET_GAP = 0.01
"""(step_s - bound_s) / step_s at which the search ends."""

STRETCHES = (1.0, 1.003, 1.006, 1.01, 1.015, 1.025, 1.05)
"""Multiples of the relaxation's T at which plans are looked for."""

CHOICES = 3
"""Replica counts tried at each of these."""

HOPELESS = 0.97
"""Replica counts that serve less than this share of the counts, fractionally, are not dived for."""

SERVES = 0.997
"""Those that serve this share are worth polishing."""

RETREATS = (0.0, 1e-3, 2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064, 0.128, 0.256)
"""By how much less than the relaxation's T, which is only nearly a bound, a proof is tried."""

CLOSING_SHARE = 0.95
"""The last step asks for a little less than the target gap, so that its "no" is enough."""

CERTAIN = 1e-5
"""SCIP's tolerances are well below this: a share that it bounds below 1 by this much is below 1."""

PROMISING = 1.03
"""Share-outs within this ratio of what is wanted are polished."""

SETTLE_LIMIT_S = 2.0
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

    def offer(self, replica_counts: Sequence[int], max_s: float) -> None:
        if self.best is None or max_s < self.best.max_s:
            self.best = Settled(replica_counts=tuple(replica_counts), max_s=max_s, bound_s=0.0)


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
        _search(search, high_s)
    if search.best is None:
        fallback = settle(problem, homogeneous(problem), deadline=search.deadline)
        search.offer(fallback.replica_counts, fallback.max_s)
    _close(search, settling=True)
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


def _search(search: _Search, high_s: float) -> None:
    """Steps 2 and 4 by turns, at growing T."""
    solutions: list[MasterSolution] = []
    for stretch in STRETCHES:
        replica_s = high_s * stretch
        if search.is_done() or (search.best and search.best.max_s <= replica_s):
            return
        before = search.best
        _find_plans(search, Level(search.relaxation, replica_s), solutions)
        if search.best is not before:
            _close(search, settling=False)


def _find_plans(search: _Search, level: Level, solutions: list[MasterSolution]) -> None:
    """Step 2 at one T. `solutions` of the masters so far tell which patterns matter; it gains some."""
    answer = level.solve(deadline=search.deadline)
    solutions += [] if answer.solution is None else [answer.solution]
    tried: list[tuple[int, ...]] = []
    for _ in range(CHOICES):
        if not solutions or search.left_s() <= SHORTEST_SOLVE_S:
            return
        chosen = choice.from_patterns(
            search.relaxation, level.patterns, solutions, time_limit_s=min(CHOICE_LIMIT_S, search.left_s())
        )
        search.num_nodes += chosen.num_nodes
        if chosen.replica_counts is None or chosen.replica_counts in tried:
            return
        tried.append(chosen.replica_counts)
        served = level.solve(replica_counts=chosen.replica_counts, deadline=search.deadline)
        solutions += [] if served.solution is None else [served.solution]
        if served.scale >= HOPELESS:
            _dive(search, chosen.replica_counts, level, search.goal_s(), polish=served.scale >= SERVES)
        if search.is_done() or served.scale >= 1:
            return


def _dive(
    search: _Search,
    replica_counts: tuple[int, ...],
    level: Level,
    goal_s: float,
    *,
    polish: bool = True,
) -> Share:
    """Looks for a share-out over these replicas within the level's T, or by polishing at least within `goal_s`."""
    rounded = rounding.dive(
        search.problem,
        replica_counts,
        level.replica_s,
        level.patterns,
        deadline=search.deadline,
        improve_s=LOCAL_SEARCH_LIMIT_S,
    )
    if polish and goal_s < rounded.share.max_s < goal_s * PROMISING:
        rounded = rounding.polished(search.problem, rounded, goal_s, deadline=search.deadline)
    search.offer(replica_counts, rounded.share.max_s)
    return rounded.in_order()


def _prove(search: _Search, low_s: float, prices: np.ndarray) -> None:
    """Step 3."""
    for retreat in RETREATS:
        trial_s = low_s * (1 - retreat)
        if trial_s <= search.bound_s:
            return
        if search.relaxation.proves_unattainable(prices, trial_s):
            search.bound_s = trial_s
            return


def _close(search: _Search, *, settling: bool) -> None:
    """Step 4. Without `settling` it leaves off at replica counts that would have to be settled."""
    problem, relaxation = search.problem, search.relaxation
    settled: dict[tuple[int, ...], Settled] = {}
    level = None
    while not search.is_done():
        trial_s = search.trial_s()
        if level is None or trial_s < level.replica_s:
            level = Level(relaxation, trial_s, proven=True)
            if level.solve(decide=True, deadline=search.deadline).bound < 1 - CERTAIN:
                search.bound_s = max(search.bound_s, trial_s)
                return
        ruled_out = [known.replica_counts for known in settled.values() if known.bound_s >= trial_s]
        chosen = choice.from_worths(relaxation, level.worths, ruled_out=ruled_out, time_limit_s=search.left_s())
        search.num_nodes += chosen.num_nodes
        if chosen.bound < 1 - CERTAIN:
            search.bound_s = max(search.bound_s, trial_s)
            return
        if chosen.replica_counts is None or chosen.replica_counts in settled:
            return
        served = level.solve(replica_counts=chosen.replica_counts, decide=True, deadline=search.deadline)
        if served.bound < 1 - CERTAIN:
            continue
        before = search.best
        start = _dive(search, chosen.replica_counts, level, trial_s)
        if not settling:
            if search.best is before:
                return
            continue
        one = settle(
            problem,
            chosen.replica_counts,
            bound_s=search.bound_s,
            target_gap=search.better() / 2,
            deadline=search.deadline,
            start=start,
        )
        settled[one.replica_counts] = one
        search.offer(one.replica_counts, one.max_s)
