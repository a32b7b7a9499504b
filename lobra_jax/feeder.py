"""Prepares steps ahead of the devices: which sequences, on which replica, laid out as arrays.

A prepared step is a function of (run config, plan, step, tasks that take part); a thread makes the next one while the
devices work on the present one. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lobra_jax.config import PlannerConfig
from lobra_jax.data.batches import (
    GlobalBatch,
    MicroBatchArrays,
    TaskData,
    eval_batches,
    fill_micro_batch,
    global_batch,
)
from planner.cost import CostTable
from planner.dispatch import Dispatch, dispatch
from planner.errors import UserError
from planner.plan import Plan

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A step ready to be issued.

    Attributes:
      task_steps: task name -> its own step; None for a task that takes no part.
      arrays: [replica][micro-batch], each replica's most expensive first.
      prepare_s: seconds that making it took, the dispatch's included.
    """

    task_steps: Mapping[str, int | None]
    batch: GlobalBatch
    dispatch: Dispatch
    arrays: tuple[tuple[MicroBatchArrays, ...], ...]
    prepare_s: float

    @property
    def padded_tokens(self) -> int:
        return sum(arrays.tokens.size for own in self.arrays for arrays in own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationChunk:
    """Part of the held-out examples, ready to be run: [replica][micro-batch]."""

    batch: GlobalBatch
    arrays: tuple[tuple[MicroBatchArrays, ...], ...]


class Feeder:
    """Makes `PreparedStep`s of one run, one step ahead. A context manager."""

    def __init__(self, tasks: Sequence[TaskData], plan: Plan, costs: CostTable, settings: PlannerConfig) -> None:
        self.tasks = tuple(tasks)
        self.plan = plan
        self.costs = costs
        self.settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._ahead: tuple[Mapping[str, int | None], Future[PreparedStep]] | None = None

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def prefetch(self, task_steps: Mapping[str, int | None]) -> None:
        """Starts preparing a step in the background."""
        self._ahead = (dict(task_steps), self._thread.submit(self.prepare, dict(task_steps)))

    def take(self, task_steps: Mapping[str, int | None]) -> PreparedStep:
        """The step, from the background if that is what was asked for last."""
        if self._ahead is not None and self._ahead[0] == task_steps:
            future = self._ahead[1]
            self._ahead = None
            return future.result()
        return self.prepare(task_steps)

    def prepare(self, task_steps: Mapping[str, int | None]) -> PreparedStep:
        start = time.perf_counter()
        batch = global_batch(self.tasks, task_steps)
        chosen = dispatch(
            self.plan,
            self.costs,
            batch.lengths,
            batch.task_ids,
            method=self.settings.dispatch,
            max_buckets=self.settings.max_dispatch_buckets,
            time_limit_s=self.settings.dispatch_time_limit_s,
        )
        return PreparedStep(
            task_steps=task_steps,
            batch=batch,
            dispatch=chosen,
            arrays=_fill(batch, chosen),
            prepare_s=time.perf_counter() - start,
        )

    def evaluation(self, names: Sequence[str], max_sequences: int) -> Iterator[EvaluationChunk]:
        """Every held-out example of these tasks once, each on the smallest replicas that it fits, in full rows."""
        capacities = [group.capacity_tokens for group in self.plan.expanded()]
        for batch in eval_batches(self.tasks, names, max_sequences):
            chosen = dispatch(
                self.plan,
                self.costs,
                batch.lengths,
                batch.task_ids,
                method="group",
                max_buckets=len(self.plan.buckets),
                time_limit_s=self.settings.dispatch_time_limit_s,
            )
            full = dataclasses.replace(
                chosen,
                replicas=tuple(
                    tuple(dataclasses.replace(m, rows=capacity // m.length) for m in micro_batches)
                    for micro_batches, capacity in zip(chosen.replicas, capacities, strict=True)
                ),
            )
            yield EvaluationChunk(batch=batch, arrays=_fill(batch, full))


def evaluation_shapes(plan: Plan) -> list[list[Shape]]:
    """[replica][shape] that `Feeder.evaluation` uses: each bucket on the smallest capacity that holds it."""
    capacities = [group.capacity_tokens for group in plan.expanded()]
    smallest = {bucket: min(c for c in capacities if c >= bucket) for bucket in plan.buckets}
    return [[(own // bucket, bucket) for bucket in plan.buckets if smallest[bucket] == own] for own in capacities]


def check_lengths(tasks: Sequence[TaskData], plan: Plan) -> None:
    """Refuses a plan under which some example of a task fits no replica."""
    for task in tasks:
        for dataset in (task.train, task.evaluation):
            longest = 0 if dataset is None else int(dataset.lengths.max())
            if longest > plan.buckets[-1]:
                raise UserError(
                    f"task {task.name!r} has a sequence longer than any replica of the plan takes",
                    key=f"tasks.{task.name}.context_length",
                    value=longest,
                    expected=f"at most {plan.buckets[-1]} tokens (the plan's largest bucket; its largest capacity is "
                    f"{plan.max_capacity_tokens}), or another plan",
                )


def _fill(batch: GlobalBatch, chosen: Dispatch) -> tuple[tuple[MicroBatchArrays, ...], ...]:
    return tuple(tuple(fill_micro_batch(batch, m) for m in micro_batches) for micro_batches in chosen.replicas)
