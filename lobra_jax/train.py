"""The training loop: joint steps over all tasks, evaluation, checkpoints, adapters out.

A step is recorded after the next one has been issued, so the devices never wait for the host's bookkeeping.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from lobra_jax.checkpoint import CheckpointMetadata, Checkpoints
from lobra_jax.compilation import CompilationCount, after_start, at_start
from lobra_jax.config import RunConfig, TaskConfig
from lobra_jax.data.batches import TaskData
from lobra_jax.export import base_model_name
from lobra_jax.feeder import Feeder
from lobra_jax.held_out import BestSoFar, after_evaluation, held_out_losses, is_spent, perplexity
from lobra_jax.joint_step import PendingStep, issue_step, make_engine, step_record, task_records
from lobra_jax.lora import task_adapter
from lobra_jax.metrics import (
    EvalRecord,
    EventRecord,
    MetricsWriter,
    StartRecord,
    StepRecord,
    convert_bar,
    progress_bar,
)
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.hf import base_weights
from lobra_jax.models.weight_cache import converted
from lobra_jax.models.weights import WeightSource, weight_shapes
from lobra_jax.out_of_memory import Failure, OutOfMemoryError, is_out_of_memory
from lobra_jax.peft_folder import TaskAdapter, write_peft_adapter
from lobra_jax.room import Room
from lobra_jax.run_folder import ADAPTERS_FOLDER, BEST_FOLDER, CHECKPOINTS_FOLDER, PLAN_FILE, TIMELINE_FILE
from lobra_jax.run_state import run_metadata, state_from_tree, state_to_tree
from lobra_jax.standing import Standing, evaluates
from lobra_jax.tasks import adapter_seed, lora_spec, task_optimizer
from lobra_jax.timeline import save_timeline, step_timeline
from lobra_jax.trace_steps import TracedSteps
from lobra_jax.tracing import StepTracer
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a run is made of, checked, before any device work."""

    config: RunConfig
    model: LlamaConfig
    tasks: tuple[TaskData, ...]
    plan: Plan
    costs: CostTable
    devices: tuple[Any, ...]
    adapters: Mapping[str, TaskAdapter] = dataclasses.field(default_factory=dict)
    """By task: what to go on training instead of a fresh adapter."""
    batching: str = "padded"
    """What training's rows hold: padded or packed."""
    trace: TracedSteps | None = None
    """Steps to trace, within those that this run makes."""


