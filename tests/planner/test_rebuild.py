"""Rebuilding a part of a deployment: what comes back is a deployment of the same problem, and its part ends earlier."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import balance, deployment, rebuild
from planner.balance import Share
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig
from planner.problem import Constraints, build_problem
from planner.rounding import RoundedShare
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 64)
SHORT, MIDDLE, LONG = (ParallelConfig(tp=tp, pp=1, remat="none") for tp in (1, 2, 4))


def problem_of(counts, num_devices, *, capacities=(32, 48, 128), pinned=()):
    """Replicas of 1, 2 and 4 devices; by default only the last kind holds the longest bucket, the second the middle."""
    configs = [
        ConfigCost(config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, 1e-3 / config.tp, 0.0, 0.0, 4e-3))
        for config, capacity in zip((SHORT, MIDDLE, LONG), capacities, strict=True)
    ]
    table = CostTable(model="m", model_fingerprint="f", hardware={}, configs=tuple(configs), step_overhead_s=0.0)
    total = sum(counts)
    lengths = {b: n / total for b, n in zip(BUCKETS, counts, strict=True) if n}
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=lengths),))
    constraints = Constraints(pinned=pinned)
    return build_problem(workload, table, num_devices, buckets=list(BUCKETS), constraints=constraints)


def listed(problem, replica_counts):
    """Every micro-batch on the replica that then ends first."""
    replicas = [config for config, count in enumerate(replica_counts) for _ in range(count)]
    table = balance.tables([problem.configs[config] for config in replicas], problem.counts)
    loads = balance.list_schedule(table, problem.counts)
    return RoundedShare(replicas=tuple(replicas), share=Share(loads=loads, replica_s=table.replica_s(loads)))


def tries(problem, start, goal_s, *, number=6, seed=0):
    rng, upper = np.random.default_rng(seed), np.array([problem.num_devices] * len(problem.configs))
    return [rebuild.rebuilt(problem, start, goal_s, [], upper=upper, rng=rng) for _ in range(number)]


@given(
    counts=st.tuples(st.integers(10, 60), st.integers(0, 20), st.integers(1, 6)),
    replicas=st.tuples(st.integers(3, 8), st.integers(0, 3), st.integers(1, 2)),
    goal=st.floats(0.7, 1.0),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_rebuilt_deployment_serves_the_same_and_no_replica_of_the_part_ends_later(counts, replicas, goal, seed):
    problem = problem_of(counts, sum(n * d for n, d in zip(replicas, (1, 2, 4), strict=True)))
    start = listed(problem, replicas)
    for found in tries(problem, start, goal * start.share.max_s, number=3, seed=seed):
        if found is None:
            continue
        kinds = [problem.configs[config] for config in found.replicas]
        assert found.share.loads.sum(axis=0).tolist() == list(problem.counts)
        assert sum(usable.num_devices for usable in kinds) <= problem.num_devices
        assert any(usable.fits(2) for usable in kinds)
        assert all(u.fits(b) for u, row in zip(kinds, found.share.loads, strict=True) for b in np.flatnonzero(row))
        seconds = [u.replica_s(row.tolist()) for u, row in zip(kinds, found.share.loads, strict=True)]
        assert found.share.replica_s == pytest.approx(seconds)
        assert found.share.max_s <= start.share.max_s
        assert np.sort(found.share.replica_s)[-1] < np.sort(start.share.replica_s)[-1] or (
            np.isclose(start.share.replica_s, start.share.max_s).sum() > 1
        )


@pytest.mark.parametrize("upper", [(20, 20, 20), (20, 0, 20), (20, 1, 2), (20, 0, 0)])
def test_a_part_keeps_to_its_devices_and_to_what_can_hold_its_longest(monkeypatch, upper):
    """The longest bucket fits the widest kind alone, which is no part of this; the middle one fits the second, too.

    Other plans may be limited to fewer replicas of a kind than this one has.
    """
    problem = problem_of((70, 12, 1), 16, capacities=(16, 48, 128))
    start = listed(problem, (8, 2, 1))
    slow = int(np.flatnonzero((np.array(start.replicas) == 1) & (start.share.loads[:, 1] > 0))[0])
    loads, table = start.share.loads, balance.tables([problem.configs[c] for c in start.replicas], problem.counts)
    loads[slow] += loads[1]  # the second of the short kind idles, and one of the middle kind does its work
    loads[1] = 0
    start = RoundedShare(replicas=start.replicas, share=Share(loads=loads, replica_s=table.replica_s(loads)))
    monkeypatch.setattr(rebuild, "_drawn", lambda seconds, size, rng: np.array([slow, 0, 1, 2]))
    goal_s, rng = 0.97 * start.share.replica_s[slow], np.random.default_rng(0)
    found = rebuild.rebuilt(problem, start, goal_s, [], upper=np.array(upper), rng=rng)
    assert found is not None
    kinds = [problem.configs[config] for config in found.replicas]
    assert sum(usable.num_devices for usable in kinds) <= problem.num_devices
    assert found.share.loads.sum(axis=0).tolist() == list(problem.counts)
    assert all(u.fits(b) for u, row in zip(kinds, found.share.loads, strict=True) for b in np.flatnonzero(row))


def test_pinned_replicas_stay():
    problem = problem_of((60, 10, 2), 16, pinned=("6x(tp1,pp1,none)", "1x(tp4,pp1,none)"))
    start = listed(problem, (8, 2, 1))
    found = [one for one in tries(problem, start, 0.9 * start.share.max_s, number=20) if one is not None]
    assert found
    for one in found:
        counts = np.bincount(one.replicas, minlength=3)
        assert counts[0] >= 6 and counts[2] >= 1


def test_rebuilding_betters_what_a_list_schedule_leaves_over():
    problem = problem_of((55, 13, 3), 16)
    start = listed(problem, (8, 2, 1))
    share, rng = start, np.random.default_rng(0)
    upper = np.array([problem.num_devices] * 3)
    for _ in range(20):
        share = rebuild.rebuilt(problem, share, 0.8 * start.share.max_s, [], upper=upper, rng=rng) or share
    assert share.share.max_s < 0.97 * start.share.max_s


def test_the_exact_planner_takes_what_is_rebuilt(monkeypatch):
    monkeypatch.setattr(deployment.closing, "close", lambda *args, **options: None)
    search = deployment._relaxed(problem_of((400, 60, 5), 24), 1e-5, time.perf_counter() + 60)
    search.offer_share(listed(search.problem, (14, 3, 1)))
    before = search.best
    deployment._rebuild(search, most_vain=deployment.MOST_VAIN)
    assert search.best.max_s < 0.99 * before.max_s
    assert search.best.share.loads.sum(axis=0).tolist() == list(search.problem.counts)


def test_of_plans_that_end_together_the_one_with_more_room_is_kept():
    problem = problem_of((9, 0, 1), 8)
    search = deployment._relaxed(problem, 1e-5, time.perf_counter() + 60)
    start = listed(problem, (4, 0, 1))
    slower = dataclasses.replace(start.share, replica_s=np.full(5, start.share.max_s))
    search.offer((4, 0, 1), slower)
    search.offer((4, 0, 1), start.share)
    assert search.best.share is start.share
    search.offer((4, 0, 1), slower)
    assert search.best.share is start.share


def test_the_exact_planner_rebuilds_where_dives_leave_a_gap(monkeypatch):
    problem = problem_of((500, 130, 31), 16, capacities=(64, 64, 64))
    monkeypatch.setattr(deployment.closing, "close", lambda *args, **options: None)
    for name in ("_search", "_nearer"):
        monkeypatch.setattr(deployment, name, lambda *args, **options: None)
    monkeypatch.setattr(deployment, "homogeneous", lambda problem: (16, 0, 0))
    tried, rebuilt = [], rebuild.rebuilt
    monkeypatch.setattr(rebuild, "rebuilt", lambda *args, **options: tried.append(rebuilt(*args, **options)))
    plan = deployment.solve(problem, target_gap=1e-9)
    assert plan.predicted.status == "gap left"
    assert len(tried) == deployment.MOST_VAIN + deployment.LAST_MOST_VAIN
