"""Plans that are good over many sampled batches, not only on the expected one; and whether a plan still is.

The expected batch hides what a step waits for: how many of the longest sequences come together. So deployments are
judged on sampled batches, by the mean of the step time or by a percentile of it.

1. Candidates: what a planner makes of the expected batch, of some sampled batches, and of a batch that holds of every
   bucket its upper quantile; then their neighbours, one replica replaced by others on its devices and the idle ones.
2. Every candidate is screened by the mean (or percentile) of its bounds over the samples (`planner.prices`: a proven
   bound for each batch, usually within 1 % of the dispatch).
3. The best few are judged by the dispatch's own search on every sample (`planner.share_out`), and compared with the
   plan of the expected batch on samples that took no part in choosing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from planner import balance, prices
from planner.dispatch import GAP_LIMIT
from planner.errors import UserError
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.share_out import share_out
from planner.simulate import batch

MEAN = "mean"
OBJECTIVES = "mean or a percentile p1 to p99"
DEFAULT_SAMPLES = 64

UPPER = 0.95
"""Quantile of every bucket in the batch that stands for a hard one."""

NUM_PLANNED_BATCHES = 4
"""Sampled batches that the planner plans for, one by one, beside the expected one."""

SCREENED_BATCHES = 8
"""Samples that neighbours are screened on."""

MAX_ROUNDS = 4
"""Times that the neighbours of the best candidate so far are looked at."""

NUM_JUDGED = 4
"""Candidates that are dispatched on every sample."""

PLANNING_SHARE = 0.4
JUDGING_SHARE = 0.3
"""Shares of the time limit for making candidates by the planner and for judging them; neighbours have the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of a step over sampled batches, the step's overhead included.

    `objective_s` is the mean or the percentile that was asked for, `bound_s` the mean of the bounds.
    """

    mean_s: float
    p50_s: float
    p95_s: float
    objective_s: float
    bound_s: float


def percentile(objective: str) -> float | None:
    """The quantile that an objective names, None for the mean; what is neither raises `UserError`."""
    if objective == MEAN:
        return None
    number = objective.removeprefix("p")
    if not objective.startswith("p") or not number.isdecimal() or not 1 <= int(number) <= 99:
        raise UserError("bad value", key="robust", value=objective, expected=OBJECTIVES)
    return int(number) / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust:
    """A plan chosen over samples.

    Attributes:
      plan: the plan.
      objective: "mean" or a percentile, as `percentile` reads it.
      num_samples, seed: batches it was chosen on; as many others gave the times below.
      times: of the plan.
      mean_plan, mean_plan_times: the plan made for the expected batch alone, and its times.
      num_candidates: deployments screened.
    """

    plan: Plan
    objective: str
    num_samples: int
    seed: int
    times: StepTimes
    mean_plan: Plan
    mean_plan_times: StepTimes
    num_candidates: int

    @property
    def regret(self) -> float:
        """By how much of the plan's objective the plan of the expected batch is worse."""
        return self.mean_plan_times.objective_s / self.times.objective_s - 1


