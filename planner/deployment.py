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

Solved in three steps. Bisection on T over the relaxation with whole replicas and fractional slots
(`planner.relaxation`) gives a bound L and deployments that attain nearly L there. Each is settled: its integers n_rj
are found (`planner.balance`), which gives a plan's true T. If the best is not within the target gap of L, the
relaxation with whole slots is asked for anything better by the target gap; what it names is settled, and excluded with
its own bound, until it answers "no": then the least of that T and the excluded deployments' bounds is proven.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from planner import balance, balance_model, relaxation
from planner.plan import Plan
from planner.problem import PlanningProblem

TARGET_GAP = 0.01
"""(step_s - bound_s) / step_s at which the search ends."""

BISECTION_RATIO = 1.003
"""Bisection ends when the attainable T is within this ratio of the bound."""

FIRST_STEP = 1.05
"""First factor by which T grows while it is unattainable; squared each time."""

SLACKS = (1.0, 1.01, 1.03)
"""Multiples of the least attainable T at which deployments are drawn."""

LAST_FOUND = 4
"""Deployments met last by bisection that are settled too, plus one."""

CLOSING_SHARE = 0.9
"""The last step asks for a little less than the target gap, so that its "no" is enough."""

SETTLE_LIMIT_S = 2.0
LOCAL_SEARCH_LIMIT_S = 0.2
SHORTEST_SOLVE_S = 0.05

STRICTLY = 1e-7
"""With a target gap of 0, "better" means better by this share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """A deployment with its share-out of the planned counts. Seconds are of the slowest replica, without overhead."""

    replica_counts: tuple[int, ...]
    max_s: float
    bound_s: float


def solve(problem: PlanningProblem, *, target_gap: float = TARGET_GAP) -> Plan:
    """The exact planner. Ends at `target_gap`, or at the problem's time limit with the best plan and its honest gap."""
    started = time.perf_counter()
    deadline = started + problem.time_limit_s
    bound_s, attained_s, answers = _bisect(problem, deadline)
    best = None
    for replica_counts in _candidates(problem, attained_s, answers, deadline):
        settled = settle(problem, replica_counts, bound_s=bound_s, target_gap=target_gap, deadline=deadline)
        best = settled if best is None or settled.max_s < best.max_s else best
        if _gap(problem, best.max_s, bound_s) <= target_gap:
            break
    best, bound_s = _close(problem, best, bound_s, target_gap, deadline)
    overhead_s = problem.costs.step_overhead_s
    return problem.make_plan(
        best.replica_counts,
        step_s=best.max_s + overhead_s,
        bound_s=min(bound_s, best.max_s) + overhead_s,
        planner="exact",
        solve_s=time.perf_counter() - started,
    )


def settle(
    problem: PlanningProblem,
    replica_counts: tuple[int, ...],
    *,
    bound_s: float = 0.0,
    target_gap: float = TARGET_GAP,
    deadline: float | None = None,
) -> Settled:
    """Shares the planned counts out over a deployment that has a replica for every bucket.

    `bound_s` is what is known to be the least for any deployment: within `target_gap` of it there is nothing to prove.
    """
    replicas = [u for u, count in zip(problem.configs, replica_counts, strict=True) for _ in range(count)]
    table = balance.tables(replicas, problem.counts)
    share = balance.heuristic(table, problem.counts, time_limit_s=LOCAL_SEARCH_LIMIT_S)
    own_bound_s = bound_s
    left_s = SETTLE_LIMIT_S if deadline is None else min(SETTLE_LIMIT_S, deadline - time.perf_counter())
    if left_s > SHORTEST_SOLVE_S and _gap(problem, share.max_s, bound_s) > target_gap:
        share, proven_s = balance_model.refine(
            replicas, table, problem.counts, share, time_limit_s=left_s, gap_limit=target_gap / 2
        )
        own_bound_s = max(bound_s, proven_s)
    return Settled(replica_counts=tuple(replica_counts), max_s=share.max_s, bound_s=min(own_bound_s, share.max_s))


