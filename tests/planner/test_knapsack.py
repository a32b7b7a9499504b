"""The compiled loops against trying everything, and against the same in plain Python."""

import itertools

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import compiled as compiled_module
from planner.cuts import VIOLATED, violated
from planner.knapsack import best_rows, by_largest_slot, chunks_of, fractional_worth, replica_seconds
from planner.patterns import Lattice, Pattern

WORTHS = st.floats(0.0, 1.0)


@st.composite
def knapsacks(draw, grouped):
    """(cells [I], worth [I], group [I], cells in all): remainders of a bucket one after the other, as they come."""
    cells, worth, group = [], [], []
    for bucket in range(draw(st.integers(1, 3))):
        for is_rest in (False, True):
            for _ in range(draw(st.integers(0, 2))):
                cells.append(draw(st.integers(0, 12)))
                worth.append(draw(WORTHS))
                group.append(bucket if is_rest and grouped else -1)
    return np.array(cells, dtype=np.int64), np.array(worth), np.array(group, dtype=np.int64), draw(st.integers(1, 20))


def most_worth(cells, worth, group, room):
    """By trying every subset."""
    best = 0.0
    for taken in itertools.product((False, True), repeat=len(cells)):
        which = np.flatnonzero(taken)
        rests = [g for g in group[which] if g >= 0]
        if cells[which].sum() <= room and len(rests) == len(set(rests)):
            best = max(best, worth[which].sum())
    return best


@settings(max_examples=200, deadline=None)
@given(knapsacks(grouped=True))
def test_the_best_rows_are_those_of_the_best_subset(knapsack):
    cells, worth, group, room = knapsack
    # Each step serves a bucket of its own, so that rows tell which steps were taken.
    steps = np.arange(len(cells))
    arguments = (cells, worth, np.zeros(len(cells)), group, steps, np.ones_like(steps), np.inf, 0.0, len(cells), room)
    best = most_worth(cells, worth, group, room)
    found, rows = best_rows(*arguments, -1.0)
    assert found == pytest.approx(best)
    taken = np.flatnonzero(rows)
    assert worth[taken].sum() == pytest.approx(best)
    assert cells[taken].sum() <= room
    rests = group[taken][group[taken] >= 0]
    assert len(rests) == len(set(rests.tolist()))
    assert best_rows(*arguments, best + 1e-9)[0] == best + 1e-9


@settings(max_examples=200, deadline=None)
@given(knapsacks(grouped=False), st.data())
def test_every_largest_slot_is_served_by_the_steps_before_it(knapsack, data):
    cells, worth, group, room = knapsack
    ends = np.array(sorted(data.draw(st.lists(st.integers(0, len(cells)), min_size=1, max_size=4))))
    rooms = np.array([data.draw(st.integers(0, room)) for _ in ends])
    nothing = np.zeros(len(cells))
    served = by_largest_slot(
        cells, worth, nothing, np.full(len(ends), np.inf), np.zeros(len(ends)), ends, rooms, room + 1
    )
    for end, own_room, found in zip(ends, rooms, served, strict=True):
        assert found == pytest.approx(most_worth(cells[:end], worth[:end], group[:end], own_room))


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch):
    njit = numba.njit

    def without_a_folder(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(compiled_module.numba, "njit", without_a_folder)
    doubled = compiled_module.compiled(numba.int64, numba.int64)(lambda n: 2 * n)
    assert doubled(21) == 42 and doubled.nopython_signatures


def test_steps_that_lose_too_much_are_left_out():
    # The second loses 2 * 1 - 1 against a bound that is 0.5 above what is enough; the first loses nothing.
    cells, worth, seconds = np.array([1, 1]), np.array([2.0, 1.0]), np.array([1.0, 1.0])
    ends, rooms = np.array([2]), np.array([2])
    assert by_largest_slot(cells, worth, seconds, np.array([0.5]), np.array([2.0]), ends, rooms, 3) == [2.0]
    assert by_largest_slot(cells, worth, seconds, np.array([1.5]), np.array([2.0]), ends, rooms, 3) == [3.0]
    group, one = np.array([-1, -1]), np.array([1, 1])
    assert best_rows(cells, worth, seconds, group, np.array([0, 1]), one, 0.5, 2.0, 2, 2, 0.0)[1].tolist() == [1, 0]
    assert best_rows(cells, worth, seconds, group, np.array([0, 1]), one, 1.5, 2.0, 2, 2, 0.0)[1].tolist() == [1, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORTHS, st.floats(0.0, 2.0)), min_size=1, max_size=5), st.floats(0.1, 5.0))
def test_time_goes_to_the_buckets_that_pay_best(buckets, room):
    ratio, all_s = (np.array([column]) for column in zip(*buckets, strict=True))
    left, worth, last = room, 0.0, 0.0
    for rate, seconds in sorted(buckets, reverse=True):
        worth += rate * min(seconds, left)
        left -= min(seconds, left)
        if left <= room * 1e-9:
            last = rate
            break
    bound, of_last = fractional_worth(ratio, all_s, np.array([room]), 1e-9)
    assert bound[0] == pytest.approx(worth)
    assert of_last[0] == last


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_chunks_make_up_every_number_of_slots(most):
    slot, times = chunks_of(np.arange(len(most)), np.array(most))
    for index, number in enumerate(most):
        own = times[slot == index].tolist()
        assert sum(own) == number
        sums = {sum(taken) for n in range(len(own) + 1) for taken in itertools.combinations(own, n)}
        assert sums == set(range(number + 1))
        assert len(own) == number.bit_length()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=2), st.integers(0, 3))
def test_a_replicas_seconds_are_those_of_its_slots(rows, bubbles):
    options, slot_s = np.array([[2, 4], [3, 3]]), np.array([[1.0, 1.5], [0.7, 0.7]])
    slots = []
    for own, rows_of, seconds in zip(rows, options, slot_s, strict=True):
        num_full, rest = divmod(own, rows_of[-1])
        slots += [seconds[-1]] * num_full
        slots += [next(s for o, s in zip(rows_of, seconds, strict=True) if o >= rest)] if rest else []
    expected = 0.25 + sum(slots) + bubbles * max(slots, default=0.0)
    assert replica_seconds(np.array(rows), options, slot_s, 0.25, float(bubbles)) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), WORTHS), min_size=1, max_size=4), st.integers(1, 8), st.floats(0.2, 1.0))
def test_the_cuts_that_are_found_are_violated(patterns, full, scale):
    count = sum(rows for rows, _ in patterns)
    lattice = Lattice(full=np.array([full]), options=np.array([[full]]), slot_s=np.array([[1.0]]))
    made = [Pattern(config=0, rows=np.array([rows]), seconds=1.0) for rows, _ in patterns]
    uses = np.array([use for _, use in patterns])

    def shortfall(times, size):
        left = 0.0
        for rows, use in patterns:
            slots = [full] * (rows // full) + [rows % full] * (rows % full > 0)
            left += use * sum(-(-own * times // size) for own in slots)
        return 1 - left / (scale * -(-count * times // size))

    found = [shortfall(cut.times, cut.size) for cut in violated([count], [lattice], made, uses, scale, known=[])]
    assert all(short > VIOLATED for short in found)
    # Shares that round all slots to 1 are not looked at but for the smallest, 1 / the most sequences in a slot.
    every = [shortfall(times, size) for size in range(2, full + 1) for times in range(1, size) if size <= count]
    worst = max(every, default=0.0)
    assert max(found, default=0.0) >= (worst if uses.any() and worst > VIOLATED + 1e-9 else 0.0) - 1e-9
