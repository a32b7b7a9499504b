"""Row options, padded lengths: the dynamic programme against brute force, and what users may ask for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bucketing import STATIC_7, bucket_lengths, choose_buckets, planning_buckets
from planner.errors import UserError
from planner.lattice import row_options, rows_for, split_rows
from planner.workload import TaskLengths, Workload


def make_workload(lengths, batch_size=8):
    return Workload.from_samples({"task": (batch_size, lengths)})


def padded_tokens(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 4))
def test_row_options_end_in_the_full_rows_and_halve(length, capacity, num_options):
    options = row_options(length, capacity, num_options=num_options)
    assert len(options) <= num_options
    assert list(options) == sorted(set(options))
    if capacity < length:
        assert options == ()
        return
    assert options[-1] == capacity // length
    assert all(low == -(-high // 2) for low, high in itertools.pairwise(options))


def test_row_options_of_known_shapes():
    assert row_options(256, 2048) == (2, 4, 8)
    assert row_options(100, 2048) == (5, 10, 20)
    assert row_options(2048, 2048) == (1,)
    assert row_options(256, 2048, num_options=1) == (8,)


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 500))
def test_split_rows_holds_all_with_one_remainder(length, full_rows, num_sequences):
    options = row_options(length, length * full_rows)
    rows = split_rows(num_sequences, options)
    assert sum(rows[:-1]) < num_sequences <= sum(rows)
    assert all(r == full_rows for r in rows[:-1])
    assert rows[-1] == rows_for(num_sequences - sum(rows[:-1]), options)


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(1, 5),
    st.data(),
)
def test_choose_buckets_pads_as_little_as_any_choice(candidates, max_buckets, data):
    candidates = sorted(candidates)
    lengths = data.draw(st.lists(st.integers(1, candidates[-1]), min_size=1, max_size=12))
    chosen = choose_buckets(np.array(lengths), candidates, max_buckets)
    assert set(chosen) <= set(candidates) and 1 <= len(chosen) <= max_buckets
    best = min(
        padded_tokens(lengths, subset)
        for size in range(1, max_buckets + 1)
        for subset in itertools.combinations(candidates, size)
        if subset[-1] >= max(lengths)
    )
    assert padded_tokens(lengths, chosen) == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=10), st.integers(1, 4))
def test_planning_buckets_pad_the_expected_batch_least(lengths, num_buckets):
    align = 8
    chosen = planning_buckets(make_workload(lengths), num_buckets, align)
    assert len(chosen) <= num_buckets and all(b % align == 0 for b in chosen) and chosen[-1] >= max(lengths)
    options = sorted({-(-length // align) * align for length in lengths})
    best = min(
        padded_tokens(lengths, subset)
        for size in range(1, num_buckets + 1)
        for subset in itertools.combinations(options, size)
        if subset[-1] >= max(lengths)
    )
    assert padded_tokens(lengths, chosen) == best


def test_choose_buckets_of_no_sequence_is_empty():
    assert choose_buckets(np.array([], dtype=int), (16, 32), 4) == ()


def test_choose_buckets_names_a_sequence_over_the_largest():
    with pytest.raises(UserError, match="33 tokens.*32"):
        choose_buckets(np.array([3, 33]), (16, 32), 4)


def test_preset_buckets_go_no_further_than_the_workload():
    found = bucket_lengths(make_workload([100, 3000]), "static7", num_buckets=16, max_capacity_tokens=16384)
    assert found == (256, 512, 1024, 2048, 4096)
    assert bucket_lengths(make_workload([16384]), "static7", num_buckets=16, max_capacity_tokens=16384) == STATIC_7


def test_largest_bucket_is_cut_to_the_capacity_when_the_length_fits():
    assert bucket_lengths(make_workload([10, 1001]), "dynamic", num_buckets=2, max_capacity_tokens=1004) == (16, 1004)


@pytest.mark.parametrize(("num_buckets", "expected"), [(4, (16, 32, 5008)), (2, (32, 5008)), (1, (5008,))])
def test_a_listed_length_of_share_zero_gets_the_last_bucket(num_buckets, expected):
    lengths = {10: 0.5, 30: 0.5, 700: 0.0, 5000: 0.0}
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=4, lengths=lengths),))
    assert bucket_lengths(workload, "dynamic", num_buckets=num_buckets, max_capacity_tokens=8000) == expected


@pytest.mark.parametrize("bad", ["statik7", [], [0], [16, 2.5], [True]])
def test_bad_bucket_requests_are_user_errors(bad):
    with pytest.raises(UserError, match="buckets"):
        bucket_lengths(make_workload([10]), bad, num_buckets=4, max_capacity_tokens=64)


def test_listed_buckets_must_reach_the_longest_length():
    with pytest.raises(UserError, match="40 tokens"):
        bucket_lengths(make_workload([40]), [16, 32], num_buckets=4, max_capacity_tokens=64)
