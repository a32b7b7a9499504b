"""The 1F1B table, without devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.schedule import BACKWARD, FORWARD, FUSED, dependency, issue_order, one_f_one_b, simulate

sizes = {"num_stages": st.integers(1, 6), "num_micro_batches": st.integers(0, 9)}


def test_a_schedule_is_as_the_textbook_draws_it():
    assert [" ".join(map(str, actions)) for actions in one_f_one_b(3, 4)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 F1 F2 F3",
    ]


@given(**sizes)
def test_every_stage_does_every_micro_batch_once_each_way(num_stages, num_micro_batches):
    for stage, actions in enumerate(one_f_one_b(num_stages, num_micro_batches)):
        phases = [FUSED] if stage == num_stages - 1 else [FORWARD, BACKWARD]
        for phase in phases:
            assert [a.micro_batch for a in actions if a.phase == phase] == list(range(num_micro_batches))
        assert len(actions) == len(phases) * num_micro_batches


@given(**sizes)
def test_a_stage_holds_at_most_its_distance_to_the_end_in_flight(num_stages, num_micro_batches):
    for stage, actions in enumerate(one_f_one_b(num_stages, num_micro_batches)[:-1]):
        in_flight = peak = 0
        for action in actions:
            in_flight += 1 if action.phase == FORWARD else -1
            peak = max(peak, in_flight)
        assert peak <= num_stages - stage


@given(**sizes)
def test_the_issue_order_respects_stages_and_dependencies(num_stages, num_micro_batches):
    schedule = one_f_one_b(num_stages, num_micro_batches)
    order = issue_order(schedule)
    place = {action: i for i, action in enumerate(order)}
    assert len(place) == len(order) == sum(map(len, schedule))
    for actions in schedule:
        assert [place[a] for a in actions] == sorted(place[a] for a in actions)
    for action in order:
        needs = dependency(action, num_stages)
        assert needs is None or place[needs] < place[action]


def test_a_schedule_that_cannot_run_is_refused():
    first, last = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="deadlock"):
        issue_order((first[2:], last))


@given(num_stages=st.integers(1, 5), num_micro_batches=st.integers(1, 8))
def test_equal_micro_batches_take_the_planners_bubble(num_stages, num_micro_batches):
    """(m + p - 1) slots: the term (pp - 1) max t of the cost model."""
    times = simulate(one_f_one_b(num_stages, num_micro_batches), [[3.0] * num_stages] * num_micro_batches)
    end = max(end for _, end in times.values())
    assert end == pytest.approx(3.0 * (num_micro_batches + num_stages - 1))
