"""Which tasks take part in which step."""

from __future__ import annotations

from pathlib import Path

import pytest

from lobra_jax.config import TaskConfig
from lobra_jax.held_out import BestSoFar
from lobra_jax.standing import Standing, check_steps, evaluates
from planner.errors import UserError


def task(name: str, steps: int, **rest: object) -> TaskConfig:
    return TaskConfig.model_validate({"name": name, "files": [], "batch_size": 1, "steps": steps, **rest})


def test_tasks_leave_at_their_last_step_or_when_they_are_out():
    standing = Standing(tasks=[task("a", 3), task("b", 5), task("c", 5)])
    assert standing.task_steps(2) == {"a": 2, "b": 2, "c": 2}
    assert standing.task_steps(3) == {"a": None, "b": 3, "c": 3}
    standing.stopped["b"] = 3
    assert [t.name for t in standing.running(3)] == ["a", "c"] and not standing.is_over(4)
    standing.ended["c"] = 4
    assert standing.is_over(4) and standing.is_out("c") and not standing.is_out("a")


def test_a_position_restores_the_standing():
    tasks = [task("a", 3), task("b", 5)]
    before = Standing(tasks=tasks, stopped={"a": 2}, ended={"b": 4}, best={"b": BestSoFar(loss=1.5, step=2, misses=1)})
    after = Standing(tasks=tasks)
    after.restore(before.position())
    assert after == before


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ({}, None),
        ({"b": 7}, None),
        ({"b": 4}, None),
        ({"b": 3}, "4 steps are done already.*got 3.*at least 4"),
        ({"a": 5}, r"tasks\.a\.steps: the task was done after 2 steps.*gone on to 4 .got 5.; expected 2, or a new run"),
        ({"a": 1}, "was done after 2 steps"),
    ],
)
def test_steps_of_a_task_may_change_while_it_trains_and_not_once_it_is_done(steps, complaint):
    before = {"a": 2, "b": 6}
    position = Standing(tasks=[task(name, number) for name, number in before.items()]).position()
    tasks = [task(name, number) for name, number in (before | steps).items()]
    if complaint is None:
        check_steps(tasks, position, 4, Path("run/checkpoints/4"))
        return
    with pytest.raises(UserError, match=complaint):
        check_steps(tasks, position, 4, Path("run/checkpoints/4"))


def test_a_task_that_has_just_ended_may_go_on():
    position = Standing(tasks=[task("a", 4)]).position()
    check_steps([task("a", 9)], position, 4, Path("run/checkpoints/4"))


def test_a_checkpoint_that_does_not_tell_its_steps_is_taken():
    position = Standing(tasks=[task("a", 4)]).position()
    del position["steps"]
    check_steps([task("a", 4)], position, 2, Path("run/checkpoints/2"))
    check_steps([task("a", 1)], position, 2, Path("run/checkpoints/2"))  # it may have been done by then


def test_a_task_is_evaluated_at_its_interval_and_after_its_last_step(tmp_path):
    (tmp_path / "held_out.jsonl").write_text("{}\n")
    own = task("a", 5, eval_files=[str(tmp_path / "held_out.jsonl")], eval_interval=2)
    assert [done for done in range(1, 8) if evaluates(own, done)] == [2, 4, 5]
    assert not any(evaluates(task("b", 5), done) for done in range(1, 6))
