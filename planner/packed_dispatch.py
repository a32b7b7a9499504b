"""Per step, packed: which sequences lie in which row of which micro-batch of which replica.

At a time T every replica runs the packed micro-batches that end by T, full ones first, then a half, a quarter. T is
feasible where all sequences fit into their rows (`planner.row_fit`), rows of the replicas that take the shortest
sequences first: so long ones go where they must and short ones fill what is left; bisection finds the least. What a
micro-batch takes also depends on how long its sequences are, which is known only afterwards: a second round starts from
what the first one found. Looks at no clock.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.config_cost import ConfigCost, PackedCost
from planner.cost import CostTable
from planner.dispatch import Dispatch, MicroBatch
from planner.errors import UserError
from planner.packing import ROW_ALIGN, packed_shapes
from planner.plan import Plan
from planner.row_fit import fit

METHOD = "packed"

ROUNDS = 2
"""Bisections, each with the replicas' share of long sequences as the one before it found them."""

PRECISION = 0.005
"""Bisection ends when the least feasible time is known to this share."""

GROWTH = 1.5
"""A time that is not feasible is followed by so many times it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedReplica:
    """What one replica runs: its packed shapes (rows, length), largest first, and what they cost."""

    cost: ConfigCost
    shapes: tuple[tuple[int, int], ...]

    @property
    def packed(self) -> PackedCost:
        assert self.cost.packed is not None, "checked by packed_replicas"
        return self.cost.packed

    @property
    def longest(self) -> int:
        return max(length for _, length in self.shapes)

    def shape_s(self, shape: tuple[int, int], squares_per_token: float) -> float:
        rows, length = shape
        return self.packed.micro_batch_s(rows, length, squares_per_token * rows * length)

    def shapes_within(self, seconds: float, squares_per_token: float) -> list[tuple[int, int]]:
        """Micro-batches that end within `seconds` of the step's start, as many full ones as there is time for."""
        left_s = seconds - self.cost.fixed_s
        largest_s, chosen = 0.0, []
        for shape in self.shapes:
            slot_s = self.shape_s(shape, squares_per_token)
            filling_s = (self.cost.config.pp - 1) * max(largest_s, slot_s)
            count = max(math.floor((left_s - filling_s) / slot_s), 0)
            if count > 0:
                largest_s = max(largest_s, slot_s)
                left_s -= count * slot_s
                chosen += [shape] * count
        return chosen


class Slot(NamedTuple):
    """The number-th micro-batch of a replica, of this shape."""

    replica: int
    number: int
    shape: tuple[int, int]


def packed_replicas(plan: Plan, costs: CostTable) -> list[PackedReplica]:
    """Each replica of a plan, in its order.

    Raises:
      UserError: the cost table lacks a config of the plan, or its packed times.
    """
    out: list[PackedReplica] = []
    for group in plan.replicas:
        cost = next((known for known in costs.configs if known.config == group.config), None)
        if cost is None or cost.packed is None:
            raise UserError(
                f"packed rows run with one policy, not {group.config}"
                if group.smaller_capacities
                else f"the cost table has no packed times of {group.config}",
                key="training.batching",
                expected="padded, or a cost table that lobra profile measured with training.batching: packed",
            )
        capacity = min(group.capacity_tokens, cost.packed.capacity_tokens)
        longest = max((bucket for bucket in plan.buckets if bucket <= capacity), default=capacity)
        shapes = packed_shapes(capacity, longest, num_options=plan.row_options)
        out += [PackedReplica(cost=cost, shapes=shapes)] * group.count
    return out


def packed_dispatch(plan: Plan, costs: CostTable, lengths: np.ndarray, task_ids: np.ndarray) -> Dispatch:
    """Serves every sequence exactly once, whole, in packed rows of a replica that takes it.

    Args:
      lengths: [n] tokens of each sequence.
      task_ids: [n] task of each sequence.

    Raises:
      UserError: a sequence longer than every replica's packed rows, or no packed times of a config of the plan.
    """
    started = time.perf_counter()
    replicas = packed_replicas(plan, costs)
    lengths, task_ids = np.asarray(lengths, dtype=np.int64), np.asarray(task_ids, dtype=np.int64)
    _check_lengths(replicas, lengths)
    bound_s = least_s(replicas, lengths)
    work = _best(replicas, lengths, task_ids, bound_s) if len(lengths) else [[] for _ in replicas]
    predicted_s = tuple(_replica_s(replica, own) for replica, own in zip(replicas, work, strict=True))
    return Dispatch(
        replicas=tuple(tuple(own) for own in work),
        predicted_s=predicted_s,
        bound_s=min(bound_s, max(predicted_s)),
        method=METHOD,
        solve_s=time.perf_counter() - started,
        stopped_early=False,
    )


def _check_lengths(replicas: Sequence[PackedReplica], lengths: np.ndarray) -> None:
    longest = max(replica.longest for replica in replicas)
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"packed_dispatch: a sequence of {int(lengths.min())} tokens, expected >= 1")
    if len(lengths) and lengths.max() > longest:
        raise UserError(
            f"a sequence of {int(lengths.max())} tokens fits no replica's packed rows",
            expected=f"at most {longest} tokens, or training.batching: padded",
        )


def _replica_s(replica: PackedReplica, micro_batches: Sequence[MicroBatch]) -> float:
    return replica.cost.slots_s([micro_batch.slot_s(replica.cost) for micro_batch in micro_batches])