class Trainer:
    """One run: `prepare`, then `run`.

    Args:
      inputs: what to train.
      out: the run directory, made by the caller.
      say: receives lines for the user.
    """

    def __init__(self, inputs: Inputs, out: Path, say: Callable[[str], None]) -> None:
        self.inputs = inputs
        self.config = inputs.config
        self.out = out
        self.say = say
        self.compilations = CompilationCount()
        self.task_configs: tuple[TaskConfig, ...] = self.config.tasks
        self.optimizers = [task_optimizer(task) for task in self.task_configs]
        self.engine = make_engine(
            self.config,
            inputs.model,
            inputs.plan,
            self.optimizers,
            devices=inputs.devices,
            packed=inputs.batching == "packed",
        )
        evaluates_any = any(task.has_evaluation for task in self.task_configs)
        self.room = Room(
            self.engine,
            inputs.costs,
            batching=inputs.batching,
            eval_replicas=self.config.training.eval_replicas if evaluates_any else None,
            longest=max(_longest(task) for task in inputs.tasks),
            plan_path=out / PLAN_FILE,
            say=say,
        )
        self.num_steps = max(task.steps for task in self.task_configs)
        self.tracer = StepTracer(out, inputs.trace, self.engine.replicas, say)
        self.standing = Standing(tasks=self.task_configs)
        self._compiled = 0
        self._timeline: dict[str, Any] | None = None
        self._step = 0
        self._pending: PendingStep | None = None

    def prepare(self, checkpoints: Checkpoints, *, resume: bool) -> StartRecord:
        """Weights, adapters and compiled programs onto the devices; the record's `step` is the steps already done.

        Programs are compiled, or read from the cache, while weights are.
        """
        started = time.perf_counter()
        before, before_from_cache = self.compilations.total, self.compilations.from_cache
        with at_start(), ThreadPoolExecutor(1, thread_name_prefix="programs") as executor:
            programs = executor.submit(self.room.compile)
            try:
                self._place()
                done = self._restore(checkpoints) if resume else 0
                placed = time.perf_counter()
                programs.result()
            except BaseException:
                self.engine.abandon_compiling()
                raise
        self.room.within("warm-up", self._warm_up)
        self._compiled = self.compilations.total
        record = StartRecord(
            step=done,
            weights_s=placed - started,
            compile_s=time.perf_counter() - started,
            programs=self._compiled - before,
            programs_from_cache=self.compilations.from_cache - before_from_cache,
        )
        self.say(str(record))
        return record

    def _warm_up(self) -> None:
        """Of a traced run also every program of a micro-batch: its first run, which takes longer, is not traced."""
        self.engine.warm_up(None if self.inputs.trace is None else self.room.training_shapes())

    def _place(self) -> None:
        """Base weights, and the adapters to start from."""
        names = [task.name for task in self.task_configs]
        given = {names.index(name): adapter for name, adapter in self.inputs.adapters.items()}
        try:
            self.engine.load(self._base())
            self.engine.init_adapters([adapter_seed(self.config, task) for task in self.task_configs], given)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            expected = "a plan of wider replicas (tp, pp)"
            raise UserError("out of device memory for weights and adapters", key="plan", expected=expected) from error

    def _base(self) -> WeightSource:
        """The base weights, converted into the cache first where the config names one."""
        section, model = self.config.model, self.inputs.model
        source = base_weights(model, path=section.path, init_seed=section.init_seed, dtype=section.dtype)
        if section.cache_dir is None:
            return source
        assert section.path is not None, "checked by ModelConfig"
        with convert_bar(len(weight_shapes(model))) as advance:
            return converted(
                source,
                model,
                checkpoint=section.path,
                dtype=section.dtype,
                cache_dir=section.cache_dir,
                on_tensor=advance,
            )

    def _restore(self, checkpoints: Checkpoints) -> int:
        done = checkpoints.latest_step()
        if done is None:
            self.say("no checkpoint yet: starting from the beginning")
            return 0
        tree, position = checkpoints.restore(
            done,
            state_to_tree(self.engine.state),
            self._metadata(),
        )
        self.engine.set_state(state_from_tree(tree, self.engine.state))
        self.standing.restore(position)
        self.say(f"resumed after step {done}")
        return done

    def _metadata(self) -> CheckpointMetadata:
        return run_metadata(self.config, self.inputs.model, self.inputs.tasks, self.standing.position())

    def run(self, feeder: Feeder, checkpoints: Checkpoints, metrics: MetricsWriter, *, done: int) -> None:
        """Trains from step `done` to the end.

        Raises:
          UserError: at the end, naming the tasks whose loss was not finite; the others are complete.
        """
        self._step = done
        if self.standing.is_over(done):
            self._write_adapters()  # an interruption may have come between the last checkpoint and these

        def lowered(plan: Plan, message: str) -> None:
            feeder.replan(plan)
            metrics.write(EventRecord(step=self._step, event="out_of_memory", message=message))

        self.room.on_lowered.append(lowered)
        if done == 0:
            self._evaluate(0, self.task_configs, feeder, metrics)
        with after_start(), self.tracer, progress_bar(self.num_steps, done=done) as advance:
            while self._pending is not None or not self.standing.is_over(self._step):
                try:
                    self._turn(feeder, checkpoints, metrics, advance)
                    continue
                except OutOfMemoryError as error:
                    failures = error.failures
                self._retry(failures, metrics, advance)
        if self.standing.stopped:
            steps = self.standing.stopped
            self._save(max(done, *steps.values()), checkpoints)
            stopped = ", ".join(f"task {name!r} at step {step}" for name, step in steps.items())
            raise UserError(
                f"the loss was not finite: {stopped}; the adapter before it is kept, other tasks are complete",
                file=self.out,
                expected="finite losses (a lower lr, or a smaller clip_norm)",
            )

    def _turn(
        self, feeder: Feeder, checkpoints: Checkpoints, metrics: MetricsWriter, advance: Callable[[StepRecord], None]
    ) -> None:
        """Issues the next step, if there is one, and records the one before it.

        Raises:
          OutOfMemoryError: of the one or the other, see `_retry`.
        """
        step = self._step
        issued = None if self.standing.is_over(step) else self._issue(step, feeder)
        if self._pending is not None:
            advance(self._record(self._pending, metrics))
        self._pending, self._step = issued, step + 1
        if issued is not None and self._is_boundary(step + 1):
            advance(self._record(issued, metrics))
            self._pending = None
            self._milestones(step + 1, feeder, checkpoints, metrics)

    def _retry(
        self, failures: Sequence[Failure], metrics: MetricsWriter, advance: Callable[[StepRecord], None]
    ) -> None:
        """Lowers capacities and goes back to the first step that has not happened."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                advance(self._record(pending, metrics))
            except OutOfMemoryError as error:
                failures, self._step = error.failures, pending.step
        del pending
        self.engine.pause()
        self.room.lower(failures, f"step {self._step + 1}")

    def _issue(self, step: int, feeder: Feeder) -> PendingStep:
        return issue_step(
            step,
            self.standing.task_steps(step),
            feeder=feeder,
            optimizers=self.optimizers,
            engine=self.engine,
            following=None if self.standing.is_over(step + 1) else self.standing.task_steps(step + 1),
            before_issue=self.tracer.before_issue,
        )

    def _record(self, pending: PendingStep, metrics: MetricsWriter) -> StepRecord:
        result = self.engine.finish(pending.issued)
        done = pending.step + 1
        plan, costs = self.room.plan, self.inputs.costs
        record = step_record(pending, result, plan=plan, costs=costs, compilations=self._newly_compiled())
        metrics.write(record)
        if pending.prepared.dispatch.stopped_early:
            limit = self.config.planner.dispatch_time_limit_s
            message = f"dispatch hit planner.dispatch_time_limit_s = {limit:g} s: a repeat may differ in rounding"
            metrics.write(EventRecord(step=done, event="dispatch_cut", message=message))
        for task in task_records(pending, result, self.optimizers):
            if self.standing.is_out(task.task):
                continue
            metrics.write(task)
            if not result.alive[self._index(task.task)]:
                self._stop(task.task, done, metrics)
        is_full = all(k is not None or self.standing.is_out(name) for name, k in pending.prepared.task_steps.items())
        if is_full or self.tracer.wants(done):
            dispatch = pending.prepared.dispatch
            timeline = step_timeline(done, result, dispatch, self.engine.replicas, self.engine.plan, self.inputs.costs)
            if is_full:
                self._timeline = timeline
            if self.tracer.wants(done):
                self.tracer.after_record(done, timeline)
        if not sys.stderr.isatty() and done % self.config.training.log_interval == 0:
            self.say(_progress_line(record, self.num_steps))
        return record

    def _index(self, name: str) -> int:
        """Of a task in the adapters' task axis."""
        return [task.name for task in self.task_configs].index(name)

    def _newly_compiled(self) -> int:
        """Programs compiled since the last record, whatever for."""
        before, self._compiled = self._compiled, self.compilations.total
        return self._compiled - before

    def _stop(self, name: str, done: int, metrics: MetricsWriter) -> None:
        self.standing.stopped[name] = done
        message = f"task {name!r}: the loss was not finite at step {done}; stopped, the adapter before it is kept"
        metrics.write(EventRecord(step=done, task=name, event="nan", message=message))
        self.say(message)

    def _is_boundary(self, done: int) -> bool:
        interval = self.config.training.checkpoint_interval
        return (
            done == self.num_steps
            or done % interval == 0
            or any(done == task.steps or evaluates(task, done) for task in self.task_configs)
        )

    def _milestones(self, done: int, feeder: Feeder, checkpoints: Checkpoints, metrics: MetricsWriter) -> None:
        if self._timeline is not None:
            save_timeline(self._timeline, self.out / TIMELINE_FILE)
        running = self.standing.running(done)
        self._evaluate(done, [task for task in running if evaluates(task, done)], feeder, metrics)
        for task in running:
            if done == task.steps:
                metrics.write(EventRecord(step=done, task=task.name, event="finished"))
        if self.standing.is_over(done) or done % self.config.training.checkpoint_interval == 0:
            self._save(done, checkpoints)
            metrics.write(EventRecord(step=done, event="checkpoint"))
        self.engine.pause()

    def _save(self, done: int, checkpoints: Checkpoints) -> None:
        checkpoints.save(
            done,
            state_to_tree(self.engine.state),
            self._metadata(),
        )
        self._write_adapters()

    def _write_adapters(self) -> None:
        for index, task in enumerate(self.task_configs):
            self._write_adapter(index, self.out / ADAPTERS_FOLDER / task.name)

    def _write_adapter(self, index: int, folder: Path) -> None:
        spec = lora_spec(self.task_configs[index])
        own = task_adapter(self.engine.state.tasks.averaged, index, spec)
        write_peft_adapter(folder, spec, own, base_model_name(self.config.model.preset, self.config.model.path))

    def _evaluate(self, done: int, tasks: Sequence[TaskConfig], feeder: Feeder, metrics: MetricsWriter) -> None:
        names = tuple(task.name for task in tasks if task.has_evaluation)
        if not names:
            return
        size, number = self.config.training.eval_batch_size, len(self.task_configs)
        losses, tokens = self.room.within(
            "evaluation", lambda: held_out_losses(self.engine, feeder.evaluation(names, size), number)
        )
        for index, task in enumerate(self.task_configs):
            if task.name in names:
                loss = float(losses[index])
                best = after_evaluation(self.standing.best.get(task.name), loss=loss, step=done)
                self.standing.best[task.name] = best
                record = EvalRecord(
                    step=done,
                    task=task.name,
                    task_step=done,
                    loss=loss,
                    perplexity=perplexity(loss),
                    best_loss=best.loss,
                    tokens=int(tokens[index]),
                )
                metrics.write(record)
                if best.step == done:
                    self._write_adapter(index, self.out / BEST_FOLDER / task.name)
                elif is_spent(best, task.patience) and done < task.steps:
                    self._end(task, done, best, metrics)

    def _end(self, task: TaskConfig, done: int, best: BestSoFar, metrics: MetricsWriter) -> None:
        """Ends a task whose held-out loss no longer falls; the others have the devices to themselves."""
        self.standing.ended[task.name] = done
        reason = f"no held-out loss of {best.misses} evaluations was a number"
        if best.step >= 0:
            reason = (
                f"held-out loss no lower than {best.loss:.4f} of step {best.step} in {best.misses} evaluations; its "
                f"best adapter is in {BEST_FOLDER}/{task.name}"
            )
        message = f"task {task.name!r}: ended after step {done}: {reason}"
        metrics.write(EventRecord(step=done, task=task.name, event="early_stop", message=message))
        self.say(message)


