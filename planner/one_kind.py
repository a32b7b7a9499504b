"""The best plan of one kind of replica, its work shared out as ours is.

Beside a plan of unlike replicas it says what these gain. Task-Fused (`planner.task_fused`) gives every replica as many
sequences of each bucket, which costs it more.
"""

from __future__ import annotations

import time

from planner import balance
from planner.dispatch import GAP_LIMIT
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.relaxation import least_conceivable_s
from planner.share_out import share_out


def fleets(problem: PlanningProblem) -> list[tuple[float, int, int]]:
    """(proven least seconds, config, replicas) of as many replicas of one config as there is room for, the least first;
    of configs that fit the last bucket."""
    longest = len(problem.buckets) - 1
    out = []
    for number, usable in enumerate(problem.configs):
        count = problem.num_devices // usable.num_devices
        if count and usable.fits(longest):
            out.append((balance.quick_bound_s([usable] * count, problem.counts), number, count))
    return sorted(out)


def solve(problem: PlanningProblem) -> Plan:
    """The plan of as many replicas of one config as there is room for that finishes a step soonest.

    Configs are looked at from the least bound up, until the next cannot be better, or the time limit.
    """
    started = time.perf_counter()
    best_s, chosen, status = float("inf"), (0, 0), "complete"
    for bound_s, number, count in fleets(problem):
        if bound_s >= best_s:
            break
        if best_s < float("inf") and time.perf_counter() - started >= problem.time_limit_s:
            status = "time limit"
            break
        replicas = [problem.configs[number]] * count
        table = balance.tables(replicas, problem.counts)
        share, _ = share_out(replicas, table, problem.counts, gap_limit=GAP_LIMIT, ahead=True)
        if share.max_s < best_s:
            best_s, chosen = share.max_s, (number, count)
    counts = [chosen[1] if number == chosen[0] else 0 for number in range(len(problem.configs))]
    overhead_s = problem.costs.step_overhead_s
    return problem.make_plan(
        counts,
        step_s=best_s + overhead_s,
        bound_s=least_conceivable_s(problem) + overhead_s,
        planner="one kind",
        solve_s=time.perf_counter() - started,
        status=status,
    )
