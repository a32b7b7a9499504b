"""Judges plans and dispatches from the cost table's numbers alone. Shares no code with the models that made them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from planner.cost import CostTable
from planner.dispatch import Dispatch, MicroBatch
from planner.packing import MAX_SEGMENTS, MAX_TASKS_OF_A_ROW, MIN_SEGMENTS, TOKENS_A_SEGMENT
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.workload import Workload

RELATIVE_TOLERANCE = 1e-6
"""How far a dispatch's own prediction may be from the evaluator's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a step costs.

    Attributes:
      replica_s: seconds of each replica, in plan order.
      step_s: the slowest replica and the step's overhead.
      gpu_seconds: step_s times the devices that the plan's replicas hold.
      tokens: tokens of all sequences; padded_tokens: of all micro-batches, empty rows included.
      padding_share: 1 - tokens / padded_tokens.
      idle_share: share of those devices' time, overhead apart, that they wait for the slowest replica.
      violations: what is wrong, one line each; empty when all is right.
    """

    replica_s: tuple[float, ...]
    step_s: float
    gpu_seconds: float
    tokens: int
    padded_tokens: int
    padding_share: float
    idle_share: float
    violations: tuple[str, ...]


def evaluate(
    plan: Plan, costs: CostTable, dispatch: Dispatch, lengths: np.ndarray, task_ids: np.ndarray | None = None
) -> Evaluation:
    """Times `dispatch` of sequences of `lengths` [n] tokens on `plan` and lists every violation.

    `task_ids` [n] tell whether packed rows hold more tasks than they may; without them that is not looked at.
    """
    groups = [group for group in plan.replicas for _ in range(group.count)]
    violations = _replica_violations(plan, costs)
    if len(dispatch.replicas) != len(groups):
        violations.append(f"dispatch has {len(dispatch.replicas)} replicas, the plan {len(groups)}")
    served = np.zeros(len(lengths), dtype=np.int64)
    seconds, padded = [], 0
    for index, (group, batches) in enumerate(zip(groups, dispatch.replicas, strict=False)):
        times = [
            _slot_s(costs, group, batch.rows, batch.length)
            if batch.places is None
            else _packed_slot_s(costs, group, batch.rows, batch.length, [lengths[i] for i in batch.sequences])
            for batch in batches
        ]
        seconds.append(_replica_s(costs, group, times))
        for number, batch in enumerate(batches):
            name = f"replica {index} {group.config} micro-batch {number}"
            if batch.places is None:
                violations += _batch_violations(name, plan, group, batch.rows, batch.length, batch.sequences, lengths)
            else:
                violations += _packed_violations(name, group, batch, lengths, task_ids)
            padded += batch.rows * batch.length
            for sequence in batch.sequences:
                if 0 <= sequence < len(lengths):
                    served[sequence] += 1
        if any(later > earlier * (1 + RELATIVE_TOLERANCE) for earlier, later in itertools.pairwise(times)):
            violations.append(f"replica {index} {group.config}: micro-batches are not most expensive first")
    violations += [f"sequence {int(i)} is served {int(served[i])} times" for i in np.flatnonzero(served != 1)]
    violations += _prediction_violations(dispatch, seconds)
    slowest = max(seconds, default=0.0)
    devices = [group.config.tp * group.config.pp for group in groups]
    busy = sum(d * s for d, s in zip(devices, seconds, strict=False))
    tokens = int(np.sum(lengths))
    return Evaluation(
        replica_s=tuple(seconds),
        step_s=slowest + costs.step_overhead_s,
        gpu_seconds=(slowest + costs.step_overhead_s) * sum(devices),
        tokens=tokens,
        padded_tokens=padded,
        padding_share=1 - tokens / padded if padded else 0.0,
        idle_share=1 - busy / (slowest * sum(devices)) if slowest > 0 else 0.0,
        violations=tuple(violations),
    )


def plan_violations(plan: Plan, costs: CostTable, workload: Workload) -> tuple[str, ...]:
    """What stops `plan` from serving any batch of `workload` at the capacities of `costs`, and what its own numbers
    contradict; empty when nothing does."""
    violations = [*_replica_violations(plan, costs), *prediction_violations(plan)]
    longest = max(length for task in workload.tasks for length in task.lengths)
    bucket = next((s for s in plan.buckets if s >= longest), None)
    if bucket is None:
        violations.append(f"sequences of {longest} tokens exceed the largest bucket, {max(plan.buckets)}")
    elif all(group.capacity_tokens < bucket for group in plan.replicas):
        violations.append(f"sequences of {longest} tokens, padded to {bucket}, fit no replica")
    return tuple(violations)


def prediction_violations(plan: Plan) -> tuple[str, ...]:
    """Where the numbers that a plan predicts contradict each other or its replicas."""
    made = plan.predicted
    if made is None:
        return ()
    out = []
    if not 0 < made.step_s < float("inf"):
        return (f"predicted step_s is {made.step_s:.6g} s, no time",)
    if made.bound_s > made.step_s * (1 + RELATIVE_TOLERANCE):
        out.append(f"predicted bound_s, {made.bound_s:.6g} s, exceeds step_s, {made.step_s:.6g} s")
    gap = (made.step_s - made.bound_s) / made.step_s
    if abs(made.gap - gap) > RELATIVE_TOLERANCE:
        out.append(f"predicted gap is {made.gap:.6g}, but step_s and bound_s make {gap:.6g}")
    used = sum(group.count * group.config.tp * group.config.pp for group in plan.replicas)
    if abs(made.gpu_seconds - made.step_s * used) > RELATIVE_TOLERANCE * made.step_s * used:
        out.append(
            f"predicted gpu_seconds are {made.gpu_seconds:.6g}, but {used} devices for {made.step_s:.6g} s make "
            f"{made.step_s * used:.6g}"
        )
    return tuple(out)


def _replica_violations(plan: Plan, costs: CostTable) -> list[str]:
    out = []
    used = sum(group.count * group.config.tp * group.config.pp for group in plan.replicas)
    if used > plan.num_devices:
        out.append(f"replicas hold {used} devices of {plan.num_devices}")
    for group in plan.replicas:
        for policy, given in _policies(group).items():
            held = [cost.capacity_tokens for cost in costs.configs if _key(cost.config) == policy]
            name = "(tp{},pp{},{})".format(*policy)
            if not held:
                out.append(f"{name} is not in the cost table")
            elif given > held[0]:
                out.append(f"{name} is given {given} tokens of {held[0]}")
    if costs.model != plan.model:
        out.append(f"plan is for model {plan.model}, cost table for {costs.model}")
    return out


def _batch_violations(
    name: str,
    plan: Plan,
    group: ReplicaGroup,
    rows: int,
    length: int,
    sequences: tuple[int, ...],
    lengths: np.ndarray,
) -> list[str]:
    out = []
    if not sequences:
        out.append(f"{name} is empty")
    if len(sequences) > rows:
        out.append(f"{name} holds {len(sequences)} sequences in {rows} rows")
    capacity = min((held for held in _policies(group).values() if held >= length), default=group.capacity_tokens)
    if rows * length > capacity:
        out.append(f"{name} of {rows} x {length} tokens exceeds the capacity {capacity}")
    if length not in plan.buckets:
        out.append(f"{name}: {length} is not a bucket of the plan")
    full = capacity // length
    if rows not in {-(-full // 2**halvings) for halvings in range(plan.row_options)}:
        out.append(f"{name}: {rows} rows of {length} tokens are not on the lattice")
    for sequence in sequences:
        if not 0 <= sequence < len(lengths):
            out.append(f"{name}: there is no sequence {sequence}")
        elif lengths[sequence] > length:
            out.append(f"{name}: sequence {sequence} of {int(lengths[sequence])} tokens is cut to {length}")
    return out


def _packed_violations(
    name: str, group: ReplicaGroup, batch: MicroBatch, lengths: np.ndarray, task_ids: np.ndarray | None
) -> list[str]:
    out = []
    if batch.rows * batch.length > group.capacity_tokens:
        out.append(f"{name} of {batch.rows} x {batch.length} tokens exceeds the capacity {group.capacity_tokens}")
    if batch.places is None or len(batch.places) != len(batch.sequences) or not batch.sequences:
        return [*out, f"{name} does not say where its sequences lie, or is empty"]
    rows: dict[int, list[int]] = {}
    for sequence, place in zip(batch.sequences, batch.places, strict=True):
        rows.setdefault(place, []).append(sequence)
    for row, own in rows.items():
        if not 0 <= row < batch.rows:
            out.append(f"{name}: there is no row {row}")
        tokens = sum(int(lengths[i]) for i in own)
        if tokens > batch.length:
            out.append(f"{name}: row {row} holds {tokens} tokens of {batch.length}")
        if len(own) + 1 > min(max(batch.length // TOKENS_A_SEGMENT, MIN_SEGMENTS), MAX_SEGMENTS):
            out.append(f"{name}: row {row} holds {len(own)} sequences")
        if task_ids is not None and len({int(task_ids[i]) for i in own}) > MAX_TASKS_OF_A_ROW:
            out.append(f"{name}: row {row} holds more than {MAX_TASKS_OF_A_ROW} tasks")
    return out


def _prediction_violations(dispatch: Dispatch, seconds: list[float]) -> list[str]:
    out = []
    for index, (claimed, found) in enumerate(zip(dispatch.predicted_s, seconds, strict=False)):
        if abs(claimed - found) > RELATIVE_TOLERANCE * max(found, 1e-12):
            out.append(f"replica {index} takes {found:.6g} s, predicted {claimed:.6g} s")
    slowest = max(seconds, default=0.0)
    if dispatch.bound_s > slowest * (1 + RELATIVE_TOLERANCE):
        out.append(f"bound {dispatch.bound_s:.6g} s exceeds the slowest replica, {slowest:.6g} s")
    return out


def _policies(group: ReplicaGroup) -> dict[tuple[int, int, str], int]:
    """The (tp, pp, remat) that a replica's micro-batches run with and what each holds, ascending."""
    remats = group.config.remat.split("+")
    held = (*group.smaller_capacities, group.capacity_tokens)
    return {(group.config.tp, group.config.pp, remat): tokens for remat, tokens in zip(remats, held, strict=True)}


