"""Looks for deployments that are good over sampled batches: neighbours of good ones, the most promising first.

A deployment is looked at by the mean (or a percentile) of its proven bounds over the samples (`planner.prices`). Each
bound comes with prices, and prices bound every other deployment on that sample too: with v_c(T) what a replica of
config c can be worth in T seconds, p replicas of each config need at least the T at which

    (1)  sum over c of p_c v_c(T) = 1

As v_c is convex and v_c(0) = 0, lines between a few of its points lie above it and bound T from below. The greatest T
by the prices of all looks so far says what a neighbour promises (the cuts of Benders' decomposition, by sample); a look
at one that did not keep its promise brings the prices that say why.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from planner import prices
from planner.problem import PlanningProblem

MOST_REMOVED = 2
"""Replicas that are replaced at once: none (only idle devices are filled), one or two.

Beside two come as many of one config as one replica of another needs the devices of."""

MOST_LOOKED_AT = 24
"""Neighbours of one deployment, the most promising, of which one must be better for the search to go on."""

POINTS = (0.85, 1.0, 1.15, 2.0)
"""Multiples of a look's T at which replicas are priced; of a T beyond the last it is only known that it is."""

LOOKED_AT_S = 1e12
"""In place of the promise of a neighbour that was looked at; percentiles of infinities are not numbers."""

STRICTLY = 1e-6
"""A neighbour must promise to be better by this share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a deployment needs on every sample, and what its prices say of others.

    Attributes:
      bounds: [S] seconds.
      worths: [POINTS, C, S] worth of a replica of each config in the multiples POINTS of these seconds.
    """

    bounds: np.ndarray
    worths: np.ndarray

    def least_s(self, others: np.ndarray) -> np.ndarray:
        """[N, S] bounds on the least seconds of other deployments [N, C] by these prices."""
        served = [others @ worth for worth in self.worths]
        least = self.bounds * POINTS[0] / np.maximum(served[0], 1.0)
        for low, high, before, after in zip(POINTS[:-1], POINTS[1:], served[:-1], served[1:], strict=True):
            rise = np.where(after > before, after - before, 1.0)
            part = np.where(after > before, np.clip((1 - before) / rise, 0.0, 1.0), 1.0)
            least = np.where(before < 1, self.bounds * (low + (high - low) * part), least)
        return least


class Screen:
    """Looks at deployments on samples [S, J] by an objective: the mean, or the quantile if that is not None.

    `known` are the deployments looked at and those that these were compared with.
    """

    def __init__(self, problem: PlanningProblem, samples: np.ndarray, quantile: float | None) -> None:
        self.problem = problem
        self._samples = samples
        self._quantile = quantile
        self.known: set[tuple[int, ...]] = set()
        self._looks: dict[tuple[int, ...], Look] = {}
        self._lines = []
        for row in samples:
            used = np.flatnonzero(row)
            self._lines.append((used, prices.slot_lines(problem.configs, used, row[used].astype(np.float64))))

    def __call__(self, counts: tuple[int, ...]) -> float:
        """The objective of a deployment's bounds, without the step's overhead."""
        return float(over_samples(self.look(counts).bounds, self._quantile))

    @property
    def seen(self) -> list[tuple[int, ...]]:
        """The deployments looked at, best first."""
        return sorted(self._looks, key=self)

    def look(self, counts: tuple[int, ...]) -> Look:
        if counts not in self._looks:
            self.known.add(counts)
            kinds = [usable for usable, count in zip(self.problem.configs, counts, strict=True) if count]
            multiplicity = [count for count in counts if count]
            bounds, worths = [], []
            for row, (used, lines) in zip(self._samples, self._lines, strict=True):
                relaxed = prices.relax(kinds, multiplicity, row.tolist())
                worth = relaxed.prices[used] * row[used]
                bounds.append(relaxed.bound_s)
                worths.append([(lines.most(m * relaxed.bound_s) * worth).max(axis=1) for m in POINTS])
            self._looks[counts] = Look(bounds=np.array(bounds), worths=np.moveaxis(np.array(worths), 0, -1))
        return self._looks[counts]

    def descend(self, start: tuple[int, ...], deadline: float) -> None:
        """Goes from neighbour to better neighbour until none that promises to be better is, or the deadline."""
        counts: tuple[int, ...] | None = start
        while counts is not None:
            counts = self._better_neighbour(counts, deadline)

    def _better_neighbour(self, counts: tuple[int, ...], deadline: float) -> tuple[int, ...] | None:
        """The first neighbour that looks better than `counts`, the most promising looked at first."""
        if time.perf_counter() >= deadline:
            return None
        least = self(counts)
        others = [o for removed in range(MOST_REMOVED + 1) for o in neighbours(self.problem, counts, removed)]
        if not others:
            return None
        replicas = np.array(others, dtype=np.float64)
        promised_s = np.zeros((len(others), len(self._samples)))
        for look in self._looks.values():
            promised_s = np.maximum(promised_s, look.least_s(replicas))
        if time.perf_counter() >= deadline:
            return None
        self.known.update(others)
        for _ in range(MOST_LOOKED_AT):
            promises = over_samples(promised_s, self._quantile, axis=1)
            best = int(promises.argmin())
            if promises[best] >= least * (1 - STRICTLY) or time.perf_counter() >= deadline:
                return None
            if self(others[best]) < least:
                return others[best]
            look = self.look(others[best])
            promised_s = np.maximum(promised_s, look.least_s(replicas))
            promised_s[best] = LOOKED_AT_S
        return None