def _progress_line(record: StepRecord, num_steps: int) -> str:
    new = f", {record.first_runs} programs for the first time" if record.first_runs else ""
    return (
        f"step {record.step}/{num_steps}: {record.tokens / record.seconds.total:,.0f} tokens/s, "
        f"{record.seconds.total:.2f} s (predicted {record.predicted_step_s:.2f}{new}), idle {record.idle_share:.0%}, "
        f"padding {record.padding_share:.0%}"
    )


def _longest(task: TaskData) -> int:
    """Tokens of a task's longest example."""
    return max(int(data.lengths.max()) for data in (task.train, task.evaluation) if data is not None)


def train(inputs: Inputs, out: Path, *, resume: bool, say: Callable[[str], None]) -> None:
    """Trains what `inputs` says into the run directory `out`.

    Raises:
      UserError: a checkpoint of another run; or, after the others have finished, tasks whose loss was not finite.
    """
    trainer = Trainer(inputs, out, say)
    keep = inputs.config.training.keep_checkpoints
    with Checkpoints(out / CHECKPOINTS_FOLDER, keep=keep) as checkpoints:
        start = trainer.prepare(checkpoints, resume=resume)
        done = start.step
        with (
            Feeder(
                inputs.tasks,
                trainer.room.plan,
                inputs.costs,
                inputs.config.planner,
                eval_replicas=inputs.config.training.eval_replicas,
                batching=inputs.batching,
            ) as feeder,
            MetricsWriter(out, resume_step=done or None) as metrics,
        ):
            metrics.write(start)
            if resume:
                metrics.write(EventRecord(step=done, event="resumed"))
            trainer.run(feeder, checkpoints, metrics, done=done)