def _gap(problem: PlanningProblem, max_s: float, bound_s: float) -> float:
    return (max_s - bound_s) / (max_s + problem.costs.step_overhead_s)


def least_conceivable_s(problem: PlanningProblem) -> float:
    """A bound on T without solving: all devices busy at each bucket's best rate; and each bucket's quickest slot."""
    work, quickest = balance.work_and_quickest_s(problem.configs, problem.counts)
    return max(work / problem.num_devices, quickest) * (1 - balance.ROUNDING)


def _bisect(problem: PlanningProblem, deadline: float) -> tuple[float, float, list[tuple[int, ...]]]:
    """(T proven unattainable, T attainable in the relaxation, deployments found on the way, last is best)."""
    low, high = least_conceivable_s(problem), np.inf
    found: list[tuple[int, ...]] = []
    trial, step = low * BISECTION_RATIO, FIRST_STEP
    while high / low > BISECTION_RATIO and time.perf_counter() < deadline:
        answer = relaxation.attainable(problem, trial, time_limit_s=deadline - time.perf_counter())
        if answer.verdict == "yes":
            high = trial
            found.append(answer.replica_counts)
        elif answer.verdict == "no":
            low = trial
        else:
            break
        if np.isinf(high):
            trial, step = trial * step, step * step
        else:
            trial = float(np.sqrt(low * high))
    return low, high, found


def _candidates(
    problem: PlanningProblem, attained_s: float, found: list[tuple[int, ...]], deadline: float
) -> Iterator[tuple[int, ...]]:
    """Deployments to settle, without repeats: with slack near the least attainable T, then what bisection met.

    With neither (no time) the narrowest config that fits the longest bucket, as often as there is room.
    """
    seen: set[tuple[int, ...]] = set()
    for slack in SLACKS if found else ():
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            break
        answer = relaxation.attainable(problem, attained_s * slack, time_limit_s=left_s, spread=True)
        if answer.replica_counts is not None and answer.replica_counts not in seen:
            seen.add(answer.replica_counts)
            yield answer.replica_counts
    for replica_counts in found[:-LAST_FOUND:-1]:
        if replica_counts not in seen:
            seen.add(replica_counts)
            yield replica_counts
    if not seen:
        yield homogeneous(problem)


def homogeneous(problem: PlanningProblem) -> tuple[int, ...]:
    """Replica counts with every device on the narrowest config that fits the longest bucket (the roomiest of those)."""
    chosen = problem.narrowest_for_longest
    count = problem.num_devices // problem.configs[chosen].num_devices
    return tuple(count if index == chosen else 0 for index in range(len(problem.configs)))


def _close(
    problem: PlanningProblem, best: Settled, bound_s: float, target_gap: float, deadline: float
) -> tuple[Settled, float]:
    """Looks for deployments better by the target gap until there are none: (the best one, the bound proven)."""
    overhead_s = problem.costs.step_overhead_s
    settled = {best.replica_counts: best}
    while _gap(problem, best.max_s, bound_s) > target_gap:
        left_s = deadline - time.perf_counter()
        better = max(target_gap * CLOSING_SHARE, STRICTLY)
        trial = (best.max_s + overhead_s) * (1 - better) - overhead_s
        worth_excluding = [known.replica_counts for known in settled.values() if known.bound_s >= trial]
        if left_s < SHORTEST_SOLVE_S:
            break
        answer = relaxation.attainable(problem, trial, time_limit_s=left_s, whole_slots=True, excluded=worth_excluding)
        if answer.verdict == "no":
            bound_s = max(bound_s, trial)
            break
        if answer.verdict == "unknown" or answer.replica_counts in settled:
            break
        one = settle(problem, answer.replica_counts, bound_s=bound_s, target_gap=better / 2, deadline=deadline)
        settled[one.replica_counts] = one
        best = min(best, one, key=lambda known: known.max_s)
    return best, bound_s
