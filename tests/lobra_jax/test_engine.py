"""Times of a step's actions, from ends that watching threads noted."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.engine import action_times, step_window
from lobra_jax.replica import Issued
from lobra_jax.schedule import dependency, issue_order, one_f_one_b


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
    issued = [Issued(action=action, shape=(1, 8), done=jnp.zeros(())) for action in actions]
    ends = [
        [start + data.draw(st.floats(-1, 12)) for action in actions if action.stage == stage]
        for stage in range(num_stages)
    ]
    times = action_times(issued, ends, num_stages, start, ready)
    assert [t.action for t in times] == actions
    assert all(0 <= t.start_s <= t.end_s <= ready - start for t in times)
    end_of = {t.action: t.end_s for t in times}
    free = [0.0] * num_stages
    for t in times:
        needs = dependency(t.action, num_stages)
        assert t.start_s in (t.end_s, max(free[t.action.stage], 0.0 if needs is None else end_of[needs]))
        free[t.action.stage] = t.end_s


@pytest.mark.parametrize(
    ("issued_at", "before", "ready", "expected"),
    [
        (5.0, None, 8.0, (5.0, 0.0, 8.0)),
        (5.0, 6.0, 8.0, (6.0, 0.0, 8.0)),  # issued while the step before still ran
        (5.0, 3.0, 8.0, (5.0, 2.0, 8.0)),  # the devices waited for the host
    ],
)
def test_a_step_begins_when_it_was_issued_and_the_one_before_is_over(issued_at, before, ready, expected):
    assert step_window(issued_at, before, ready) == expected


def test_a_step_takes_time_even_if_the_one_before_was_seen_to_end_after_it():
    start, waited_s, end = step_window(5.0, 9.0, 8.0)
    assert start == 9.0 and waited_s == 0.0 and end > start
