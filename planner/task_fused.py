"""Task-Fused, LobRA's baseline: all tasks jointly on replicas of one config, the best one at equal shares.

The best one where work is shared out as ours is: `planner.one_kind`.
"""

from __future__ import annotations

import time

from planner.equal_share import best_homogeneous
from planner.minlp import to_plan
from planner.plan import Plan
from planner.problem import PlanningProblem


def solve(problem: PlanningProblem) -> Plan:
    """The plan of as many replicas of one config as there is room for that finishes a step soonest at equal shares."""
    start = time.perf_counter()
    share = best_homogeneous(problem, range(len(problem.configs)))
    return to_plan(problem, share, planner="task-fused", solve_s=time.perf_counter() - start)
