"""Least covers equal a plain recursion; bounds that count whole slots are what can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import prices, tighten
from planner.config_cost import ConfigCost
from planner.plan import ParallelConfig
from planner.problem import usable_config
from planner.whole_slots import least_covers


def kind(capacity, seconds, buckets, *, tp=1, pp=1, fixed_s=0.0):
    """A config whose every micro-batch takes so many seconds."""
    cost = ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat="none"),
        capacity_tokens=capacity,
        coefficients=(0.0,) * 5 + (seconds,),
        fixed_s=fixed_s,
    )
    return usable_config(cost, buckets)


slot = st.tuples(st.integers(1, 30), st.one_of(st.just(np.inf), st.floats(0.0, 5.0)))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.lists(slot, min_size=4, max_size=4), st.integers(0, 60)), min_size=1, max_size=5))
def test_least_covers_equal_the_plain_recursion(cases):
    rows = np.array([[held for held, _ in slots] for slots, _ in cases])
    cost = np.array([[seconds for _, seconds in slots] for slots, _ in cases])
    found = least_covers(rows, cost, np.array([number for _, number in cases]))
    for row, (slots, number) in zip(found, cases, strict=True):
        least = [0.0]
        for n in range(1, number + 1):
            least.append(min(least[max(n - held, 0)] + seconds for held, seconds in slots))
        assert row[: number + 1] == pytest.approx(least)


def test_a_wide_replica_runs_whole_slots_only():
    # The wide one spends 6 s on three sequences that fit nowhere else. In fractions 7 s are enough for sixteen short
    # ones as well: four in half a slot, twelve on the two narrow ones. But before 8 s the wide one ends no other slot.
    kinds = [kind(40, 2.0, (10, 40), tp=4), kind(10, 1.0, (10, 40))]
    relaxed = prices.relax(kinds, [1, 2], [16, 3])
    assert relaxed.bound_s == pytest.approx(7.0, rel=0.02)
    bound_s = tighten.by_kind(kinds, [1, 2], [16, 3], relaxed, 0, 9.0)
    assert 8.0 * (1 - 2e-3) <= bound_s <= 8.0


def test_a_bound_by_kind_ends_where_it_was_asked_to():
    kinds = [kind(40, 2.0, (10, 40), tp=4), kind(10, 1.0, (10, 40))]
    relaxed = prices.relax(kinds, [1, 2], [16, 3])
    assert tighten.by_kind(kinds, [1, 2], [16, 3], relaxed, 0, 7.5) == pytest.approx(7.5)


@pytest.mark.parametrize(("pp", "fixed_s", "least_s"), [(1, 0.0, 2.0), (1, 0.5, 2.5), (2, 0.0, 3.0)])
def test_one_of_three_replicas_runs_two_of_four_slots(pp, fixed_s, least_s):
    kinds = [kind(10, 1.0, (10,), pp=pp, fixed_s=fixed_s)]
    relaxed = prices.relax(kinds, [3], [4])
    bound_s = tighten.by_replica(kinds, [3], [4], relaxed, 4.0)
    assert least_s * (1 - 2e-3) <= bound_s <= least_s


def test_kinds_that_fit_nothing_of_a_step_do_no_harm():
    kinds = [kind(40, 2.0, (10, 40), tp=4), kind(10, 1.0, (10, 40))]
    relaxed = prices.relax(kinds, [2, 5], [0, 3])
    assert 4.0 * (1 - 2e-3) <= tighten.by_replica(kinds, [2, 5], [0, 3], relaxed, 5.0) <= 4.0
    assert tighten.by_kind(kinds, [2, 5], [0, 3], relaxed, 1, 5.0) <= 4.0