def over_samples(seconds: Sequence[float] | np.ndarray, quantile: float | None, axis: int | None = None) -> Any:
    return np.mean(seconds, axis=axis) if quantile is None else np.quantile(seconds, quantile, axis=axis)


def neighbours(problem: PlanningProblem, counts: Sequence[int], num_removed: int = 1) -> Iterator[tuple[int, ...]]:
    """Deployments with `num_removed` replicas less and the room filled by one or two other configs, each once.

    `MOST_REMOVED` stands also for more replicas of one config, where a replica of another needs so many devices. Idle
    devices count as room. All hold the longest bucket and the pinned replicas, and no more configs than allowed.
    """
    devices = [usable.num_devices for usable in problem.configs]
    pinned = problem.pinned or (0,) * len(counts)
    most_configs = len(counts) if problem.max_configs is None else problem.max_configs
    last = len(problem.buckets) - 1
    seen = {tuple(counts)}
    for kept in _removals(counts, devices, problem.num_devices, num_removed):
        if any(count < least for count, least in zip(kept, pinned, strict=True)):
            continue
        room = problem.num_devices - sum(count * number for count, number in zip(kept, devices, strict=True))
        for changed in _filled(kept, devices, room):
            serves = any(count and problem.configs[i].fits(last) for i, count in enumerate(changed))
            if serves and sum(count > 0 for count in changed) <= most_configs and changed not in seen:
                seen.add(changed)
                yield changed


def _removals(counts: Sequence[int], devices: Sequence[int], num_devices: int, num_removed: int) -> Iterator[list[int]]:
    """`counts` without `num_removed` replicas; for `MOST_REMOVED` also without as many as a larger one needs."""
    present = [index for index, count in enumerate(counts) if count]
    removals = set(itertools.combinations_with_replacement(present, num_removed))
    if num_removed == MOST_REMOVED:
        idle = num_devices - sum(count * number for count, number in zip(counts, devices, strict=True))
        needed = ((index, -(-(size - idle) // devices[index])) for index in present for size in devices)
        removals |= {(index,) * number for index, number in needed if MOST_REMOVED < number <= counts[index]}
    for removed in sorted(removals):
        kept = list(counts)
        for index in removed:
            kept[index] -= 1
        yield kept


def _filled(counts: Sequence[int], devices: Sequence[int], room: int) -> Iterator[tuple[int, ...]]:
    """`counts` with a replica of one config and as many of another as fit beside it into `room` devices."""
    for one in range(len(counts)):
        for two in range(one, len(counts)):
            changed = list(counts)
            left = room
            for index, most in ((one, 1), (two, room)):
                added = min(most, left // devices[index])
                changed[index] += added
                left -= added * devices[index]
            yield tuple(changed)
