"""Whole replica counts for a level of the relaxation: small integer models for SCIP.

Both choose p with

    (1)  sum_c g_c p_c <= D                        devices, some may idle
    (2)  sum over c that fit bucket J of p_c >= 1  the longest length fits a replica
    (3)  p_c >= pinned_c
    (4)  at most K configs have p_c > 0            where the user limits them: p_c <= (D / g_c) y_c, sum y_c <= K
    (5)  p' <= p for no p in those ruled out       some config has more replicas

and maximise s. `from_patterns` takes s <= 1 from the level's patterns, used fractionally (the master with whole p), and
among replica counts that serve all prefers those that leave room: what it names serves at least s. `from_worths` takes
s <= sum_c z_c p_c for every pricing z so far: what it names serves at most s, and its bound holds for all p that are
not ruled out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pyscipopt import Model, quicksum

from planner import scip
from planner.master import MasterSolution
from planner.patterns import Pattern
from planner.relaxation import Relaxation
from planner.rounding import THRIFT

NEAR = 0.03
"""`from_patterns` takes patterns that fall short of their charge by at most this share of a device's."""

GAP = 1e-3
"""Relative gap of s with which `from_patterns` is content."""

NODES = 300
"""Branch-and-bound nodes of `from_patterns`."""

MOST_SCALE = 4.0
"""Serving more than this many times the counts is of no more use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Replica counts [C] (None: none found), the share s of the model, a bound on its objective, and nodes."""

    replica_counts: tuple[int, ...] | None
    scale: float
    bound: float
    num_nodes: int


def from_patterns(
    relaxation: Relaxation,
    patterns: Sequence[Pattern],
    solutions: Sequence[MasterSolution],
    *,
    time_limit_s: float,
) -> Choice:
    """Whole replica counts whose best use of the patterns that are near their charge in some solution serves most."""
    problem = relaxation.problem
    model, scale, counts = _model("deployment from patterns", relaxation, ())
    serving: list[list] = [[] for _ in problem.counts]
    using: list[list] = [[] for _ in counts]
    near = NEAR / problem.num_devices * relaxation.devices
    for pattern in patterns:
        short = (s.charges[pattern.config] - relaxation.worth(pattern, s.prices) for s in solutions)
        if min(short) <= near[pattern.config]:
            uses = model.addVar(lb=0)
            using[pattern.config].append(uses)
            for bucket in np.flatnonzero(pattern.rows).tolist():
                serving[bucket].append(int(pattern.rows[bucket]) * uses)
    for count, terms in zip(problem.counts, serving, strict=True):
        if count > 0:
            model.addCons(quicksum(terms) >= count * scale)
    busy = []
    for uses, count, devices in zip(using, counts, relaxation.devices.tolist(), strict=True):
        if uses:
            model.addCons(quicksum(uses) <= count)
            busy.append(devices / problem.num_devices * quicksum(uses))
    model.addCons(scale <= 1)
    model.setObjective(scale - THRIFT * quicksum(busy), sense="maximize")
    return _solved(model, scale, counts, scip.solve(model, time_limit_s=time_limit_s, gap_limit=GAP, node_limit=NODES))


def from_worths(
    relaxation: Relaxation,
    worths: Sequence[np.ndarray],
    *,
    ruled_out: Sequence[Sequence[int]] = (),
    time_limit_s: float,
) -> Choice:
    """Whole replica counts that no pricing z rules out; with `bound` < 1 there are none."""
    model, scale, counts = _model("deployment from worths", relaxation, ruled_out)
    for worth in worths:
        terms = [w * count for w, count in zip(worth.tolist(), counts, strict=True) if w > 0]
        model.addCons(quicksum(terms) >= scale)
    return _solved(model, scale, counts, scip.solve(model, time_limit_s=time_limit_s, gap_limit=GAP))


def _model(name: str, relaxation: Relaxation, ruled_out: Sequence[Sequence[int]]) -> tuple[Model, object, list]:
    """A model with s, p and (1) to (5)."""
    problem = relaxation.problem
    model = scip.new_model(name)
    scip.light(model)
    scale = model.addVar(lb=0, ub=MOST_SCALE)
    bounds = list(zip(relaxation.lower.tolist(), relaxation.upper.tolist(), strict=True))
    counts = [model.addVar(vtype="I", lb=low, ub=high) for low, high in bounds]
    devices = relaxation.devices.tolist()
    model.addCons(quicksum(g * count for g, count in zip(devices, counts, strict=True)) <= problem.num_devices)  # (1)
    fitting = [count for count, fits in zip(counts, relaxation.fits_longest.tolist(), strict=True) if fits]
    model.addCons(quicksum(fitting) >= 1)  # (2)
    if problem.max_configs is not None:
        used = [model.addVar(vtype="B") for _ in counts]
        for count, flag, (_, high) in zip(counts, used, bounds, strict=True):
            model.addCons(count <= high * flag)
        model.addCons(quicksum(used) <= problem.max_configs)  # (4)
    for known in ruled_out:
        more = []
        for count, most, (_, high) in zip(counts, known, bounds, strict=True):
            if most < high:
                flag = model.addVar(vtype="B")
                model.addCons(count >= (most + 1) * flag)
                more.append(flag)
        model.addCons(quicksum(more) >= 1)  # (5)
    model.setObjective(scale, sense="maximize")
    return model, scale, counts


def _solved(model: Model, scale: object, counts: list, outcome: scip.Outcome) -> Choice:
    if outcome.status == "infeasible":
        return Choice(replica_counts=None, scale=0.0, bound=0.0, num_nodes=outcome.num_nodes)
    bound = outcome.bound if np.isfinite(outcome.bound) else MOST_SCALE
    if not outcome.has_solution:
        return Choice(replica_counts=None, scale=0.0, bound=bound, num_nodes=outcome.num_nodes)
    chosen = tuple(round(model.getVal(count)) for count in counts)
    return Choice(replica_counts=chosen, scale=model.getVal(scale), bound=bound, num_nodes=outcome.num_nodes)
