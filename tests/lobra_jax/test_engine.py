"""Times of a step's actions, from ends that watching threads noted."""

from __future__ import annotations

import threading
import time
import types
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.engine import Engine, IssuedStep
from lobra_jax.optim import no_inputs
from lobra_jax.replica import Issued, ReplicaRun
from lobra_jax.schedule import dependency, issue_order, one_f_one_b
from lobra_jax.step_times import action_times
from lobra_jax.watch import Watch


@given(
    num_stages=st.integers(1, 3),
    num_micro_batches=st.integers(1, 4),
    start=st.floats(0, 10),
    data=st.data(),
)
def test_actions_follow_each_other_within_the_step_however_late_their_ends_were_noted(
    num_stages, num_micro_batches, start, data
):
    ready = start + data.draw(st.floats(0, 10))
    actions = list(issue_order(one_f_one_b(num_stages, num_micro_batches)))
    handed = [start + data.draw(st.floats(-5, 12)) for _ in actions]
    issued = [
        Issued(action=action, shape=(1, 8), handed_at=handed_at, done=jnp.zeros(()))
        for action, handed_at in zip(actions, handed, strict=True)
    ]
    ends = [
        [start + data.draw(st.floats(-1, 12)) for action in actions if action.stage == stage]
        for stage in range(num_stages)
    ]
    times = action_times(issued, ends, num_stages, start, ready)
    assert [t.action for t in times] == actions
    assert all(0 <= t.start_s <= t.end_s <= ready - start for t in times)
    end_of = {t.action: t.end_s for t in times}
    free = [0.0] * num_stages
    for t, handed_at in zip(times, handed, strict=True):
        needs = dependency(t.action, num_stages)
        able_s = max(free[t.action.stage], 0.0 if needs is None else end_of[needs])
        assert t.start_s == pytest.approx(min(max(able_s, handed_at - start), t.end_s))
        assert t.late_s == pytest.approx(max(t.start_s - able_s, 0.0))
        free[t.action.stage] = t.end_s


def test_a_stage_that_the_host_keeps_waiting_is_not_busy_meanwhile():
    actions = list(issue_order(one_f_one_b(1, 2)))
    issued = [
        Issued(action=action, shape=(1, 8), handed_at=handed_at, done=jnp.zeros(()))
        for action, handed_at in zip(actions, (9.0, 13.0), strict=True)
    ]
    first, second = action_times(issued, [[12.0, 15.0]], 1, 10.0, 15.0)
    assert (first.start_s, first.end_s, first.late_s) == (0.0, 2.0, 0.0)
    assert (second.start_s, second.end_s, second.late_s) == (3.0, 5.0, 1.0)


@pytest.mark.parametrize("configs", [[(1, 1, "dots")], [(2, 1, "none"), (1, 2, "full")]])
def test_a_warm_up_of_all_shapes_changes_nothing(world, configs):
    tasks = list(world.tasks.values())[:2]
    warm, cold = (world.engine(world.plan(*configs), tasks) for _ in range(2))
    before = jax.tree.map(np.asarray, (warm.state.tasks, warm.state.alive))
    warm.warm_up([replica.training_shapes for replica in warm.replicas])
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves((warm.state.tasks, warm.state.alive)), strict=True):
        np.testing.assert_array_equal(one, other)
    found, losses = world.train(warm, tasks, 1)
    expected, expected_losses = world.train(cold, tasks, 1)
    assert all(world.difference(found[name], expected[name]) == 0 for name in expected)
    np.testing.assert_array_equal(losses, expected_losses)


def test_compiling_that_is_abandoned_leaves_what_it_has_not_begun(world, monkeypatch):
    engine = world.engine(world.plan((1, 1, "none")), list(world.tasks.values())[:1])
    made = []

    def compile_training(shape, remat):
        time.sleep(0.05)
        made.append(shape)

    monkeypatch.setattr(engine.replicas[0], "_compile_training", compile_training)
    programs = engine.compile([[(rows, 16) for rows in range(101, 121)]], [[]], num_threads=1)
    assert next(programs)[0] == 1
    engine.abandon_compiling()
    assert list(programs) == []
    assert 1 <= len(made) < 10


