"""Says why a plan takes the time it takes: where each replica's time goes, what limits the step, what else there was.

Plans are compared on one batch, the expected one: as many sequences of each bucket as `planner.problem` plans for, each
as long as its bucket, dispatched by the code that training uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from planner.config_cost import ConfigCost
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.dispatch import MicroBatch, dispatch
from planner.evaluate import prediction_violations
from planner.other_plans import BEST, Alternative, left_out, other_plans
from planner.plan import Plan
from planner.problem import PlanningProblem, build_problem
from planner.simulate import check_plan, replica_names
from planner.workload import Workload

TOGETHER = 0.05
"""Replicas that finish within this share of the slowest count as finishing together."""

MOSTLY = 0.5
"""A part of a replica's time larger than this share is named as what fills it."""

WORTH_SAYING = 0.02
"""Smaller shares of a step are not mentioned."""

NEAR = 0.03
"""A step that differs from the plan's own prediction by more than this share is not of the same costs and lengths."""

NO_DECIMALS = 99.95
"""From here three digits have no decimals."""

DISPATCH_TIME_LIMIT_S = 30.0
"""A safety net, see `planner.dispatch.dispatch`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaTime:
    """Where one replica's seconds of a step go.

    Attributes:
      name: as everywhere, "replica 0 (tp8,pp1,none)".
      config: "(tp8,pp1,none)".
      num_devices: its devices.
      capacity_tokens: most padded tokens of a micro-batch.
      seconds: all of its time, 0 without work.
      by_bucket: padded length -> seconds of its micro-batches.
      sequences: padded length -> sequences.
      num_micro_batches: how many it runs.
      filling_s: seconds the pipeline takes to fill and drain.
      fixed_s: seconds that a step costs whatever it holds.
    """

    name: str
    config: str
    num_devices: int
    capacity_tokens: int
    seconds: float
    by_bucket: dict[int, float]
    sequences: dict[int, int]
    num_micro_batches: int
    filling_s: float
    fixed_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Everything that `lobra explain` shows.

    Attributes:
      plan: the plan explained.
      step_s: seconds of a step on the expected batch, `overhead_s` included.
      bound_s: no plan on these devices takes less (proven), None where it was not computed.
      overhead_s: seconds of every step for summing gradients and updating adapters.
      counts: padded length -> sequences of the expected batch.
      replicas: where each replica's time goes.
      limits: sentences on what limits the step.
      doubts: sentences on what in the plan's own prediction does not agree with itself, or with costs and lengths.
      alternatives: other plans on the same batch, fastest first; those on other devices last.
      num_kept_in: kinds of replica that were not left out in turn.
      fitted_s: where the plan's micro-batches were timed (`lobra profile --plan`), seconds of a step by what is fitted,
        which is what plans are compared by, and bounds are of; else None.
    """

    plan: Plan
    step_s: float
    bound_s: float | None
    overhead_s: float
    counts: dict[int, int]
    replicas: tuple[ReplicaTime, ...]
    limits: tuple[str, ...]
    doubts: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    num_kept_in: int = 0
    fitted_s: float | None = None

    @property
    def compared_s(self) -> float:
        """Seconds of a step as those of other plans are told."""
        return self.step_s if self.fitted_s is None else self.fitted_s

    @property
    def gap(self) -> float | None:
        """Share of the step time that a better plan could save at the most."""
        return None if self.bound_s is None else max(0.0, (self.compared_s - self.bound_s) / self.compared_s)

    @property
    def slowest_s(self) -> float:
        return max(replica.seconds for replica in self.replicas)


