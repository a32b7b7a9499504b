"""Plans that are good over many sampled batches, not only on the expected one; and whether a plan still is.

The expected batch hides what a step waits for: how many of the longest sequences come together. So deployments are
judged on sampled batches, by the mean of the step time or by a percentile of it.

1. Candidates: what a planner makes of the expected batch, of some sampled batches, and of a batch that holds of every
   bucket its upper quantile; then neighbours of the best so far, one or two replicas replaced by others on their
   devices and the idle ones, in a seeded order, from each better one on.
2. Every candidate is screened by the mean (or percentile) of its bounds over the samples (`planner.prices`: a proven
   bound for each batch, usually within 1 % of the dispatch).
3. The best few are judged by the dispatch's own search on every sample (`planner.share_out`) where time allows, and the
   choice is compared with the plan of the expected batch on samples that took no part in choosing.
"""

from __future__ import annotations

import dataclasses
import itertools
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
DEFAULT_SEED = 10_000
"""Of the batches that plans are chosen on: not that of simulations, which would else judge a plan on them."""

UPPER = 0.95
"""Quantile of every bucket in the batch that stands for a hard one."""

NUM_PLANNED_BATCHES = 4
"""Sampled batches that the planner plans for, one by one, beside the expected one."""

SCREENED_BATCHES = 8
"""Samples that neighbours are screened on."""

MOST_REMOVED = 2
"""Replicas that are replaced at once: none (only idle devices are filled), one, or where that does not help two.

Beside two come as many of one config as one replica of another needs the devices of."""

NUM_JUDGED = 5
"""Candidates that are dispatched on every sample, the plan of the expected batch among them."""

MEAN_SHARE = 0.2
PLANNED_SHARE = 0.02
"""Shares of the time limit for the plan of the expected batch and for the plan of each other batch."""

JUDGING_SHARE = 0.4
"""Most of the time left that goes to dispatching candidates, at least two or none; neighbours have the rest."""

