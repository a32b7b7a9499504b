"""The deployment problem relaxed at a fixed time T: can `num_devices` devices run the counts within T at all?

At a fixed T a replica runs one of its config's patterns (`planner.pricing`), and the master problem (`planner.master`)
asks which share s of the counts fractional numbers of patterns can serve. The relaxation lets T through if s >= 1. Of
patterns there are too many to list, so they are found as needed (Gilmore and Gomory, "A linear programming approach to
the cutting-stock problem", 1961): the master's prices pi are handed to the pricer, and the patterns that are worth more
than they are charged join the master.

For any prices pi >= 0 with sum_j N_j pi_j = 1 and any replica counts p that serve everything within T

    (1)  sum_c z_c(pi) p_c >= 1                   z_c: the most that one replica of config c can be worth

so where sum_c z_c p_c stays below 1 for all p that (3) to (5) of the master allow, T is unattainable. With cuts of
whole slots (`planner.cuts`) in the master their prices sigma count too: sum_j N_j pi_j + sum_i L_i sigma_i = 1. A
`proven` level prices with bounds, so that its "no" is a proof; the others are for finding plans.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from planner import balance
from planner.cuts import Cut, of_patterns, violated
from planner.master import Master, MasterSolution
from planner.patterns import Pattern, lattice_of, slots_of
from planner.pricing import Pricer
from planner.problem import ReplicaProblem

WORTHWHILE = 3e-4
"""A pattern joins the master when it is worth more than its charge by this share."""

SMOOTHING = 0.5
"""Share of the best prices so far in those that are priced next; plain master prices swing from round to round."""

SURPLUS = 0.002
"""Patterns that took up to this share longer than T elsewhere join a master too: cells of time are no finer."""

PRICED_AT_ONCE = 6
"""Configs that get the dynamic programme in one round of an unproven level."""

CHEAP = 0.97
"""A config that any plan may leave out is not looked at closer once it is worth less than this share of its devices."""

STRICT = 1e-9
"""What stays below 1 by this much stays below 1."""


def least_conceivable_s(problem: ReplicaProblem) -> float:
    """A bound on T without solving: all devices busy at each bucket's best rate; and each bucket's quickest slot."""
    work, quickest = balance.work_and_quickest_s(problem.configs, problem.counts)
    return max(work / problem.num_devices, quickest) * (1 - balance.ROUNDING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a level knows for some bounds on the replica counts.

    Attributes:
      bound: no replica counts serve more than this share of the counts (proven if the level is).
      prices: [J] those that gave the bound.
      solution: the master's last solution: some share that fractional patterns do serve. None before the first.
    """

    bound: float
    prices: np.ndarray
    solution: MasterSolution | None

    @property
    def scale(self) -> float:
        return 0.0 if self.solution is None else self.solution.scale


