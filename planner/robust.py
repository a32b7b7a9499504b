"""Plans that are good over many sampled batches, not only on the expected one; and whether a plan still is.

The expected batch hides what a step waits for: how many of the longest sequences come together. So deployments are
judged on sampled batches, by the mean of the step time or by a percentile of it.

1. Candidates: what a planner makes of the expected batch and of one that holds of every bucket its upper quantile; then
   neighbours of the best so far (`planner.robust_search`).
2. Every candidate is screened by the mean (or percentile) of its bounds over the samples (`planner.prices`: a proven
   bound for each batch, usually within 1 % of the dispatch).
3. Those near the best are judged by the dispatch's own search (`planner.share_out`) where time allows, and the choice
   is compared with the plan of the expected batch on samples that took no part in choosing; if that plan is better
   there, it is taken instead.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from planner import balance
from planner.defaults import DEFAULT_SAMPLES
from planner.dispatch import GAP_LIMIT
from planner.errors import UserError
from planner.plan import Plan
from planner.problem import PlanningProblem
from planner.robust_search import Screen, over_samples
from planner.share_out import share_out
from planner.simulate import batch

MEAN = "mean"
OBJECTIVES = "mean or a percentile p1 to p99"
DEFAULT_SEED = 10_000
"""Of the batches that plans are chosen on: not that of simulations, which would else judge a plan on them."""

UPPER = 0.95
"""Quantile of every bucket in the batch that stands for a hard one."""

TIMED_BATCHES = 8
"""Samples that tell how long dispatching takes."""

NEAR = 1.02
"""Candidates whose bounds are within this ratio of the best one's are dispatched: others would hardly overtake it."""

NUM_JUDGED, FIRST_SHARE = 5, 0.25
"""How many of them at the most, at first on this share of the samples."""

NUM_FINALISTS = 2
"""Those of them that are dispatched on all."""

MEAN_SHARE = 0.2
PLANNED_SHARE = 0.02
"""Shares of the time limit for the plan of the expected batch and for that of the hard one."""

JUDGING_SHARE = 0.4
"""Most of the time left that dispatching candidates may take; where it takes more, their bounds choose."""

NUM_DISPATCHED = NUM_JUDGED * FIRST_SHARE + NUM_FINALISTS + 1
"""Deployments that are dispatched on all samples in judging, the expected batch's among them."""

PATTERNS_SHARE = 0.5
"""Share of the time limit that dispatching may take with patterns (`planner.share_out`); else it goes without them."""

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
      num_samples, seed: batches it was chosen on; as many others gave the times below, and on these it is no worse than
        the plan of the expected batch.
      times: of the plan.
      mean_plan, mean_plan_times: the plan made for the expected batch alone, and its times.
      num_candidates: deployments compared, most of them by the prices of others.
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
    patterns: bool | None = None,
) -> Robust:
    """The best candidate over `num_samples` batches; at the problem's time limit the best of those judged.

    How long a deployment takes to dispatch on every sample is measured first, so that the search ends in time for what
    comes after it; `patterns` None leaves to that whether dispatching knows of them. A limit that leaves too little for
    dispatching candidates goes by their bounds, one that leaves none for a search gives the plan of the expected batch;
    times on fresh samples come in any case.
    """
    quantile = percentile(objective)
    started = time.perf_counter()
    samples = sampled_counts(problem, num_samples, seed)
    mean_plan = solve(_within(problem, problem.counts, MEAN_SHARE * problem.time_limit_s))
    mean_counts = replica_counts(problem, mean_plan)
    limit_s = PATTERNS_SHARE * problem.time_limit_s
    once_s, patterns = dispatching_s(problem, mean_counts, samples, limit_s, patterns)
    deadline = started + problem.time_limit_s - NUM_REPORTED * once_s
    judging_s = once_s * NUM_DISPATCHED
    is_judged = judging_s <= JUDGING_SHARE * (deadline - time.perf_counter())
    screen = Screen(problem, samples, quantile)
    _search(screen, solve, mean_counts, samples, deadline - judging_s * is_judged)
    best = screen.seen[0]
    if is_judged:
        near = [counts for counts in screen.seen if screen(counts) <= NEAR * screen(best)]
        best = _judged(problem, near[:NUM_JUDGED], mean_counts, samples, quantile, patterns)
    fresh = sampled_counts(problem, num_samples, seed, first=num_samples)
    times = step_times(problem, best, fresh, quantile, patterns=patterns)
    mean_times = times if best == mean_counts else step_times(problem, mean_counts, fresh, quantile, patterns=patterns)
    if mean_times.objective_s < times.objective_s:
        best, times = mean_counts, mean_times
    return Robust(
        plan=_plan(problem, best, mean_plan, time.perf_counter() - started),
        objective=objective,
        num_samples=num_samples,
        seed=seed,
        times=times,
        mean_plan=mean_plan,
        mean_plan_times=mean_times,
        num_candidates=len(screen.known),
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
    problem: PlanningProblem,
    counts: Sequence[int],
    samples: np.ndarray,
    quantile: float | None = None,
    *,
    patterns: bool = True,
) -> StepTimes:
    """Times of a deployment over sampled batches [S, J]; `quantile` None means the mean.

    Dispatched as steps are that are not prepared ahead; without `patterns` quicker, and worse where pipelines are long.
    """
    replicas = [usable for usable, count in zip(problem.configs, counts, strict=True) for _ in range(count)]
    seconds, bounds = [], []
    for row in samples.tolist():
        table = balance.tables(replicas, row)
        share, bound_s = share_out(replicas, table, row, gap_limit=GAP_LIMIT, patterns=patterns)
        seconds.append(share.max_s)
        bounds.append(bound_s)
    overhead_s = problem.costs.step_overhead_s
    return StepTimes(
        mean_s=float(np.mean(seconds)) + overhead_s,
        p50_s=float(np.quantile(seconds, 0.5)) + overhead_s,
        p95_s=float(np.quantile(seconds, 0.95)) + overhead_s,
        objective_s=float(over_samples(seconds, quantile)) + overhead_s,
        bound_s=float(np.mean(bounds)) + overhead_s,
    )


