"""The planning problem that every planner solves: one frozen instance, built and checked here.

Buckets s_1 < ... < s_J are padded lengths; s_J covers the longest length that the workload lists, with share 0 too, so
a plan with a replica that fits bucket J serves any batch. From the expected number of sequences E_j of each bucket in a
batch the instance takes integer counts N_j, rounded up cumulatively from the longest bucket down:

    N_j = ceil(E_j + ... + E_J) - ceil(E_{j+1} + ... + E_J)

so the N_j sum to the global batch size, every tail is at least its expectation, and the longest bucket that is expected
at all holds at least one sequence however rare it is (plain ceil would add up to one sequence for each bucket; the
paper plans on the fractions). A sequence is served in its own bucket.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from planner.bucketing import bucket_lengths
from planner.config_cost import ConfigCost
from planner.constraints import Constraints, allowed_configs, check_pins_hold, parse_replicas, pinned_counts
from planner.cost import CostTable
from planner.errors import UserError
from planner.lattice import DEFAULT_ROW_OPTIONS, row_options, split_rows
from planner.mix_remats import mix_remats
from planner.plan import ParallelConfig, Plan, Prediction, ReplicaGroup
from planner.workload import Workload

ROUNDING_SLACK = 1e-9
"""Relative slack below which an expected count a hair over an integer is that integer."""

DEFAULT_NUM_BUCKETS = 16
DEFAULT_TIME_LIMIT_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsableConfig:
    """A parallel config with its slot times on the lattice.

    Attributes:
      cost: its row of the cost table.
      rows: for each bucket, the row options, ascending, the last being the full rows; () where the bucket does not fit.
      slot_s: for each bucket and row option, seconds that such a micro-batch occupies the slowest stage.
    """

    cost: ConfigCost
    rows: tuple[tuple[int, ...], ...]
    slot_s: tuple[tuple[float, ...], ...]

    @property
    def config(self) -> ParallelConfig:
        return self.cost.config

    @property
    def num_devices(self) -> int:
        return self.cost.config.num_devices

    @property
    def capacity_tokens(self) -> int:
        return self.cost.capacity_tokens

    def fits(self, bucket: int) -> bool:
        """Whether bucket number `bucket` (from 0) is within the capacity."""
        return bool(self.rows[bucket])

    def full_rows(self, bucket: int) -> int:
        return self.rows[bucket][-1]

    def slots(self, bucket: int, num_sequences: int) -> tuple[float, ...]:
        """Seconds of each micro-batch that `num_sequences` of a bucket become on one replica."""
        options = self.rows[bucket]
        times = dict(zip(options, self.slot_s[bucket], strict=True))
        return tuple(times[rows] for rows in split_rows(num_sequences, options)) if num_sequences else ()

    def per_sequence_s(self, bucket: int) -> float:
        """Least seconds of slot time that one sequence of the bucket can cost: the best row option's share."""
        return min(s / b for s, b in zip(self.slot_s[bucket], self.rows[bucket], strict=True))

    def replica_s(self, loads: Sequence[int]) -> float:
        """Seconds of one step on one replica that is given loads[j] sequences of each bucket j; 0 without any."""
        times = [s for bucket, n in enumerate(loads) for s in self.slots(bucket, int(n))]
        if not times:
            return 0.0
        return self.cost.fixed_s + sum(times) + (self.config.pp - 1) * max(times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaProblem:
    """How many replicas of each config serve these counts best. With as many `pinned` as there are devices for: how.

    Attributes:
      num_devices: devices that replicas may use (some may idle).
      counts: N_j, sequences of each bucket (see the module's docstring).
      configs: those that replicas may have.
      pinned: for each config, replicas that there must be at the least; () for none.
    """

    num_devices: int
    counts: tuple[int, ...]
    configs: tuple[UsableConfig, ...]
    pinned: tuple[int, ...] = ()

    @property
    def pinned_counts(self) -> tuple[int, ...]:
        """`pinned` for every config."""
        return self.pinned or (0,) * len(self.configs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningProblem(ReplicaProblem):
    """What to plan for. Made by `build_problem`, solved by `solve(problem) -> Plan` of any planner.

    Its `configs` are those allowed that fit the devices and at least the shortest bucket.

    Attributes:
      workload: the tasks' length distributions.
      costs: the cost table; `costs.step_overhead_s` is paid once a step whatever the plan.
      buckets: padded lengths, tokens, ascending.
      expected: E_j, expected sequences of each bucket in one batch.
      row_options: row counts of the lattice for each bucket on a config.
      proposal: whether planners that know LobRA's configuration proposal use it.
      time_limit_s: after this many seconds a planner returns the best plan that it has.
      max_configs: most distinct configs in a plan; None for no limit.
    """

    workload: Workload
    costs: CostTable
    buckets: tuple[int, ...]
    expected: tuple[float, ...]
    row_options: int = DEFAULT_ROW_OPTIONS
    proposal: bool = True
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    max_configs: int | None = None

    @property
    def narrowest_for_longest(self) -> int:
        """Index of the config with the fewest devices (then the most room) that fits the last bucket.

        One of the pinned configs, where they are as many as a plan may have.
        """
        fitting = [index for index, usable in enumerate(self.configs) if usable.fits(len(self.buckets) - 1)]
        pinned = [index for index, count in enumerate(self.pinned_counts) if count]
        if self.max_configs is not None and len(pinned) >= self.max_configs:
            fitting = [index for index in fitting if index in pinned]
        return min(fitting, key=lambda i: (self.configs[i].num_devices, -self.configs[i].capacity_tokens))

    def make_plan(
        self,
        replica_counts: Sequence[int],
        *,
        step_s: float,
        bound_s: float,
        planner: str,
        solve_s: float,
        status: str | None = None,
        num_nodes: int | None = None,
    ) -> Plan:
        """The plan of replica_counts[i] replicas of configs[i], largest configs first; drops configs with none.

        `step_s` and `bound_s` are seconds with `costs.step_overhead_s` included.
        """
        chosen = [
            ReplicaGroup(
                count=int(count),
                config=usable.config,
                capacity_tokens=usable.capacity_tokens,
                smaller_capacities=usable.cost.capacities[:-1],
            )
            for usable, count in zip(self.configs, replica_counts, strict=True)
            if count > 0
        ]
        chosen.sort(key=lambda group: (-group.config.num_devices, -group.capacity_tokens, group.config))
        used = sum(group.num_devices for group in chosen)
        return Plan(
            model=self.costs.model,
            num_devices=self.num_devices,
            replicas=tuple(chosen),
            buckets=self.buckets,
            row_options=self.row_options,
            planner=planner,
            predicted=Prediction(
                step_s=step_s,
                bound_s=bound_s,
                gap=(step_s - bound_s) / step_s,
                gpu_seconds=step_s * used,
                solve_s=solve_s,
                status=status,
                num_nodes=num_nodes,
            ),
        )


def build_problem(
    workload: Workload,
    costs: CostTable,
    num_devices: int,
    *,
    buckets: str | Sequence[int] = "dynamic",
    num_buckets: int = DEFAULT_NUM_BUCKETS,
    row_options: int = DEFAULT_ROW_OPTIONS,
    constraints: Constraints | None = None,
    proposal: bool = True,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
) -> PlanningProblem:
    """Checks that a plan exists and puts the instance together, by what is fitted alone (`CostTable.fitted`).

    Raises:
      UserError: no config is allowed; the longest length fits none of them, or only configs wider than the devices
        there are; a listed bucket set is too short; the cost table gives a shape no positive time; constraints that
        leave no plan (see `planner.constraints`).
    """
    if num_devices < 1:
        raise UserError("bad value", key="num_devices", value=num_devices, expected="an integer >= 1")
    constraints, costs = constraints or Constraints(), costs.fitted()
    allowed = allowed_configs(costs, num_devices, constraints, workload)
    cap = max(cost.capacity_tokens for cost in allowed)
    padded = bucket_lengths(workload, buckets, num_buckets=num_buckets, max_capacity_tokens=cap)
    expected = _expected_counts(workload, padded)
    too_small = tuple(cost for cost in allowed if cost.capacity_tokens < padded[0])
    check_pins_hold(constraints, too_small, padded[0])
    allowed = tuple(cost for cost in allowed if cost not in too_small)
    counts = _integer_counts(expected)
    if constraints.mix_remats:
        pinned = [parse_replicas(text)[1] for text in constraints.pinned]
        allowed = mix_remats(allowed, padded, counts, keep=pinned)
    return PlanningProblem(
        workload=workload,
        costs=costs,
        num_devices=num_devices,
        buckets=padded,
        expected=expected,
        counts=counts,
        configs=tuple(usable_config(cost, padded, num_options=row_options, file=costs.file) for cost in allowed),
        row_options=row_options,
        proposal=proposal,
        time_limit_s=time_limit_s,
        pinned=pinned_counts(constraints, allowed, num_devices, workload.max_length),
        max_configs=constraints.max_configs,
    )


def usable_config(
    cost: ConfigCost, buckets: Sequence[int], *, num_options: int = DEFAULT_ROW_OPTIONS, file: object = None
) -> UsableConfig:
    """The slot times of a config on the lattice of `buckets`; a shape without a positive time is a `UserError`.

    `file`: the cost table's, for that message.
    """
    rows = tuple(
        row_options(length, cost.of_length(length).capacity_tokens, num_options=num_options) for length in buckets
    )
    slot_s = tuple(
        tuple(float(cost.micro_batch_s(b, length)) for b in options)
        for options, length in zip(rows, buckets, strict=True)
    )
    for length, options, times in zip(buckets, rows, slot_s, strict=True):
        for b, seconds in zip(options, times, strict=True):
            if not (math.isfinite(seconds) and seconds > 0):
                raise UserError(
                    f"cost table of {cost.config} predicts {seconds:.3g} s for a micro-batch of {b} x {length} tokens",
                    file=file,
                    key="coefficients",
                    expected="a positive time for every shape: profile that shape or refit",
                )
    return UsableConfig(cost=cost, rows=rows, slot_s=slot_s)


def _expected_counts(workload: Workload, buckets: Sequence[int]) -> tuple[float, ...]:
    counts = workload.expected_counts()
    where = np.searchsorted(np.asarray(buckets), np.fromiter(counts, dtype=np.int64))
    values = np.fromiter(counts.values(), dtype=np.float64)
    positive = values > 0
    return tuple(np.bincount(where[positive], weights=values[positive], minlength=len(buckets)).tolist())


def _integer_counts(expected: Sequence[float]) -> tuple[int, ...]:
    tails = np.cumsum(np.asarray(expected)[::-1])
    ceiled = np.ceil(tails * (1 - ROUNDING_SLACK)).astype(np.int64)
    return tuple(np.diff(ceiled, prepend=0)[::-1].tolist())
