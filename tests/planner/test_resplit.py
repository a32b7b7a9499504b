"""Loads of two replicas shared out anew: always valid, never slower, and what moves and swaps do not find."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import balance, prices
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.local_search import improve
from planner.plan import ParallelConfig
from planner.problem import build_problem
from planner.resplit import resplit
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 64)


def config_cost(tp, pp, capacity, per_token, per_slot, fixed_s=0.0):
    return ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat="none"),
        capacity_tokens=capacity,
        coefficients=(0.0, 0.0, per_token, 0.0, 0.0, per_slot),
        fixed_s=fixed_s,
    )


def usables(costs, counts):
    table = CostTable(model="m", model_fingerprint="f", hardware={}, configs=tuple(costs))
    shares = {b: n / sum(counts) for b, n in zip(BUCKETS, counts, strict=True)}
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=sum(counts), lengths=shares),))
    return build_problem(workload, table, 16, buckets=BUCKETS).configs


@st.composite
def share_outs(draw):
    counts = [draw(st.integers(0, 24)) for _ in BUCKETS]
    counts[0] += not any(counts)
    per_slot = st.sampled_from([0.0, 1e-3, 8e-3])
    costs = [config_cost(4, 1, 128, 3e-4, draw(per_slot))]
    costs += [config_cost(1, draw(st.integers(1, 3)), draw(st.integers(16, 100)), 1e-3, draw(per_slot), 0.01)]
    kinds = usables(costs, counts)
    longest = [usable for usable in kinds if usable.fits(len(BUCKETS) - 1)]
    replicas = [longest[0], *draw(st.lists(st.sampled_from(kinds), min_size=0, max_size=4))]
    return replicas, counts


def searched(replicas, counts, share, **limits):
    table = balance.tables(replicas, counts)
    kinds = [replicas[int(index)] for index in np.unique(table.kind, return_index=True)[1]]
    relaxed = prices.relax(kinds, np.bincount(table.kind).tolist(), counts)
    loads = balance.list_schedule(table, counts)
    start = balance.Share(loads=loads, replica_s=table.replica_s(loads))
    target_s = max(relaxed.bound_s, start.max_s * share)
    return table, start, resplit(table, start, target_s, relaxed.prices, relaxed.kind_prices, **limits)


@settings(max_examples=200)
@given(share_outs(), st.floats(0.5, 1.0), st.integers(0, 60))
def test_every_sequence_is_served_once_and_no_share_out_is_slower(instance, share, max_pairs):
    replicas, counts = instance
    table, start, found = searched(replicas, counts, share, max_pairs=max_pairs, seed=1)
    assert found.loads.sum(axis=0).tolist() == counts and (found.loads >= 0).all()
    assert np.isfinite(found.replica_s).all()
    assert found.replica_s == pytest.approx(table.replica_s(found.loads))
    assert found.max_s <= start.max_s
    assert (found.loads == searched(replicas, counts, share, max_pairs=max_pairs, seed=1)[2].loads).all()


def least_s(table, counts):
    """Least seconds of the slowest of two replicas, over every split."""
    every = itertools.product(*(range(n + 1) for n in counts))
    loads = (np.array([one, np.array(counts) - one]) for one in every)
    return min(float(table.replica_s(load).max()) for load in loads)


@pytest.mark.parametrize("pp", [1, 2])
def test_two_replicas_end_nearly_as_early_as_any_split_lets_them(pp):
    rng = np.random.default_rng(pp)
    for _ in range(20):
        counts = rng.integers(1, 9, size=3).tolist()
        wide = config_cost(4, 1, 128, *rng.uniform((2e-4, 0), (6e-4, 1e-2)))
        narrow = config_cost(1, pp, 70, *rng.uniform((5e-4, 0), (1e-3, 1e-2)))
        replicas = list(usables([wide, narrow], counts))
        table, _, found = searched(replicas, counts, 0.0, max_pairs=60)
        assert found.max_s <= max(least_s(table, counts) * 1.01, 1e-12)


def test_a_split_that_no_move_or_swap_leads_to_is_found():
    counts = [9, 5, 4]
    one = config_cost(1, 1, 128, 1e-3, 5e-3)
    replicas = list(usables([one], counts)) * 6
    table = balance.tables(replicas, counts)
    stuck = improve(table, balance.list_schedule(table, counts))
    kinds = [replicas[0]]
    relaxed = prices.relax(kinds, [6], counts)
    found = resplit(table, stuck, relaxed.bound_s, relaxed.prices, relaxed.kind_prices, max_pairs=400)
    assert found.max_s < stuck.max_s * (1 - 1e-3)


def test_what_is_good_enough_or_alone_is_left_as_it_is():
    counts = [4, 2, 1]
    replicas = list(usables([config_cost(1, 1, 128, 1e-3, 5e-3)], counts))
    _, start, found = searched(replicas, counts, 0.0, max_pairs=50)
    assert found is start
    _, start, found = searched(replicas * 3, counts, 1.0, max_pairs=50)
    assert found is start
