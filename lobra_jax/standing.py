"""Where each task of a run stands: still training, stopped, ended early, done; and its best held-out loss so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lobra_jax.config import TaskConfig
from lobra_jax.held_out import BestSoFar
from planner.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Standing:
    """Of all tasks of a run.

    Attributes:
      tasks: as configured, in the order of the adapters' task axis.
      stopped: task -> the step at which its loss was not finite.
      ended: task -> the step after which its held-out loss had not fallen for long enough.
      best: task -> its best evaluation.
    """

    tasks: Sequence[TaskConfig]
    stopped: dict[str, int] = dataclasses.field(default_factory=dict)
    ended: dict[str, int] = dataclasses.field(default_factory=dict)
    best: dict[str, BestSoFar] = dataclasses.field(default_factory=dict)

    def is_out(self, name: str) -> bool:
        """Whether the task stopped before its last step."""
        return name in self.stopped or name in self.ended

    def task_steps(self, step: int) -> dict[str, int | None]:
        """Task -> its own step in the run's step `step`, counted from 0; None for a task that takes no part."""
        return {task.name: step if step < task.steps and not self.is_out(task.name) else None for task in self.tasks}

    def is_over(self, step: int) -> bool:
        """Whether no task takes part in this step."""
        return all(own is None for own in self.task_steps(step).values())

    def running(self, done: int) -> list[TaskConfig]:
        """The tasks that took part in the step that made the steps done `done`."""
        return [task for task in self.tasks if not self.is_out(task.name) and done <= task.steps]

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        best = {name: dataclasses.asdict(best) for name, best in self.best.items()}
        steps = {task.name: task.steps for task in self.tasks}
        return {"stopped": dict(self.stopped), "ended": dict(self.ended), "best": best, "steps": steps}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Undoes `position`; steps are as configured now, see `check_steps`."""
        self.stopped = dict(position["stopped"])
        self.ended = dict(position["ended"])
        self.best = {name: BestSoFar(**best) for name, best in position["best"].items()}


def check_steps(tasks: Sequence[TaskConfig], position: Mapping[str, Any], done: int, file: Path) -> None:
    """Refuses other `steps` than a task can still take in a run that goes on after `done` steps from `file`.

    A task's own step is the run's: one that was done before it cannot go on, nor end before where it is.

    Raises:
      UserError: naming the task.
    """
    for task in tasks:
        before = position.get("steps", {}).get(task.name, task.steps)  # checkpoints of before do not tell
        taken = min(before, done)
        if task.steps == before or (task.steps >= taken and taken == done):
            continue
        if taken < done:
            problem = f"the task was done after {taken} steps, and the run has gone on to {done}"
            expected = f"{before}, or a new run that goes on from its adapter (tasks.{task.name}.adapter)"
        else:
            problem, expected = f"{done} steps are done already", f"at least {done}"
        raise UserError(problem, file=file, key=f"tasks.{task.name}.steps", value=task.steps, expected=expected)


def evaluates(task: TaskConfig, done: int) -> bool:
    """Whether the task is evaluated after `done` steps (before its first it always is)."""
    if not task.has_evaluation or done > task.steps:
        return False
    return done == task.steps or (task.eval_interval is not None and done % task.eval_interval == 0)
