"""Per step: which sequences go to which replica, and the micro-batches they become there.

Sequences are padded to a few of the plan's buckets (`planner.bucketing`), counted by bucket, shared out over the
replicas by a method, and dealt out to them task by task:

    balance   least time of the slowest replica: prices, then fills near their bound (`planner.share_out`); where there
              is time, patterns for whole replicas and re-splits of two; then SCIP from there where a handful of
              replicas and buckets leave a gap (`planner.balance_model`)
    group     each bucket to the replicas of the smallest capacity that fits it (LobRA's length-based dispatch)
    uniform   each bucket in equal numbers to all replicas that fit it, whatever their speed

A resumed run must dispatch its steps as the first run did, so what ends the search is counted, not timed: rounds of
local search, re-splits, nodes of SCIP, the gap. The time limit is a safety net over these; a dispatch that it cut says
so.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from planner import balance
from planner.balance import Tables
from planner.bucketing import choose_buckets
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import Plan
from planner.problem import UsableConfig, usable_config
from planner.share_out import share_out

METHODS = ("balance", "group", "uniform")

GAP_LIMIT = 0.01
"""Balance stops when the slowest replica is within this share of the proven bound."""

NODE_LIMIT = 20
"""Branch-and-bound nodes of SCIP for one dispatch: most of what it finds, it finds at the root."""

SCIP_MAX_CELLS = 24
"""Pairs of replica and bucket up to which SCIP is asked: it takes milliseconds there, and nothing is left to luck."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """`rows` x `length` padded tokens; `sequences` index the step's sequence arrays, at most `rows` of them.

    Packed rows hold any number: `places` names the row of each sequence, those of a row follow one another in order,
    and `squares` is the sum of all their squared lengths.
    """

    rows: int
    length: int
    sequences: tuple[int, ...]
    places: tuple[int, ...] | None = None
    squares: int = 0

    def slot_s(self, cost: ConfigCost) -> float:
        """Seconds that it occupies the slowest stage of a replica of this cost."""
        if self.places is None:
            return cost.micro_batch_s(self.rows, self.length)
        assert cost.packed is not None, "a packed micro-batch where packed ones were not measured"
        return cost.packed.micro_batch_s(self.rows, self.length, self.squares)


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
    ahead: bool = False,
) -> Dispatch:
    """Serves every sequence exactly once, on a replica that fits it.

    Args:
      lengths: [n] tokens of each sequence.
      task_ids: [n] task of each sequence.
      method: one of METHODS.
      max_buckets: most padded lengths in use this step.
      time_limit_s: a safety net for SCIP, which should end well before; with 0 or less, balance gives the first valid
        share-out and looks no further. The same inputs give the same dispatch on a slow machine as on a quick one,
        and under any limit, as long as `stopped_early` is false.
      ahead: it is made while the step before runs, so that balance may take longer by part of a step
        (`planner.share_out`) and ends nearer its bound.

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
    loads, bound_s, stopped_early = _share(method, replicas, counts, time_limit_s, ahead=ahead)
    work = _micro_batches(replicas, buckets, loads, bucket_ids, task_ids)
    return Dispatch(
        replicas=tuple(tuple(batch for _, batch in own) for own in work),
        predicted_s=tuple(
            usable.cost.slots_s([seconds for seconds, _ in own]) for usable, own in zip(replicas, work, strict=True)
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
            cost = costs.of(group)
        except KeyError:
            raise UserError(
                f"the cost table has no config {group.config}",
                key="replicas",
                expected="one of " + ", ".join(str(known.config) for known in costs.configs),
            ) from None
        usable = usable_config(cost, buckets, num_options=plan.row_options)
        out += [usable] * group.count
    return out


def _share(
    method: str, replicas: Sequence[UsableConfig], counts: Sequence[int], time_limit_s: float, *, ahead: bool
) -> tuple[np.ndarray, float, bool]:
    """(loads [R, J], proven bound on the least seconds of the slowest replica, whether the time limit ran out)."""
    if not counts:
        return np.zeros((len(replicas), 0), dtype=np.int64), 0.0, False
    table = balance.tables(replicas, counts)
    if method != "balance" or time_limit_s <= 0:
        bound_s = balance.quick_bound_s(replicas, counts)
        smallest = _smallest_only(table, replicas) if method == "group" else table
        loads = _uniform(table, counts) if method == "uniform" else balance.list_schedule(smallest, counts)
        return loads, bound_s, method == "balance"
    deadline = time.perf_counter() + time_limit_s
    share, bound_s = share_out(replicas, table, counts, gap_limit=GAP_LIMIT, ahead=ahead)
    if share.max_s <= bound_s * (1 + GAP_LIMIT) or len(replicas) * np.count_nonzero(counts) > SCIP_MAX_CELLS:
        return share.loads, min(bound_s, share.max_s), False
    left_s = deadline - time.perf_counter()
    if left_s > 0:
        from planner import balance_model  # SCIP is loaded only where the heuristic is not proven good enough

        share, proven_s = balance_model.refine(
            replicas,
            table,
            counts,
            share,
            time_limit_s=left_s,
            gap_limit=GAP_LIMIT,
            node_limit=NODE_LIMIT,
            good_s=bound_s * (1 + GAP_LIMIT),
        )
        bound_s = max(bound_s, proven_s)
    return share.loads, min(bound_s, share.max_s), time.perf_counter() >= deadline


def _smallest_only(table: Tables, replicas: Sequence[UsableConfig]) -> Tables:
    """The tables with each bucket closed to all replicas but those of the smallest capacity that fits it."""
    kinds = {int(kind): replicas[index] for index, kind in enumerate(table.kind)}
    sums, rows = table.sums.copy(), table.rows.copy()
    for bucket in range(sums.shape[1]):
        smallest = min(usable.capacity_tokens for usable in kinds.values() if usable.fits(bucket))
        for kind, usable in kinds.items():
            if usable.capacity_tokens != smallest:
                sums[kind, bucket, 1:] = np.inf
                rows[kind, bucket] = 0
    return table._replace(sums=sums, rows=rows)


def _uniform(table: Tables, counts: Sequence[int]) -> np.ndarray:
    loads = np.zeros((len(table.kind), len(counts)), dtype=np.int64)
    turn = 0
    for bucket, count in enumerate(counts):
        fitting = np.flatnonzero(table.full[table.kind, bucket])
        share, extra = divmod(count, len(fitting))
        loads[fitting, bucket] = share
        loads[np.roll(fitting, -turn)[:extra], bucket] += 1  # the odd ones out go on where the last bucket's ended
        turn += extra
    return loads


def _micro_batches(
    replicas: Sequence[UsableConfig],
    buckets: Sequence[int],
    loads: np.ndarray,
    bucket_ids: np.ndarray,
    task_ids: np.ndarray,
) -> list[list[tuple[float, MicroBatch]]]:
    """(seconds, micro-batch) of each replica, most expensive first.

    Each bucket's sequences are taken task by task and cut into runs of loads[:, bucket]; in a run, full micro-batches
    are of one task and the tasks' remainders go together.
    """
    order = np.lexsort((task_ids, bucket_ids))
    sequences, tasks = order.tolist(), task_ids[order].tolist()
    timed: list[list[tuple[float, MicroBatch]]] = [[] for _ in replicas]
    start = 0
    for bucket, length in enumerate(buckets):
        for replica in np.flatnonzero(loads[:, bucket]).tolist():
            usable = replicas[replica]
            options, slot_s = usable.rows[bucket], usable.slot_s[bucket]
            end = start + int(loads[replica, bucket])
            for chunk in _chunks(sequences[start:end], tasks[start:end], options[-1]):
                option = bisect.bisect_left(options, len(chunk))
                batch = MicroBatch(rows=options[option], length=length, sequences=tuple(chunk))
                timed[replica].append((slot_s[option], batch))
            start = end
    for own in timed:
        own.sort(key=lambda item: (-item[0], -item[1].length, item[1].sequences))
    return timed


def _chunks(sequences: list[int], tasks: list[int], full_rows: int) -> list[list[int]]:
    """Runs of at most `full_rows` of `sequences`, which are sorted by task: full ones of one task, then the rest."""
    if len(sequences) <= full_rows:
        return [sequences]
    chunks, rest = [], []
    start = 0
    while start < len(sequences):
        end = bisect.bisect_right(tasks, tasks[start], start)
        full_end = start + (end - start) // full_rows * full_rows
        chunks += [sequences[at : at + full_rows] for at in range(start, full_end, full_rows)]
        rest += sequences[full_end:end]
        start = end
    return chunks + [rest[at : at + full_rows] for at in range(0, len(rest), full_rows)]