def dispatching_s(
    problem: PlanningProblem,
    counts: Sequence[int],
    samples: np.ndarray,
    limit_s: float,
    patterns: bool | None = None,
) -> tuple[float, bool]:
    """(seconds that dispatching every sample on a deployment takes, as measured on a few; whether with patterns).

    Unless `patterns` says: without them where all that are dispatched would take more than `limit_s` with them.
    """
    few = samples[:TIMED_BATCHES]
    for with_patterns in (True, False) if patterns is None else (patterns,):
        started = time.perf_counter()
        step_times(problem, counts, few, patterns=with_patterns)
        once_s = (time.perf_counter() - started) * len(samples) / len(few)
        if once_s * (NUM_DISPATCHED + NUM_REPORTED) <= limit_s:
            break
    return once_s, with_patterns


def _search(
    screen: Screen,
    solve: Callable[[PlanningProblem], Plan],
    mean_counts: tuple[int, ...],
    samples: np.ndarray,
    deadline: float,
) -> None:
    """Looks at the plans of the expected batch and of a hard one, then from the better of them on."""
    problem = screen.problem
    screen.look(mean_counts)
    upper = np.quantile(samples, UPPER, axis=0, method="higher").astype(np.int64)
    left_s = min(deadline - time.perf_counter(), PLANNED_SHARE * problem.time_limit_s)
    if left_s > 0:
        screen.look(replica_counts(problem, solve(_within(problem, upper.tolist(), left_s))))
    screen.descend(screen.seen[0], deadline)


def _judged(
    problem: PlanningProblem,
    candidates: Sequence[tuple[int, ...]],
    mean_counts: tuple[int, ...],
    samples: np.ndarray,
    quantile: float | None,
    patterns: bool,
) -> tuple[int, ...]:
    """What dispatches best: the candidates on the first samples, the best of them and `mean_counts` on all."""
    first = samples[: max(1, round(FIRST_SHARE * len(samples)))]

    def best(among: Sequence[tuple[int, ...]], batches: np.ndarray) -> list[tuple[int, ...]]:
        times = {c: step_times(problem, c, batches, quantile, patterns=patterns).objective_s for c in among}
        return sorted(times, key=times.__getitem__)

    finalists = best(candidates, first)[:NUM_FINALISTS] if len(candidates) > NUM_FINALISTS else candidates
    finalists = list(dict.fromkeys((*finalists, mean_counts)))
    return best(finalists, samples)[0] if len(finalists) > 1 else finalists[0]


def _within(problem: PlanningProblem, counts: Sequence[int], seconds: float) -> PlanningProblem:
    return dataclasses.replace(problem, counts=tuple(counts), time_limit_s=seconds)


def _plan(problem: PlanningProblem, counts: tuple[int, ...], mean_plan: Plan, solve_s: float) -> Plan:
    """The deployment as a plan, its prediction that of the expected batch, its bound that of the planner's own plan."""
    if counts == replica_counts(problem, mean_plan):
        made = mean_plan.predicted
        return dataclasses.replace(mean_plan, predicted=made and dataclasses.replace(made, solve_s=solve_s))
    replicas = [usable for usable, count in zip(problem.configs, counts, strict=True) for _ in range(count)]
    table = balance.tables(replicas, problem.counts)
    share, _ = share_out(replicas, table, problem.counts, gap_limit=GAP_LIMIT, ahead=True)
    step_s = share.max_s + problem.costs.step_overhead_s
    bound_s = 0.0 if mean_plan.predicted is None else mean_plan.predicted.bound_s
    return problem.make_plan(
        counts, step_s=step_s, bound_s=min(bound_s, step_s), planner=mean_plan.planner, solve_s=solve_s
    )
