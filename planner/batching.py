"""Padded or packed: which of the two finishes a run's steps sooner, and the costs that plan for packed rows."""

from __future__ import annotations

import dataclasses

from planner.cost import CostTable
from planner.errors import UserError
from planner.packed_dispatch import packed_replicas
from planner.plan import Plan
from planner.simulate import Simulation, simulate
from planner.workload import Workload

NUM_SAMPLES = 16
"""Batches that are dispatched both ways."""


BATCHINGS = ("padded", "packed", "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchingChoice:
    """The same sampled batches both ways; `packed` is None where packed micro-batches cannot serve them (`reason`)."""

    padded: Simulation
    packed: Simulation | None
    reason: str = ""

    @property
    def batching(self) -> str:
        """The way of the shorter mean step; padded where they tie."""
        is_packed = self.packed is not None and self.packed.mean_step_s < self.padded.mean_step_s
        return "packed" if is_packed else "padded"

    @property
    def mean_step_s(self) -> float:
        """Of the way that is chosen."""
        return (
            self.padded.mean_step_s if self.packed is None else min(self.padded, self.packed, key=_step_s).mean_step_s
        )

    def __str__(self) -> str:
        if self.packed is None:
            return f"batching: padded ({self.reason})"
        return (
            f"batching: {self.batching} (over {len(self.padded.steps)} sampled batches a step takes "
            f"{self.padded.mean_step_s:.4g} s padded, {self.packed.mean_step_s:.4g} s packed; "
            f"{self.padded.tokens_per_s:,.0f} and {self.packed.tokens_per_s:,.0f} tokens/s; "
            f"padding {self.padded.padding_share:.1%} and {self.packed.padding_share:.1%})"
        )


def _step_s(simulation: Simulation) -> float:
    return simulation.mean_step_s


def packed_prices(costs: CostTable) -> CostTable:
    """The table in which a micro-batch without padding costs what its sequences cost packed, for planning with.

    p2 b s^2 + (p1 l + p3) b s + p4, l being the length of the packed rows that take the config's capacity; configs
    whose packed times were not measured are left out. As many buckets as may be then come near to no padding.

    Raises:
      UserError: there are no packed times.
    """
    configs = []
    for cost in costs.fitted().configs:
        if cost.packed is not None:
            p1, p2, p3, p4 = cost.packed.coefficients
            length = max(point.length for point in cost.packed.points) if cost.packed.points else 0
            configs.append(
                dataclasses.replace(
                    cost,
                    capacity_tokens=cost.packed.capacity_tokens,
                    coefficients=(p2, 0.0, p1 * length + p3, 0.0, 0.0, p4),
                    points=(),
                    fit_error=None,
                )
            )
    if not configs:
        raise UserError(
            "the cost table has no packed times",
            key="training.batching",
            value="packed",
            expected="padded or auto, or a table that lobra profile measured with training.batching packed or auto",
        )
    return dataclasses.replace(costs, configs=tuple(configs))


def choose_batching(
    plan: Plan,
    costs: CostTable,
    workload: Workload,
    *,
    seed: int = 0,
    max_buckets: int,
    num_samples: int = NUM_SAMPLES,
) -> BatchingChoice:
    """Dispatches sampled batches both ways, by what is fitted of either. The same arguments give the same choice."""
    costs = costs.fitted()

    def sampled(batching: str) -> Simulation:
        return simulate(
            plan, costs, workload, num_steps=num_samples, seed=seed, max_buckets=max_buckets, batching=batching
        )

    reason = packed_problem(plan, costs, workload)
    return BatchingChoice(padded=sampled("padded"), packed=None if reason else sampled("packed"), reason=reason)


def packed_problem(plan: Plan, costs: CostTable, workload: Workload) -> str:
    """Why packed rows cannot serve this workload on this plan; empty where they can."""
    if any(group.smaller_capacities for group in plan.replicas):
        return "replicas of several remat policies run padded rows"
    if any(costs[group.config].packed is None for group in plan.replicas):
        return "the cost table has no packed times: lobra profile measures them with training.batching packed or auto"
    if workload.max_length > max(replica.longest for replica in packed_replicas(plan, costs)):
        return f"sequences of {workload.max_length} tokens fit no replica's packed rows"
    return ""
