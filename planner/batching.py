"""Padded or packed: which of the two finishes a run's steps sooner, by the cost table."""

from __future__ import annotations

import dataclasses

from planner.cost import CostTable
from planner.packed_dispatch import packed_replicas
from planner.plan import Plan
from planner.simulate import Simulation, simulate
from planner.workload import Workload

NUM_SAMPLES = 16
"""Batches that are dispatched both ways."""


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

    def __str__(self) -> str:
        if self.packed is None:
            return f"batching: padded ({self.reason})"
        return (
            f"batching: {self.batching} (over {len(self.padded.steps)} sampled batches a step takes "
            f"{self.padded.mean_step_s:.4g} s padded, {self.packed.mean_step_s:.4g} s packed; "
            f"{self.padded.tokens_per_s:,.0f} and {self.packed.tokens_per_s:,.0f} tokens/s; "
            f"padding {self.padded.padding_share:.1%} and {self.packed.padding_share:.1%})"
        )


def choose_batching(
    plan: Plan,
    costs: CostTable,
    workload: Workload,
    *,
    seed: int = 0,
    max_buckets: int,
    num_samples: int = NUM_SAMPLES,
) -> BatchingChoice:
    """Dispatches sampled batches both ways. The same arguments give the same choice."""

    def sampled(batching: str) -> Simulation:
        return simulate(
            plan, costs, workload, num_steps=num_samples, seed=seed, max_buckets=max_buckets, batching=batching
        )

    reason = packed_problem(plan, costs, workload)
    return BatchingChoice(padded=sampled("padded"), packed=None if reason else sampled("packed"), reason=reason)


def packed_problem(plan: Plan, costs: CostTable, workload: Workload) -> str:
    """Why packed rows cannot serve this workload on this plan; empty where they can."""
    if any(costs[group.config].packed is None for group in plan.replicas):
        return "the cost table has no packed times: lobra profile measures them with training.batching packed or auto"
    if workload.max_length > max(replica.longest for replica in packed_replicas(plan, costs)):
        return f"sequences of {workload.max_length} tokens fit no replica's packed rows"
    return ""
