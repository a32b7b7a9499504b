"""The linear master problem over patterns: which share of the counts can replicas serve within a time?

With patterns a of known worth (`planner.pricing`) at a fixed T:

    maximise s
    (1)  sum over patterns a of n_aj x_a >= N_j s          every bucket j; dual pi_j, with sum_j N_j pi_j = 1
    (2)  sum over patterns a of config c of x_a <= p_c     every config c; dual mu_c
    (3)  sum_c g_c p_c <= D
    (4)  sum over c that fit bucket J of p_c >= 1          where asked for
    (5)  lower_c <= p_c <= upper_c

with x and p fractional. The solver sees (1) divided by N_j and D s as objective, so that duals are about 1 whatever
the size: its tolerances are absolute. With `thrift` e > 0 the objective is s - e sum_a g_a x_a / D and s <= 1: of what
serves all counts, that which leaves most room; `charges` then include e g_c / D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pyscipopt import LP

from planner.pricing import Pattern
from planner.problem import PlanningProblem


@dataclasses.dataclass(frozen=True, kw_only=True)
class MasterSolution:
    """`scale` is s; `prices` [J] pi; `charges` [C] mu; `replicas` [C] p; `uses` x of each pattern, in order."""

    scale: float
    prices: np.ndarray
    charges: np.ndarray
    replicas: np.ndarray
    uses: np.ndarray


class Master:
    """The master at one T. Patterns are added, bounds on p are changed, and it is solved again from where it was."""

    def __init__(
        self,
        problem: PlanningProblem,
        lower: Sequence[int],
        upper: Sequence[int],
        *,
        needs_longest: bool = True,
        thrift: float = 0.0,
    ) -> None:
        self.patterns: list[Pattern] = []
        self._served = [bucket for bucket, count in enumerate(problem.counts) if count > 0]
        self._row = {bucket: row for row, bucket in enumerate(self._served)}
        self._num_buckets, self._num_configs = len(problem.counts), len(problem.configs)
        self._counts, self._num_devices = np.array(problem.counts), problem.num_devices
        lp = LP("master", sense="minimize")
        free = lp.infinity()
        num_rows = len(self._served)
        num_covers = num_rows + self._num_configs
        lp.addRows([[] for _ in range(num_covers)], lhss=[0.0] * num_covers, rhss=[free] * num_covers)
        lp.addRow([], lhs=-free, rhs=float(problem.num_devices))
        lp.addRow([], lhs=1.0 if needs_longest else 0.0, rhs=free)
        lp.addCol(
            [(row, -1.0) for row in range(num_rows)],
            obj=-float(problem.num_devices),
            lb=0.0,
            ub=1.0 if thrift else free,
        )
        last = len(problem.counts) - 1
        for index, usable in enumerate(problem.configs):
            entries = [(num_rows + index, 1.0), (num_rows + self._num_configs, float(usable.num_devices))]
            if usable.fits(last):
                entries.append((num_rows + self._num_configs + 1, 1.0))
            lp.addCol(entries, obj=0.0, lb=float(lower[index]), ub=float(upper[index]))
        self._lp = lp
        devices = np.array([usable.num_devices for usable in problem.configs])
        self._thrift = thrift * devices / problem.num_devices

    def add(self, patterns: Sequence[Pattern]) -> None:
        if not patterns:
            return
        columns = []
        for pattern in patterns:
            entries = [(self._row[b], float(n / self._counts[b])) for b, n in enumerate(pattern.rows.tolist()) if n]
            columns.append([*entries, (len(self._served) + pattern.config, -1.0)])
        free = self._lp.infinity()
        self._lp.addCols(
            columns,
            objs=[float(self._thrift[pattern.config] * self._num_devices) for pattern in patterns],
            lbs=[0.0] * len(columns),
            ubs=[free] * len(columns),
        )
        self.patterns += patterns

    def fix(self, lower: Sequence[float], upper: Sequence[float]) -> None:
        """Sets (5)."""
        for index, (low, high) in enumerate(zip(lower, upper, strict=True)):
            self._lp.chgBound(1 + index, float(low), float(high))

    def solve(self) -> MasterSolution:
        self._lp.solve()
        primal = np.array(self._lp.getPrimal())
        dual = np.array(self._lp.getDual()) / self._num_devices
        prices = np.zeros(self._num_buckets)
        prices[self._served] = np.maximum(dual[: len(self._served)], 0.0) / self._counts[self._served]
        links = dual[len(self._served) : len(self._served) + self._num_configs]
        return MasterSolution(
            scale=float(primal[0]),
            prices=prices,
            charges=np.maximum(links, 0.0) + self._thrift,
            replicas=primal[1 : 1 + self._num_configs],
            uses=primal[1 + self._num_configs :],
        )
