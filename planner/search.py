"""Where the exact planner's search stands; how it settles replica counts and looks for plans. See `planner.deployment`.

The integers of one deployment's dispatch are found here: by a dive (`planner.rounding`) or a model of their own
(`planner.balance_model`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from planner import balance, balance_model, rounding
from planner.balance import Share
from planner.local_search import improve
from planner.problem import PlanningProblem
from planner.relaxation import Level, Relaxation
from planner.rounding import RoundedShare

TARGET_GAP = 0.01
"""(step_s - bound_s) / step_s at which the search ends."""

CLOSING_SHARE = 0.95
"""Plans and bounds are asked for a little less than the target gap apart, so that nearly finding one is enough."""

LAST_CLOSING_SHARE = 0.995
"""The same when all else has left a gap."""

STRICTLY = 1e-7
"""With a target gap of 0, "better" means better by this share."""

ATTAINED = STRICTLY * (1 + 1e-6)
"""And this gap means that nothing is: what is proven there leaves STRICTLY and rounding errors."""

SETTLE_LIMIT_S = 0.5
NEARLY_ALL = 0.9
"""Share of its time after which SCIP is taken to have been ended by it."""

LOCAL_SEARCH_LIMIT_S = 0.2
SHORTEST_SOLVE_S = 0.02


DiveKey = tuple[float, bool, tuple[int, ...], tuple[int, ...], int]
"""T, whether with cuts, the least and most replicas of each config, and how many patterns are known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """A deployment with a share-out of the planned counts over its replicas, configs in order.

    `bound_s` is of the slowest replica, without overhead; `limit_s` is for how long SCIP was let search where that
    ended it, else 0.
    """

    replica_counts: tuple[int, ...]
    share: Share
    bound_s: float
    limit_s: float = 0.0

    @property
    def max_s(self) -> float:
        """Seconds of the slowest replica, without overhead."""
        return self.share.max_s

    def rounded(self) -> RoundedShare:
        replicas = [config for config, count in enumerate(self.replica_counts) for _ in range(count)]
        return RoundedShare(replicas=tuple(replicas), share=self.share)


@dataclasses.dataclass(kw_only=True)
class Search:
    """Where the search stands: the best plan so far, the proven bound, and what it took.

    Attributes:
      bound_s: no plan's slowest replica takes less, step overhead excluded.
      dived: dives that were made, and are not made again.
      rng: what is drawn in the search is drawn from here.
      level: the last proven level of `planner.closing`.
      settled: replica counts that may attain what was asked for, with what is known of them.
      hurries: whether to decide at once about what would end the search.
      is_bracketed: whether a T was found that the relaxation lets through.
      cutoff_s: what the slowest replica of a plan found elsewhere takes: only better ones are of interest.
    """

    problem: PlanningProblem
    relaxation: Relaxation
    target_gap: float
    deadline: float
    bound_s: float
    best: Settled | None = None
    dived: set[DiveKey] = dataclasses.field(default_factory=set)
    rng: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))
    level: Level | None = None
    settled: dict[tuple[int, ...], Settled] = dataclasses.field(default_factory=dict)
    hurries: bool = False
    cutoff_s: float = np.inf
    closing_share: float = CLOSING_SHARE
    num_nodes: int = 0
    is_bracketed: bool = False

    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    def gap(self) -> float:
        """The best plan's gap to the bound; infinite without a plan."""
        return gap_of(self.problem, np.inf if self.best is None else self.best.max_s, self.bound_s)

    def raise_bound(self, seconds: float) -> None:
        """Takes note that no plan of those that the relaxation looks at is within `seconds`."""
        self.bound_s = max(self.bound_s, min(seconds, self.relaxation.horizon_s))

    def is_done(self) -> bool:
        gap = min(self.gap(), gap_of(self.problem, self.cutoff_s, self.bound_s))
        return gap <= max(self.target_gap, ATTAINED) or self.left_s() <= SHORTEST_SOLVE_S

    def better(self) -> float:
        """The share by which a better plan is asked for."""
        return max(self.target_gap * self.closing_share, STRICTLY)

    def trial_s(self) -> float:
        """The T that no plan must attain to end the search."""
        overhead_s = self.problem.costs.step_overhead_s
        return (min(self.best.max_s, self.cutoff_s) + overhead_s) * (1 - self.better()) - overhead_s

    def goal_s(self) -> float:
        """The T that would be near enough to the bound."""
        wanted = self.target_gap * self.closing_share
        return (self.bound_s + wanted * self.problem.costs.step_overhead_s) / (1 - wanted)

    def decided_s(self) -> float:
        """The T at which to decide whether there are plans: the goal, or what is asked for if that is less.

        A "no" at the goal raises the bound, and with it the goal; one for whole replica counts alone may hold for much
        more, which is looked at next.
        """
        step = max(self.target_gap, TARGET_GAP) * self.closing_share
        overhead_s = self.problem.costs.step_overhead_s
        goal_s = (self.bound_s + step * overhead_s) / (1 - step)
        return self.trial_s() if self.hurries else min(self.trial_s(), goal_s)

    def offer(self, replica_counts: Sequence[int], share: Share) -> None:
        """Takes a plan, with its share-out over replicas in the order of their configs, if it is the best so far.

        Of plans that end together that whose other replicas end earlier, from the slowest on.
        """
        if self.best is None or _slowest_first(share) < _slowest_first(self.best.share):
            self.best = Settled(replica_counts=tuple(replica_counts), share=share, bound_s=0.0)

    def offer_share(self, rounded: RoundedShare) -> None:
        counts = np.bincount(rounded.replicas, minlength=len(self.problem.configs)).tolist()
        self.offer(counts, rounded.in_order())


