"""Runs one part of `lobra bench experiment` on devices: weights, programs, warm-up, timed joint steps.

The loop is training's: steps are prepared ahead, a step is issued before the one before it is waited for, and gradient
sum and update are part of it. When a part is done, nothing of it is left on the devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax

from lobra_jax.compilation import CompilationCount, after_start, compile_threads
from lobra_jax.config import RunConfig, model_config
from lobra_jax.data.batches import GlobalBatch, TaskData
from lobra_jax.devices import peak_bytes
from lobra_jax.engine import Engine
from lobra_jax.feeder import Feeder
from lobra_jax.joint_step import PendingStep, issue_step, make_engine, step_record
from lobra_jax.metrics import StepRecord, compile_bar
from lobra_jax.optim import TaskOptimizer
from lobra_jax.out_of_memory import NoRoomForUpdateError, OutOfMemoryError, is_out_of_memory
from lobra_jax.room import lowered
from lobra_jax.tasks import adapter_seed, task_optimizer
from lobra_jax.timeline import save_timeline, step_timeline
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import Plan
from profiling.measure import make_up_weights

NUM_WARM_UPS = 2
"""Steps before the timed ones: the first runs on the state as it was made, the second as updates leave it."""


class FailedError(Exception):
    """A part that did not run to its end; the text says why. Nothing of it is left on the devices."""


@contextlib.contextmanager
def failing_without_room() -> Iterator[None]:
    """What a device has no room for inside is a `FailedError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = "out of device memory for weights and adapters"
    except OutOfMemoryError as error:
        failure = str(error)
    else:
        return
    # Out here the frames of the failed attempt, which hold its arrays, are gone.
    gc.collect()
    raise FailedError(failure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What all parts of an experiment share.

    Attributes:
      config: of the run, with the experiment's batch sizes and steps (warm-up included).
      tasks: the data of every task of the config.
      devices: those given to each part.
    """

    config: RunConfig
    tasks: tuple[TaskData, ...]
    costs: CostTable
    devices: tuple[Any, ...]

    @property
    def num_steps(self) -> int:
        """Timed ones."""
        return self.config.tasks[0].steps - NUM_WARM_UPS

    def only(self, names: Sequence[str]) -> Scene:
        """With these tasks alone."""
        chosen = tuple(task for task in self.config.tasks if task.name in names)
        return dataclasses.replace(
            self,
            config=self.config.model_copy(update={"tasks": chosen}),
            tasks=tuple(task for task in self.tasks if task.name in names),
        )


class Served:
    """Which sequences a task was served: their number, their tokens, and a digest of which they were, in order."""

    def __init__(self) -> None:
        self._sequences, self._tokens, self._digest = 0, 0, hashlib.sha256()

    def add(self, batch: GlobalBatch, task: int) -> None:
        own = batch.task_ids == task
        self._sequences += int(own.sum())
        self._tokens += int(batch.lengths[own].sum())
        self._digest.update(batch.rows[own].tobytes())

    def to_dict(self) -> dict[str, Any]:
        return {"sequences": self._sequences, "tokens": self._tokens, "sha256": self._digest.hexdigest()}


def run_part(scene: Scene, plan: Plan, timeline: Path) -> dict[str, Any]:
    """Runs the scene's tasks jointly on a plan; what was measured, for JSON.

    A micro-batch for which there was no room is not run any more, as in training, and the part runs from its start.

    Args:
      timeline: receives what each stage did in the last step, measured beside predicted.

    Raises:
      FailedError: a device ran out of memory, and no smaller capacity would do.
    """
    lines: list[str] = []
    longest = max(int(task.train.lengths.max()) for task in scene.tasks)
    while True:
        try:
            return {**_run(scene, plan, timeline), "capacities_lowered": lines}
        except OutOfMemoryError as error:
            failure, failures = str(error), error.failures
        except NoRoomForUpdateError as error:
            failure, failures = str(error), None
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure, failures = "out of device memory for weights and adapters", None
        # Out here the frames of the failed attempt, which hold its arrays, are gone.
        gc.collect()
        if failures is None:
            raise FailedError(failure)
        shapes = [list(group.shapes(plan.buckets, num_options=plan.row_options)) for group in plan.expanded()]
        try:
            plan, line = lowered(plan, shapes, failures, longest=longest, doing="a step")
        except UserError as error:
            raise FailedError(str(error)) from None
        click.echo(line)
        lines.append(line)


def _run(scene: Scene, plan: Plan, timeline: Path) -> dict[str, Any]:
    compilations = CompilationCount()
    optimizers = [task_optimizer(task) for task in scene.config.tasks]
    engine = make_engine(scene.config, model_config(scene.config), plan, optimizers, devices=scene.devices)
    started = time.perf_counter()
    num_programs = _compile(engine)
    compiled, from_cache = time.perf_counter(), compilations.from_cache
    click.echo(f"  {num_programs} programs in {compiled - started:.0f} s, {from_cache} of them from the cache")
    on_host = scene.devices[0].platform == "cpu"
    for replica in engine.replicas:
        make_up_weights(replica, on_host=on_host)
        # What drawing them takes for a while is free again before anything is placed that stays.
        jax.block_until_ready(replica.params)
    engine.init_adapters([adapter_seed(scene.config, task) for task in scene.config.tasks])
    jax.block_until_ready([replica.params for replica in engine.replicas])
    placed = time.perf_counter()
    engine.warm_up(None if on_host else engine.shapes())
    gc.collect()
    with after_start(), Feeder(scene.tasks, plan, scene.costs, scene.config.planner) as feeder:
        loop = _Loop(scene, engine, feeder, optimizers, compilations)
        records = loop.run(timeline)
    return {
        "tasks": [task.name for task in scene.tasks],
        "plan": plan.to_dict(),
        "replicas": str(plan),
        "used_devices": plan.used_devices,
        "compile_s": compiled - started,
        "num_programs": num_programs,
        "programs_from_cache": from_cache,
        "place_s": placed - compiled,
        "peak_bytes_so_far": peak_bytes(scene.devices),
        "served": {task.name: served.to_dict() for task, served in zip(scene.tasks, loop.served, strict=True)},
        "steps": [_step(*one) for one in records],
    }


def _compile(engine: Engine) -> int:
    """The number of programs."""
    total = 0
    nothing: list[tuple[()]] = [()] * len(engine.replicas)
    with compile_bar() as advance:
        for done, total in engine.compile(engine.shapes(), nothing, num_threads=compile_threads()):
            advance(done, total)
    return total


class _Loop:
    """The joint steps of one part; `served` counts the sequences of the timed ones, by task."""

    def __init__(
        self,
        scene: Scene,
        engine: Engine,
        feeder: Feeder,
        optimizers: Sequence[TaskOptimizer],
        compilations: CompilationCount,
    ) -> None:
        self.served = [Served() for _ in scene.tasks]
        self._scene = scene
        self._engine = engine
        self._feeder = feeder
        self._optimizers = optimizers
        self._compilations = compilations
        self._compiled = compilations.total

    def run(self, timeline: Path) -> list[tuple[StepRecord, tuple[float, ...]]]:
        """The records of the timed steps, with each replica's `StepResult.late_s`."""
        records = []
        pending: PendingStep | None = None
        last = NUM_WARM_UPS + self._scene.num_steps
        for step in range(last + 1):
            issued = self._issue(step, following=step + 1 if step + 1 < last else None) if step < last else None
            if pending is not None:
                record = self._record(pending, timeline if step == last else None)
                if pending.step >= NUM_WARM_UPS:
                    records.append(record)
                elif pending.step == NUM_WARM_UPS - 1:
                    click.echo(f"  warm, {record[0].seconds.total:.2f} s a step; {self._scene.num_steps} are timed")
            pending = issued
        return records

    def _task_steps(self, step: int) -> dict[str, int | None]:
        return {task.name: step for task in self._scene.tasks}

    def _issue(self, step: int, *, following: int | None) -> PendingStep:
        return issue_step(
            step,
            self._task_steps(step),
            feeder=self._feeder,
            optimizers=self._optimizers,
            engine=self._engine,
            following=None if following is None else self._task_steps(following),
        )

    def _record(self, pending: PendingStep, timeline: Path | None) -> tuple[StepRecord, tuple[float, ...]]:
        result = self._engine.finish(pending.issued)
        prepared, costs = pending.prepared, self._scene.costs
        before, self._compiled = self._compiled, self._compilations.total
        if pending.step >= NUM_WARM_UPS:
            for task, served in enumerate(self.served):
                served.add(prepared.batch, task)
        if timeline is not None:
            replicas = self._engine.replicas
            plan = self._engine.plan
            done = step_timeline(pending.step + 1, result, prepared.dispatch, replicas, plan, costs)
            save_timeline(done, timeline)
        record = step_record(pending, result, plan=self._engine.plan, costs=costs, compilations=self._compiled - before)
        return record, result.late_s


def _step(record: StepRecord, late_s: Sequence[float]) -> dict[str, Any]:
    """What the results keep of a step; `busy_s` are device-seconds."""
    return {
        "step_s": record.seconds.total,
        "predicted_step_s": record.predicted_step_s,
        "execute_s": record.seconds.execute,
        "sum_update_s": record.seconds.sum_update,
        "host_wait_s": record.seconds.host_wait,
        "wait_dispatch_s": record.seconds.wait_dispatch,
        "dispatch_solve_s": record.dispatch_solve_s,
        "issue_s": record.seconds.issue,
        "busy_s": (1 - record.idle_share) * record.gpu_seconds,
        "num_micro_batches": sum(record.num_micro_batches),
        "tokens": record.tokens,
        "padded_tokens": record.padded_tokens,
        "replica_s": list(record.measured_s),
        "predicted_replica_s": list(record.predicted_s),
        "replica_late_s": list(late_s),
        "compilations": record.compilations,
        "first_runs": record.first_runs,
    }