def explain(
    plan: Plan,
    costs: CostTable,
    workload: Workload,
    *,
    compare: bool = True,
    time_limit_s: float = 10.0,
    on_progress: Callable[[str], None] | None = None,
) -> Explanation:
    """Explains a plan; with `compare` also plans anew in other ways, all of them in about `time_limit_s`.

    Raises:
      UserError: plan, costs and lengths do not belong together.
    """
    check_plan(plan, costs, workload)
    problem = build_problem(
        workload,
        costs,
        plan.num_devices,
        buckets=plan.buckets,
        row_options=plan.row_options,
        constraints=Constraints(mix_remats=any(group.smaller_capacities for group in plan.replicas)),
        time_limit_s=time_limit_s,
    )
    replicas, share_bound_s = replica_times(plan, costs, problem)
    step_s = max(replica.seconds for replica in replicas) + costs.step_overhead_s
    alternatives, bound_s = (), None

    def seconds_of(other: Plan, changed: PlanningProblem) -> float:
        times, _ = replica_times(other, changed.costs, changed)
        return max(replica.seconds for replica in times) + changed.costs.step_overhead_s

    fitted_s = seconds_of(plan, problem) if costs.is_timed else None
    compared_s = step_s if fitted_s is None else fitted_s
    if compare:
        found = other_plans(plan, compared_s, problem, workload, seconds_of, on_progress or (lambda _: None))
        bound_s = next((a.plan.predicted.bound_s for a in found if a.change == BEST and a.plan is not None), None)
        alternatives = tuple(sorted(found, key=lambda a: (not a.same_devices, a.step_s or float("inf"))))
    least_s = share_bound_s + costs.step_overhead_s if fitted_s is None else 0.0  # of timed micro-batches
    doubts = _doubts(plan, compared_s, least_s)
    proven_s = bound_s
    if proven_s is None and plan.predicted is not None and not doubts:
        proven_s = plan.predicted.bound_s
    if proven_s is not None and fitted_s is None:  # it holds for these replicas, as for all others
        share_bound_s = min(max(share_bound_s, proven_s - costs.step_overhead_s), step_s - costs.step_overhead_s)
    return Explanation(
        plan=plan,
        step_s=step_s,
        bound_s=None if bound_s is None else min(bound_s, compared_s),
        overhead_s=costs.step_overhead_s,
        counts={length: count for length, count in zip(problem.buckets, problem.counts, strict=True) if count},
        replicas=replicas,
        limits=limits(plan, replicas, costs.step_overhead_s, share_bound_s),
        doubts=doubts,
        alternatives=alternatives,
        num_kept_in=len({group.config for group in plan.replicas}) - len(left_out(plan)) if compare else 0,
        fitted_s=fitted_s,
    )


def replica_times(plan: Plan, costs: CostTable, problem: PlanningProblem) -> tuple[tuple[ReplicaTime, ...], float]:
    """(where each replica's time goes on the expected batch, dispatched as a step of a run is; proven least seconds of
    the slowest replica, whatever the share-out)."""
    lengths = np.repeat(np.asarray(problem.buckets), problem.counts)
    dispatched = dispatch(
        plan,
        costs,
        lengths,
        np.zeros_like(lengths),
        method="balance",
        max_buckets=len(plan.buckets),
        time_limit_s=DISPATCH_TIME_LIMIT_S,
        ahead=True,
    )
    groups = plan.expanded()
    times = tuple(
        _replica_time(name, costs.of(group), group.capacity_tokens, micro_batches)
        for name, group, micro_batches in zip(replica_names(plan), groups, dispatched.replicas, strict=True)
    )
    return times, dispatched.bound_s


def _replica_time(
    name: str, cost: ConfigCost, capacity_tokens: int, micro_batches: Sequence[MicroBatch]
) -> ReplicaTime:
    by_bucket: dict[int, float] = {}
    sequences: dict[int, int] = {}
    slots = [cost.micro_batch_s(micro.rows, micro.length) for micro in micro_batches]
    for micro, slot_s in zip(micro_batches, slots, strict=True):
        by_bucket[micro.length] = by_bucket.get(micro.length, 0.0) + slot_s
        sequences[micro.length] = sequences.get(micro.length, 0) + len(micro.sequences)
    return ReplicaTime(
        name=name,
        config=str(cost.config),
        num_devices=cost.config.num_devices,
        capacity_tokens=capacity_tokens,
        seconds=cost.replica_s((micro.rows, micro.length) for micro in micro_batches),
        by_bucket=dict(sorted(by_bucket.items())),
        sequences=dict(sorted(sequences.items())),
        num_micro_batches=len(micro_batches),
        filling_s=(cost.config.pp - 1) * max(slots, default=0.0),
        fixed_s=cost.fixed_s if slots else 0.0,
    )


def limits(plan: Plan, replicas: Sequence[ReplicaTime], overhead_s: float, share_bound_s: float) -> tuple[str, ...]:
    """Sentences on what limits the step, the most important first; no share-out takes less than `share_bound_s`."""
    slowest = max(replicas, key=lambda replica: replica.seconds)
    step_s = slowest.seconds + overhead_s
    used = sum(replica.num_devices for replica in replicas)
    busy = sum(replica.num_devices * replica.seconds for replica in replicas)
    waiting = 1 - busy / (used * slowest.seconds)
    said = [_who_limits(slowest, replicas, waiting, share_bound_s), *_what_fills(slowest, replicas, waiting)]
    if used < plan.num_devices:
        said.append(f"{plan.num_devices - used} of {plan.num_devices} devices hold no replica.")
    without = [replica.name for replica in replicas if replica.seconds == 0]
    if without:
        said.append(f"No sequence of this batch goes to {', '.join(without)}.")
    if slowest.filling_s > WORTH_SAYING * step_s:
        said.append(
            f"Filling and draining the pipeline of {slowest.name} takes {in_seconds(slowest.filling_s)}: fewer stages, "
            "or more and smaller micro-batches, would shorten that."
        )
    if overhead_s > WORTH_SAYING * step_s:
        said.append(
            f"Every step spends {in_seconds(overhead_s)} ({overhead_s / step_s:.0%}) on summing gradients over the "
            "replicas and updating the adapters, whatever the plan."
        )
    return tuple(said)


