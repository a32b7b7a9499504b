"""What the same batches cost on Task-Fused's plan, through the real dispatch and by the cost table that was measured.

Running the baseline as well would compile and warm up a second set of replicas, for a few noisy steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lobra_jax.config import RunConfig
from lobra_jax.data.batches import global_batch
from lobra_jax.data.load import load_tasks
from planner import task_fused
from planner.cost import CostTable
from planner.dispatch import dispatch
from planner.evaluate import Evaluation, evaluate
from planner.inputs import beside
from planner.plan import Plan
from planner.problem import build_problem
from planner.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    """A plan and what the cost table says of every step of the run on it."""

    plan: Plan
    steps: tuple[Evaluation, ...]

    @property
    def gpu_seconds(self) -> float:
        return sum(step.gpu_seconds for step in self.steps)


def compare_with_task_fused(config: RunConfig, plan_file: Path) -> tuple[Predicted, Predicted]:
    """(the run's plan, Task-Fused's from the same costs, lengths and buckets), both on the run's own batches."""
    plan = Plan.load(plan_file)
    costs = CostTable.load(beside(plan_file, "costs"))
    lengths = Workload.load(beside(plan_file, "lengths"))
    problem = build_problem(lengths, costs, plan.num_devices, buckets=plan.buckets, row_options=plan.row_options)
    return _predict(config, plan, costs), _predict(config, task_fused.solve(problem), costs)


def _predict(config: RunConfig, plan: Plan, costs: CostTable) -> Predicted:
    tasks = load_tasks(config)
    settings = config.planner
    steps = []
    for step in range(max(task.steps for task in config.tasks)):
        batch = global_batch(tasks, {task.name: step if step < task.steps else None for task in config.tasks})
        chosen = dispatch(
            plan,
            costs,
            batch.lengths,
            batch.task_ids,
            method=settings.dispatch,
            max_buckets=settings.max_dispatch_buckets,
            time_limit_s=settings.dispatch_time_limit_s,
        )
        steps.append(evaluate(plan, costs, chosen, batch.lengths))
    return Predicted(plan=plan, steps=tuple(steps))
