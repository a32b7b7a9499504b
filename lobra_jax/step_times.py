"""What a joint step was measured to be: losses, and when each stage worked on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lobra_jax.replica import Issued, ReplicaRun
from lobra_jax.schedule import Action, dependency
from planner.lattice import Shape
from planner.plan import ParallelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionTime:
    """When a stage worked on a micro-batch, seconds since the step's start; before, it waited `late_s` for the host."""

    action: Action
    shape: Shape
    start_s: float
    end_s: float
    late_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """One finished step.

    Attributes:
      losses: float64 [T], mean loss over the task's target tokens; 0 for a task that took no part.
      gradient_norms: [T], before clipping.
      alive: [T] bool, false for good once a task's gradient was not finite.
      replica_s: by replica, from the step's issue to the end of its last micro-batch; 0 without work.
      busy_s: by replica, device-seconds in which its stages worked; pipeline bubbles do not count.
      late_s: by replica, the most that one of its stages, free and with its input there, waited for the host to hand it
        its actions.
      host_wait_s: the devices waited for the host (dispatch, data) before this step, after the one before it.
      execute_s: from the step's start on the devices to the end of the slowest replica's last micro-batch.
      sum_update_s: from there to the new adapters on every replica.
      total_s: the step, host_wait_s + execute_s + sum_update_s.
      first_runs: micro-batches' programs, over all replicas, that had not run before.
      actions: [replica][action], measured.
    """

    losses: np.ndarray
    gradient_norms: np.ndarray
    alive: np.ndarray
    replica_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    late_s: tuple[float, ...]
    host_wait_s: float
    execute_s: float
    sum_update_s: float
    total_s: float
    first_runs: int
    actions: tuple[tuple[ActionTime, ...], ...]


def step_result(
    runs: Sequence[ReplicaRun],
    ends: Sequence[Sequence[Sequence[float]]],
    parallel: Sequence[ParallelConfig],
    *,
    start: float,
    ready: float,
    host_wait_s: float,
    gradient_norms: np.ndarray,
    alive: np.ndarray,
) -> StepResult:
    """Of replicas' `runs`, `ends` [replica][stage] when their actions ended, and `parallel` [replica].

    The devices turned to the step at `start`; its new adapters were `ready`.
    """
    losses = np.zeros(len(alive), np.float64)
    for run in runs:
        for micro_batch_losses in run.losses:
            losses += np.asarray(micro_batch_losses, np.float64)
    actions = tuple(
        action_times(run.issued, own_ends, config.pp, start, ready)
        for run, own_ends, config in zip(runs, ends, parallel, strict=True)
    )
    replica_s = tuple(max((a.end_s for a in own), default=0.0) for own in actions)
    execute_s = max(replica_s)
    return StepResult(
        losses=losses,
        gradient_norms=gradient_norms,
        alive=alive,
        replica_s=replica_s,
        busy_s=tuple(
            sum(a.end_s - a.start_s for a in own) * config.tp for own, config in zip(actions, parallel, strict=True)
        ),
        late_s=tuple(
            max(sum(a.late_s for a in own if a.action.stage == stage) for stage in range(config.pp))
            for own, config in zip(actions, parallel, strict=True)
        ),
        host_wait_s=host_wait_s,
        execute_s=execute_s,
        sum_update_s=ready - start - execute_s,
        total_s=host_wait_s + ready - start,
        first_runs=sum(run.first_runs for run in runs),
        actions=actions,
    )


def action_times(
    issued: Sequence[Issued], ends: Sequence[Sequence[float]], num_stages: int, start: float, ready: float
) -> tuple[ActionTime, ...]:
    """Each action began when its stage was free, its input there and the host had turned to it, so far as ends tell.

    The new adapters, there at `ready`, need every action: an end noted later was noted late, by a busy host.
    """
    remaining = [iter(stage_ends) for stage_ends in ends]
    free = [start] * num_stages
    end_of: dict[Action, float] = {}
    times = []
    for item in issued:
        action = item.action
        end = max(min(next(remaining[action.stage]), ready), free[action.stage])
        needs = dependency(action, num_stages)
        able = min(max(free[action.stage], start if needs is None else end_of[needs]), end)
        begin = min(max(able, item.handed_at), end)
        times.append(
            ActionTime(action=action, shape=item.shape, start_s=begin - start, end_s=end - start, late_s=begin - able)
        )
        free[action.stage] = end_of[action] = end
    return tuple(times)
