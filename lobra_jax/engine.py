"""The joint step: every replica's micro-batches, the gradient sum, one update, new adapters on every replica.

One controller issues everything. The training loop waits for a step (`finish`) after it has issued the next one, whose
micro-batches go to the devices while the step before still runs there, so that they never wait for the host.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax import Array

from lobra_jax.at_once import at_once
from lobra_jax.blame import await_gradients, failures
from lobra_jax.compilation import in_rounds
from lobra_jax.data.batches import MicroBatchArrays
from lobra_jax.devices import cut_up_bytes
from lobra_jax.free_memory import bytes_by_device, check_room, has_room, shapes_in_use
from lobra_jax.lora import (
    Adapters,
    LoraSpec,
    adapted_targets,
    init_adapters,
    set_magnitudes,
    set_task_adapter,
    task_inputs,
)
from lobra_jax.mesh import cut
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import WeightSource
from lobra_jax.optim import OPTIMIZERS, HyperInputs, no_inputs
from lobra_jax.out_of_memory import NoRoomForUpdateError, OutOfMemoryError, blaming, is_out_of_memory
from lobra_jax.peft_folder import TaskAdapter
from lobra_jax.reduce import AdapterState, GradientSum
from lobra_jax.replica import Replica, ReplicaRun
from lobra_jax.step_times import StepResult, step_result
from lobra_jax.trace_steps import ISSUE_MARK, PAUSE_MARK, READY_MARK
from lobra_jax.watch import Watch
from planner.lattice import Shape
from planner.plan import Plan

ReplicaBatches = Sequence[Sequence[MicroBatchArrays]]
"""[replica][micro-batch], each replica's most expensive first."""

STEPS_WATCHED = 3
"""Steps at a time that threads wait for, one for each stage and one for the new adapters: that before the last, which
is not yet recorded, the last, and the one being issued."""

NOTHING_GIVEN: Mapping[int, TaskAdapter] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class IssuedStep:
    """A step handed to the devices and not yet waited for; `settle_s` of its issuing went to waiting for devices.

    `ends` is [replica][stage] when its actions ended.
    """

    issued_at: float
    settle_s: float
    runs: tuple[ReplicaRun, ...]
    gradient_norms: Array
    alive: Array
    ends: tuple[tuple[Future[list[float]], ...], ...]
    adapters_ready: Future


