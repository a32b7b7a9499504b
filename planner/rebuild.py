"""Rebuilds a part of a deployment: the slowest replica and a few others are given up, and their devices dived on anew.

A dive (`planner.rounding`) makes its last replicas of what the others left, and these end late. Given a few replicas at
a time it has room to do better, with other configs too if these suit what the part runs (large neighbourhood search).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from planner import balance, rounding
from planner.balance import Share
from planner.patterns import Pattern
from planner.problem import ReplicaProblem
from planner.rounding import RoundedShare

FEWEST, MOST = 4, 7
"""Replicas given up at once."""

SPARE = 1e-3
"""Share of the slowest replica's time that all others count as spare besides their own."""


def rebuilt(
    problem: ReplicaProblem,
    rounded: RoundedShare,
    goal_s: float,
    pool: Sequence[Pattern],
    *,
    upper: np.ndarray,
    rng: np.random.Generator,
    deadline: float = math.inf,
    improve_s: float = math.inf,
) -> RoundedShare | None:
    """The deployment with a part of it rebuilt to end by `goal_s`, or None if the part that was drawn ends no earlier.

    `upper` [C] is the most replicas of each config, though the deployment may have more; those pinned stay.
    """
    kinds, loads, seconds = np.array(rounded.replicas), rounded.share.loads, rounded.share.replica_s
    num_configs = len(problem.configs)
    group = _drawn(seconds, int(rng.integers(FEWEST, MOST + 1)), rng)
    rest = np.delete(np.arange(len(kinds)), group)
    elsewhere = np.bincount(kinds[rest], minlength=num_configs)
    devices = np.array([usable.num_devices for usable in problem.configs])
    counts = loads[group].sum(axis=0)
    must_fit = len(counts) - 1
    if any(problem.configs[config].fits(must_fit) for config in np.flatnonzero(elsewhere).tolist()):
        must_fit = int(np.flatnonzero(counts)[-1])
    part = dataclasses.replace(
        problem,
        counts=tuple(counts.tolist()),
        num_devices=problem.num_devices - int(devices @ elsewhere),
    )
    found = rounding.dive(
        part,
        goal_s,
        pool,
        lower=np.maximum(np.array(problem.pinned_counts) - elsewhere, 0),
        upper=np.maximum(upper, np.bincount(kinds, minlength=num_configs)) - elsewhere,
        must_fit=must_fit,
        deadline=deadline,
        improve_s=improve_s,
    )
    if found.share.max_s >= seconds[group].max() * (1 - balance.IMPROVEMENT):
        return None
    return RoundedShare(
        replicas=(*kinds[rest].tolist(), *found.replicas),
        share=Share(
            loads=np.concatenate([loads[rest], found.share.loads]),
            replica_s=np.concatenate([seconds[rest], found.share.replica_s]),
        ),
    )


def _drawn(seconds: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The slowest replica and some others, those that end early likelier (a draw without replacement, by keys)."""
    slowest = int(seconds.argmax())
    others = np.delete(np.arange(len(seconds)), slowest)
    spare = seconds[slowest] * (1 + SPARE) - seconds[others]
    keys = np.log(spare) + rng.gumbel(size=len(others))
    return np.array([slowest, *others[np.argsort(-keys)][: size - 1].tolist()])
