"""LobRA's exact planner ("balance" in the original): one mixed-integer nonlinear programme for counts and dispatch.

Kept as a baseline: it assumes that replicas of one config get equal shares, which `planner.deployment` does not.
"""

from __future__ import annotations

import time

from planner.deployment import least_conceivable_s
from planner.equal_share import EqualShare, best_homogeneous, solve_equal_share
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.proposal import propose

MINLP_GAP = 1e-3
"""Relative gap at which SCIP may stop; the last tenth of a percent costs it most of the time."""


def solve(problem: PlanningProblem) -> Plan:
    """The best equal-share plan; at `problem.time_limit_s` the best found, at the worst the best homogeneous plan."""
    return solve_nonlinear(problem, planner="minlp", length_based=False)


def solve_nonlinear(problem: PlanningProblem, *, planner: str, length_based: bool) -> Plan:
    """Solves the equal-share model with free replica counts, starting from the best homogeneous plan."""
    start = time.perf_counter()
    pool = propose(problem)
    homogeneous = best_homogeneous(problem, pool)
    found = solve_equal_share(
        problem,
        pool,
        length_based=length_based,
        cutoff_s=homogeneous.step_s,
        gap=MINLP_GAP,
        time_limit_s=problem.time_limit_s - (time.perf_counter() - start),
    )
    best = homogeneous if found is None or homogeneous.step_s < found.step_s else found
    seconds = time.perf_counter() - start
    status = "complete" if seconds < problem.time_limit_s else "time limit"
    return to_plan(problem, best, planner=planner, solve_s=seconds, status=status)


def to_plan(
    problem: PlanningProblem, share: EqualShare, *, planner: str, solve_s: float, status: str = "complete"
) -> Plan:
    """The plan of a share. Its bound holds for every plan, not only for those with equal shares.

    `status` says whether the planner came to its end or to the time limit; neither proves anything.
    """
    overhead_s = problem.costs.step_overhead_s
    return problem.make_plan(
        share.counts,
        step_s=share.step_s + overhead_s,
        bound_s=least_conceivable_s(problem) + overhead_s,
        planner=planner,
        solve_s=solve_s,
        status=status,
    )