class Engine:
    """All replicas of a plan, the adapters' state, and the step over them.

    Args:
      plan: which replicas.
      model: base model shape.
      specs: one adapter each task.
      dtype: of base weights and activations.
      quantization: how the layers' linears are stored on every replica: none, int8, nf4 or fp8.
      devices: all devices by default; the plan takes the first.
      optimizers: names of those that the tasks use.
      averages: whether any task keeps a moving average of its adapter.
      last_good: whether the adapters before a step are kept though the optimisers could tell them (`optim.BEFORE`).
      packed: whether training micro-batches are packed rows.
      memory_bytes: what may be used of each device; None for all that it offers.
    """

    def __init__(
        self,
        plan: Plan,
        model: LlamaConfig,
        specs: Sequence[LoraSpec],
        *,
        dtype: Any,
        quantization: str = "none",
        devices: Sequence[Any] | None = None,
        optimizers: Collection[str] = ("adamw",),
        averages: bool = False,
        last_good: bool = False,
        packed: bool = False,
        memory_bytes: int | None = None,
    ) -> None:
        self.plan = plan
        self._memory_bytes = memory_bytes
        self.model = model
        self.specs = tuple(specs)
        self.replicas = tuple(
            Replica(
                index=index,
                model=model,
                submesh=submesh,
                num_tasks=len(specs),
                max_rank=max(spec.rank for spec in specs),
                targets=adapted_targets(specs),
                dropout=any(spec.dropout > 0 for spec in specs),
                dora=any(spec.dora for spec in specs),
                dtype=dtype,
                quantization=quantization,
                packed=packed,
            )
            for index, submesh in enumerate(cut(plan, devices))
        )
        self.gradient_sum = GradientSum(
            self.replicas,
            model.num_layers,
            len(specs),
            tuple(name for name in OPTIMIZERS if name in optimizers),
            averages=averages,
            last_good=last_good,
        )
        self.tasks = [replica.place_tasks(task_inputs(specs)) for replica in self.replicas]
        self.state: AdapterState
        self._spread: list[list[Adapters]]
        num_stages = sum(replica.parallel.pp for replica in self.replicas)
        self._issuers = ThreadPoolExecutor(len(self.replicas), thread_name_prefix="issue")
        self._watchers = ThreadPoolExecutor(STEPS_WATCHED * (num_stages + 1), thread_name_prefix="watch")
        self._abandoned = threading.Event()
        self._previous_ready: Future | None = None
        self._unsettled: IssuedStep | None = None
        self._before: AdapterState | None = None

    def load(self, source: WeightSource) -> None:
        """Base weights onto every replica: read for the first of each (tp, pp), copied to others like it."""
        first: dict[tuple[int, int], Replica] = {}
        for replica in self.replicas:
            like = first.setdefault((replica.parallel.tp, replica.parallel.pp), replica)
            if like is replica:
                replica.load(source)
            else:
                replica.copy_weights(like)

    def init_adapters(self, seeds: Sequence[int], given: Mapping[int, TaskAdapter] = NOTHING_GIVEN) -> None:
        """Adapters to start from: fresh ones, one seed a task, or those `given` by task. Call it after `load`."""
        adapters = init_adapters(self.model, self.specs, seeds)
        if any(spec.dora for spec in self.specs):
            set_magnitudes(adapters, self.specs, self.replicas[0].column_norms(adapted_targets(self.specs)))
        for task, adapter in given.items():
            set_task_adapter(adapters, task, adapter)
        self.set_state(self.gradient_sum.init(adapters))

    def set_state(self, state: AdapterState) -> None:
        spread = self.gradient_sum.spread(state.adapters)
        self.state, self._spread = state, spread

    def shapes(self) -> list[list[Shape]]:
        """The plan's shape lattice, by replica."""
        plan = self.plan
        return [list(group.shapes(plan.buckets, num_options=plan.row_options)) for group in plan.expanded()]

    def compile(
        self,
        training_shapes: Sequence[Sequence[Shape]],
        evaluation_shapes: Sequence[Sequence[Shape]],
        *,
        num_threads: int,
    ) -> Iterator[tuple[int, int]]:
        """Compiles [replica][shape] in parallel, yielding (programs done, programs in all) as they finish.

        The first replica of each kind goes before those like it, whose programs a GPU's compilation cache then has.
        """
        first = {replica.parallel: replica.index for replica in reversed(self.replicas)}
        rounds: tuple[list[Callable[[], object]], ...] = ([], [])
        every = zip(self.replicas, self.plan.expanded(), training_shapes, evaluation_shapes, strict=True)
        for replica, group, own, own_evaluation in every:
            is_first = first[replica.parallel] == replica.index
            rounds[0 if is_first else 1].extend(replica.compilations(own, own_evaluation, remat_of=group.remat_of))
        yield from in_rounds(rounds, num_threads=num_threads, abandoned=self._abandoned)

    def abandon_compiling(self) -> None:
        """Ends `compile`, in whatever thread it runs, with the programs that are being compiled."""
        self._abandoned.set()

    def warm_up(self, shapes: Sequence[Sequence[Shape]] | None = None) -> None:
        """Runs the sum, the update and the spreading once without any work, so that they are compiled too.

        With `shapes`, [replica][shape] that are compiled, also each of their programs: on a GPU the first run of a
        large one takes longer, by 0.7 s for 7B models on H200s (profiling/results/h200_x4_experiment.json).

        Raises:
          OutOfMemoryError: a device had no room for a micro-batch of such a shape, or for one compiled of a replica
            whose devices would wait for each other.
        """
        self.finish(self.issue([()] * len(self.replicas), no_inputs(len(self.specs))))
        self.check_room()
        if shapes is not None:
            batches = [
                [replica.empty_micro_batch(shape) for shape in own]
                for replica, own in zip(self.replicas, shapes, strict=True)
            ]
            await_gradients(self._issue_micro_batches(batches))
        self.pause()

    def check_room(self) -> None:
        """Raises OutOfMemoryError where some device of several has no room for a program (`free_memory.check_room`)."""
        for replica, group in zip(self.replicas, self.plan.expanded(), strict=True):
            check_room(replica, shapes_in_use(replica, group))

    def issue(
        self,
        batches: ReplicaBatches,
        hyper: HyperInputs,
        *,
        step: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> IssuedStep:
        """Hands one step to the devices, all replicas at once, while the one before it may still run.

        Until the micro-batches of a step are done, the state before it is held, in case there was no room for them.
        Where devices have no room for two states beside micro-batches, the host waits for them instead and the update
        is made in place: a new state elsewhere would besides cut up the room that they need.

        `step` is the number that a trace has of it; `meanwhile` is called when the devices have the micro-batches,
        before the host waits for any.

        Raises:
          OutOfMemoryError: nothing of this step has happened; or of the one before, which `finish` then says again.
          NoRoomForUpdateError: there was room for the micro-batches but not for an update in place.
        """
        with jax.profiler.StepTraceAnnotation(ISSUE_MARK, step_num=step):
            return self._issue(batches, hyper, step, meanwhile or _nothing)

    def _issue(
        self, batches: ReplicaBatches, hyper: HyperInputs, step: int, meanwhile: Callable[[], None]
    ) -> IssuedStep:
        issued_at, settle_s = time.perf_counter(), 0.0
        runs = None if self._before is None else self._issue_ahead(batches)
        if runs is not None:
            meanwhile()
        if self._unsettled is not None:
            settle_s += _seconds(functools.partial(self._await_micro_batches, self._unsettled))
        if runs is None:
            runs = self._issue_micro_batches(batches)
            meanwhile()
        before = self.state if self._has_room_for_two_states() else None
        if before is None:
            settle_s += _seconds(functools.partial(self._await_for_update_in_place, runs))
        state, norms = self._update(runs, hyper, in_place=before is None)
        for run in runs:
            run.gradients.clear()
        ready = self._watchers.submit(_await_all, self._spread, step)
        issued = IssuedStep(
            issued_at=issued_at,
            settle_s=settle_s,
            runs=runs,
            gradient_norms=norms,
            alive=state.alive,
            ends=tuple(run.watch.ends for run in runs),
            adapters_ready=ready,
        )
        self._unsettled, self._before = issued, before
        return issued

    def _await_for_update_in_place(self, runs: Sequence[ReplicaRun]) -> None:
        await_gradients(runs)
        if self._unsettled is not None:
            # Whoever waits for the adapters before looks at arrays that the update takes.
            wait([self._unsettled.adapters_ready])

    def _has_room_for_two_states(self) -> bool:
        """Beside the micro-batches of any shape in use, whose gradient sums are there."""
        return all(
            has_room(replica, shapes_in_use(replica, group), beside=self._second_state, limit_bytes=self._memory_bytes)
            for replica, group in zip(self.replicas, self.plan.expanded(), strict=True)
        )

    @functools.cached_property
    def _second_state(self) -> dict[Any, int]:
        """Bytes by device; the same after every step.

        Where a stage lies on several devices also what travels: if one of them has no room for a program, the others
        hang. And what may lie in gaps too small for a program's pieces: a second state makes more of them.
        """
        travel = self.gradient_sum.travel_bytes()
        state = bytes_by_device((self.state.tasks, self.state.alive))
        devices = state | travel
        return {
            device: state.get(device, 0) + travel.get(device, 0) + cut_up_bytes(device.platform, len(devices))
            for device in devices
        }

    def _update(self, runs: Sequence[ReplicaRun], hyper: HyperInputs, *, in_place: bool) -> tuple[AdapterState, Array]:
        """Issues gradient sum, update and new adapters; the new state, and gradient norms [T]."""
        gradients = [run.gradients for run in runs]
        try:
            with blaming(), jax.profiler.TraceAnnotation("gradient sum and update"):
                state, norms = self.gradient_sum.step(self.state, gradients, hyper, in_place=in_place)
                self.set_state(state)
        except OutOfMemoryError as error:
            if in_place:
                raise NoRoomForUpdateError() from error
            raise
        return state, norms

    def _issue_ahead(self, batches: ReplicaBatches) -> tuple[ReplicaRun, ...] | None:
        """Issues micro-batches while those of the step before run; None where there was no room for that."""
        try:
            return self._issue_micro_batches(batches)
        except OutOfMemoryError:
            # Room that is in pieces; or the step before had none, and its adapters cannot be read.
            return None

    def _issue_micro_batches(self, batches: ReplicaBatches) -> tuple[ReplicaRun, ...]:
        runs = tuple(ReplicaRun(gradients=replica.zero_gradients()) for replica in self.replicas)
        calls = [
            functools.partial(replica.issue, run, micro_batches, self._spread[replica.index], self.tasks[replica.index])
            for replica, run, micro_batches in zip(self.replicas, runs, batches, strict=True)
        ]
        try:
            for replica, run in zip(self.replicas, runs, strict=True):
                run.watch = Watch(replica.parallel.pp, self._watchers)
            at_once(self._issuers, calls)
        except OutOfMemoryError as error:
            # What could not be issued may have lacked the results of an earlier micro-batch that had no room.
            raise OutOfMemoryError(failures(runs) or error.failures) from error
        finally:
            for run in runs:
                if run.watch is not None:
                    run.watch.close()
        return runs

    def _await_micro_batches(self, step: IssuedStep) -> None:
        """Waits until a step's micro-batches are done, after which the state before it is not needed any more."""
        errors = [end.exception() for ends in step.ends for end in ends]
        if any(error is not None for error in errors):
            self._settle(step)
        self._before = None

    def _settle(self, step: IssuedStep) -> None:
        """Waits for a step's new adapters, which need all of it; if a device had no room, goes back to before it.

        Raises:
          OutOfMemoryError: the engine is as it was before the step was issued.
          NoRoomForUpdateError: there was room for the micro-batches but not for the update, which was in place, or was
            found to lack it when the next step had been issued.
        """
        error, is_last, before = step.adapters_ready.exception(), step is self._unsettled, self._before
        if is_last:
            self._unsettled = self._before = None
        if error is None:
            return
        if not is_out_of_memory(error):
            raise error
        if is_last and before is not None:
            self.set_state(before)
            self.pause()
        elif is_last or self._unsettled is not None:
            raise NoRoomForUpdateError() from error
        raise OutOfMemoryError(failures(step.runs)) from error

    def finish(self, step: IssuedStep) -> StepResult:
        """Waits for a step; losses, norms and times.

        Raises:
          OutOfMemoryError, NoRoomForUpdateError: as `_settle`.
        """
        self._settle(step)
        start, host_wait_s, ready = step.issued_at, 0.0, step.adapters_ready.result()
        before = None if self._previous_ready is None else self._previous_ready.result()
        # This step's adapters need those before it: where those were noted later, a busy host was a whole step late.
        if before is not None and before < ready:
            host_wait_s = max(0.0, step.issued_at - before)
            start = max(step.issued_at, before)
        self._previous_ready = step.adapters_ready
        return step_result(
            step.runs,
            [[end.result() for end in ends] for ends in step.ends],
            [replica.parallel for replica in self.replicas],
            start=start,
            ready=ready,
            host_wait_s=host_wait_s,
            gradient_norms=np.asarray(step.gradient_norms),
            alive=np.asarray(step.alive),
        )

    def pause(self) -> None:
        """Says that the host now does something else (evaluation, a checkpoint): the gap belongs to no step."""
        self._previous_ready = None
        with jax.profiler.TraceAnnotation(PAUSE_MARK):
            pass

    def evaluate(self, batches: ReplicaBatches) -> np.ndarray:
        """float64 [T]: each task's weighted token losses over [replica][micro-batch], without dropout.

        With its averaged adapter for a task that keeps one.

        Raises:
          OutOfMemoryError: a device had no room for a micro-batch.
        """
        spread = self.gradient_sum.spread(self.state.tasks.averaged) if self.gradient_sum.averages else self._spread

        def issue(replica: Replica, own: Sequence[MicroBatchArrays]) -> list[Array]:
            results = []
            for arrays in own:
                with blaming(replica.index, arrays.tokens.shape):
                    results.append(replica.evaluate(arrays, spread[replica.index], self.tasks[replica.index]))
            return results

        work = list(zip(self.replicas, batches, strict=True))
        issued = at_once(self._issuers, [functools.partial(issue, *one) for one in work])
        total = np.zeros(len(self.specs))
        for (replica, own), results in zip(work, issued, strict=True):
            for arrays, result in zip(own, results, strict=True):
                with blaming(replica.index, arrays.tokens.shape):
                    total += np.asarray(result, np.float64)
        return total


def _nothing() -> None:
    pass


def _seconds(call: Callable[[], None]) -> float:
    """What it takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _await_all(tree: Any, step: int) -> float:
    jax.block_until_ready(tree)
    with jax.profiler.TraceAnnotation(READY_MARK, step_num=step):
        return time.perf_counter()
