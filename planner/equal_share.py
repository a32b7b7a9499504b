"""The model that LobRA's planners solve: all replicas of a config get the same number of sequences of each bucket.

For config i (devices g_i, stages P_i, fixed seconds f_i), bucket j (N_j sequences) and row option k (o_ijk rows, t_ijk
seconds, k = K the full rows) choose

    p_i    replicas                                    w_ij   sequences that all replicas of i get together
    n_ij   most sequences that any one of them gets    m_ij   full micro-batches of each
    y_ijk  whether each runs a remainder of o_ijk rows M_i    its longest micro-batch

to minimise the step time T subject to

    (1) sum_i g_i p_i <= devices                       (2) sum_i w_ij = N_j
    (3) w_ij <= p_i n_ij                               (4) n_ij <= o_ijK m_ij + sum_k o_ijk y_ijk
    (5) sum_k y_ijk <= 1                               (6) M_i >= t_ijK where m_ij > 0,  M_i >= t_ijk y_ijk
    (7) T >= f_i [i has work] + sum_j (t_ijK m_ij + sum_k t_ijk y_ijk) + (P_i - 1) M_i

and, implied but needed to close the gap, with e_ij the least seconds a sequence can cost on i,

    (8) T p_i >= sum_j e_ij w_ij                       (9) T devices >= sum_ij g_i e_ij w_ij

With the p_i given, (3) and (8) are linear and the model is the dispatch ILP of the pruning planner. Length-based
planning adds: a bucket goes to the configs of one capacity only, the smallest that fits among those with replicas.
LobRA, appendix; where it pads a remainder to its own rows we use the lattice's row options, and devices may stay idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pyscipopt import quicksum

from planner import scip
from planner.deployment import least_conceivable_s
from planner.problem import PlanningProblem, UsableConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualShare:
    """A deployment and how much each config serves; numbers follow `problem.configs`.

    Attributes:
      counts: replicas of each config.
      totals: for each config, sequences of each bucket that its replicas get together.
      step_s: seconds of the slowest replica when each total is split evenly, `step_overhead_s` not included.
    """

    counts: tuple[int, ...]
    totals: tuple[tuple[int, ...], ...]
    step_s: float


def split_evenly(totals: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Loads of each replica by bucket; shares differ by at most one and the odd sequences rotate over the replicas."""
    loads = [[total // num_replicas] * len(range(num_replicas)) for total in totals]
    offset = 0
    for bucket, total in enumerate(totals):
        for extra in range(total % num_replicas):
            loads[bucket][(offset + extra) % num_replicas] += 1
        offset += total % num_replicas
    return [[loads[bucket][replica] for bucket in range(len(totals))] for replica in range(num_replicas)]


def evenly_split_s(usable: UsableConfig, totals: Sequence[int], num_replicas: int) -> float:
    """Seconds of the slowest of `num_replicas` replicas that share `totals` evenly; 0 without any work."""
    return max((usable.replica_s(loads) for loads in split_evenly(totals, num_replicas)), default=0.0)


def share_of(problem: PlanningProblem, counts: Sequence[int], totals: Sequence[Sequence[int]]) -> EqualShare:
    """Puts an `EqualShare` together and computes its step time."""
    step_s = max(
        evenly_split_s(usable, served, count)
        for usable, count, served in zip(problem.configs, counts, totals, strict=True)
        if count > 0
    )
    return EqualShare(counts=tuple(counts), totals=tuple(tuple(row) for row in totals), step_s=step_s)


def best_homogeneous(problem: PlanningProblem, pool: Sequence[int]) -> EqualShare:
    """The best plan of one config alone (Task-Fused); some config of `pool` must fit the longest bucket."""
    shares = []
    for number in pool:
        usable = problem.configs[number]
        count = problem.num_devices // usable.num_devices
        if count and usable.fits(len(problem.buckets) - 1):
            empty = (0,) * len(problem.buckets)
            counts = [count if n == number else 0 for n in range(len(problem.configs))]
            totals = [problem.counts if n == number else empty for n in range(len(problem.configs))]
            shares.append(share_of(problem, counts, totals))
    return min(shares, key=lambda share: share.step_s)


def solve_equal_share(
    problem: PlanningProblem,
    pool: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    length_based: bool = False,
    cutoff_s: float | None = None,
    gap: float = 0.0,
    time_limit_s: float,
) -> EqualShare | None:
    """The best equal-share plan of the configs numbered in `pool`, or None.

    Args:
      counts: replicas of each config of the problem, where the deployment is given and only the dispatch is open.
      length_based: whether a bucket may only go to the smallest capacity that fits.
      cutoff_s: only plans whose model value is below this are of interest.
      gap: relative gap at which SCIP may stop.
      time_limit_s: after it the best plan found so far is returned.

    None means that nothing beats `cutoff_s`, or that nothing was found in time.
    """
    model = scip.new_model("equal share")
    if cutoff_s is not None:
        model.setObjlimit(cutoff_s)
    variables = _build(model, problem, pool, counts=counts, length_based=length_based)
    outcome = scip.solve(model, time_limit_s=time_limit_s, gap_limit=gap)
    if not outcome.has_solution:
        return None
    return _read(model, problem, pool, variables, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variables:
    """SCIP variables (or numbers) by config of the pool: p_i, and w_ij by bucket (None where it does not fit)."""

    replicas: list[Any]
    served: list[list[Any]]


def _build(
    model: Any, problem: PlanningProblem, pool: Sequence[int], *, counts: Sequence[int] | None, length_based: bool
) -> _Variables:
    configs = [problem.configs[number] for number in pool]
    step = model.addVar(lb=least_conceivable_s(problem), name="step_s")
    replicas = [
        counts[number]
        if counts is not None
        else _integer(model, problem.num_devices // problem.configs[number].num_devices)
        for number in pool
    ]
    served = [_add_config(model, problem, usable, count, step) for usable, count in zip(configs, replicas, strict=True)]
    if counts is None:
        model.addCons(
            quicksum(c.num_devices * p for c, p in zip(configs, replicas, strict=True)) <= problem.num_devices
        )
        # The longest length has to fit even where none is expected in a batch.
        longest = len(problem.buckets) - 1
        model.addCons(quicksum(p for c, p in zip(configs, replicas, strict=True) if c.fits(longest)) >= 1)
    for bucket, total in enumerate(problem.counts):
        model.addCons(quicksum(row[bucket] for row in served if row[bucket] is not None) == total)
    device_seconds = quicksum(
        usable.num_devices * usable.per_sequence_s(bucket) * w
        for usable, row in zip(configs, served, strict=True)
        for bucket, w in enumerate(row)
        if w is not None
    )
    model.addCons(problem.num_devices * step >= device_seconds)
    if length_based:
        _add_length_based(model, problem, configs, replicas, served)
    model.setObjective(step)
    return _Variables(replicas=replicas, served=served)


def _add_config(model: Any, problem: PlanningProblem, usable: UsableConfig, count: Any, step: Any) -> list[Any]:
    """Adds (3) to (8) of one config; returns w_ij by bucket."""
    stages = usable.config.pp
    longest = model.addVar(lb=0) if stages > 1 else None
    busy = model.addVar(vtype="B") if usable.cost.fixed_s > 0 else None
    seconds, least_seconds, served = [], [], []
    for bucket, total in enumerate(problem.counts):
        if not usable.fits(bucket):
            served.append(None)
            continue
        one = _integer(model, total)
        seconds += _add_micro_batches(model, usable, bucket, total, one, longest, busy)
        together = _integer(model, total)
        model.addCons(together <= count * one)
        served.append(together)
        least_seconds.append(usable.per_sequence_s(bucket) * together)
    if busy is not None:
        seconds.append(usable.cost.fixed_s * busy)
    if longest is not None:
        seconds.append((stages - 1) * longest)
    model.addCons(step >= quicksum(seconds))
    model.addCons(step * count >= quicksum(least_seconds))
    return served


def _add_micro_batches(
    model: Any, usable: UsableConfig, bucket: int, total: int, sequences: Any, longest: Any, busy: Any
) -> list[Any]:
    """Adds (4) to (6) of one config and bucket; returns its terms of (7)."""
    options, slots = usable.rows[bucket], usable.slot_s[bucket]
    most = -(-total // options[-1])
    full = _integer(model, most)
    remainders = [model.addVar(vtype="B") for _ in options[:-1]]
    model.addCons(
        sequences <= options[-1] * full + quicksum(o * y for o, y in zip(options[:-1], remainders, strict=True))
    )
    if remainders:
        model.addCons(quicksum(remainders) <= 1)
    if longest is not None:
        any_full = model.addVar(vtype="B")
        model.addCons(full <= most * any_full)
        model.addCons(longest >= slots[-1] * any_full)
        for t, y in zip(slots[:-1], remainders, strict=True):
            model.addCons(longest >= t * y)
    if busy is not None:
        model.addCons(sequences <= total * busy)
    return [slots[-1] * full, *(t * y for t, y in zip(slots[:-1], remainders, strict=True))]


def _add_length_based(
    model: Any,
    problem: PlanningProblem,
    configs: Sequence[UsableConfig],
    replicas: Sequence[Any],
    served: list[list[Any]],
) -> None:
    """A bucket is served by one capacity: the smallest that fits it among those with replicas."""
    capacities = sorted({usable.capacity_tokens for usable in configs})
    members = {c: [i for i, usable in enumerate(configs) if usable.capacity_tokens == c] for c in capacities}
    deployed = {}
    for capacity in capacities:
        deployed[capacity] = model.addVar(vtype="B")
        together = quicksum(replicas[i] for i in members[capacity])
        model.addCons(together >= deployed[capacity])
        model.addCons(together <= problem.num_devices * deployed[capacity])
    for bucket, (length, total) in enumerate(zip(problem.buckets, problem.counts, strict=True)):
        fitting = [capacity for capacity in capacities if capacity >= length]
        for position, capacity in enumerate(fitting):
            here = quicksum(served[i][bucket] for i in members[capacity])
            model.addCons(here <= total * deployed[capacity])
            for smaller in fitting[:position]:
                model.addCons(here <= total * (1 - deployed[smaller]))


def _integer(model: Any, upper: int) -> Any:
    return model.addVar(vtype="I", lb=0, ub=upper)


def _read(
    model: Any, problem: PlanningProblem, pool: Sequence[int], variables: _Variables, counts: Sequence[int] | None
) -> EqualShare:
    found = [0] * len(problem.configs)
    totals = [[0] * len(problem.buckets) for _ in problem.configs]
    for position, number in enumerate(pool):
        replicas = variables.replicas[position]
        found[number] = int(replicas) if counts is not None else round(model.getVal(replicas))
        for bucket, together in enumerate(variables.served[position]):
            if together is not None:
                totals[number][bucket] = round(model.getVal(together))
    return share_of(problem, found, totals)
