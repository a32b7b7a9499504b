"""The few things that every SCIP model here does the same way: quiet, one thread, seeded, status read before values.

SCIP is used through pyscipopt; nothing else of the project calls `optimize` or `optimizeNogil`.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time

from pyscipopt import SCIP_PARAMSETTING, Model

MIN_TIME_LIMIT_S = 1e-3

STATUS_OF_BOUND = (
    "optimal",
    "gaplimit",
    "timelimit",
    "nodelimit",
    "totalnodelimit",
    "sollimit",
    "bestsollimit",
    "stallnodelimit",
    "primallimit",
)
"""Statuses after which SCIP's dual bound holds for the whole model."""

NO_NODE_LIMIT = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a solve ended.

    Attributes:
      status: SCIP's status ("optimal", "infeasible", "timelimit", ...).
      has_solution: whether values may be read from the model.
      bound: proven bound on the objective; infinite with the sign of "nothing proven" where there is none.
      num_nodes: branch-and-bound nodes.
      seconds: wall seconds of the solve.
    """

    status: str
    has_solution: bool
    bound: float
    num_nodes: int
    seconds: float


def new_model(name: str) -> Model:
    """An empty minimisation model that prints nothing."""
    model = Model(name)
    model.hideOutput()
    model.setParam("randomization/randomseedshift", 0)
    return model


def light(model: Model) -> None:
    """Settings for small models solved many times: presolve, heuristics and cuts cost more than they save there."""
    model.setPresolve(SCIP_PARAMSETTING.FAST)
    model.setParam("separating/maxroundsroot", 3)
    model.setParam("separating/maxrounds", 1)
    model.setHeuristics(SCIP_PARAMSETTING.FAST)
    model.setParam("misc/usesymmetry", 0)


def solve(
    model: Model,
    *,
    time_limit_s: float,
    gap_limit: float = 0.0,
    node_limit: int = NO_NODE_LIMIT,
    first_solution: bool = False,
    good_enough: float = -math.inf,
) -> Outcome:
    """Optimises without the GIL, so that other Python threads go on meanwhile.

    Args:
      time_limit_s: wall seconds. A solve that this ends depends on the machine's speed; one that ends otherwise does
        not.
      gap_limit: relative gap at which to stop.
      node_limit: branch-and-bound nodes, restarts included, after which to stop.
      first_solution: stop at the first solution.
      good_enough: stop at a solution with an objective no larger than this.

    Raises:
      KeyboardInterrupt: Ctrl-C while solving in the main thread. Elsewhere SCIP leaves Ctrl-C to the main thread.
    """
    model.setParam("limits/time", max(time_limit_s, MIN_TIME_LIMIT_S))
    model.setParam("timing/clocktype", 2)  # wall clock, not CPU
    model.setParam("limits/gap", gap_limit)
    model.setParam("limits/totalnodes", node_limit)
    model.setParam("misc/catchctrlc", threading.current_thread() is threading.main_thread())
    if first_solution:
        model.setParam("limits/solutions", 1)
    if good_enough > -math.inf:
        model.setParam("limits/primal", good_enough)
    started = time.perf_counter()
    model.optimizeNogil()
    seconds = time.perf_counter() - started
    status = model.getStatus()
    if status == "userinterrupt":  # SCIP's handler took the signal, Python saw none
        raise KeyboardInterrupt
    bound = model.getDualbound() if status in STATUS_OF_BOUND else -math.inf
    return Outcome(
        status=status,
        has_solution=model.getNSols() > 0,
        bound=bound if abs(bound) < model.infinity() else -math.inf,
        num_nodes=model.getNTotalNodes(),
        seconds=seconds,
    )
