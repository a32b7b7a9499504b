"""The share-out of `planner.balance` as an integer model: proves a bound, improves on a share-out that it starts from.

A unit u is one replica, or (when there are many) all mu_u replicas of one config taken together. Slots of bucket j on
u: m_uj with full rows b, w_ujo with a smaller option o.

    minimise T
    (1)  sum over u of b m_uj + sum_o o w_ujo >= N_j                 every sequence of bucket j is served
    (2)  sum_o w_ujo <= mu_u                                         a replica has one remainder a bucket
    (3)  sum_j t m + sum_jo t w + fixed_u v_u + (pp - 1) top_u <= mu_u T
    (4)  m_uj <= M_j v_u,  w_ujo <= mu_u v_u                         only a busy replica pays fixed_s
    (5)  top_u >= t_ujo w_ujo / mu_u,  top_u >= t_uj z_uj,  m_uj <= M_j z_uj     the pipeline's largest slot

With mu = 1 throughout this is the problem itself; with mu > 1 a relaxation, so its bound holds and its slots are dealt
out to the replicas longest first and repaired by local search.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
from pyscipopt import Model, quicksum

from planner import scip
from planner.balance import Share, Tables
from planner.local_search import improve
from planner.problem import UsableConfig

MAX_SINGLE_CELLS = 160
"""Up to this many (replica, bucket) pairs every replica is a unit of its own; above, replicas of a config are one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    usable: UsableConfig
    replicas: tuple[int, ...]
    full: dict[int, object]
    rests: dict[int, dict[int, object]]
    flags: dict[int, object]
    busy: object | None
    top: object | None


def refine(
    replicas: Sequence[UsableConfig],
    table: Tables,
    counts: Sequence[int],
    start: Share,
    *,
    time_limit_s: float,
    gap_limit: float,
    node_limit: int = scip.NO_NODE_LIMIT,
    good_s: float = -math.inf,
) -> tuple[Share, float]:
    """Looks for better share-outs with SCIP and local search.

    Args:
      time_limit_s: wall seconds for all of it.
      gap_limit: relative gap at which SCIP stops.
      node_limit: as in `scip.solve`. Given, the model is taken to be solved often and quickly: see `scip.light`.
      good_s: SCIP stops at a share-out this fast.

    Returns:
      (the best share-out found, never slower than `start`; a proven bound on the least max seconds, 0 if none).
    """
    deadline = time.perf_counter() + time_limit_s
    model = scip.new_model("balance")
    longest = model.addVar(lb=0, name="T")
    units = [_add_unit(model, replicas[who[0]], who, counts, longest) for who in _members(replicas, counts)]
    for bucket, count in enumerate(counts):
        if count > 0:
            served = [
                rows * slots
                for unit in units
                if unit.usable.fits(bucket)
                for rows, slots in ((unit.usable.full_rows(bucket), unit.full[bucket]), *unit.rests[bucket].items())
            ]
            model.addCons(quicksum(served) >= int(count))  # (1)
    model.setObjective(longest)
    _warm_start(model, units, longest, start)
    if node_limit != scip.NO_NODE_LIMIT:
        scip.light(model)
    left_s = deadline - time.perf_counter()
    outcome = scip.solve(model, time_limit_s=left_s, gap_limit=gap_limit, node_limit=node_limit, good_enough=good_s)
    bound_s = min(max(outcome.bound, 0.0), start.max_s)
    best = start
    if outcome.has_solution:
        loads = _trim(_deal(model, units, counts, len(replicas)), counts)
        found = improve(table, loads, time_limit_s=deadline - time.perf_counter())
        best = min(start, found, key=lambda share: share.max_s)
    return best, min(bound_s, best.max_s)


def _members(replicas: Sequence[UsableConfig], counts: Sequence[int]) -> list[tuple[int, ...]]:
    if len(replicas) * sum(count > 0 for count in counts) <= MAX_SINGLE_CELLS:
        return [(index,) for index in range(len(replicas))]
    groups: dict[int, list[int]] = {}
    for index, usable in enumerate(replicas):
        groups.setdefault(id(usable), []).append(index)
    return [tuple(group) for group in groups.values()]


