"""The planners by name, and the one way to make a plan."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

from planner.cost import CostTable
from planner.errors import UserError
from planner.lattice import DEFAULT_ROW_OPTIONS
from planner.plan import Plan
from planner.problem import (
    DEFAULT_NUM_BUCKETS,
    DEFAULT_TIME_LIMIT_S,
    Constraints,
    PlanningProblem,
    build_problem,
)
from planner.workload import Workload

PLANNERS = {
    "exact": "planner.deployment",
    "minlp": "planner.minlp",
    "prune": "planner.prune",
    "group": "planner.group",
}
"""Name -> module with `solve(problem) -> Plan`; loaded when asked for, since each loads SCIP."""


def solver(name: str) -> Callable[[PlanningProblem], Plan]:
    """The planner called `name`; an unknown name raises `UserError`.

    LobRA's planners keep to allowed configs, but know neither pinned replicas nor a limit of distinct configs: for a
    problem with these they raise `UserError`.
    """
    if name not in PLANNERS:
        raise UserError("bad value", key="planner", value=name, expected=f"one of {', '.join(PLANNERS)}")
    solve = importlib.import_module(PLANNERS[name]).solve
    return solve if name == "exact" else functools.partial(_without_pins, name, solve)


def _without_pins(name: str, solve: Callable[[PlanningProblem], Plan], problem: PlanningProblem) -> Plan:
    given = "pinned" if problem.pinned else "max_configs" if problem.max_configs is not None else None
    if given is not None:
        raise UserError(f"planner {name} does not know {given}", key=given, expected="planner exact, or without it")
    return solve(problem)


def make_plan(
    name: str,
    workload: Workload,
    costs: CostTable,
    num_devices: int,
    *,
    buckets: str | Sequence[int] = "dynamic",
    num_buckets: int = DEFAULT_NUM_BUCKETS,
    row_options: int = DEFAULT_ROW_OPTIONS,
    proposal: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    constraints: Constraints | None = None,
) -> Plan:
    """Plans `workload` on `num_devices` devices with the planner called `name`.

    Args:
      buckets: "dynamic" (at most `num_buckets`, least padding), "static7", "static16", or a list of lengths.
      row_options: row counts compiled for each bucket on a replica, see `planner.lattice`.
      proposal: whether minlp and prune draw configs by LobRA's configuration proposal.
      time_limit_s: after which the best plan found is returned with its gap.
      constraints: what a plan has to keep to.

    Raises:
      UserError: an unknown planner, or no plan exists (see `build_problem`).
    """
    solve = solver(name)
    problem = build_problem(
        workload,
        costs,
        num_devices,
        buckets=buckets,
        num_buckets=num_buckets,
        row_options=row_options,
        constraints=constraints,
        proposal=proposal,
        time_limit_s=time_limit_s,
    )
    return solve(problem)