def _slowest_first(share: Share) -> list[float]:
    return sorted(share.replica_s.tolist(), reverse=True)


def status_of(gap: float, target_gap: float, *, late: bool) -> str:
    """What a search ended by: a plan's status, see `planner.deployment.solve`."""
    if gap <= ATTAINED:
        return "optimal"
    if gap <= target_gap:
        return "gap limit"
    return "time limit" if late else "gap left"


def settle(
    problem: PlanningProblem,
    replica_counts: tuple[int, ...],
    *,
    bound_s: float = 0.0,
    target_gap: float = TARGET_GAP,
    deadline: float | None = None,
    start: Share | None = None,
    limit_s: float = SETTLE_LIMIT_S,
) -> Settled:
    """Shares the planned counts out over a deployment that has a replica for every bucket.

    `bound_s` is what is known to be the least for any deployment: within `target_gap` of it there is nothing to prove.
    `start` is a share-out over its replicas, configs in order, to improve on. SCIP searches for `limit_s` at the most.
    """
    replicas = [u for u, count in zip(problem.configs, replica_counts, strict=True) for _ in range(count)]
    table = balance.tables(replicas, problem.counts)
    share = start or improve(table, balance.list_schedule(table, problem.counts), time_limit_s=LOCAL_SEARCH_LIMIT_S)
    own_bound_s = bound_s
    left_s = limit_s if deadline is None else min(limit_s, deadline - time.perf_counter())
    cut_at_s = 0.0
    if left_s > SHORTEST_SOLVE_S and gap_of(problem, share.max_s, bound_s) > target_gap:
        started = time.perf_counter()
        share, proven_s = balance_model.refine(
            replicas, table, problem.counts, share, time_limit_s=left_s, gap_limit=target_gap / 2
        )
        own_bound_s = max(bound_s, proven_s)
        cut_at_s = left_s if time.perf_counter() - started >= NEARLY_ALL * left_s else 0.0
    return Settled(
        replica_counts=tuple(replica_counts),
        share=share,
        bound_s=min(own_bound_s, share.max_s),
        limit_s=cut_at_s,
    )


def dive(
    search: Search, lower: Sequence[int], upper: Sequence[int], replica_s: float, *, cutting: bool = False
) -> Share:
    """Looks for a plan within `replica_s` and these bounds on replica counts."""
    search.dived.add(dive_key(search, lower, upper, replica_s, cutting=cutting))
    rounded = rounding.dive(
        search.problem,
        replica_s,
        search.relaxation.pool,
        lower=lower,
        upper=upper,
        deadline=search.deadline,
        improve_s=LOCAL_SEARCH_LIMIT_S,
        cutting=cutting,
    )
    search.offer_share(rounded)
    return rounded.in_order()


def dive_key(search: Search, lower: Sequence[int], upper: Sequence[int], replica_s: float, *, cutting: bool) -> DiveKey:
    """What a dive depends on: another that has the same finds the same."""
    bounds = (tuple(np.asarray(bound).tolist()) for bound in (lower, upper))
    return replica_s, cutting, *bounds, len(search.relaxation.pool)


def gap_of(problem: PlanningProblem, max_s: float, bound_s: float) -> float:
    """Infinite for no plan."""
    if max_s == np.inf:
        return np.inf
    return (max_s - bound_s) / (max_s + problem.costs.step_overhead_s)
