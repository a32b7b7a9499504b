"""How many padded lengths to compile for: padding against programs, both in seconds of a step.

More lengths pad less and make shorter steps; each is compiled for every row option, config and stage, and the run waits
for that before its first step. With P programs of `compile_s` seconds each, spread over the run's steps, the cost of a
step under K lengths is

    mean step time (K) + P(K) compile_s / steps

The step times are those of sampled batches, shared out as dispatch does where it asks no solver, on the replicas that
the planner chooses with `REFERENCE_BUCKETS` lengths: replicas are planned anew once the number of lengths is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from planner import balance
from planner.bucketing import bucket_lengths, choose_buckets
from planner.cost import CostTable
from planner.defaults import DEFAULT_MAX_BUCKETS
from planner.dispatch import GAP_LIMIT
from planner.lattice import DEFAULT_ROW_OPTIONS
from planner.plan import Plan
from planner.problem import Constraints, PlanningProblem, UsableConfig, build_problem, usable_config
from planner.share_out import share_out
from planner.simulate import batch
from planner.workload import Workload

CHOICES = (4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
"""Numbers of lengths that are compared."""

REFERENCE_BUCKETS = 16

NUM_SAMPLES = 8

PLANNING_SHARE = 0.3
"""Share of the time limit for the plan whose replicas the numbers of lengths are compared on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketRow:
    """One number of lengths.

    Attributes:
      num_buckets: lengths asked for; `buckets`: those that pad least.
      padding_share: share of the computed tokens that is padding, empty rows included.
      num_programs: shapes, summed over configs and stages of the replicas.
      step_s: mean step over the sampled batches.
      compile_step_s: compile time for each step.
      steps: those it is spread over.
    """

    num_buckets: int
    buckets: tuple[int, ...]
    padding_share: float
    num_programs: int
    step_s: float
    compile_step_s: float
    steps: int

    @property
    def total_s(self) -> float:
        return self.step_s + self.compile_step_s


def bucket_rows(
    plan: Plan,
    costs: CostTable,
    workload: Workload,
    *,
    compile_s: float,
    steps: int,
    seed: int = 0,
    choices: Sequence[int] = CHOICES,
) -> tuple[BucketRow, ...]:
    """A row for each number of lengths, on the replicas of `plan`."""
    batches = [batch(workload, seed, step)[1] for step in range(NUM_SAMPLES)]
    rows = []
    for number in choices:
        buckets = bucket_lengths(workload, "dynamic", num_buckets=number, max_capacity_tokens=plan.max_capacity_tokens)
        candidate = dataclasses.replace(plan, buckets=buckets, predicted=None)
        shared = [_shared_out(candidate, costs, lengths) for lengths in batches]
        programs = num_programs(candidate)
        rows.append(
            BucketRow(
                num_buckets=number,
                buckets=buckets,
                padding_share=1 - sum(int(lengths.sum()) for lengths in batches) / sum(tokens for _, tokens in shared),
                num_programs=programs,
                step_s=float(np.mean([slowest_s for slowest_s, _ in shared])) + costs.step_overhead_s,
                compile_step_s=programs * compile_s / steps,
                steps=steps,
            )
        )
    return tuple(rows)


def _shared_out(plan: Plan, costs: CostTable, lengths: np.ndarray) -> tuple[float, int]:
    """(seconds of the slowest replica, padded tokens) of a batch of these lengths, its micro-batches never listed."""
    buckets = choose_buckets(lengths, plan.buckets, DEFAULT_MAX_BUCKETS)
    counts = np.bincount(np.searchsorted(buckets, lengths), minlength=len(buckets)).tolist()
    replicas: list[UsableConfig] = []
    for group in plan.replicas:
        replicas += [usable_config(costs.of(group), buckets, num_options=plan.row_options)] * group.count
    table = balance.tables(replicas, counts)
    share, _ = share_out(replicas, table, counts, gap_limit=GAP_LIMIT)
    options = table.rows[table.kind]
    full = np.maximum(options[:, :, -1], 1)
    whole, rest = np.divmod(share.loads, full)
    option = (options >= rest[:, :, None]).argmax(axis=2)
    rows = whole * full + np.where(rest > 0, np.take_along_axis(options, option[:, :, None], axis=2)[:, :, 0], 0)
    return share.max_s, int((rows * np.asarray(buckets)).sum())


def num_programs(plan: Plan) -> int:
    """Micro-batch programs that a plan's replicas compile: its shapes on every stage of each config."""
    return sum(
        len(group.shapes(plan.buckets, num_options=plan.row_options)) * group.config.pp for group in plan.replicas
    )


def best_row(rows: Sequence[BucketRow]) -> BucketRow:
    """The row of least total; of equals the one with the fewest lengths."""
    return min(rows, key=lambda row: (row.total_s, row.num_buckets))


def choose_num_buckets(
    workload: Workload,
    costs: CostTable,
    num_devices: int,
    solve: Callable[[PlanningProblem], Plan],
    *,
    row_options: int = DEFAULT_ROW_OPTIONS,
    constraints: Constraints | None,
    compile_s: float,
    steps: int,
    time_limit_s: float,
) -> tuple[BucketRow, ...]:
    """The rows compared on replicas planned by `solve`; `best_row` of them is the choice.

    Raises:
      UserError: no plan exists (see `build_problem`).
    """
    problem = build_problem(
        workload,
        costs,
        num_devices,
        num_buckets=REFERENCE_BUCKETS,
        row_options=row_options,
        constraints=constraints,
        time_limit_s=PLANNING_SHARE * time_limit_s,
    )
    return bucket_rows(solve(problem), costs, workload, compile_s=compile_s, steps=steps)
