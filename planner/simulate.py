"""Simulates training steps without devices: seeded batches through the real dispatch code, timed by the cost table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from planner.cost import CostTable
from planner.defaults import DEFAULT_DISPATCH_TIME_LIMIT_S, DEFAULT_MAX_BUCKETS
from planner.dispatch import dispatch
from planner.errors import UserError
from planner.evaluate import evaluate
from planner.packed_dispatch import METHOD, packed_dispatch
from planner.plan import Plan
from planner.problem import usable_config
from planner.timeline import Timeline, step_timeline
from planner.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """One step.

    Attributes:
      replica_s: seconds that each replica works, in the order of `plan.expanded()`.
      step_s: seconds until all have finished and the gradients are summed and applied.
      tokens: real tokens.
      padded_tokens: tokens with padding, as computed.
      gpu_seconds: step_s x the devices of the plan's replicas.
      bound_s: the dispatcher's bound on the slowest replica.
      solve_s: seconds that the dispatch took; not a part of step_s.
    """

    replica_s: tuple[float, ...]
    step_s: float
    tokens: int
    padded_tokens: int
    gpu_seconds: float
    bound_s: float
    solve_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """Simulated steps of one plan under one dispatch method; `timeline` is of the step nearest the median."""

    plan: Plan
    method: str
    seed: int
    steps: tuple[SimulatedStep, ...]
    timeline: Timeline

    def quantile_s(self, quantile: float) -> float:
        """Quantile of the step time, seconds."""
        return float(np.quantile([step.step_s for step in self.steps], quantile))

    @property
    def mean_step_s(self) -> float:
        return float(np.mean([step.step_s for step in self.steps]))

    @property
    def gpu_seconds(self) -> float:
        """Device-seconds of a step, mean."""
        return float(np.mean([step.gpu_seconds for step in self.steps]))

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that is padding, empty rows included."""
        return 1 - sum(step.tokens for step in self.steps) / sum(step.padded_tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second, padding not counted."""
        return sum(step.tokens for step in self.steps) / sum(step.step_s for step in self.steps)

    @property
    def replica_s(self) -> tuple[float, ...]:
        """Mean seconds that each replica works in a step."""
        return tuple(np.mean([step.replica_s for step in self.steps], axis=0).tolist())

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Share of each replica's time that it waits for the slowest, over all steps."""
        slowest = sum(max(step.replica_s) for step in self.steps)
        busy = np.sum([step.replica_s for step in self.steps], axis=0) / slowest
        return tuple(np.maximum(1 - busy, 0.0).tolist())

    @property
    def idle_share(self) -> float:
        """As `idle_shares`, over the devices of all replicas."""
        devices = [group.num_devices for group in self.plan.expanded()]
        return float(np.average(self.idle_shares, weights=devices))


def replica_names(plan: Plan) -> tuple[str, ...]:
    """ "replica 0 (tp8,pp1,none)" and so on, in the order of `plan.expanded()`."""
    return tuple(f"replica {index} {group.config}" for index, group in enumerate(plan.expanded()))


def check_plan(plan: Plan, costs: CostTable, workload: Workload | None = None) -> None:
    """Raises `UserError` where plan and cost table do not belong together: model, configs, capacities.

    With a workload, where its sequences are longer than the plan's buckets too.
    """
    if plan.model != costs.model:
        raise UserError(
            "plan of another model",
            file=plan.file,
            key="model",
            value=plan.model,
            expected=f"{costs.model}, as the costs",
        )
    for index, group in enumerate(plan.replicas):
        try:
            known = costs[group.config]
        except KeyError:
            configs = ", ".join(str(cost.config) for cost in costs.configs)
            raise UserError(
                f"no costs of {group.config}",
                file=plan.file,
                key=f"replicas[{index}]",
                expected=f"one of {configs}{_of(costs)}",
            ) from None
        if any(given > held for given, held in zip(group.capacities, known.capacities, strict=True)):
            raise UserError(
                f"more than {group.config} holds",
                file=plan.file,
                key=f"replicas[{index}].capacity_tokens",
                value=", ".join(map(str, group.capacities)),
                expected=f"at most {', '.join(map(str, known.capacities))}, as the cost table says{_of(costs)}",
            )
    if workload is not None and workload.max_length > plan.buckets[-1]:
        raise UserError(
            f"sequences of {workload.max_length} tokens are longer than the largest bucket",
            file=plan.file,
            key="buckets",
            value=plan.buckets[-1],
            expected=f"a bucket of at least {workload.max_length}{_of(workload)}",
        )


def _of(source: CostTable | Workload) -> str:
    return "" if source.file is None else f" ({source.file})"


def batch(workload: Workload, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(task ids [n], lengths [n]) of one step's batch: a function of (seed, step) alone."""
    return workload.sample(np.random.default_rng([seed, step]))


def simulate(
    plan: Plan,
    costs: CostTable,
    workload: Workload,
    *,
    num_steps: int,
    seed: int = 0,
    method: str = "balance",
    max_buckets: int = DEFAULT_MAX_BUCKETS,
    time_limit_s: float = DEFAULT_DISPATCH_TIME_LIMIT_S,
    batching: str = "padded",
    on_step: Callable[[SimulatedStep], None] | None = None,
) -> Simulation:
    """Dispatches `num_steps` sampled batches, padded or packed; `on_step` is called after each.

    The same arguments give the same batches, and the same times as long as no dispatch runs into `time_limit_s`.

    Raises:
      UserError: plan, costs and workload do not belong together, or a shape has no positive time.
    """
    if num_steps < 1:
        raise UserError("bad value", key="steps", value=num_steps, expected="an integer >= 1")
    check_plan(plan, costs, workload)
    if batching != "packed":
        for group in plan.replicas:
            usable_config(costs.of(group), plan.buckets, num_options=plan.row_options, file=costs.file)
    steps, timelines = [], []
    for index in range(num_steps):
        task_ids, lengths = batch(workload, seed, index)
        if batching == "packed":
            dispatched = packed_dispatch(plan, costs, lengths, task_ids)
        else:
            dispatched = dispatch(
                plan,
                costs,
                lengths,
                task_ids,
                method=method,
                max_buckets=max_buckets,
                time_limit_s=time_limit_s,
                ahead=True,
            )
        judged = evaluate(plan, costs, dispatched, lengths, task_ids)
        if judged.violations:
            raise RuntimeError(f"step {index}: {judged.violations[0]}")
        steps.append(
            SimulatedStep(
                replica_s=judged.replica_s,
                step_s=judged.step_s,
                tokens=judged.tokens,
                padded_tokens=judged.padded_tokens,
                gpu_seconds=judged.gpu_seconds,
                bound_s=dispatched.bound_s,
                solve_s=dispatched.solve_s,
            )
        )
        timelines.append(step_timeline(index, plan, costs, dispatched))
        if on_step is not None:
            on_step(steps[-1])
    median_s = float(np.median([step.step_s for step in steps]))
    return Simulation(
        plan=plan,
        method=METHOD if batching == "packed" else method,
        seed=seed,
        steps=tuple(steps),
        timeline=min(timelines, key=lambda timeline: abs(timeline.step_s - median_s)),
    )
