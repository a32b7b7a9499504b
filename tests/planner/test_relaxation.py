"""Pricing bounds every pattern, and what the relaxation does not let through no plan attains."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bracket import bracket
from planner.config_cost import ConfigCost
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.cuts import Cut, of_patterns
from planner.patterns import lattice_of, slots_of
from planner.plan import ParallelConfig
from planner.pricing import Pricer
from planner.problem import build_problem
from planner.relaxation import SURPLUS, Level, Relaxation, least_conceivable_s
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 64)


@st.composite
def priced_configs(draw):
    """(problem with one config on one replica, its counts, prices, seconds)."""
    counts = [draw(st.integers(0, 7)), draw(st.integers(0, 3)), draw(st.integers(1, 2))]
    total = sum(counts)
    lengths = {s: n / total for s, n in zip(BUCKETS, counts, strict=True)}
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=lengths),))
    config = ParallelConfig(tp=1, pp=draw(st.integers(1, 3)), remat="none")
    times = st.floats(0.0, 1e-2)
    coefficients = (0.0, 0.0, draw(st.floats(1e-5, 1e-3)), 0.0, draw(times), draw(times))
    cost = ConfigCost(
        config=config,
        capacity_tokens=draw(st.integers(64, 200)),
        coefficients=coefficients,
        fixed_s=draw(times),
    )
    costs = CostTable(model="m", model_fingerprint="f", hardware={}, configs=(cost,))
    problem = build_problem(workload, costs, config.num_devices, buckets=BUCKETS)
    prices = np.array([draw(st.floats(0.0, 1.0)) for _ in BUCKETS])
    return problem, prices, draw(st.floats(1e-2, 1.0))


def best_worth(problem, prices, seconds):
    """By trying every load of the one replica; worked out from the cost table alone."""
    best = 0.0
    for loads in itertools.product(*(range(n + 1) for n in problem.counts)):
        if problem.configs[0].replica_s(loads) <= seconds:
            best = max(best, float(np.dot(loads, prices)))
    return best


def pricer_of(problem, seconds, **kind):
    usable = problem.configs[0]
    return Pricer(problem, [slots_of(usable, problem.counts)], [lattice_of(usable)], seconds, **kind)


@settings(max_examples=60, deadline=None)
@given(priced_configs())
def test_proven_prices_bound_every_load_of_a_replica(instance):
    problem, prices, seconds = instance
    worth, _ = pricer_of(problem, seconds, proven=True).price(prices, np.zeros(1))
    assert worth[0] >= best_worth(problem, prices, seconds) * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(priced_configs(), st.floats(0.5, 0.99))
def test_asking_for_less_never_prices_below_what_a_load_is_worth(instance, share):
    problem, prices, seconds = instance
    best = best_worth(problem, prices, seconds)
    worth, patterns = pricer_of(problem, seconds, proven=True).price(prices, np.array([best * share]))
    assert worth[0] >= best * (1 - 1e-9)
    for pattern in patterns:
        assert pattern.rows @ prices > best * share


@st.composite
def cuts_of(draw, counts):
    buckets = [bucket for bucket, count in enumerate(counts) if count >= 2]
    if not buckets:
        return []
    sizes = st.integers(2, 6)
    pairs = draw(st.lists(st.tuples(st.sampled_from(buckets), sizes), min_size=1, max_size=3, unique=True))
    return [Cut(bucket=bucket, size=size, times=draw(st.integers(1, size - 1))) for bucket, size in pairs]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_share_out_keeps_to_the_cuts(data):
    full = [np.array([data.draw(st.integers(1, 7))]) for _ in range(3)]
    loads = [np.array([data.draw(st.integers(0, 12))]) for _ in range(3)]
    counts = [int(sum(load[0] for load in loads))]
    cuts = data.draw(cuts_of(counts))
    adds = of_patterns(cuts, np.array(loads), np.array(full)).sum(axis=0)
    assert (adds >= [cut.least(counts) for cut in cuts]).all()


@settings(max_examples=60, deadline=None)
@given(priced_configs(), st.data())
def test_prices_on_cuts_bound_every_load_of_a_replica(instance, data):
    problem, prices, seconds = instance
    cuts = data.draw(cuts_of(problem.counts))
    sigma = np.array([data.draw(st.floats(0.0, 1.0)) for _ in cuts])
    pricer = pricer_of(problem, seconds, proven=True, cuts=cuts)
    worth, _ = pricer.price(np.append(prices, sigma), np.zeros(1))
    full = lattice_of(problem.configs[0]).full
    for loads in itertools.product(*(range(n + 1) for n in problem.counts)):
        if problem.configs[0].replica_s(loads) <= seconds:
            adds = of_patterns(cuts, np.array([loads]), full[None])[0]
            assert worth[0] >= (np.dot(loads, prices) + adds @ sigma) * (1 - 1e-9)


def test_cuts_know_that_a_slot_is_not_a_fraction():
    # Three sequences, two to a slot, and one replica with time for one slot: it serves two of the three, but of the two
    # slots that they take it runs one.
    cost = ConfigCost(
        config=ParallelConfig(tp=1, pp=1, remat="none"), capacity_tokens=32, coefficients=(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    )
    costs = CostTable(model="m", model_fingerprint="f", hardware={}, configs=(cost,))
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=3, lengths={16: 1.0}),))
    problem = build_problem(workload, costs, 1, buckets=(16,))
    relaxation = Relaxation(problem)
    level = Level(relaxation, 1.5)
    assert level.solve().scale == pytest.approx(2 / 3)
    assert level.solve(cutting=True).scale == pytest.approx(1 / 2)
    assert [(cut.bucket, cut.size) for cut in relaxation.cuts] == [(0, 2)]


@settings(max_examples=60, deadline=None)
@given(priced_configs())
def test_patterns_take_about_the_time_they_are_found_for(instance):
    problem, prices, seconds = instance
    _, patterns = pricer_of(problem, seconds).price(prices, np.zeros(1))
    for pattern in patterns:
        assert pattern.seconds == pytest.approx(problem.configs[0].replica_s(pattern.rows.tolist()))
        assert pattern.seconds <= seconds * 1.01


def test_two_remainders_of_a_pipelines_bucket_are_not_two_small_slots():
    # Slots of 1, 2 or 4 rows of 16 tokens, 16 ms a row, on two stages. A remainder of 3 rows runs as a slot of 4, which
    # takes 2 x 64 ms. In 80 ms 2 rows fit (32 and 32 ms), though a slot of 1 and one of 2 would (48 and 32 ms).
    cost = ConfigCost(
        config=ParallelConfig(tp=1, pp=2, remat="none"),
        capacity_tokens=64,
        coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 0.0),
    )
    costs = CostTable(model="m", model_fingerprint="f", hardware={}, configs=(cost,))
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={16: 1.0}),))
    problem = build_problem(workload, costs, 2, buckets=(16,))
    for kind in ({}, {"proven": True}):
        worth, patterns = pricer_of(problem, 0.081, **kind).price(np.ones(1), np.zeros(1))
        assert worth[0] == pytest.approx(2.0) and [pattern.rows.tolist() for pattern in patterns] == [[2]]


def many_replicas():
    costs = [(1, 1, 64, 1e-3), (2, 1, 128, 6e-4), (1, 2, 96, 6e-4)]
    table = CostTable(
        model="m",
        model_fingerprint="f",
        hardware={},
        configs=tuple(
            ConfigCost(
                config=ParallelConfig(tp=tp, pp=pp, remat="none"),
                capacity_tokens=capacity,
                coefficients=(0.0, 0.0, per_token, 0.0, 0.0, 5e-3),
            )
            for tp, pp, capacity, per_token in costs
        ),
    )
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=400, lengths={16: 0.7, 60: 0.2, 128: 0.1}),))
    return build_problem(workload, table, 24, buckets=(16, 64, 128))


def test_what_the_bracket_says_can_be_proven_just_below():
    relaxation = Relaxation(many_replicas())
    low_s, prices, high_s = bracket(relaxation, deadline=float("inf"))
    assert least_conceivable_s(relaxation.problem) <= low_s < high_s
    assert relaxation.proven_served(prices, low_s * 0.99) < 1
    assert relaxation.proven_served(prices, high_s * 1.02) >= 1


def test_a_bracket_ends_where_prices_say_that_nothing_is_served():
    # One sequence, one replica, pinned: at a T that is too short for a slot some prices make all patterns worthless.
    costs = CostTable(
        model="m",
        model_fingerprint="f",
        hardware={},
        configs=(
            ConfigCost(
                config=ParallelConfig(tp=2, pp=2, remat="none"),
                capacity_tokens=28,
                coefficients=(0.0, 0.0, 6e-4, 0.0, 0.0, 2e-3),
            ),
            ConfigCost(
                config=ParallelConfig(tp=3, pp=1, remat="none"),
                capacity_tokens=114,
                coefficients=(0.0, 0.0, 5e-4, 0.0, 0.0, 5e-3),
                fixed_s=4e-3,
            ),
        ),
    )
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=1, lengths={16: 1.0}),))
    problem = build_problem(workload, costs, 4, buckets=(16,), constraints=Constraints(pinned=("1x(tp3,pp1,none)",)))
    low_s, _, high_s = bracket(Relaxation(problem), deadline=time.perf_counter() + 10)
    assert 0.0232 < low_s < 0.025  # the pinned replica takes 25 ms
    assert low_s < high_s and 0.025 * (1 - SURPLUS) < high_s < 0.0252


def test_a_level_serves_what_its_patterns_say():
    relaxation = Relaxation(many_replicas())
    _, _, high_s = bracket(relaxation, deadline=float("inf"))
    level = Level(relaxation, high_s * 1.01)
    solution = level.solve().solution
    served = sum(use * pattern.rows for use, pattern in zip(solution.uses, level.patterns, strict=True))
    assert (served >= np.array(relaxation.problem.counts) * solution.scale * (1 - 1e-6)).all()
    assert solution.scale >= 1
    assert solution.replicas @ relaxation.devices <= 24 * (1 + 1e-9)
    used = np.zeros(len(solution.replicas))
    for use, pattern in zip(solution.uses, level.patterns, strict=True):
        used[pattern.config] += use
    assert used == pytest.approx(np.minimum(used, solution.replicas), abs=1e-6)
