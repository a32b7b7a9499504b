"""Length-based planning ("group" in the original): a sequence goes to the smallest capacity that fits it.

Kept as a baseline: it cannot move short sequences to wide replicas that would otherwise wait for the others.
"""

from __future__ import annotations

from planner.minlp import solve_nonlinear
from planner.plan import Plan
from planner.problem import PlanningProblem


def solve(problem: PlanningProblem) -> Plan:
    """The best length-based plan; at `problem.time_limit_s` the best found, at the worst the best homogeneous plan."""
    return solve_nonlinear(problem, planner="group", length_based=True)
