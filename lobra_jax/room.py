"""Room on the devices: the plan's programs, and smaller capacities where a device ran out of memory all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from lobra_jax.compilation import compile_threads
from lobra_jax.engine import Engine
from lobra_jax.feeder import EvalReplicas, evaluation_shapes
from lobra_jax.metrics import compile_bar
from lobra_jax.out_of_memory import Failure, OutOfMemoryError
from planner.cost import CostTable
from planner.lattice import Shape
from planner.lower import lower_capacities
from planner.packed_dispatch import packed_replicas
from planner.plan import Plan

Result = TypeVar("Result")


class Room:
    """The plan that a run follows, whose capacities fall when a device runs out of memory.

    Args:
      engine: compiles and runs the plan.
      costs: where the plan's packed shapes come from.
      batching: padded or packed.
      eval_replicas: which replicas evaluate; None where no task does.
      longest: tokens of the longest sequence that must be served.
      plan_path: the run's plan, rewritten so that a resumed run keeps what was lowered.
      say: receives lines for the user.
    """

    def __init__(
        self,
        engine: Engine,
        costs: CostTable,
        *,
        batching: str,
        eval_replicas: EvalReplicas | None,
        longest: int,
        plan_path: Path,
        say: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.costs = costs
        self.batching = batching
        self.eval_replicas = eval_replicas
        self.longest = longest
        self.plan_path = plan_path
        self.say = say
        self.on_lowered: list[Callable[[Plan, str], None]] = []

    @property
    def plan(self) -> Plan:
        return self.engine.plan

    def compile(self) -> int:
        """Compiles what the plan's shapes lack, in parallel; returns the number of programs."""
        return self.within("compiling", self._compile)

    def within(self, doing: str, work: Callable[[], Result]) -> Result:
        """The outcome of `work`, done again with smaller capacities for as long as a device runs out of memory.

        Raises:
          UserError: no smaller capacity can serve the longest sequence.
        """
        while True:
            try:
                return work()
            except OutOfMemoryError as error:
                failures = error.failures
            # Out here the arrays of the failed attempt, which the exception's frames hold, are gone.
            self.lower(failures, doing)

    def lower(self, failures: Sequence[Failure], doing: str) -> None:
        """Lowers the capacity of the replicas that had no room, or of all that can where none is known to be at fault.

        Rewrites the run's plan, says it in one line, and compiles the new shapes.
        """
        plan, message = lowered(self.plan, self.training_shapes(), failures, longest=self.longest, doing=doing)
        self.engine.plan = plan
        plan.save(self.plan_path)
        self.say(message)
        for listener in self.on_lowered:
            listener(plan, message)
        self.compile()
        self.within("asking for room", self.engine.check_room)

    def _compile(self) -> int:
        nothing: list[list[Shape]] = [[] for _ in self.engine.replicas]
        evaluation = nothing if self.eval_replicas is None else evaluation_shapes(self.plan, self.eval_replicas)
        programs = 0
        with compile_bar() as advance:
            for done, total in self.engine.compile(self.training_shapes(), evaluation, num_threads=compile_threads()):
                programs = total
                advance(done, total)
        return programs

    def training_shapes(self) -> list[list[Shape]]:
        """Of the micro-batches that the plan may run, by replica."""
        if self.batching == "packed":
            return [list(replica.shapes) for replica in packed_replicas(self.plan, self.costs)]
        return self.engine.shapes()


def lowered(
    plan: Plan, shapes: Sequence[Sequence[Shape]], failures: Sequence[Failure], *, longest: int, doing: str
) -> tuple[Plan, str]:
    """The plan with less for those that had no room, or for all that can where none is known, and a line that says it.

    Args:
      shapes: of every replica's training micro-batches.
      longest: tokens of the longest sequence that must be served.
      doing: what there was no room for.

    Raises:
      UserError: no smaller capacity can serve the longest sequence.
    """
    groups = list(plan.expanded())
    suspects = failures or [Failure(replica=index, shape=None) for index in range(len(groups))]
    failed = []
    for suspect in suspects:
        group, own = groups[suspect.replica], sorted(shapes[suspect.replica], key=math.prod)
        largest = {group.policy_of(length): (rows, length) for rows, length in own}  # of each policy
        failed += [(group.config, shape) for shape in ([suspect.shape] if suspect.shape else largest.values())]
    new_plan = lower_capacities(plan, failed, longest=longest, suspects=not failures)
    changes = dict.fromkeys(
        f"{old.config} from {old.tokens} to {new.tokens} tokens"
        for old, new in zip(plan.replicas, new_plan.replicas, strict=True)
        if old != new
    )
    where = "".join(f", replica {f.replica}{f}" for f in failures)
    return new_plan, f"out of device memory in {doing}{where}: capacity lowered of {', '.join(changes)}; done again"
