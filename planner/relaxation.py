"""The deployment problem relaxed at a fixed time T: can `num_devices` devices run the counts within T at all?

At a fixed T the product "T times replica counts" is linear and only the replica counts are integers. "No" proves that
every plan needs longer than T; "yes" comes with replica counts worth trying.

Variants. A replica of a config with pp > 1 pays (pp - 1) times its largest slot. So such a config is entered once for
each class of largest slot: a variant may use slots up to its class's largest and is charged the class's smallest.
A variant v has g_v devices, room C_v = T - fixed - (pp - 1) theta_v for slots, and slots i (bucket j_i, rows o_i,
seconds t_vi <= C_v).

    find  p_v integer >= 0 (replicas), y_vi >= 0 (slots of all replicas of v)
    (1)   sum_v g_v p_v <= D                                   devices, some may idle
    (2)   sum over v, slots i of bucket j of o_i y_vi >= N_j   every sequence of every bucket j is served
    (3)   sum_i t_vi y_vi <= C_v p_v                           slots fit the replicas' time together
    (4)   sum_i phi_k(t_vi / C_v) y_vi <= p_v                  k = 1..K, and one replica at a time
    (5)   sum over remainder slots i of bucket j of y_vi <= p_v    a replica has one remainder a bucket (y integer only)
    (6)   p' <= p for no p in the excluded deployments             p summed over a config's variants
    (7)   sum over v that fit bucket J of p_v + q >= 1             the longest length listed fits a replica, even one
                                                                   idle in the planned batch: q, on the fewest
                                                                   devices, which (1) counts too

(4) holds because slots that fit one replica satisfy sum_i t_vi / C_v <= 1 and phi_k is dual feasible: x_1 + ... <= 1
implies phi_k(x_1) + ... <= 1 (Fekete and Schepers, "New classes of fast lower bounds for bin packing problems", 2001:
phi_k(x) = x if (k + 1) x is an integer, else floor((k + 1) x) / k). It sees what (3) does not: that a replica with time
for 2.6 slots runs two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pyscipopt import Model, quicksum

from planner import scip
from planner.problem import PlanningProblem, UsableConfig

SLOT_CLASS_RATIO = 1.1
"""Largest slots within this ratio share a variant; smaller is a tighter bound and a bigger model."""

DUAL_FEASIBLE_KS = (1, 2, 3, 4, 5, 6)
"""The k of constraint (4)."""

SPREAD_GAP = 0.01
"""How near to the most slack a deployment drawn with slack has to come."""

EDGE = 1e-7
"""Slots this close (relative) to a breakpoint are taken on its weaker side, so rounding never cuts a true plan off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A config whose largest slot lies in one class, at one T; arrays are over its slots [I].

    Attributes:
      config: index into the problem's configs.
      num_devices: devices of one replica.
      bucket: [I] bucket of each slot.
      rows: [I] rows of each slot.
      weight: [1 + K, I] what each slot takes of a replica in (3) and in (4) for each k; a replica has 1 of each.
      fits_longest: whether its replicas fit the last bucket.
      full_rows: for each bucket the config's full rows, 0 where it does not fit.
      best: [J] least of (3) that one sequence of each bucket takes, inf where none fits.
    """

    config: int
    num_devices: int
    bucket: np.ndarray
    rows: np.ndarray
    weight: np.ndarray
    fits_longest: bool
    full_rows: tuple[int, ...]
    best: np.ndarray


def variants(problem: PlanningProblem, replica_s: float, *, whole_slots: bool = False) -> list[Variant]:
    """All variants that can run anything within `replica_s` seconds, without those that others dominate.

    With `whole_slots`, y is to be integer, and only what then stays dominated is dropped.
    """
    found = []
    for index, usable in enumerate(problem.configs):
        found += _variants_of(index, usable, problem.counts, replica_s, whole_slots)
    return _undominated(found, whole_slots)


def _variants_of(
    index: int, usable: UsableConfig, counts: Sequence[int], replica_s: float, whole_slots: bool
) -> list[Variant]:
    slots = sorted(
        (seconds, bucket, rows)
        for bucket, count in enumerate(counts)
        if count > 0
        for rows, seconds in zip(usable.rows[bucket], usable.slot_s[bucket], strict=True)
    )
    seconds = np.array([slot[0] for slot in slots])
    bucket = np.array([slot[1] for slot in slots], dtype=np.int64)
    rows = np.array([slot[2] for slot in slots], dtype=np.int64)
    num_bubbles = usable.config.pp - 1
    out = []
    start = 0
    while start < len(slots):
        stop = len(slots)
        if num_bubbles > 0:
            stop = int(np.searchsorted(seconds, seconds[start] * SLOT_CLASS_RATIO, side="right"))
        room = replica_s - usable.cost.fixed_s - num_bubbles * seconds[start]
        fits = np.flatnonzero(seconds[:stop] <= room * (1 + EDGE))
        if room > 0 and fits.size:
            shape = (bucket[fits], rows[fits], seconds[fits] / room)
            out.append(_variant(index, usable, *shape, whole_slots))
        start = stop
    return out


def _variant(
    index: int,
    usable: UsableConfig,
    bucket: np.ndarray,
    rows: np.ndarray,
    share: np.ndarray,
    whole_slots: bool,
) -> Variant:
    weight = np.concatenate([share[None, :], dual_feasible(share[None, :], np.array(DUAL_FEASIBLE_KS)[:, None])])
    keep = np.full(len(rows), True) if whole_slots else _useful_slots(bucket, weight / rows)
    best = np.full(len(usable.rows), np.inf)
    np.minimum.at(best, bucket, share / rows)
    return Variant(
        config=index,
        num_devices=usable.num_devices,
        bucket=bucket[keep],
        rows=rows[keep],
        weight=weight[:, keep],
        fits_longest=usable.fits(len(usable.rows) - 1),
        full_rows=tuple(options[-1] if options else 0 for options in usable.rows),
        best=best,
    )


def _useful_slots(bucket: np.ndarray, per_row: np.ndarray) -> np.ndarray:
    """[I] whether no other slot of the same bucket takes as little of everything for each row; of equals, the first."""
    beaten = (per_row[:, None, :] <= per_row[:, :, None]).all(axis=0) & (bucket[None, :] == bucket[:, None])
    beaten &= ~np.triu(beaten & beaten.T)
    return ~beaten.any(axis=1)


def _undominated(found: list[Variant], whole_slots: bool) -> list[Variant]:
    """Drops every variant whose devices another variant uses at least as well, whatever they serve."""
    if not found:
        return []
    ordered = sorted(found, key=lambda v: (v.num_devices, float(np.min(v.best))))
    best = np.stack([variant.best for variant in ordered])
    devices = np.array([variant.num_devices for variant in ordered])
    copies = devices[None, :] // devices[:, None]  # of the row's variant, on the devices of the column's
    reach = np.full(copies.shape, True)
    for bucket in range(best.shape[1]):
        allowed = np.where(copies > 0, copies, 1) * best[None, :, bucket]
        reach &= best[:, None, bucket] <= allowed
    reach &= copies > 0
    kept: list[int] = []
    for index, variant in enumerate(ordered):
        if not any(reach[k, index] and _dominates(ordered[k], variant, whole_slots) for k in kept):
            kept = [k for k in kept if not (reach[index, k] and _dominates(variant, ordered[k], whole_slots))]
            kept.append(index)
    return [ordered[k] for k in kept]


def _dominates(better: Variant, worse: Variant, whole_slots: bool) -> bool:
    """Whether the copies of `better` that fit on the devices of one `worse` serve all that it can, in (3), (4), (7).

    With `whole_slots` each slot of `worse` must be matched by one of as many rows, on one copy.
    """
    if worse.fits_longest and not better.fits_longest:
        return False
    copies = worse.num_devices // better.num_devices
    same_bucket = better.bucket[None, :] == worse.bucket[:, None]
    if whole_slots:
        lighter = (better.weight[:, None, :] <= worse.weight[:, :, None]).all(axis=0)
        is_rest = [v.rows < np.asarray(v.full_rows)[v.bucket] for v in (better, worse)]
        serves = lighter & same_bucket & (better.rows[None, :] >= worse.rows[:, None])
        serves &= ~is_rest[0][None, :] | is_rest[1][:, None]  # (5) allows few remainders
    else:
        per_row, allowed = better.weight / better.rows, copies * worse.weight / worse.rows
        serves = (per_row[:, None, :] <= allowed[:, :, None]).all(axis=0) & same_bucket
    return bool(serves.any(axis=1).all())


def dual_feasible(share: np.ndarray, k: int | np.ndarray) -> np.ndarray:
    """phi_k of the module's docstring, rounded towards the weaker side at its breakpoints."""
    scaled = (k + 1) * np.minimum(share, 1.0)
    nearest = np.rint(scaled)
    at_edge = np.abs(scaled - nearest) <= EDGE * (k + 1)
    return np.where(at_edge, np.minimum(share, np.maximum(nearest - 1, 0) / k), np.floor(scaled) / k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether T is attainable in the relaxation: "yes" with replica counts per config, "no" (proven), or "unknown"."""

    verdict: str
    replica_counts: tuple[int, ...] | None
    num_nodes: int


def attainable(
    problem: PlanningProblem,
    replica_s: float,
    *,
    time_limit_s: float,
    spread: bool = False,
    whole_slots: bool = False,
    excluded: Sequence[Sequence[int]] = (),
) -> Answer:
    """Solves the relaxation at T = `replica_s` (step overhead excluded).

    With `spread` the objective serves as many extra sequences as it can (a deployment with slack); without it the first
    deployment found is enough. With `whole_slots` y is integer: tighter, and much harder. `excluded` are replica counts
    (per config) that are not to be answered, nor their subsets: a "no" then says nothing about those.
    """
    entered = variants(problem, replica_s, whole_slots=whole_slots)
    model = scip.new_model("deployment at fixed time")
    scip.light(model)
    p = [model.addVar(vtype="I", lb=0, ub=problem.num_devices // variant.num_devices) for variant in entered]
    kind = "I" if whole_slots else "C"
    y = [[model.addVar(vtype=kind, lb=0) for _ in variant.rows] for variant in entered]
    serving: list[list] = [[] for _ in problem.counts]
    for variant, slots in zip(entered, y, strict=True):
        for bucket, rows, slot in zip(variant.bucket.tolist(), variant.rows.tolist(), slots, strict=True):
            serving[bucket].append(rows * slot)
    if any(count > 0 and not terms for count, terms in zip(problem.counts, serving, strict=True)):
        return Answer(verdict="no", replica_counts=None, num_nodes=0)
    idle_config = problem.narrowest_for_longest
    idle = model.addVar(vtype="B")
    devices = quicksum(variant.num_devices * count for variant, count in zip(entered, p, strict=True))
    devices += problem.configs[idle_config].num_devices * idle
    model.addCons(devices <= problem.num_devices)  # (1)
    model.addCons(quicksum(c for variant, c in zip(entered, p, strict=True) if variant.fits_longest) + idle >= 1)  # (7)
    scale = model.addVar(lb=1, ub=None if spread else 1)
    for count, terms in zip(problem.counts, serving, strict=True):
        if count > 0:
            model.addCons(quicksum(terms) >= count * scale)  # (2)
    for variant, count, slots in zip(entered, p, y, strict=True):
        for weight in variant.weight:  # (3), then (4)
            if weight.any():
                model.addCons(
                    quicksum(w * slot for w, slot in zip(weight.tolist(), slots, strict=True) if w > 0) <= count
                )
        if whole_slots:
            for bucket in np.unique(variant.bucket).tolist():
                mine = np.flatnonzero(variant.bucket == bucket)
                rests = mine[variant.rows[mine] < variant.full_rows[bucket]].tolist()
                if rests:
                    model.addCons(quicksum(slots[i] for i in rests) <= count)  # (5)
    per_config: list[list] = [[] for _ in problem.configs]
    for variant, count in zip(entered, p, strict=True):
        per_config[variant.config].append(count)
    per_config[idle_config].append(idle)
    _exclude(model, problem, per_config, excluded)
    model.setObjective(-scale if spread else devices)
    outcome = scip.solve(
        model, time_limit_s=time_limit_s, gap_limit=SPREAD_GAP if spread else 0.0, first_solution=not spread
    )
    if outcome.status == "infeasible":
        return Answer(verdict="no", replica_counts=None, num_nodes=outcome.num_nodes)
    if not outcome.has_solution:
        return Answer(verdict="unknown", replica_counts=None, num_nodes=outcome.num_nodes)
    counts = tuple(sum(round(model.getVal(count)) for count in mine) for mine in per_config)
    return Answer(verdict="yes", replica_counts=counts, num_nodes=outcome.num_nodes)


def _exclude(
    model: Model, problem: PlanningProblem, per_config: Sequence[list], excluded: Sequence[Sequence[int]]
) -> None:
    """(6): some config has more replicas than in the excluded deployment. `per_config` are each config's p_v, and q."""
    for known in excluded:
        more = []
        for config, counts in enumerate(per_config):
            if counts and (known[config] + 1) * problem.configs[config].num_devices <= problem.num_devices:
                flag = model.addVar(vtype="B")
                model.addCons(quicksum(counts) >= (known[config] + 1) * flag)
                more.append(flag)
        model.addCons(quicksum(more) >= 1)
