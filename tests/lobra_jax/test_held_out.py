"""Best step and patience out of a series of held-out losses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra_jax.held_out import BestSoFar, after_evaluation, is_spent, perplexity

LOSSES = st.lists(st.floats(0, 20), min_size=1, max_size=30)


def follow(losses):
    best = None
    for step, loss in enumerate(losses):
        best = after_evaluation(best, loss=loss, step=step)
    return best


@given(LOSSES)
def test_the_best_is_the_first_lowest_and_misses_count_what_came_after(losses):
    best = follow(losses)
    assert best == BestSoFar(
        loss=min(losses), step=losses.index(min(losses)), misses=len(losses) - 1 - losses.index(min(losses))
    )


@given(LOSSES, st.integers(1, 5))
def test_patience_ends_a_task_once_nothing_better_came_so_often(losses, patience):
    assert is_spent(follow(losses), patience) == (len(losses) - losses.index(min(losses)) > patience)
    assert not is_spent(follow(losses), None)


def test_a_loss_that_is_no_number_is_never_best():
    assert follow([2.0, math.nan, 1.0]) == BestSoFar(loss=1.0, step=2)
    assert follow([math.nan, 3.0]) == BestSoFar(loss=3.0, step=1)
    never = follow([math.nan, math.nan])
    assert never == BestSoFar(loss=math.inf, step=-1, misses=2) and is_spent(never, 2)
    assert follow([2.0, math.nan]).misses == 1


def test_perplexity_is_finite_for_any_loss():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert math.isfinite(perplexity(1e6))