class Action(types.SimpleNamespace):
    """Something that ends when it is told to."""

    def __init__(self) -> None:
        super().__init__(ended=threading.Event(), asked=threading.Event())

    def block_until_ready(self) -> None:
        self.asked.set()
        assert self.ended.wait(LONG_S)


LONG_S = 20


def test_ends_are_noted_while_more_is_issued():
    first, second, other = Action(), Action(), Action()
    with ThreadPoolExecutor(2) as executor:
        watch = Watch(2, executor)
        try:
            watch.add(0, first)
            watch.add(0, second)
            watch.add(1, other)
            first.ended.set()
            assert second.asked.wait(LONG_S)  # the first was noted
            issued_last = time.perf_counter()
            second.ended.set()
            other.ended.set()
        finally:
            watch.close()
        (first_s, second_s), (other_s,) = (ends.result(LONG_S) for ends in watch.ends)
    assert first_s < issued_last <= second_s
    assert other_s > issued_last


class Full(ThreadPoolExecutor):
    """Has room for one thread."""

    def submit(self, *call):
        if self._threads:
            raise RuntimeError("can't start new thread")
        return super().submit(*call)


def test_no_thread_is_left_waiting_where_another_cannot_start():
    executor = Full(2)
    with pytest.raises(RuntimeError, match="new thread"):
        Watch(2, executor)
    (thread,) = executor._threads
    executor.shutdown(wait=False)
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_a_step_that_is_not_one_for_these_replicas_leaves_nothing_waiting(world):
    engine = world.engine(world.plan((1, 1, "none"), (1, 1, "none")), list(world.tasks.values())[:1])
    with pytest.raises(ValueError, match="shorter"):
        engine.issue([()], no_inputs(1))
    engine._watchers.shutdown(wait=False)
    for thread in engine._watchers._threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(("has_room", "waits"), [(True, "step before"), (False, "update in place")])
def test_what_is_done_meanwhile_begins_with_the_micro_batches_and_before_any_wait(world, monkeypatch, has_room, waits):
    tasks = list(world.tasks.values())[:1]
    engine = world.engine(world.plan((1, 1, "none")), tasks)
    events = []

    def note(name, event):
        call = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *args: (events.append(event), call(*args))[1])

    note("_issue_micro_batches", "micro-batches")
    note("_await_micro_batches", "step before")
    note("_await_for_update_in_place", "update in place")
    monkeypatch.setattr(engine, "_has_room_for_two_states", lambda: has_room)
    for _ in range(2):
        events.clear()
        engine.issue([()], no_inputs(1), meanwhile=lambda: events.append("meanwhile"))
    assert events.index("meanwhile") == events.index("micro-batches") + 1 < events.index(waits)
    assert events.count("meanwhile") == 1


def noted(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize(
    ("before", "host_wait_s", "total_s"),
    [(2.0, 0.0, 4.0), (0.5, 0.5, 5.5), (7.0, 0.0, 5.0), (None, 0.0, 5.0)],
    ids=["while it was issued", "before", "late, after this one", "paused"],
)
def test_a_step_takes_some_time_whenever_the_one_before_was_noted(before, host_wait_s, total_s):
    """A step issued at 1 s whose adapters are noted at 6 s."""
    parallel = types.SimpleNamespace(pp=1, tp=1)
    engine = types.SimpleNamespace(
        _settle=lambda step: None,
        _previous_ready=None if before is None else noted(before),
        specs=(),
        replicas=(types.SimpleNamespace(parallel=parallel),),
    )
    step = IssuedStep(
        issued_at=1.0,
        settle_s=0.0,
        runs=(ReplicaRun(gradients=[]),),
        gradient_norms=np.zeros(0),
        alive=np.ones(0, bool),
        ends=((noted([]),),),
        adapters_ready=noted(6.0),
    )
    result = Engine.finish(engine, step)
    assert (result.host_wait_s, result.total_s) == (host_wait_s, total_s)
    assert engine._previous_ready is step.adapters_ready
