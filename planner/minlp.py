"""LobRA's exact planner ("balance" in the original): one mixed-integer nonlinear programme for counts and dispatch.

Kept as a baseline: it assumes that replicas of one config get equal shares, which `planner.deployment` does not.
"""

from __future__ import annotations

import time

from planner.deployment import least_conceivable_s
from planner.equal_share import EqualShare, best_homogeneous, solve_equal_share
from planner.errors import UserError
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.proposal import propose

MINLP_GAP = 1e-3
"""Relative gap at which SCIP may stop; the last tenth of a percent costs it most of the time."""


def solve(problem: PlanningProblem) -> Plan:
    """The best equal-share plan; at `problem.time_limit_s` the best found, at the worst the best homogeneous plan.

    Raises:
      UserError: with the proposal on, the proposed configs cannot serve the workload.
    """
    return solve_nonlinear(problem, planner="minlp", length_based=False)


def solve_nonlinear(problem: PlanningProblem, *, planner: str, length_based: bool) -> Plan:
    """Solves the equal-share model with free replica counts, starting from the best homogeneous plan."""
    start = time.perf_counter()
    pool = propose(problem)
    homogeneous = best_homogeneous(problem, pool)
    if homogeneous is None:
        raise no_plan(problem, planner)
    found = solve_equal_share(
        problem,
        pool,
        length_based=length_based,
        cutoff_s=homogeneous.step_s,
        gap=MINLP_GAP,
        time_limit_s=problem.time_limit_s - (time.perf_counter() - start),
    )
    best = min((share for share in (homogeneous, found) if share is not None), key=lambda share: share.step_s)
    return to_plan(problem, best, planner=planner, solve_s=time.perf_counter() - start)


def to_plan(problem: PlanningProblem, share: EqualShare, *, planner: str, solve_s: float) -> Plan:
    """The plan of a share. Its bound holds for every plan, not only for those with equal shares."""
    overhead_s = problem.costs.step_overhead_s
    return problem.make_plan(
        share.counts,
        step_s=share.step_s + overhead_s,
        bound_s=least_conceivable_s(problem) + overhead_s,
        planner=planner,
        solve_s=solve_s,
    )


def no_plan(problem: PlanningProblem, planner: str) -> UserError:
    return UserError(
        f"planner {planner} finds no config on {problem.num_devices} devices that serves every bucket",
        key="planner",
        expected="more devices, or --proposal off",
    )
