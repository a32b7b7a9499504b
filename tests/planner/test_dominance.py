"""Configs that are left out are needed by no plan: one that has them is no slower with what does all for them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import deployment
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.dominance import undominated, without_dominated
from planner.plan import ParallelConfig
from planner.problem import Constraints, build_problem
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 64)


def config(tp, pp, remat, *, capacity, token_s=1e-3, slot_s=4e-3, fixed_s=0.0):
    return ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat=remat),
        capacity_tokens=capacity,
        coefficients=(0.0, 0.0, token_s, 0.0, 0.0, slot_s),
        fixed_s=fixed_s,
    )


def problem_of(*costs, counts=(9, 5, 2), num_devices=8, **constraints):
    total = sum(counts)
    lengths = {b: count / total for b, count in zip(BUCKETS, counts, strict=True)}
    return build_problem(
        Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=lengths),)),
        CostTable(model="m", model_fingerprint="f", hardware={}, configs=costs),
        num_devices,
        buckets=BUCKETS,
        constraints=Constraints(**constraints),
    )


def left_out(problem):
    return [str(u.config) for u, kept in zip(problem.configs, undominated(problem), strict=True) if not kept]


BASE = config(2, 1, "none", capacity=128)


@pytest.mark.parametrize(
    ("other", "is_left_out"),
    [
        (config(2, 1, "full", capacity=128, token_s=2e-3), True),
        (config(2, 1, "full", capacity=128), True),  # the same in all
        (config(2, 1, "full", capacity=128, token_s=9e-4), False),
        (config(2, 1, "full", capacity=640, token_s=1.01e-3), False),  # more rows at once, so fewer slots
        (config(2, 1, "full", capacity=640, token_s=2e-3), True),  # though it takes more rows at once
        (config(4, 1, "none", capacity=128, token_s=1.2e-3), True),  # of more devices
        (config(1, 1, "none", capacity=128, token_s=2e-3), False),  # of fewer
        (config(1, 2, "none", capacity=128, token_s=2e-3), True),  # with bubbles
        (config(2, 1, "full", capacity=48, token_s=2e-3), True),  # of what it can serve
    ],
)
def test_a_config_is_left_out_where_another_does_all_for_it(other, is_left_out):
    assert (str(other.config) in left_out(problem_of(BASE, other))) == is_left_out


def test_bubbles_fixed_seconds_and_room_for_the_longest_are_looked_at():
    quick = config(1, 4, "none", capacity=128, token_s=5e-4, slot_s=2e-3)
    assert left_out(problem_of(config(4, 1, "none", capacity=128), quick)) == []  # three bubbles of its largest slot
    late = config(2, 1, "full", capacity=128, token_s=5e-4, slot_s=2e-3, fixed_s=0.1)
    assert left_out(problem_of(BASE, late)) == []
    short = config(2, 1, "full", capacity=32, token_s=1e-4, slot_s=1e-4)
    assert left_out(problem_of(short, BASE, counts=(9, 5, 0))) == []  # the longest is listed, though none is expected


def test_pinned_configs_stay():
    slow = config(2, 1, "full", capacity=128, token_s=2e-3)
    assert left_out(problem_of(BASE, slow, pinned=("1x(tp2,pp1,full)",))) == []


@st.composite
def instances(draw):
    costs = {}
    for _ in range(draw(st.integers(2, 5))):
        tp, pp = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
        remat = draw(st.sampled_from(["none", "dots", "full"]))
        costs[tp, pp, remat] = config(
            tp,
            pp,
            remat,
            capacity=draw(st.sampled_from([64, 96, 128, 256])),
            token_s=draw(st.sampled_from([5, 8, 10, 12, 20])) * 1e-4 / tp,
            slot_s=draw(st.sampled_from([1, 2, 4])) * 1e-3,
            fixed_s=draw(st.sampled_from([0.0, 2e-3])),
        )
    counts = [draw(st.integers(0, 6)) for _ in BUCKETS]
    counts[0] += not any(counts)
    return problem_of(*costs.values(), counts=tuple(counts), num_devices=draw(st.integers(4, 7)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instances(), st.data())
def test_any_replica_can_be_one_of_those_kept(problem, data):
    smaller, kept = without_dominated(problem)
    loads = np.array([data.draw(st.integers(0, count)) for count in problem.counts])
    for usable in problem.configs:
        fitting = [n if usable.fits(j) else 0 for j, n in enumerate(loads.tolist())]
        able = [
            other
            for other in smaller.configs
            if other.num_devices <= usable.num_devices and all(other.fits(j) for j, n in enumerate(fitting) if n)
        ]
        assert min(other.replica_s(fitting) for other in able) <= usable.replica_s(fitting) * (1 + 1e-9)
    assert len(smaller.configs) == len(kept) == undominated(problem).sum()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instances())
def test_the_optimum_is_the_same_without_them(problem):
    smaller, _ = without_dominated(problem)
    every = dataclasses.replace(problem, pinned=(0,) * len(problem.configs))
    best, found = deployment.solve(every, target_gap=0.0), deployment.solve(smaller, target_gap=0.0)
    assert best.predicted.step_s == pytest.approx(found.predicted.step_s, rel=1e-6)
    assert {group.config for group in best.replicas} <= {usable.config for usable in smaller.configs}
