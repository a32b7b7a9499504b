"""Whether a plan is still good for the lengths that a run has seen."""

from __future__ import annotations

import dataclasses
import time

from planner.constraints import Constraints
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import Plan
from planner.planners import solver
from planner.problem import build_problem
from planner.robust import (
    MEAN,
    PATTERNS_SHARE,
    StepTimes,
    dispatching_s,
    replica_counts,
    sampled_counts,
    solve_robust,
    step_times,
)
from planner.workload import Workload

GOOD_SHARE = 0.05
"""A plan is still good while a step takes at most this share longer than under the best plan."""


LEAST_SHARE = 0.1
"""Of the time limit, for a plan that there would be no time left for."""


DISPATCHING_SHARE = 0.15
"""Of the time limit, for dispatching the sampled batches of each plan found, which looks at no clock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """A plan beside the best one for the same lengths, both over the same sampled batches.

    Attributes:
      present, present_times: the plan in use.
      best, best_times: the faster, in the mean, of the plan in use and of what is chosen now under the
        constraints, with the buckets in use and with new ones.
      gap: the largest gap to its proven bound that the time limit left in a search for other replicas.
    """

    present: Plan
    present_times: StepTimes
    best: Plan
    best_times: StepTimes
    gap: float

    @property
    def excess(self) -> float:
        """By which share the mean step takes longer than under the best plan."""
        return self.present_times.mean_s / self.best_times.mean_s - 1

    @property
    def is_good(self) -> bool:
        return self.excess <= GOOD_SHARE

    @property
    def is_sure(self) -> bool:
        """Whether the search would have found plans that are better by more than counts as good."""
        return self.gap <= GOOD_SHARE


def check_drift(
    plan: Plan,
    costs: CostTable,
    seen: Workload,
    *,
    num_samples: int,
    seed: int,
    time_limit_s: float,
    constraints: Constraints | None = None,
) -> Drift:
    """Judges `plan` on batches sampled from the lengths seen, beside plans that keep to `constraints`.

    The other plans are chosen over sampled batches too (`planner.robust`), each in half of what judging the present one
    leaves of the time limit; all are judged on other batches than those that they are chosen on.

    Raises:
      UserError: the cost table lacks a config of the plan, or no plan can serve the lengths.
    """
    groups = {group.config: group for group in plan.replicas}
    try:
        in_use = dataclasses.replace(costs, configs=tuple(costs.of(group) for group in groups.values()))
    except KeyError as error:
        missing = f"the cost table has no config {error.args[0]}"
        raise UserError(missing, expected="a table with those of the plan") from None
    found: list[tuple[Plan, StepTimes]] = []
    gap = 0.0
    deadline = time.perf_counter() + (1 - DISPATCHING_SHARE) * time_limit_s
    ways = ((in_use, plan.buckets, None), (costs, plan.buckets, None), (costs, "dynamic", len(plan.buckets)))
    for left, (table, buckets, number) in zip(range(len(ways), 0, -1), ways, strict=True):
        left_s = max(deadline - time.perf_counter(), LEAST_SHARE * time_limit_s)
        problem = build_problem(
            seen,
            table,
            plan.num_devices,
            buckets=buckets,
            num_buckets=number or len(plan.buckets),
            row_options=plan.row_options,
            constraints=None if table is in_use else constraints,
            time_limit_s=left_s / left,
        )
        if table is in_use:
            fresh = sampled_counts(problem, num_samples, seed, first=num_samples)
            present = replica_counts(problem, plan)
            _, patterns = dispatching_s(problem, present, fresh, PATTERNS_SHARE * left_s / left)
            found.append((plan, step_times(problem, present, fresh, patterns=patterns)))
        else:
            robust = solve_robust(
                problem, solver("exact"), objective=MEAN, num_samples=num_samples, seed=seed, patterns=patterns
            )
            found.append((robust.plan, robust.times))
            made = robust.mean_plan.predicted
            gap = max(gap, 0.0 if made is None else made.gap)
    best, best_times = min(found, key=lambda item: item[1].mean_s)
    return Drift(present=plan, present_times=found[0][1], best=best, best_times=best_times, gap=gap)
