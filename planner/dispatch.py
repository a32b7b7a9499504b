"""Per step: which sequences go to which replica, and the micro-batches they become there.

Sequences are padded to a few of the plan's buckets (`planner.bucketing`), counted by bucket, shared out over the
replicas by a method, and dealt out to them task by task:

    balance   least time of the slowest replica: a heuristic that is always valid (`planner.balance`), then SCIP from
              there (`planner.balance_model`)
    group     each bucket to the replicas of the smallest capacity that fits it (LobRA's length-based dispatch)
    uniform   each bucket in equal numbers to all replicas that fit it, whatever their speed

A resumed run must dispatch its steps as the first run did, so what ends the search is counted, not timed: rounds of
local search, nodes of SCIP, the gap. The time limit is a safety net over these; a dispatch that it cut says so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from planner import balance
from planner.balance import Tables
from planner.bucketing import choose_buckets
from planner.cost import CostTable
from planner.errors import UserError
from planner.lattice import rows_for
from planner.plan import Plan
from planner.problem import UsableConfig, usable_config

METHODS = ("balance", "group", "uniform")

GAP_LIMIT = 0.01
"""Balance stops when the slowest replica is within this share of the proven bound."""

NODE_LIMIT = 200
"""Branch-and-bound nodes of SCIP for one dispatch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """`rows` x `length` padded tokens; `sequences` index the step's sequence arrays, at most `rows` of them."""

    rows: int
    length: int
    sequences: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
    """One step's work.

    Attributes:
      replicas: for each replica, in the order of `plan.expanded()`, its micro-batches, most expensive first; may be ().
      predicted_s: seconds of each replica by the cost table, without the step's overhead.
      bound_s: proven least seconds of the slowest replica for this step's buckets, whatever the dispatch.
      method: the method asked for.
      solve_s: seconds that making this took.
      stopped_early: the time limit ran out while sharing out, so the same inputs may give another dispatch next time.
    """

    replicas: tuple[tuple[MicroBatch, ...], ...]
    predicted_s: tuple[float, ...]
    bound_s: float
    method: str
    solve_s: float
    stopped_early: bool


def dispatch(
    plan: Plan,
    costs: CostTable,
    lengths: np.ndarray,
    task_ids: np.ndarray,
    *,
    method: str = "balance",
    max_buckets: int,
    time_limit_s: float,
) -> Dispatch:
    """Serves every sequence exactly once, on a replica that fits it.

    Args:
      lengths: [n] tokens of each sequence.
      task_ids: [n] task of each sequence.
      method: one of METHODS.
      max_buckets: most padded lengths in use this step.
      time_limit_s: a safety net for local search and SCIP, which should end well before; the first valid share-out
        does not wait for it. The same inputs give the same dispatch on a slow machine as on a quick one, and under
        any limit, as long as `stopped_early` is false.

    Raises:
      UserError: an unknown method; a sequence longer than every replica's capacity, or than the plan's largest bucket;
        a replica whose config the cost table lacks.
    """
    started = time.perf_counter()
    lengths, task_ids = np.asarray(lengths, dtype=np.int64), np.asarray(task_ids, dtype=np.int64)
    if lengths.shape != task_ids.shape or lengths.ndim != 1:
        raise ValueError(f"dispatch: lengths {lengths.shape} and task_ids {task_ids.shape}: expected one [n] for both")
    if method not in METHODS:
        raise UserError("bad value", key="dispatch", value=method, expected=f"one of {', '.join(METHODS)}")
    _check_lengths(plan, lengths)
    buckets = choose_buckets(lengths, plan.buckets, max_buckets)
    replicas = _replicas(plan, costs, buckets)
    bucket_ids = np.searchsorted(np.asarray(buckets, dtype=np.int64), lengths)
    counts = np.bincount(bucket_ids, minlength=len(buckets)).tolist()
    loads, bound_s, stopped_early = _share(method, replicas, counts, time_limit_s)
    owner = _deal(loads, bucket_ids, task_ids)
    work = [
        _micro_batches(usable, buckets, np.flatnonzero(owner == replica), bucket_ids, task_ids)
        for replica, usable in enumerate(replicas)
    ]
    return Dispatch(
        replicas=tuple(work),
        predicted_s=tuple(
            usable.cost.replica_s((batch.rows, batch.length) for batch in batches)
            for usable, batches in zip(replicas, work, strict=True)
        ),
        bound_s=bound_s,
        method=method,
        solve_s=time.perf_counter() - started,
        stopped_early=stopped_early,
    )


def _check_lengths(plan: Plan, lengths: np.ndarray) -> None:
    if lengths.size == 0:
        return
    if lengths.min() < 1:
        raise ValueError(f"dispatch: a sequence of {int(lengths.min())} tokens, expected >= 1")
    longest = int(lengths.max())
    if longest > plan.max_capacity_tokens:
        raise UserError(
            f"a sequence of {longest} tokens fits no replica",
            expected=f"at most {plan.max_capacity_tokens} tokens, the plan's largest capacity",
        )


