"""LobRA's pruning planner: enumerate the deployments, bound each cheaply, solve the dispatch of the promising ones.

1. Deployments are the multisets of proposed configs that leave no device idle that another replica could use (the
   integer partitions of the device count) and whose largest capacity serves the longest bucket.
2. Each is bounded by the device-seconds of length-based dispatch (every bucket to the smallest capacity that fits),
   spread evenly over its devices. Balanced dispatch may do better: the bound is a guide and not a proof.
3. Those within 15 % of the least bound stay, eight at the least, as in the original.
4. Each one left gets a dispatch ILP (equal shares, `planner.equal_share`); the fastest wins. Many have the same bound:
   those of which the dispatch's own bound (`planner.prices`) is least come first, for when the time does not reach.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence

from planner import prices
from planner.equal_share import EqualShare, best_homogeneous, solve_equal_share
from planner.minlp import to_plan
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.proposal import propose

FILTER = 0.15
"""Deployments stay whose bound is at most this share above the least bound."""

MIN_DEPLOYMENTS = 8
ILP_GAP = 5e-3
ENUMERATION_SHARE = 0.5
"""Share of the time limit that enumerating and bounding may take."""


def solve(problem: PlanningProblem) -> Plan:
    """The best plan that survives the filter; at `problem.time_limit_s` the best found, else the best homogeneous."""
    start = time.perf_counter()
    pool = propose(problem)
    deadline = start + problem.time_limit_s
    candidates = promising(problem, pool, deadline=start + ENUMERATION_SHARE * problem.time_limit_s)
    candidates = _most_promising_first(problem, candidates, deadline=start + ENUMERATION_SHARE * problem.time_limit_s)
    best: EqualShare | None = None
    for counts in candidates:
        remaining_s = deadline - time.perf_counter()
        if best is not None and remaining_s <= 0:
            break
        found = solve_equal_share(
            problem,
            [number for number in pool if counts[number]],
            counts=counts,
            cutoff_s=None if best is None else best.step_s,
            gap=ILP_GAP,
            time_limit_s=remaining_s,
        )
        if found is not None and (best is None or found.step_s < best.step_s):
            best = found
    return to_plan(
        problem,
        best or best_homogeneous(problem, pool),
        planner="prune",
        solve_s=time.perf_counter() - start,
        status="complete" if time.perf_counter() < deadline else "time limit",
    )


def _most_promising_first(
    problem: PlanningProblem, candidates: Sequence[tuple[float, tuple[int, ...]]], *, deadline: float
) -> list[tuple[int, ...]]:
    """Deployments by the bound of their dispatch; those not looked at by the deadline come last."""

    def bound_s(counts: tuple[int, ...]) -> float:
        if time.perf_counter() > deadline:
            return float("inf")
        kinds = [usable for usable, count in zip(problem.configs, counts, strict=True) if count]
        return prices.relax(kinds, [count for count in counts if count], problem.counts).bound_s

    return sorted((counts for _, counts in candidates), key=bound_s)


def promising(problem: PlanningProblem, pool: Sequence[int], *, deadline: float) -> list[tuple[float, tuple[int, ...]]]:
    """(bound in seconds, replicas of each config) of the deployments that the filter keeps, least bound first.

    Stops enumerating at `deadline` (of `time.perf_counter`) and keeps the best of what it has seen.
    """
    costs = _device_seconds(problem)
    least_distinct, kept, nearest = float("inf"), [], []
    for counts in deployments(problem, pool):
        bound = length_based_s(problem, costs, counts)
        capacities = [problem.configs[number].capacity_tokens for number in pool if counts[number]]
        if len(set(capacities)) == len(capacities):
            least_distinct = min(least_distinct, bound)
        if bound <= least_distinct * (1 + FILTER):
            kept.append((bound, counts))
        # A heap of the least bounds seen, largest on top, for when too few pass the filter.
        if len(nearest) < MIN_DEPLOYMENTS:
            heapq.heappush(nearest, (-bound, counts))
        else:
            heapq.heappushpop(nearest, (-bound, counts))
        if time.perf_counter() > deadline:
            break
    kept = sorted(item for item in kept if item[0] <= least_distinct * (1 + FILTER))
    return kept if len(kept) >= MIN_DEPLOYMENTS else sorted((-negative, counts) for negative, counts in nearest)


def deployments(problem: PlanningProblem, pool: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Replica counts (by `problem.configs`) of every maximal deployment of the pool that serves the longest bucket."""
    configs, last = problem.configs, len(problem.buckets) - 1
    order = sorted(pool, key=lambda number: -configs[number].num_devices)
    if not order:
        return
    narrowest = configs[order[-1]].num_devices
    counts = [0] * len(configs)

    def extend(position: int, free: int) -> Iterator[tuple[int, ...]]:
        if position == len(order):
            if free < narrowest and any(counts[number] and configs[number].fits(last) for number in order):
                yield tuple(counts)
            return
        number = order[position]
        for count in range(free // configs[number].num_devices, -1, -1):
            counts[number] = count
            yield from extend(position + 1, free - count * configs[number].num_devices)
        counts[number] = 0

    yield from extend(0, problem.num_devices)


def length_based_s(problem: PlanningProblem, device_seconds: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """Seconds of a step with every bucket on the smallest capacity that fits and the work spread over all devices."""
    deployed = [number for number, count in enumerate(counts) if count]
    deployed.sort(key=lambda number: problem.configs[number].capacity_tokens)
    total, longest = 0.0, dict.fromkeys(deployed, 0.0)
    for bucket in range(len(problem.buckets)):
        number = next(number for number in deployed if problem.configs[number].fits(bucket))
        total += device_seconds[number][bucket]
        longest[number] = max(longest[number], problem.configs[number].slot_s[bucket][-1])
    for number, slot_s in longest.items():
        usable = problem.configs[number]
        if slot_s:
            filling_s = usable.cost.fixed_s + (usable.config.pp - 1) * slot_s
            total += counts[number] * usable.num_devices * filling_s
    return total / sum(counts[number] * problem.configs[number].num_devices for number in deployed)


def _device_seconds(problem: PlanningProblem) -> list[list[float]]:
    """For each config, device-seconds of all sequences of each bucket (infinite where the bucket does not fit)."""
    return [
        [
            total * usable.num_devices * usable.per_sequence_s(bucket) if usable.fits(bucket) else float("inf")
            for bucket, total in enumerate(problem.counts)
        ]
        for usable in problem.configs
    ]