def least_s(replicas: Sequence[PackedReplica], lengths: np.ndarray) -> float:
    """Seconds that the slowest replica takes at least: sequences may be cut up, rows are full, nothing is fixed.

    minimise T with x_kj >= 0 sequences of length group j on replicas of kind k (n_k of them):
    sum_k x_kj = N_j, and sum_j (tokens_j s_k + squares_j p2_k) x_kj <= n_k T, s_k the least seconds a token there.
    Lengths are rounded down to groups.
    """
    from scipy.optimize import linprog  # SciPy is loaded only where rows are packed
    from scipy.sparse import coo_array

    if len(lengths) == 0:
        return 0.0
    values, counts = np.unique(np.maximum(lengths // ROW_ALIGN * ROW_ALIGN, 1), return_counts=True)
    kinds = list(dict.fromkeys(replicas))
    rows, columns, data = [], [], []
    column = 0
    for number, kind in enumerate(kinds):
        token_s = min(kind.shape_s(shape, 0.0) / (shape[0] * shape[1]) for shape in kind.shapes)
        for group, value in enumerate(values.tolist()):
            if value > kind.longest:
                continue
            seconds = token_s * value + kind.packed.coefficients[1] * value**2
            rows += [group, len(values) + number]
            columns += [column, column]
            data += [1.0, seconds]
            column += 1
    num_groups = len(values)
    matrix = coo_array((data, (rows, columns)), shape=(num_groups + len(kinds), column + 1)).tolil()
    for number, kind in enumerate(kinds):
        matrix[num_groups + number, column] = -replicas.count(kind)
    matrix = matrix.tocsr()
    objective = np.zeros(column + 1)
    objective[-1] = 1.0
    found = linprog(
        objective,
        A_ub=matrix[num_groups:],
        b_ub=np.zeros(len(kinds)),
        A_eq=matrix[:num_groups],
        b_eq=counts,
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"packed dispatch, bound: {found.message}")
    return float(found.fun)


def _best(
    replicas: Sequence[PackedReplica], lengths: np.ndarray, task_ids: np.ndarray, bound_s: float
) -> list[list[MicroBatch]]:
    ratios = [float(np.sum(lengths**2) / np.sum(lengths))] * len(replicas)
    best: tuple[float, list[list[MicroBatch]]] | None = None
    for _ in range(ROUNDS):
        work = _bisect(replicas, ratios, lengths, task_ids, bound_s)
        slowest_s = max(_replica_s(replica, own) for replica, own in zip(replicas, work, strict=True))
        if best is None or slowest_s < best[0]:
            best = slowest_s, work
        ratios = [
            sum(m.squares for m in own) / sum(m.rows * m.length for m in own) if own else ratio
            for own, ratio in zip(work, ratios, strict=True)
        ]
    assert best is not None, "there is a round"
    return best[1]


def _bisect(
    replicas: Sequence[PackedReplica],
    ratios: Sequence[float],
    lengths: np.ndarray,
    task_ids: np.ndarray,
    bound_s: float,
) -> list[list[MicroBatch]]:
    """Micro-batches of each replica at the least feasible time."""
    order = np.lexsort((task_ids, -lengths))
    by_longest = sorted(range(len(replicas)), key=lambda index: replicas[index].longest)

    def attempt(seconds: float) -> dict[Slot, list[tuple[int, int]]] | None:
        """(sequence, row of the micro-batch) of each micro-batch's sequences; None where they do not fit."""
        rows = [
            (Slot(replica, number, shape), row)
            for replica in by_longest
            for number, shape in enumerate(replicas[replica].shapes_within(seconds, ratios[replica]))
            for row in range(shape[0])
        ]
        placed = fit(lengths[order], task_ids[order], [slot.shape[1] for slot, _ in rows])
        if placed is None:
            return None
        chosen: dict[Slot, list[tuple[int, int]]] = {}
        for index, at in zip(order.tolist(), placed, strict=True):
            slot, row = rows[at]
            chosen.setdefault(slot, []).append((index, row))
        return chosen

    low_s = high_s = bound_s
    found = attempt(high_s)
    while found is None:
        low_s, high_s = high_s, high_s * GROWTH
        found = attempt(high_s)
    while high_s - low_s > PRECISION * high_s:
        middle_s = (low_s + high_s) / 2
        trial = attempt(middle_s)
        if trial is None:
            low_s = middle_s
        else:
            found, high_s = trial, middle_s
    work: list[list[MicroBatch]] = [[] for _ in replicas]
    for slot, own in found.items():
        shapes = replicas[slot.replica].shapes
        smaller = shapes[shapes.index(slot.shape) :]
        sequences, places = (list(column) for column in zip(*own, strict=True))
        work[slot.replica].append(_smallest(smaller, np.array(sequences), places, lengths, task_ids))
    for replica, micro_batches in zip(replicas, work, strict=True):
        micro_batches.sort(key=lambda m: (-m.slot_s(replica.cost), m.sequences))
    return work


def _smallest(
    shapes: Sequence[tuple[int, int]],
    own: np.ndarray,
    places: Sequence[int],
    lengths: np.ndarray,
    task_ids: np.ndarray,
) -> MicroBatch:
    """The smallest of the shapes, largest first, that holds these sequences, longest first: at `places` the first."""
    shape = shapes[0]
    for rows, length in reversed(shapes[1:]):
        found = fit(lengths[own], task_ids[own], [length] * rows)
        if found is not None:
            shape, places = (rows, length), found
            break
    by_row = sorted(range(len(own)), key=lambda i: (places[i], i))
    return MicroBatch(
        rows=shape[0],
        length=shape[1],
        sequences=tuple(int(own[i]) for i in by_row),
        places=tuple(places[i] for i in by_row),
        squares=int(np.sum(lengths[own] ** 2)),
    )