class Relaxation:
    """The relaxation of a problem at any T. Patterns and prices found at one T serve at the next.

    `lower` and `upper` [C] bound the replicas of each config that plans within `horizon_s` have.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self.problem = problem
        self.devices = np.array([usable.num_devices for usable in problem.configs])
        self.fits_longest = np.array([usable.fits(len(problem.counts) - 1) for usable in problem.configs])
        self.lower = np.array(problem.pinned_counts)
        self.upper = problem.num_devices // self.devices
        self.horizon_s = math.inf
        self.slots = [slots_of(usable, problem.counts) for usable in problem.configs]
        self.lattices = [lattice_of(usable) for usable in problem.configs]
        self.pool: list[Pattern] = []
        self.cuts: list[Cut] = []
        self.prices = self._first_prices()
        self.num_rounds = 0

    def _first_prices(self) -> np.ndarray:
        """Each bucket's device-seconds at its best rate: the prices if time could be split at will."""
        problem = self.problem
        rates = [
            min((u.num_devices * u.per_sequence_s(j) for u in problem.configs if u.fits(j)), default=0.0) if n else 0.0
            for j, n in enumerate(problem.counts)
        ]
        return np.array(rates) / np.dot(rates, problem.counts)

    def limit(self, prices: np.ndarray, horizon_s: float, *, num_cells: int | None = None) -> bool:
        """Limits `upper` to what plans within `horizon_s` may have; False if these prices prove that there are none.

        Where a device is worth at most w, D devices are worth at most D w less what each replica of a config c falls
        short of its devices, g_c w - z_c; what serves all is worth 1 (reduced cost fixing).
        """
        self.upper, self.horizon_s = self.problem.num_devices // self.devices, math.inf
        worth = self._proven_worth(prices, horizon_s, np.zeros(len(self.devices)), num_cells=num_cells)
        left = self.problem.num_devices - int(self.lower @ self.devices)
        per_device = (worth / self.devices)[(self.devices <= left) | (self.lower > 0)].max(initial=0.0)
        short = np.maximum(per_device * self.devices - worth, 0.0)
        room = self.problem.num_devices * per_device - 1 - float(self.lower @ short) + STRICT
        allowed = np.full(len(worth), room)
        if not (self.lower * self.fits_longest).any():
            cover = short[self.fits_longest & (self.devices <= left)].min()
            allowed -= np.where(self.fits_longest, 0.0, cover)
            room -= cover
        if room < 0:
            return False
        more = np.floor(np.maximum(allowed, 0.0) / np.where(short > 0, short, 1.0))
        more = np.where(short > 0, np.minimum(more, self.upper), self.upper)
        more = np.where(allowed >= 0, more, 0).astype(self.upper.dtype)
        self.upper, self.horizon_s = np.minimum(self.upper, self.lower + more), horizon_s
        return True

    def most_served(self, worth: np.ndarray) -> float:
        """The most that sum_c worth[c] p_c can be over fractional p with (3) to (5) of the master."""
        left = self.problem.num_devices - int(self.lower @ self.devices)
        room = self.upper - self.lower
        pinned = float(self.lower @ worth)
        most, chosen = self._filled(worth, room, left)
        if ((self.lower + chosen) * self.fits_longest).sum() >= 1:
            return pinned + most
        covers = np.flatnonzero(self.fits_longest & (self.devices <= left) & (room > 0)).tolist()
        every = np.arange(len(worth))
        rests = (self._filled(worth, room - (every == cover), left - self.devices[cover])[0] for cover in covers)
        return pinned + max(
            (float(worth[cover]) + rest for cover, rest in zip(covers, rests, strict=True)), default=0.0
        )

    def _filled(self, worth: np.ndarray, room: np.ndarray, left: int) -> tuple[float, np.ndarray]:
        """(the most that fractional p <= room on `left` devices are worth, p [C])."""
        order = np.argsort(-worth / self.devices, kind="stable")
        devices = (room * self.devices)[order]
        used = np.clip(left - (np.cumsum(devices) - devices), 0.0, devices) / self.devices[order]
        chosen = np.zeros(len(worth))
        chosen[order] = used
        return float(worth @ chosen), chosen

    def proven_served(self, prices: np.ndarray, replica_s: float) -> float:
        """What share of the counts these prices prove that no plan serves more of within `replica_s`.

        Of plans within `upper`.
        """
        is_free = (self.lower == 0) & ~self.fits_longest
        enough = np.where(is_free, CHEAP * self.devices / self.problem.num_devices, 0.0)
        return self.most_served(self._proven_worth(prices, replica_s, enough))

    def _proven_worth(
        self, prices: np.ndarray, replica_s: float, enough: np.ndarray, *, num_cells: int | None = None
    ) -> np.ndarray:
        """[C] what no replica is worth more than, where it is worth more than `enough` [C]."""
        self.num_rounds += 1
        pricer = Pricer(
            self.problem, self.slots, self.lattices, replica_s, num_cells=num_cells, proven=True, cuts=self.cuts
        )
        return pricer.price(prices, self.if_allowed(enough))[0]

    def if_allowed(self, enough: np.ndarray) -> np.ndarray:
        """`enough` [C], infinite for configs of which plans have no replicas: these need no pricing."""
        return np.where(self.upper > 0, enough, math.inf)

    def worth(self, pattern: Pattern, prices: np.ndarray) -> float:
        """What a pattern is worth at prices [J + K] of sequences and the first K cuts."""
        num_buckets, full = len(pattern.rows), self.lattices[pattern.config].full
        adds = of_patterns(self.cuts[: len(prices) - num_buckets], pattern.rows[None], full[None])[0]
        return float(pattern.rows @ prices[:num_buckets] + adds @ prices[num_buckets:])


