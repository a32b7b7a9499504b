"""A joint step as training and its benchmarks make one: the engine of a run's tasks, a step handed to it, and what is
recorded of the step."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lobra_jax.config import RunConfig
from lobra_jax.engine import Engine, IssuedStep
from lobra_jax.feeder import Feeder, PreparedStep
from lobra_jax.metrics import PhaseSeconds, StepRecord, TaskRecord, length_counts
from lobra_jax.models.config import LlamaConfig
from lobra_jax.optim import TaskOptimizer, step_inputs
from lobra_jax.step_times import StepResult
from lobra_jax.tasks import keep_last_good, lora_spec
from planner.cost import CostTable
from planner.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class PendingStep:
    """A step that was issued and not yet recorded.

    Attributes:
      step: whole steps done before it.
      wait_s: the host waited for its dispatch and arrays.
      issue_s: the host took to hand it to the devices.
    """

    step: int
    prepared: PreparedStep
    issued: IssuedStep
    wait_s: float
    issue_s: float


def make_engine(
    config: RunConfig,
    model: LlamaConfig,
    plan: Plan,
    optimizers: Sequence[TaskOptimizer],
    *,
    devices: Sequence[Any],
    packed: bool = False,
) -> Engine:
    """The engine of a config's tasks, whose `optimizers` come in their order, on a plan."""
    return Engine(
        plan,
        model,
        [lora_spec(task) for task in config.tasks],
        dtype=jnp.dtype(config.model.dtype),
        quantization=config.model.quantization,
        devices=devices,
        optimizers={optimizer.kind for optimizer in optimizers},
        averages=any(optimizer.ema_decay is not None for optimizer in optimizers),
        last_good=keep_last_good(config.tasks),
        packed=packed,
        memory_bytes=config.devices.memory_bytes,
    )


def issue_step(
    step: int,
    task_steps: Mapping[str, int | None],
    *,
    feeder: Feeder,
    optimizers: Sequence[TaskOptimizer],
    engine: Engine,
    following: Mapping[str, int | None] | None = None,
    before_issue: Callable[[int], None] | None = None,
) -> PendingStep:
    """Takes a step from the feeder and issues it; while devices work on it, the feeder prepares the one after it.

    Args:
      step: whole steps done before it.
      task_steps: task -> its own step, None for one that takes no part.
      following: as `task_steps`, of the step after it; None for none.
      before_issue: told the step's number, `step` + 1, when it is prepared.

    Raises:
      OutOfMemoryError: as `Engine.issue`.
    """
    started = time.perf_counter()
    prepared = feeder.take(task_steps)
    taken = time.perf_counter()
    hyper = step_inputs(optimizers, list(task_steps.values()))
    if before_issue is not None:
        before_issue(step + 1)
    meanwhile = None if following is None else functools.partial(feeder.prefetch, following)
    issued = engine.issue(prepared.arrays, hyper, step=step + 1, meanwhile=meanwhile)
    return PendingStep(
        step=step,
        prepared=prepared,
        issued=issued,
        wait_s=taken - started,
        issue_s=time.perf_counter() - taken - issued.settle_s,
    )


def step_record(
    pending: PendingStep, result: StepResult, *, plan: Plan, costs: CostTable, compilations: int
) -> StepRecord:
    """The record of a finished step; `compilations` counts programs compiled meanwhile."""
    prepared = pending.prepared
    device_seconds = plan.used_devices * result.total_s
    return StepRecord(
        step=pending.step + 1,
        tokens=prepared.batch.num_tokens,
        padded_tokens=prepared.padded_tokens,
        padding_share=1 - prepared.batch.num_tokens / prepared.padded_tokens,
        idle_share=1 - sum(result.busy_s) / device_seconds,
        gpu_seconds=device_seconds,
        seconds=PhaseSeconds(
            wait_dispatch=pending.wait_s,
            issue=pending.issue_s,
            host_wait=result.host_wait_s,
            execute=result.execute_s,
            sum_update=result.sum_update_s,
            total=result.total_s,
        ),
        dispatch_solve_s=prepared.dispatch.solve_s,
        predicted_s=tuple(prepared.dispatch.predicted_s),
        measured_s=result.replica_s,
        predicted_step_s=max(prepared.dispatch.predicted_s) + costs.step_overhead_s,
        num_micro_batches=tuple(len(own) for own in prepared.dispatch.replicas),
        compilations=compilations,
        first_runs=result.first_runs,
    )


def task_records(pending: PendingStep, result: StepResult, optimizers: Sequence[TaskOptimizer]) -> Iterator[TaskRecord]:
    """The records of the tasks that took part in a finished step."""
    batch = pending.prepared.batch
    counts = batch.num_sequences
    for index, (name, task_step) in enumerate(pending.prepared.task_steps.items()):
        if task_step is not None:
            yield TaskRecord(
                step=pending.step + 1,
                task=name,
                task_step=task_step + 1,
                loss=float(result.losses[index]),
                tokens=int(batch.num_target_tokens[index]),
                sequences=int(counts[index]),
                lr=float(optimizers[index].learning_rates[task_step]),
                grad_norm=float(result.gradient_norms[index]),
                lengths=length_counts(batch.lengths[batch.task_ids == index]),
            )
