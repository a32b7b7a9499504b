"""Times of a step's actions, from ends that watching threads noted."""

from __future__ import annotations

import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.engine import action_times
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