NUM_REPORTED = 2
"""Deployments that are dispatched on fresh samples at the end: the one chosen and that of the expected batch."""


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
    seed: int = DEFAULT_SEED,
) -> Robust:
    """The best candidate over `num_samples` batches; at the problem's time limit the best of those judged.

    How long a deployment takes to dispatch on every sample is measured first, so that the search ends in time for what
    comes after it. A limit that leaves too little for dispatching candidates goes by their bounds, one that leaves none
    for a search gives the plan of the expected batch; times on fresh samples come in any case.
    """
    quantile = percentile(objective)
    started = time.perf_counter()
    samples = sampled_counts(problem, num_samples, seed)
    mean_plan = solve(_within(problem, problem.counts, MEAN_SHARE * problem.time_limit_s))
    mean_counts = replica_counts(problem, mean_plan)
    once_s = _dispatching_s(problem, mean_counts, samples)
    deadline = started + problem.time_limit_s - NUM_REPORTED * once_s
    left_s = deadline - time.perf_counter()
    num_judged = min(NUM_JUDGED, int(JUDGING_SHARE * left_s / once_s))
    judging_s = num_judged * once_s if num_judged > 1 else 0.0
    screened = _screen(problem, solve, mean_counts, samples, quantile, seed, deadline - judging_s)
    best = min(screened, key=screened.__getitem__)
    if num_judged > 1:
        others = sorted((counts for counts in screened if counts != mean_counts), key=screened.__getitem__)
        judged = {
            counts: step_times(problem, counts, samples, quantile).objective_s
            for counts in (mean_counts, *others[: num_judged - 1])
        }
        best = min(judged, key=judged.__getitem__)
    fresh = sampled_counts(problem, num_samples, seed, first=num_samples)
    times = step_times(problem, best, fresh, quantile)
    mean_times = times if best == mean_counts else step_times(problem, mean_counts, fresh, quantile)
    return Robust(
        plan=_plan(problem, best, mean_plan, time.perf_counter() - started),
        objective=objective,
        num_samples=num_samples,
        seed=seed,
        times=times,
        mean_plan=mean_plan,
        mean_plan_times=mean_times,
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


def _dispatching_s(problem: PlanningProblem, counts: Sequence[int], samples: np.ndarray) -> float:
    """Seconds that dispatching every sample on a deployment takes, as measured on a few of them."""
    few = samples[:SCREENED_BATCHES]
    started = time.perf_counter()
    step_times(problem, counts, few)
    return (time.perf_counter() - started) * len(samples) / len(few)


def _screen(
    problem: PlanningProblem,
    solve: Callable[[PlanningProblem], Plan],
    mean_counts: tuple[int, ...],
    samples: np.ndarray,
    quantile: float | None,
    seed: int,
    deadline: float,
) -> dict[tuple[int, ...], float]:
    """Deployment -> objective of its bounds over all samples, infinite for those that fewer samples ruled out."""
    few = samples[:: max(1, len(samples) // SCREENED_BATCHES)]
    quick: dict[tuple[int, ...], float] = {}

    def look(counts: tuple[int, ...]) -> float:
        if counts not in quick:
            quick[counts] = _bound_objective(problem, counts, few, quantile)
        return quick[counts]

    looking = time.perf_counter()
    look(mean_counts)
    sample_s = (time.perf_counter() - looking) / len(few)
    search_until = deadline - NUM_JUDGED * len(samples) * sample_s
    upper = np.quantile(samples, UPPER, axis=0, method="higher").astype(np.int64)
    for row in (upper, *samples[:NUM_PLANNED_BATCHES]):
        left_s = min(search_until - time.perf_counter(), PLANNED_SHARE * problem.time_limit_s)
        if left_s > 0:
            look(replica_counts(problem, solve(_within(problem, row.tolist(), left_s))))
    better: tuple[int, ...] | None = min(quick, key=quick.__getitem__)
    order = np.random.default_rng(seed)
    while better is not None:
        better = _better_neighbour(problem, better, look, order, search_until)
    kept = sorted(quick, key=quick.__getitem__)[:NUM_JUDGED]
    screened = dict.fromkeys(quick, float("inf"))
    return screened | {counts: _bound_objective(problem, counts, samples, quantile) for counts in kept}


def _better_neighbour(
    problem: PlanningProblem,
    counts: tuple[int, ...],
    look: Callable[[tuple[int, ...]], float],
    order: np.random.Generator,
    deadline: float,
) -> tuple[int, ...] | None:
    """The first neighbour, in an order drawn anew, that looks better than `counts`; None if there is none in time."""
    for num_removed in range(MOST_REMOVED + 1):
        others = list(neighbours(problem, counts, num_removed))
        for index in order.permutation(len(others)):
            if time.perf_counter() >= deadline:
                return None
            if look(others[index]) < look(counts):
                return others[index]
    return None


def _within(problem: PlanningProblem, counts: Sequence[int], seconds: float) -> PlanningProblem:
    return dataclasses.replace(problem, counts=tuple(counts), time_limit_s=seconds)


def _bound_objective(
    problem: PlanningProblem, counts: Sequence[int], samples: np.ndarray, quantile: float | None
) -> float:
    kinds = [usable for usable, count in zip(problem.configs, counts, strict=True) if count]
    multiplicity = [count for count in counts if count]
    bounds = [prices.relax(kinds, multiplicity, row).bound_s for row in samples.tolist()]
    return _objective(bounds, quantile)


def _objective(seconds: Sequence[float], quantile: float | None) -> float:
    return float(np.mean(seconds) if quantile is None else np.quantile(seconds, quantile))


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


def _plan(problem: PlanningProblem, counts: tuple[int, ...], mean_plan: Plan, solve_s: float) -> Plan:
    """The deployment as a plan, its prediction that of the expected batch, its bound that of the planner's own plan."""
    if counts == replica_counts(problem, mean_plan):
        made = mean_plan.predicted
        return dataclasses.replace(mean_plan, predicted=made and dataclasses.replace(made, solve_s=solve_s))
    replicas = [usable for usable, count in zip(problem.configs, counts, strict=True) for _ in range(count)]
    share, _ = share_out(replicas, balance.tables(replicas, problem.counts), problem.counts, gap_limit=GAP_LIMIT)
    step_s = share.max_s + problem.costs.step_overhead_s
    bound_s = 0.0 if mean_plan.predicted is None else mean_plan.predicted.bound_s
    return problem.make_plan(
        counts, step_s=step_s, bound_s=min(bound_s, step_s), planner=mean_plan.planner, solve_s=solve_s
    )