def _add_unit(
    model: Model, usable: UsableConfig, who: tuple[int, ...], counts: Sequence[int], longest: object
) -> _Unit:
    many = len(who)
    num_bubbles = usable.config.pp - 1
    buckets = [j for j, count in enumerate(counts) if count > 0 and usable.fits(j)]
    most = {j: -(-int(counts[j]) // usable.full_rows(j)) + many for j in buckets}
    full = {j: model.addVar(vtype="I", lb=0, ub=most[j]) for j in buckets}
    rests = {j: {rows: model.addVar(vtype="I", lb=0, ub=many) for rows in usable.rows[j][:-1]} for j in buckets}
    busy = model.addVar(vtype="I", lb=0, ub=many) if usable.cost.fixed_s > 0 else None
    top = model.addVar(lb=0) if num_bubbles > 0 else None
    flags = {}
    work = []
    for j in buckets:
        *rest_s, full_s = usable.slot_s[j]
        work += [full_s * full[j], *(s * w for s, w in zip(rest_s, rests[j].values(), strict=True))]
        if len(rests[j]) > 0:
            model.addCons(quicksum(rests[j].values()) <= many)  # (2)
        if busy is not None:
            model.addCons(full[j] <= most[j] * busy)  # (4)
            for w in rests[j].values():
                model.addCons(w <= many * busy)
        if top is not None:
            flags[j] = model.addVar(vtype="B")
            model.addCons(full[j] <= most[j] * flags[j])  # (5)
            model.addCons(top >= full_s / many * flags[j])
            for s, w in zip(rest_s, rests[j].values(), strict=True):
                model.addCons(top >= s / many * w)
    if busy is not None:
        work.append(usable.cost.fixed_s * busy)
    if top is not None:
        work.append(num_bubbles * many * top)
    model.addCons(quicksum(work) <= many * longest)  # (3)
    return _Unit(usable=usable, replicas=who, full=full, rests=rests, flags=flags, busy=busy, top=top)


def _warm_start(model: Model, units: Sequence[_Unit], longest: object, start: Share) -> None:
    solution = model.createSol()
    model.setSolVal(solution, longest, start.max_s)
    for unit in units:
        loads = start.loads[list(unit.replicas)]
        tops = []
        for bucket, slots in unit.full.items():
            full_rows = unit.usable.full_rows(bucket)
            num_full, rest = loads[:, bucket] // full_rows, loads[:, bucket] % full_rows
            options = np.array(unit.usable.rows[bucket])
            option = options[np.searchsorted(options, rest)]
            for rows, w in unit.rests[bucket].items():
                model.setSolVal(solution, w, int(((rest > 0) & (option == rows)).sum()))
            total = int(num_full.sum() + ((rest > 0) & (option == full_rows)).sum())
            model.setSolVal(solution, slots, total)
            if bucket in unit.flags:
                model.setSolVal(solution, unit.flags[bucket], int(total > 0))
            tops.append([max(unit.usable.slots(bucket, int(n)), default=0.0) for n in loads[:, bucket]])
        if unit.busy is not None:
            model.setSolVal(solution, unit.busy, int(loads.any(axis=1).sum()))
        if unit.top is not None and tops:
            model.setSolVal(solution, unit.top, float(np.max(tops, axis=0).mean()))
    model.addSol(solution)


def _deal(model: Model, units: Sequence[_Unit], counts: Sequence[int], num_replicas: int) -> np.ndarray:
    """Loads [R, J], rows of the solution's slots: each unit's slots, longest first, to its least loaded replica."""
    loads = np.zeros((num_replicas, len(counts)), dtype=np.int64)
    for unit in units:
        slots = []
        for bucket, full in unit.full.items():
            *rest_s, full_s = unit.usable.slot_s[bucket]
            slots += [(full_s, bucket, unit.usable.full_rows(bucket))] * round(model.getVal(full))
            for seconds, (rows, w) in zip(rest_s, unit.rests[bucket].items(), strict=True):
                slots += [(seconds, bucket, rows)] * round(model.getVal(w))
        work = dict.fromkeys(unit.replicas, 0.0)
        for seconds, bucket, rows in sorted(slots, reverse=True):
            replica = min(work, key=lambda r: work[r])
            work[replica] += seconds
            loads[replica, bucket] += rows
    return loads


def _trim(loads: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Takes rows beyond counts[j] off the replicas that hold most of bucket j."""
    loads = loads.copy()
    for bucket, count in enumerate(counts):
        extra = int(loads[:, bucket].sum() - count)
        while extra > 0:
            replica = int(loads[:, bucket].argmax())
            taken = min(extra, int(loads[replica, bucket]))
            loads[replica, bucket] -= taken
            extra -= taken
    return loads
