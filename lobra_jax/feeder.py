"""Prepares steps ahead of the devices: which sequences, on which replica, laid out as arrays.

A prepared step is a function of (run config, plan, step, tasks that take part); a thread makes the next one while the
devices work on the present one. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

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
from planner.lattice import Shape
from planner.packed_dispatch import packed_dispatch
from planner.plan import Plan

EvalReplicas = Literal["all", "one"]
"""Which replicas evaluate: all, or one of each group of like replicas."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A step ready to be issued.

    Attributes:
      task_steps: task name -> its own step; None for a task that takes no part.
      arrays: [replica][micro-batch], each replica's most expensive first.
    """

    task_steps: Mapping[str, int | None]
    batch: GlobalBatch
    dispatch: Dispatch
    arrays: tuple[tuple[MicroBatchArrays, ...], ...]

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

    def __init__(
        self,
        tasks: Sequence[TaskData],
        plan: Plan,
        costs: CostTable,
        settings: PlannerConfig,
        *,
        eval_replicas: EvalReplicas = "all",
        batching: str = "padded",
    ) -> None:
        self.tasks = tuple(tasks)
        self.batching = batching
        self.plan = plan
        self.costs = costs
        self.settings = settings
        self.eval_replicas = eval_replicas
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._ahead: tuple[Mapping[str, int | None], Future[PreparedStep]] | None = None

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def replan(self, plan: Plan) -> None:
        """Prepares steps for another plan from now on; what was prepared ahead is dropped."""
        self._ahead = None
        self.plan = plan

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
        batch = global_batch(self.tasks, task_steps)
        chosen = self._dispatch(batch)
        return PreparedStep(
            task_steps=task_steps,
            batch=batch,
            dispatch=chosen,
            arrays=_fill(batch, chosen),
        )

    def _dispatch(self, batch: GlobalBatch) -> Dispatch:
        if self.batching == "packed":
            return packed_dispatch(self.plan, self.costs, batch.lengths, batch.task_ids)
        return dispatch(
            self.plan,
            self.costs,
            batch.lengths,
            batch.task_ids,
            method=self.settings.dispatch,
            max_buckets=self.settings.max_dispatch_buckets,
            time_limit_s=self.settings.dispatch_time_limit_s,
            ahead=True,
        )

    def evaluation(self, names: Sequence[str], max_sequences: int) -> Iterator[EvaluationChunk]:
        """Every held-out example of these tasks once, each on the smallest replicas that it fits, in full rows."""
        part, numbers = _evaluating(self.plan, self.eval_replicas)
        for batch in eval_batches(self.tasks, names, max_sequences):
            chosen = dispatch(
                part,
                self.costs,
                batch.lengths,
                batch.task_ids,
                method="group",
                max_buckets=len(self.plan.buckets),
                time_limit_s=self.settings.dispatch_time_limit_s,
            )
            arrays: list[tuple[MicroBatchArrays, ...]] = [()] * self.plan.num_replicas
            for number, group, micro_batches in zip(numbers, part.expanded(), chosen.replicas, strict=True):
                full = [dataclasses.replace(m, rows=group.capacity_of(m.length) // m.length) for m in micro_batches]
                arrays[number] = tuple(fill_micro_batch(batch, m) for m in full)
            yield EvaluationChunk(batch=batch, arrays=tuple(arrays))


def evaluation_shapes(plan: Plan, eval_replicas: EvalReplicas = "all") -> list[list[Shape]]:
    """[replica][shape] that `Feeder.evaluation` uses: each bucket on the smallest capacity that holds it."""
    part, numbers = _evaluating(plan, eval_replicas)
    smallest = {
        bucket: min(group.capacity_tokens for group in plan.replicas if group.capacity_tokens >= bucket)
        for bucket in plan.buckets
    }
    shapes: list[list[Shape]] = [[] for _ in plan.expanded()]
    for number, group in zip(numbers, part.expanded(), strict=True):
        own_buckets = [bucket for bucket in plan.buckets if smallest[bucket] == group.capacity_tokens]
        shapes[number] = [(group.capacity_of(bucket) // bucket, bucket) for bucket in own_buckets]
    return shapes


def _evaluating(plan: Plan, eval_replicas: EvalReplicas) -> tuple[Plan, tuple[int, ...]]:
    """The replicas of a plan that evaluate, and their numbers in it."""
    if eval_replicas == "all":
        return plan, tuple(range(plan.num_replicas))
    firsts = itertools.accumulate((group.count for group in plan.replicas[:-1]), initial=0)
    singles = tuple(dataclasses.replace(group, count=1) for group in plan.replicas)
    return dataclasses.replace(plan, replicas=singles), tuple(firsts)


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
