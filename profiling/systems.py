"""The ways of training several tasks that experiments compare, and what each of them runs.

| system               | tasks           | replicas                                | remat     |
|----------------------|-----------------|-----------------------------------------|-----------|
| Task-Sequential      | one at a time   | the best one config, for each task      | one       |
| Task-Fused           | jointly         | the best one config                     | one       |
| LobRA                | jointly         | unlike, by LobRA's pruning planner      | one       |
| ours                 | jointly         | unlike, by the exact planner            | one       |
| Task-Fused, remat    | jointly         | the best one config                     | of config |
| ours, remat          | jointly         | unlike, by the exact planner            | of config |
| ours, remat, robust  | jointly         | unlike, best over sampled batches       | of config |
| ours, mixed remat    | jointly         | unlike, by the exact planner            | of length |

Where remat is "one", all replicas have the same policy, given from outside: LobRA has none to choose from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from planner import task_fused
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.plan import Plan
from planner.planners import solver
from planner.problem import PlanningProblem
from planner.robust import MEAN, solve_robust
from planner.workload import Workload

BuildProblem = Callable[[Workload, CostTable, Constraints], PlanningProblem]
"""Puts together what to plan for: devices, padded lengths and time limit are the caller's."""

HOMOGENEOUS = "task-fused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One way of training.

    Attributes:
      name: as results call it.
      planner: "task-fused", or one of `planner.planners`.
      is_joint: all tasks at once; else one after the other.
      chooses_remat: whether a config's remat is the planner's choice.
      mixes_remats: whether a replica may have a policy for each padded length (`planner.mix_remats`).
      is_robust: whether plans are chosen by the mean over sampled batches (`planner.robust`), not on the expected one.
    """

    name: str
    planner: str
    is_joint: bool = True
    chooses_remat: bool = False
    mixes_remats: bool = False
    is_robust: bool = False


SEQUENTIAL = System(name="Task-Sequential", planner=HOMOGENEOUS, is_joint=False)
SYSTEMS = {
    "task-sequential": SEQUENTIAL,
    "task-fused": System(name="Task-Fused", planner=HOMOGENEOUS),
    "lobra": System(name="LobRA", planner="prune"),
    "ours": System(name="ours", planner="exact"),
    "task-fused-remat": System(name="Task-Fused, remat", planner=HOMOGENEOUS, chooses_remat=True),
    "ours-remat": System(name="ours, remat", planner="exact", chooses_remat=True),
    "ours-robust": System(name="ours, remat, robust", planner="exact", chooses_remat=True, is_robust=True),
    "ours-mixed": System(name="ours, mixed remat", planner="exact", chooses_remat=True, mixes_remats=True),
}


def workloads(system: System, workload: Workload) -> tuple[Workload, ...]:
    """What the system trains at a time."""
    return (workload,) if system.is_joint else tuple(Workload(tasks=(task,)) for task in workload.tasks)


def plan_part(system: System, part: Workload, costs: CostTable, remat: str, build: BuildProblem) -> Plan:
    """Plans one of `workloads`; `remat` is that of systems which do not choose it.

    Raises:
      UserError: no plan exists.
    """
    constraints = Constraints(remats=None if system.chooses_remat else (remat,), mix_remats=system.mixes_remats)
    solve = task_fused.solve if system.planner == HOMOGENEOUS else solver(system.planner)
    problem = build(part, costs, constraints)
    return solve_robust(problem, solve, objective=MEAN).plan if system.is_robust else solve(problem)
