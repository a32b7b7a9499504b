"""Rebuilding a part of a deployment: what comes back is a deployment of the same problem, and its part ends earlier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import balance, deployment, rebuild
from planner.balance import Share
from planner.cost import ConfigCost, CostTable
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


def test_a_part_without_the_longest_sequences_gets_a_replica_for_what_it_has(monkeypatch):
    """The middle bucket fits two kinds, the longest one, whose replica is no part of what is rebuilt."""
    problem = problem_of((70, 12, 1), 16)
    start = listed(problem, (8, 2, 1))
    holds_middle = int(np.flatnonzero((np.array(start.replicas) == 1) & (start.share.loads[:, 1] > 0))[0])
    monkeypatch.setattr(rebuild, "_drawn", lambda seconds, size, rng: np.array([holds_middle, 0, 1, 2]))
    better = tries(problem, start, 0.9 * start.share.max_s, number=1)
    assert better[0] is None or better[0].share.loads.sum(axis=0).tolist() == list(problem.counts)


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


def test_the_exact_planner_rebuilds_what_dives_leave(monkeypatch):
    problem = problem_of((500, 130, 31), 16, capacities=(64, 64, 64))
    monkeypatch.setattr(deployment.closing, "close", lambda *args, **options: None)
    monkeypatch.setattr(deployment, "_search", lambda *args, **options: None)
    monkeypatch.setattr(deployment, "_nearer", lambda *args, **options: None)
    asked, rebuilt = [], rebuild.rebuilt

    def noted(problem, rounded, *args, **options):
        asked.append(rounded.share.max_s)
        return rebuilt(problem, rounded, *args, **options)

    monkeypatch.setattr(rebuild, "rebuilt", noted)
    plan = deployment.solve(problem, target_gap=1e-5)
    assert len(asked) >= deployment.MOST_VAIN + deployment.LAST_MOST_VAIN and plan.predicted.step_s <= min(asked)