def _doubts(plan: Plan, step_s: float, least_s: float) -> tuple[str, ...]:
    """`least_s` is proven: no share-out of the batch over these replicas gives a shorter step."""
    said = [f"In the plan, {violation}." for violation in prediction_violations(plan)]
    made = plan.predicted
    if made is not None and abs(step_s - made.step_s) > NEAR * step_s:
        differs = (
            f"The plan predicts {in_seconds(made.step_s)} a step, these costs and lengths give {in_seconds(step_s)} "
            "with padded rows"
        )
        others = "it was made for others, for packed rows, or changed by hand"
        if made.step_s < least_s:
            said.append(f"{differs} and, proven, no less than {in_seconds(least_s)}: {others}.")
        elif made.step_s < step_s:
            said.append(
                f"{differs}: either {others}, or dispatch, which has less time than the planner had, shares this batch "
                "out worse."
            )
        else:
            said.append(f"{differs}: {others}.")
    return tuple(said)


def three_digits(seconds: float) -> str:
    """As many decimals as three digits leave, no power of ten where there are more."""
    return f"{seconds:.0f}" if seconds >= NO_DECIMALS else f"{seconds:#.3g}"


def in_seconds(seconds: float) -> str:
    """Three digits and the unit."""
    return f"{three_digits(seconds)} s"


def _who_limits(slowest: ReplicaTime, replicas: Sequence[ReplicaTime], waiting: float, share_bound_s: float) -> str:
    last = in_seconds(slowest.seconds)
    if len(replicas) == 1:
        return f"{slowest.name} does all the work and is the step: {last}."
    waits = f"devices with a replica wait {waiting:.1%} of the time for the last one, {slowest.name}, done after {last}"
    if waiting <= TOGETHER:
        gain = 1 - share_bound_s / slowest.seconds
        return (
            f"The work is in balance: {waits}. Sharing it out otherwise over these replicas could save {gain:.1%} of "
            "that at the most (proven)."
        )
    together = [replica for replica in replicas if replica.seconds >= (1 - TOGETHER) * slowest.seconds]
    others = [replica for replica in replicas if replica not in together]
    following = max(others, key=lambda replica: replica.seconds)
    return (
        f"The work is not in balance: {waits}. {len(together)} of {len(replicas)} replicas finish last; the next, "
        f"{following.name}, needs {in_seconds(following.seconds)}."
    )


def _what_fills(slowest: ReplicaTime, replicas: Sequence[ReplicaTime], waiting: float) -> list[str]:
    """Whether the slowest replica is held up by sequences that no other kind of replica can hold."""
    if slowest.seconds == 0:
        return []
    others = [replica for replica in replicas if replica.config != slowest.config]
    elsewhere = max((replica.capacity_tokens for replica in others), default=0)
    stuck_s = sum(seconds for length, seconds in slowest.by_bucket.items() if length > elsewhere)
    if others and stuck_s > MOSTLY * slowest.seconds:
        said = (
            f"{stuck_s / slowest.seconds:.0%} of the time of {slowest.name} goes to sequences over {elsewhere} tokens, "
            "which no other kind of replica here can hold"
        )
        num_holding = sum(replica.capacity_tokens > elsewhere for replica in replicas)
        if num_holding > 1:
            return [f"{said}; {num_holding} of its kind share them."]
        if waiting <= TOGETHER:
            return [f"{said}."]
        return [
            f"{said}, so they cannot be moved away. A second replica that holds them, a faster one, or a lower context "
            "length would shorten the step."
        ]
    top = max(slowest.by_bucket, key=slowest.by_bucket.__getitem__)
    share = slowest.by_bucket[top] / slowest.seconds
    if share > MOSTLY:
        return [f"{share:.0%} of the time of {slowest.name} goes to sequences padded to {top} tokens."]
    return []