def _replicas(plan: Plan, costs: CostTable, buckets: Sequence[int]) -> list[UsableConfig]:
    """Slot times of each replica, in plan order, at the plan's capacities; like replicas share one object."""
    out: list[UsableConfig] = []
    for group in plan.replicas:
        try:
            cost = costs[group.config]
        except KeyError:
            raise UserError(
                f"the cost table has no config {group.config}",
                key="replicas",
                expected="one of " + ", ".join(str(known.config) for known in costs.configs),
            ) from None
        cost = dataclasses.replace(cost, capacity_tokens=group.capacity_tokens)
        usable = usable_config(cost, buckets, num_options=plan.row_options)
        out += [usable] * group.count
    return out


def _share(
    method: str, replicas: Sequence[UsableConfig], counts: Sequence[int], time_limit_s: float
) -> tuple[np.ndarray, float, bool]:
    """(loads [R, J], proven bound on the least seconds of the slowest replica, whether the time limit ran out)."""
    if not counts:
        return np.zeros((len(replicas), 0), dtype=np.int64), 0.0, False
    table = balance.tables(replicas, counts)
    bound_s = balance.quick_bound_s(replicas, counts)
    if method == "uniform":
        return _uniform(table, counts), bound_s, False
    if method == "group":
        return balance.list_schedule(_smallest_only(table, replicas), counts), bound_s, False
    deadline = time.perf_counter() + time_limit_s
    share = balance.heuristic(table, counts, time_limit_s=time_limit_s)
    left_s = deadline - time.perf_counter()
    if share.max_s > bound_s * (1 + GAP_LIMIT) and left_s > 0:
        from planner import balance_model  # SCIP is loaded only where the heuristic is not proven good enough

        share, proven_s = balance_model.refine(
            replicas, table, counts, share, time_limit_s=left_s, gap_limit=GAP_LIMIT, node_limit=NODE_LIMIT
        )
        bound_s = max(bound_s, proven_s)
    return share.loads, min(bound_s, share.max_s), time.perf_counter() >= deadline


def _smallest_only(table: Tables, replicas: Sequence[UsableConfig]) -> Tables:
    """The tables with each bucket closed to all replicas but those of the smallest capacity that fits it."""
    kinds = {int(kind): replicas[index] for index, kind in enumerate(table.kind)}
    sums = table.sums.copy()
    options = [list(rows) for rows in table.options]
    for bucket in range(sums.shape[1]):
        smallest = min(usable.capacity_tokens for usable in kinds.values() if usable.fits(bucket))
        for kind, usable in kinds.items():
            if usable.capacity_tokens != smallest:
                sums[kind, bucket, 1:] = np.inf
                options[kind][bucket] = ()
    return dataclasses.replace(table, sums=sums, options=tuple(tuple(rows) for rows in options))


def _uniform(table: Tables, counts: Sequence[int]) -> np.ndarray:
    loads = np.zeros((len(table.kind), len(counts)), dtype=np.int64)
    turn = 0
    for bucket, count in enumerate(counts):
        fitting = np.flatnonzero([bool(table.options[kind][bucket]) for kind in table.kind])
        share, extra = divmod(count, len(fitting))
        loads[fitting, bucket] = share
        loads[np.roll(fitting, -turn)[:extra], bucket] += 1  # the odd ones out go on where the last bucket's ended
        turn += extra
    return loads


def _deal(loads: np.ndarray, bucket_ids: np.ndarray, task_ids: np.ndarray) -> np.ndarray:
    """[n] replica of each sequence: each bucket's sequences in task order, cut into runs of loads[:, bucket]."""
    owner = np.full(len(bucket_ids), -1, dtype=np.int64)
    for bucket in range(loads.shape[1]):
        members = np.flatnonzero(bucket_ids == bucket)
        members = members[np.argsort(task_ids[members], kind="stable")]
        owner[members] = np.repeat(np.arange(loads.shape[0]), loads[:, bucket])
    return owner


def _micro_batches(
    usable: UsableConfig, buckets: Sequence[int], mine: np.ndarray, bucket_ids: np.ndarray, task_ids: np.ndarray
) -> tuple[MicroBatch, ...]:
    """A replica's sequences as micro-batches: full ones of one task, then the tasks' remainders together."""
    timed = []
    for bucket in np.unique(bucket_ids[mine]).tolist():
        options = usable.rows[bucket]
        full_rows = options[-1]
        chunks: list[np.ndarray] = []
        rests: list[np.ndarray] = []
        members = mine[bucket_ids[mine] == bucket]
        for task in np.unique(task_ids[members]):
            own = members[task_ids[members] == task]
            num_full = len(own) // full_rows
            chunks += np.split(own[: num_full * full_rows], num_full) if num_full else []
            rests.append(own[num_full * full_rows :])
        rest = np.concatenate(rests)
        chunks += [rest[at : at + full_rows] for at in range(0, len(rest), full_rows)]
        for chunk in chunks:
            rows = rows_for(len(chunk), options)
            batch = MicroBatch(rows=rows, length=buckets[bucket], sequences=tuple(chunk.tolist()))
            timed.append((usable.cost.micro_batch_s(rows, buckets[bucket]), batch))
    timed.sort(key=lambda item: (-item[0], -item[1].length, item[1].sequences))
    return tuple(batch for _, batch in timed)
