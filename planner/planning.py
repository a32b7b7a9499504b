"""From a user's settings to a plan: how many padded lengths, which planner, for the expected or for sampled batches."""

from __future__ import annotations

import dataclasses
import time

from planner.batching import choose_batching, packed_prices
from planner.bucket_choice import BucketRow, best_row, choose_num_buckets
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.defaults import DEFAULT_COMPILE_S, DEFAULT_MAX_BUCKETS, DEFAULT_SAMPLES, DEFAULT_STEPS
from planner.errors import UserError
from planner.lattice import DEFAULT_ROW_OPTIONS
from planner.plan import MIXED, Plan
from planner.planners import solver
from planner.problem import DEFAULT_NUM_BUCKETS, DEFAULT_TIME_LIMIT_S, build_problem
from planner.robust import Robust, solve_robust
from planner.workload import Workload

DEFAULT_PLANNER = "exact"

LEAST_PLANNING_SHARE = 0.5
"""Share of the time limit that the plan has at the least, however long the choice of its lengths took."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningFlags:
    """The values of `planning_options`; None where the flag was not given."""

    planner: str | None
    proposal: bool | None
    buckets: str | tuple[int, ...] | None
    num_buckets: int | None
    row_options: int | None
    max_tp: int | None
    max_pp: int | None
    tps: tuple[int, ...] | None
    pps: tuple[int, ...] | None
    remats: tuple[str, ...] | None
    devices_per_host: int | None
    pinned: tuple[str, ...] | None
    max_configs: int | None
    time_limit: float | None
    robust: str | None
    samples: int | None
    compile_s: float | None
    amortise_steps: int | None
    batching: str | None
    mix_remats: bool | None

    @property
    def constraints(self) -> Constraints:
        return Constraints(
            max_tp=self.max_tp,
            max_pp=self.max_pp,
            tps=self.tps,
            pps=self.pps,
            remats=self.remats,
            devices_per_host=self.devices_per_host,
            pinned=self.pinned or (),
            max_configs=self.max_configs,
            mix_remats=bool(self.mix_remats),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A plan; the row of `bucket_report` behind its lengths where their number was chosen, and the seconds that took;
    what sampling gave."""

    plan: Plan
    lengths: BucketRow | None
    lengths_s: float
    robust: Robust | None


def choose_plan(workload: Workload, costs: CostTable, num_devices: int, flags: PlanningFlags) -> Chosen:
    """Plans as the flags say; what they leave open has the defaults of this package.

    For packed rows the planner is given packed prices. With batching auto it plans both ways and takes the plan whose
    sampled steps, batched in its better way, are shorter, with half of the time limit for each.

    Raises:
      UserError: a constraint that the planner does not know, or no plan exists (see `build_problem`).
    """
    if flags.batching in (None, "padded") or (
        flags.batching == "auto" and all(c.packed is None for c in costs.configs)
    ):
        return _choose(workload, costs, num_devices, flags)
    if flags.batching == "auto":
        flags = dataclasses.replace(flags, time_limit=(flags.time_limit or DEFAULT_TIME_LIMIT_S) / 2)
    mixed = [text for text in flags.pinned or () if MIXED in text]
    if mixed:
        raise UserError("packed rows run with one policy", key="pinned", value=mixed[0], expected="batching: padded")
    packed = _choose(workload, packed_prices(costs), num_devices, dataclasses.replace(flags, mix_remats=False))
    if flags.batching == "packed":
        return packed
    padded = _choose(workload, costs, num_devices, flags)

    def step_s(chosen: Chosen) -> float:
        return choose_batching(chosen.plan, costs, workload, max_buckets=DEFAULT_MAX_BUCKETS).mean_step_s

    return packed if step_s(packed) < step_s(padded) else padded


def _choose(workload: Workload, costs: CostTable, num_devices: int, flags: PlanningFlags) -> Chosen:
    solve = solver(flags.planner or DEFAULT_PLANNER)
    limit_s = flags.time_limit or DEFAULT_TIME_LIMIT_S
    started = time.perf_counter()
    lengths = None
    if flags.num_buckets is None and flags.buckets in (None, "dynamic"):
        lengths = best_row(bucket_report(workload, costs, num_devices, flags))
    lengths_s = time.perf_counter() - started
    left_s = max(limit_s - lengths_s, LEAST_PLANNING_SHARE * limit_s)
    problem = build_problem(
        workload,
        costs,
        num_devices,
        buckets=flags.buckets or "dynamic",
        num_buckets=(lengths.num_buckets if lengths is not None else flags.num_buckets) or DEFAULT_NUM_BUCKETS,
        row_options=flags.row_options or DEFAULT_ROW_OPTIONS,
        constraints=flags.constraints,
        proposal=flags.proposal is not False,
        time_limit_s=left_s,
    )
    if flags.robust in (None, "off"):
        return Chosen(plan=solve(problem), lengths=lengths, lengths_s=lengths_s, robust=None)
    samples = flags.samples or DEFAULT_SAMPLES
    robust = solve_robust(problem, solve, objective=flags.robust, num_samples=samples)
    return Chosen(plan=robust.plan, lengths=lengths, lengths_s=lengths_s, robust=robust)


def bucket_report(
    workload: Workload, costs: CostTable, num_devices: int, flags: PlanningFlags
) -> tuple[BucketRow, ...]:
    """Padding, programs and seconds a step for each number of padded lengths."""
    return choose_num_buckets(
        workload,
        costs,
        num_devices,
        solver(flags.planner or "exact"),
        row_options=flags.row_options or DEFAULT_ROW_OPTIONS,
        constraints=flags.constraints,
        compile_s=DEFAULT_COMPILE_S if flags.compile_s is None else flags.compile_s,
        steps=flags.amortise_steps or DEFAULT_STEPS,
        time_limit_s=flags.time_limit or DEFAULT_TIME_LIMIT_S,
    )
