"""The linear master problem over patterns: which share of the counts can replicas serve within a time?

With patterns a of known worth (`planner.pricing`) at a fixed T:

    maximise s
    (1)  sum over patterns a of n_aj x_a >= N_j s          every bucket j; dual pi_j, with sum_j N_j pi_j = 1
    (2)  sum over patterns a of config c of x_a <= p_c     every config c; dual mu_c
    (3)  sum_c g_c p_c <= D
    (4)  sum over c that fit bucket `must_fit` of p_c >= 1 where asked for: J but for parts (`planner.rebuild`)
    (5)  lower_c <= p_c <= upper_c
    (6)  sum over patterns a of h_ai x_a >= L_i s          every cut i of `planner.cuts` that was added; dual sigma_i

with x and p fractional; with cuts sum_j N_j pi_j + sum_i L_i sigma_i = 1. The solver sees (1) divided by N_j, (6) by
L_i, and D s as objective, so that duals are about 1 whatever the size: its tolerances are absolute. With `thrift` e > 0
the objective is s - e sum_a g_a x_a / D and s <= 1: of what serves all counts, that which leaves most room; `charges`
then include e g_c / D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pyscipopt import LP

from planner.cuts import Cut, of_patterns
from planner.patterns import Lattice, Pattern
from planner.problem import ReplicaProblem


@dataclasses.dataclass(frozen=True, kw_only=True)
class MasterSolution:
    """`scale` is s; `prices` [J + K] pi, sigma; `charges` [C] mu; `replicas` [C] p; `uses` x of each pattern."""

    scale: float
    prices: np.ndarray
    charges: np.ndarray
    replicas: np.ndarray
    uses: np.ndarray


class Master:
    """The master at one T. Patterns are added, bounds on p are changed, and it is solved again from where it was."""

    def __init__(
        self,
        problem: ReplicaProblem,
        lower: Sequence[int],
        upper: Sequence[int],
        lattices: Sequence[Lattice],
        *,
        must_fit: int | None,
        thrift: float = 0.0,
    ) -> None:
        self.patterns: list[Pattern] = []
        self._cuts: list[Cut] = []
        self._full = np.array([lattice.full for lattice in lattices])
        self._served = [bucket for bucket, count in enumerate(problem.counts) if count > 0]
        self._num_buckets, self._num_configs = len(problem.counts), len(problem.configs)
        self._counts, self._num_devices = np.array(problem.counts), problem.num_devices
        lp = LP("master", sense="minimize")
        free = lp.infinity()
        num_rows = len(self._served)
        num_covers = num_rows + self._num_configs
        lp.addRows([[] for _ in range(num_covers)], lhss=[0.0] * num_covers, rhss=[free] * num_covers)
        lp.addRow([], lhs=-free, rhs=float(problem.num_devices))
        lp.addRow([], lhs=0.0 if must_fit is None else 1.0, rhs=free)
        self._first_cut = num_covers + 2
        lp.addCol(
            [(row, -1.0) for row in range(num_rows)],
            obj=-float(problem.num_devices),
            lb=0.0,
            ub=1.0 if thrift else free,
        )
        for index, usable in enumerate(problem.configs):
            entries = [(num_rows + index, 1.0), (num_rows + self._num_configs, float(usable.num_devices))]
            if must_fit is not None and usable.fits(must_fit):
                entries.append((num_rows + self._num_configs + 1, 1.0))
            lp.addCol(entries, obj=0.0, lb=float(lower[index]), ub=float(upper[index]))
        self._lp = lp
        devices = np.array([usable.num_devices for usable in problem.configs])
        self._thrift = thrift * devices / problem.num_devices

    def add(self, patterns: Sequence[Pattern]) -> None:
        if not patterns:
            return
        num_served = len(self._served)
        of_counts = np.array([pattern.rows for pattern in patterns])[:, self._served] / self._counts[self._served]
        shares = np.concatenate([of_counts, self._of_cuts(patterns, self._cuts)], axis=1)
        row = np.array([*range(num_served), *range(self._first_cut, self._first_cut + len(self._cuts))])
        own, at = np.nonzero(shares)
        entries = list(zip(row[at].tolist(), shares[own, at].tolist(), strict=True))
        ends = np.searchsorted(own, np.arange(len(patterns) + 1)).tolist()
        columns = [
            [*entries[start:end], (num_served + pattern.config, -1.0)]
            for pattern, start, end in zip(patterns, ends[:-1], ends[1:], strict=True)
        ]
        free = self._lp.infinity()
        self._lp.addCols(
            columns,
            objs=[float(self._thrift[pattern.config] * self._num_devices) for pattern in patterns],
            lbs=[0.0] * len(columns),
            ubs=[free] * len(columns),
        )
        self.patterns += patterns

    def add_cuts(self, cuts: Sequence[Cut]) -> None:
        """Adds (6); `prices` are of these cuts too from now on, in this order."""
        first_pattern = 1 + self._num_configs
        for adds in self._of_cuts(self.patterns, cuts).T.tolist():
            entries = [(first_pattern + at, share) for at, share in enumerate(adds) if share]
            self._lp.addRow([(0, -1.0), *entries], lhs=0.0, rhs=self._lp.infinity())
        self._cuts += cuts

    def _of_cuts(self, patterns: Sequence[Pattern], cuts: Sequence[Cut]) -> np.ndarray:
        """[P, K] what patterns add to cuts, as shares of what the cuts ask for."""
        rows = np.array([pattern.rows for pattern in patterns], dtype=np.int64).reshape(-1, self._num_buckets)
        full = self._full[[pattern.config for pattern in patterns]]
        return of_patterns(cuts, rows, full) / np.array([cut.least(self._counts) for cut in cuts])

    def fix(self, lower: Sequence[float], upper: Sequence[float]) -> None:
        """Sets (5)."""
        for index, (low, high) in enumerate(zip(lower, upper, strict=True)):
            self._lp.chgBound(1 + index, float(low), float(high))

    def solve(self) -> MasterSolution:
        self._lp.solve()
        primal = np.array(self._lp.getPrimal())
        dual = np.array(self._lp.getDual()) / self._num_devices
        prices = np.zeros(self._num_buckets + len(self._cuts))
        prices[self._served] = np.maximum(dual[: len(self._served)], 0.0) / self._counts[self._served]
        least = np.array([cut.least(self._counts) for cut in self._cuts])
        prices[self._num_buckets :] = np.maximum(dual[self._first_cut :], 0.0) / least
        links = dual[len(self._served) : len(self._served) + self._num_configs]
        return MasterSolution(
            scale=float(primal[0]),
            prices=prices,
            charges=np.maximum(links, 0.0) + self._thrift,
            replicas=primal[1 : 1 + self._num_configs],
            uses=primal[1 + self._num_configs :],
        )
