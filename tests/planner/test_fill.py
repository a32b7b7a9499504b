"""The slots that close a replica, against every choice of four."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import fill


def slots_of(seconds, worth, rows):
    """One slot of each bucket, and nothing first, as `fill._slots` has them."""
    number = len(seconds) + 1
    first, second = np.triu_indices(number)
    seconds = np.append(0.0, seconds)
    pair_s = seconds[first] + seconds[second]
    order = np.argsort(pair_s, kind="stable")
    return fill._Slots(
        bucket=np.append(0, np.arange(number - 1)),
        rows=np.append(0, rows),
        seconds=seconds,
        worth=np.append(0.0, worth),
        first=first[order],
        second=second[order],
        pair_s=pair_s[order],
        full=np.ones(number - 1, dtype=np.int64),
        room_s=100.0,
        shortest_s=float(seconds[1:].min()),
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 2.0), st.floats(0.01, 1.0), st.integers(1, 3)), min_size=1, max_size=4),
    st.floats(0.1, 6.0),
    st.integers(0, 3),
)
def test_closing_slots_are_worth_most_of_all_that_end_in_time(slots, room_s, lacking):
    seconds, worth, rows = (np.array(column) for column in zip(*slots, strict=True))
    left = np.full(len(slots), 10**6)
    left[0] = 10**6 if lacking == 0 else lacking - 1  # of the first bucket there may be none or few
    chosen = fill._closing(slots_of(seconds, worth, rows), left, room_s, 1)
    number, rest = np.divmod(chosen, rows)
    assert not rest.any() and (chosen <= left).all()
    assert number.sum() <= 4 and number @ seconds <= room_s * (1 + 1e-9)
    if lacking == 0:
        best = 0.0
        for four in itertools.combinations_with_replacement(range(-1, len(slots)), 4):
            taken = [slot for slot in four if slot >= 0]
            if seconds[taken].sum() <= room_s * (1 - 1e-9):
                best = max(best, worth[taken].sum())
        assert number @ worth >= best - 1e-9 or number @ worth == pytest.approx(best)