def solve_robust(
    problem: PlanningProblem,
    solve: Callable[[PlanningProblem], Plan],
    *,
    objective: str,
    num_samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> Robust:
    """The best candidate over `num_samples` batches; at the problem's time limit the best of those judged.

    The plan of the expected batch and the most promising other are always judged, and so are their times afterwards.
    """
    quantile = percentile(objective)
    started = time.perf_counter()
    samples = sampled_counts(problem, num_samples, seed)
    mean_plan = solve(_within(problem, problem.counts, PLANNING_SHARE / (NUM_PLANNED_BATCHES + 2)))
    deadline = started + problem.time_limit_s
    screened = _screen(problem, solve, mean_plan, samples, quantile, deadline - JUDGING_SHARE * problem.time_limit_s)
    mean_counts = replica_counts(problem, mean_plan)
    shortlist = [counts for counts in sorted(screened, key=screened.__getitem__)[:NUM_JUDGED] if counts != mean_counts]
    judged = {mean_counts: step_times(problem, mean_counts, samples, quantile)}
    for counts in shortlist:
        if len(judged) == 1 or time.perf_counter() < deadline:
            judged[counts] = step_times(problem, counts, samples, quantile)
    best = min(judged, key=lambda counts: judged[counts].objective_s)
    fresh = sampled_counts(problem, num_samples, seed, first=num_samples)
    times = step_times(problem, best, fresh, quantile)
    return Robust(
        plan=_plan(problem, best, mean_plan, time.perf_counter() - started),
        objective=objective,
        num_samples=num_samples,
        seed=seed,
        times=times,
        mean_plan=mean_plan,
        mean_plan_times=times if best == mean_counts else step_times(problem, mean_counts, fresh, quantile),
        num_candidates=len(screened),
    )


def sampled_counts(problem: PlanningProblem, num_samples: int, seed: int, *, first: int = 0) -> np.ndarray:
    """[num_samples, J] sequences of each bucket in the batches that `lobra simulate` draws with this seed."""
    buckets = np.asarray(problem.buckets)
    rows = []
    for step in range(first, first + num_samples):
        _, lengths = batch(problem.workload, seed, step)
        rows.append(np.bincount(np.searchsorted(buckets, lengths), minlength=len(buckets)))
    return np.stack(rows)


def replica_counts(problem: PlanningProblem, plan: Plan) -> tuple[int, ...]:
    """Replicas of each of the problem's configs in a plan."""
    found = {group.config: group.count for group in plan.replicas}
    return tuple(found.get(usable.config, 0) for usable in problem.configs)


def step_times(
    problem: PlanningProblem, counts: Sequence[int], samples: np.ndarray, quantile: float | None = None
) -> StepTimes:
    """Times of a deployment over sampled batches [S, J], dispatched as in training; `quantile` None means the mean."""
    replicas = [usable for usable, count in zip(problem.configs, counts, strict=True) for _ in range(count)]
    seconds, bounds = [], []
    for row in samples.tolist():
        share, bound_s = share_out(replicas, balance.tables(replicas, row), row, gap_limit=GAP_LIMIT)
        seconds.append(share.max_s)
        bounds.append(bound_s)
    overhead_s = problem.costs.step_overhead_s
    return StepTimes(
        mean_s=float(np.mean(seconds)) + overhead_s,
        p50_s=float(np.quantile(seconds, 0.5)) + overhead_s,
        p95_s=float(np.quantile(seconds, 0.95)) + overhead_s,
        objective_s=_objective(seconds, quantile) + overhead_s,
        bound_s=float(np.mean(bounds)) + overhead_s,
    )


def _screen(
    problem: PlanningProblem,
    solve: Callable[[PlanningProblem], Plan],
    mean_plan: Plan,
    samples: np.ndarray,
    quantile: float | None,
    deadline: float,
) -> dict[tuple[int, ...], float]:
    """Deployment -> objective of its bounds over all samples, for the candidates and the best of their neighbours."""
    few = samples[:: max(1, len(samples) // SCREENED_BATCHES)]
    quick: dict[tuple[int, ...], float] = {}

    def look(counts: tuple[int, ...]) -> float:
        if counts not in quick:
            quick[counts] = _bound_objective(problem, counts, few, quantile)
        return quick[counts]

    look(replica_counts(problem, mean_plan))
    upper = np.quantile(samples, UPPER, axis=0, method="higher").astype(np.int64)
    share = PLANNING_SHARE / (NUM_PLANNED_BATCHES + 2)
    for row in (upper, *samples[:NUM_PLANNED_BATCHES]):
        if time.perf_counter() < deadline:
            look(replica_counts(problem, solve(_within(problem, tuple(row.tolist()), share))))
    for _ in range(MAX_ROUNDS):
        best = min(quick, key=quick.__getitem__)
        for counts in neighbours(problem, best):
            if time.perf_counter() >= deadline:
                break
            look(counts)
        if min(quick, key=quick.__getitem__) == best:
            break
    kept = sorted(quick, key=quick.__getitem__)[: NUM_JUDGED + 1]
    return {counts: _bound_objective(problem, counts, samples, quantile) for counts in kept} | {
        counts: float("inf") for counts in quick if counts not in kept
    }


def _within(problem: PlanningProblem, counts: Sequence[int], share: float) -> PlanningProblem:
    return dataclasses.replace(problem, counts=tuple(counts), time_limit_s=problem.time_limit_s * share)


def _bound_objective(
    problem: PlanningProblem, counts: Sequence[int], samples: np.ndarray, quantile: float | None
) -> float:
    kinds = [usable for usable, count in zip(problem.configs, counts, strict=True) if count]
    multiplicity = [count for count in counts if count]
    bounds = [prices.relax(kinds, multiplicity, row).bound_s for row in samples.tolist()]
    return _objective(bounds, quantile)


def _objective(seconds: Sequence[float], quantile: float | None) -> float:
    return float(np.mean(seconds) if quantile is None else np.quantile(seconds, quantile))


def neighbours(problem: PlanningProblem, counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Deployments with one replica less and the room filled by one or two other configs; the longest bucket still fits.

    Also those with idle devices filled and nothing taken away.
    """
    devices = [usable.num_devices for usable in problem.configs]
    idle = problem.num_devices - sum(count * number for count, number in zip(counts, devices, strict=True))
    last = len(problem.buckets) - 1
    for removed in (None, *(index for index, count in enumerate(counts) if count)):
        room = idle + (0 if removed is None else devices[removed])
        for one in range(len(counts)):
            for two in range(one, len(counts)):
                changed = list(counts)
                if removed is not None:
                    changed[removed] -= 1
                left = room
                for index in (one, two):
                    added = (left // devices[index]) if index == two else min(1, left // devices[index])
                    changed[index] += added
                    left -= added * devices[index]
                serves = any(count and problem.configs[i].fits(last) for i, count in enumerate(changed))
                if serves and tuple(changed) != tuple(counts):
                    yield tuple(changed)


def _plan(problem: PlanningProblem, counts: tuple[int, ...], mean_plan: Plan, solve_s: float) -> Plan:
    """The deployment as a plan, its prediction that of the expected batch, its bound that of the planner's own plan."""
    if counts == replica_counts(problem, mean_plan):
        return mean_plan
    replicas = [usable for usable, count in zip(problem.configs, counts, strict=True) for _ in range(count)]
    share, _ = share_out(replicas, balance.tables(replicas, problem.counts), problem.counts, gap_limit=GAP_LIMIT)
    step_s = share.max_s + problem.costs.step_overhead_s
    bound_s = 0.0 if mean_plan.predicted is None else mean_plan.predicted.bound_s
    return problem.make_plan(
        counts, step_s=step_s, bound_s=min(bound_s, step_s), planner=mean_plan.planner, solve_s=solve_s
    )