class Level:
    """The relaxation at one T. `worths` are what replicas are worth at most [C], for some prices each."""

    def __init__(
        self,
        relaxation: Relaxation,
        replica_s: float,
        *,
        num_cells: int | None = None,
        proven: bool = False,
        worths: Sequence[np.ndarray] = (),
    ) -> None:
        self.relaxation = relaxation
        self.replica_s = replica_s
        self.proven = proven
        self.pricer = Pricer(
            relaxation.problem,
            relaxation.slots,
            relaxation.lattices,
            replica_s,
            num_cells=num_cells,
            proven=proven,
        )
        last = len(relaxation.problem.counts) - 1
        self.master = Master(relaxation.problem, relaxation.lower, relaxation.upper, relaxation.lattices, must_fit=last)
        self._num_cuts = 0
        within_s, upper = replica_s * (1 + SURPLUS), relaxation.upper
        self.master.add([p for p in relaxation.pool if p.seconds <= within_s and upper[p.config] > 0])
        self.worths = list(worths)
        self._known = {(pattern.config, pattern.rows.tobytes()) for pattern in self.patterns}

    @property
    def patterns(self) -> list[Pattern]:
        return self.master.patterns

    def solve(
        self,
        *,
        replica_counts: Sequence[int] | None = None,
        decide: bool = False,
        cutting: bool = False,
        near: float = 0.0,
        deadline: float = math.inf,
    ) -> Answer:
        """Finds patterns until none is worthwhile, or the deadline.

        Args:
          replica_counts: [C] where these are given; by default they are free within the problem's bounds.
          decide: end as soon as it is known whether the share is below 1 or not.
          cutting: add cuts that the patterns' use violates, and go on.
          near: with `decide`, do not end below 1 before this share of the bound is served.
        """
        relaxation = self.relaxation
        if replica_counts is None:
            self.master.fix(relaxation.lower, relaxation.upper)
        else:
            self.master.fix(replica_counts, replica_counts)
        self._add_cuts()
        served = np.array(relaxation.problem.counts) > 0
        if not self.pricer.can_serve[served].all():
            return Answer(bound=0.0, prices=relaxation.prices, solution=None)
        solution = self.master.solve() if self.patterns else None
        best = Answer(bound=math.inf, prices=relaxation.prices, solution=solution)
        thorough = done = False  # thorough: the master's own prices, all configs
        while time.perf_counter() < deadline:
            if decide and best.bound < 1 - STRICT and best.scale >= near * best.bound:
                break
            if done or (decide and best.scale >= 1):
                if not (cutting and self._cut(solution)):
                    break
                thorough = done = False
                solution = self.master.solve()
                best = dataclasses.replace(best, solution=solution)
                continue
            if solution is None:
                prices = relaxation.prices
            else:
                smoothing = 0.0 if thorough else SMOOTHING
                prices = (1 - smoothing) * solution.prices
                prices[: len(best.prices)] += smoothing * best.prices
            added, bound = self._round(prices, solution, replica_counts, thorough or self.proven)
            if bound < best.bound:
                best = dataclasses.replace(best, bound=bound, prices=prices)
            done, thorough = thorough and not added, not added
            if not done:
                solution = self.master.solve()
                best = dataclasses.replace(best, solution=solution)
        relaxation.prices = best.prices
        return best

    def rule_out(self, prices: np.ndarray) -> None:
        """Adds what every config's replicas are worth at these prices: `solve` looks closely at some configs only."""
        relaxation = self.relaxation
        relaxation.num_rounds += 1
        enough = CHEAP * relaxation.devices / relaxation.problem.num_devices
        worth, _ = self.pricer.price(prices, relaxation.if_allowed(enough))
        self.worths.append(worth)

    def _cut(self, solution: MasterSolution) -> bool:
        """Adds cuts that the use of patterns violates; whether there are any."""
        relaxation = self.relaxation
        new = violated(
            relaxation.problem.counts,
            relaxation.lattices,
            self.patterns,
            solution.uses,
            solution.scale,
            relaxation.cuts,
        )
        relaxation.cuts += new
        self._add_cuts()
        return bool(new)

    def _add_cuts(self) -> None:
        """Adds the relaxation's cuts that this level does not have yet."""
        new = self.relaxation.cuts[self._num_cuts :]
        self.master.add_cuts(new)
        self.pricer.add(new)
        self._num_cuts += len(new)

    def _round(
        self,
        prices: np.ndarray,
        solution: MasterSolution | None,
        replica_counts: Sequence[int] | None,
        all_configs: bool,
    ) -> tuple[int, float]:
        """Prices once: (patterns that joined the master, bound on the share served)."""
        relaxation = self.relaxation
        relaxation.num_rounds += 1
        if solution is None:
            charges = np.zeros(len(relaxation.devices))
            enough = charges
        else:
            charges = solution.charges * (1 + WORTHWHILE) + STRICT / len(relaxation.devices)
            enough = charges
        most = None if all_configs or solution is None else PRICED_AT_ONCE
        worth, found = self.pricer.price(prices, relaxation.if_allowed(enough), most=most)
        self.worths.append(worth)
        if solution is not None:
            found = [p for p in found if relaxation.worth(p, solution.prices) > charges[p.config]]
        found = [pattern for pattern in found if (pattern.config, pattern.rows.tobytes()) not in self._known]
        self._known.update((pattern.config, pattern.rows.tobytes()) for pattern in found)
        self.master.add(found)
        relaxation.pool += found
        if replica_counts is None:
            return len(found), relaxation.most_served(worth)
        return len(found), float(worth @ np.asarray(replica_counts))