def _key(config: ParallelConfig) -> tuple[int, int, str]:
    return config.tp, config.pp, config.remat


def _slot_s(costs: CostTable, group: ReplicaGroup, rows: int, length: int) -> float:
    policies = _policies(group)
    at = next((key for key, held in policies.items() if held >= length), list(policies)[-1])
    for cost in costs.configs:
        if _key(cost.config) == at:
            measured = [time.seconds for time in cost.timed if (time.rows, time.length) == (rows, length)]
            if measured:
                return measured[-1]
            squared, linear, constant = (
                np.asarray(cost.coefficients, dtype=float).reshape(3, 2) @ [rows, 1.0]
            ).tolist()
            return squared * length**2 + linear * length + constant
    return float("nan")


def _packed_slot_s(costs: CostTable, group: ReplicaGroup, rows: int, length: int, own: list[int]) -> float:
    for cost in costs.configs:
        if cost.config == group.config and cost.packed is not None:
            terms = [rows * length**2, sum(int(n) ** 2 for n in own), rows * length, 1.0]
            return float(np.dot(cost.packed.coefficients, terms))
    return float("nan")


def _replica_s(costs: CostTable, group: ReplicaGroup, slots: list[float]) -> float:
    if not slots:
        return 0.0
    own = _policies(group)
    fixed = [cost.fixed_s for cost in costs.configs if _key(cost.config) in own]
    return max(fixed, default=0.0) + sum(slots) + (group.config.pp - 1) * max(slots)
