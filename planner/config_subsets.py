"""At most K distinct configs: the exact planner over subsets of the configs, the most promising first.

With few distinct configs the relaxation over all of them is far below what such plans attain: it mixes many. Over the
K configs of one subset it is as near as ever. So subsets are looked at best first, each in three steps, and only as
far as it may hold a plan that is better than the best so far:

1. a bound without solving, that of `relaxation.least_conceivable_s`, for all subsets at once;
2. the relaxation's bound, with prices that prove it;
3. the search for plans and for a bound within the gap.

The least bound of all subsets is a bound on the plans of any. Where subsets are more than `MOST`, the search over all
configs is all there is.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from planner.balance import ROUNDING
from planner.problem import PlanningProblem
from planner.search import SHORTEST_SOLVE_S, Search, gap_of

FEW = 250
"""Subsets up to which they are looked at from the start; more, when the search over all configs has left a gap."""

MOST = 40_000
"""Subsets that are looked at, at the most."""

FIRST_PLAN_AFTER = 8
"""Subsets relaxed, then twice as many each time, before plans are looked for in the best: a plan spares others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan of any subset: replica counts [C], its slowest replica's seconds, the proven bound, nodes."""

    replica_counts: tuple[int, ...]
    max_s: float
    bound_s: float
    num_nodes: int


@dataclasses.dataclass(order=True)
class _Subset:
    """A subset on the heap: by its bound, then the one that was looked at further.

    `order` is 0 before the relaxation was looked at, and then a negative number of its own.
    """

    bound_s: float
    order: int
    configs: tuple[int, ...] = dataclasses.field(compare=False)
    search: Search | None = dataclasses.field(compare=False, default=None)


def count_subsets(problem: PlanningProblem) -> int:
    """Subsets that there are to look at; 0 without a limit on distinct configs that says anything."""
    if problem.max_configs is None or problem.max_configs >= len(problem.configs):
        return 0
    pinned = sum(count > 0 for count in problem.pinned_counts)
    return math.comb(len(problem.configs) - pinned, max(problem.max_configs - pinned, 0))


def solve(
    problem: PlanningProblem,
    relaxed: Callable[[PlanningProblem], Search],
    searched: Callable[[Search], None],
    *,
    target_gap: float,
    deadline: float,
    start: Found | None = None,
) -> Found | None:
    """The best plan of at most `max_configs` distinct configs; None if the time ran out before there was any.

    Args:
      relaxed: step 1 of `planner.deployment` on a problem; `searched`: the steps after it.
      start: what is known already.
    """
    heap = [_Subset(bound_s, 0, configs) for configs, bound_s in _bounds(problem)]
    heapq.heapify(heap)
    best, best_s, floor_s = start, math.inf, 0.0
    if start is not None:
        best_s, floor_s = start.max_s, start.bound_s
    settled_s, num_nodes, num_relaxed, next_plan = math.inf, 0, 0, FIRST_PLAN_AFTER
    while heap and deadline - time.perf_counter() > SHORTEST_SOLVE_S:
        if gap_of(problem, best_s, max(heap[0].bound_s, floor_s)) <= target_gap:
            break
        if num_relaxed >= next_plan:
            next_plan *= 2
            subset = min((subset for subset in heap if subset.search is not None), default=heap[0])
            heap.remove(subset)
            heapq.heapify(heap)
        else:
            subset = heapq.heappop(heap)
        if subset.search is None:
            num_relaxed += 1
            search = relaxed(_restricted(problem, subset.configs))
            heapq.heappush(heap, _Subset(search.bound_s, -num_relaxed, subset.configs, search))
            continue
        search = subset.search
        search.cutoff_s = best_s
        searched(search)
        num_nodes += search.num_nodes + search.relaxation.num_rounds
        settled_s = min(settled_s, search.bound_s)
        if search.best is not None and search.best.max_s < best_s:
            counts = [0] * len(problem.configs)
            for config, count in zip(subset.configs, search.best.replica_counts, strict=True):
                counts[config] = count
            best_s = search.best.max_s
            best = Found(replica_counts=tuple(counts), max_s=best_s, bound_s=0.0, num_nodes=0)
    if best is None:
        return None
    least_s = min([best_s, settled_s, *(subset.bound_s for subset in heap[:1])])
    return dataclasses.replace(best, bound_s=max(least_s, floor_s), num_nodes=best.num_nodes + num_nodes)


def _bounds(problem: PlanningProblem) -> Iterator[tuple[tuple[int, ...], float]]:
    """(configs, bound without solving) of each subset of `max_configs` that has the pinned ones and serves all."""
    pinned = [index for index, count in enumerate(problem.pinned_counts) if count]
    others = [index for index in range(len(problem.configs)) if index not in pinned]
    used = [bucket for bucket, count in enumerate(problem.counts) if count]
    last = len(problem.counts) - 1
    number = np.array(problem.counts)[used]
    each_s = np.full((len(problem.configs), len(used)), np.inf)
    one_s = np.full((len(problem.configs), len(used)), np.inf)
    devices = np.array([usable.num_devices for usable in problem.configs])
    left = problem.num_devices - int(devices @ np.array(problem.pinned_counts))
    has_room = (devices <= left) | (np.array(problem.pinned_counts) > 0)
    for index, usable in enumerate(problem.configs):
        for at, bucket in enumerate(used):
            if has_room[index] and usable.fits(bucket):
                each_s[index, at] = usable.num_devices * usable.per_sequence_s(bucket)
                one_s[index, at] = usable.cost.fixed_s + usable.config.pp * min(usable.slot_s[bucket])
    fits_longest = has_room & np.array([usable.fits(last) for usable in problem.configs])
    for chosen in itertools.combinations(others, problem.max_configs - len(pinned)):
        configs = tuple(sorted((*pinned, *chosen)))
        mine = list(configs)
        if not fits_longest[mine].any():
            continue
        work_s = float(number @ each_s[mine].min(axis=0)) / problem.num_devices
        bound_s = max(work_s, float(one_s[mine].min(axis=0).max(initial=0.0)))
        if math.isfinite(bound_s):
            yield configs, bound_s * (1 - ROUNDING)


def _restricted(problem: PlanningProblem, configs: tuple[int, ...]) -> PlanningProblem:
    pinned = problem.pinned_counts
    return dataclasses.replace(
        problem,
        configs=tuple(problem.configs[index] for index in configs),
        pinned=tuple(pinned[index] for index in configs),
        max_configs=None,
    )
