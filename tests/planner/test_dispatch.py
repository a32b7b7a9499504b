"""Dispatch serves each sequence once under every method, near the bound; the evaluator finds planted faults."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import balance, balance_model, scip
from planner.config_cost import ConfigCost, ShapeTime
from planner.cost import CostTable
from planner.dispatch import METHODS, MicroBatch, dispatch
from planner.errors import UserError
from planner.evaluate import evaluate, plan_violations
from planner.local_search import improve
from planner.plan import ParallelConfig, Plan, Prediction, ReplicaGroup
from planner.problem import usable_config
from planner.workload import TaskLengths, Workload

SHAPES = ((1, 1, 40), (2, 1, 70), (1, 2, 64), (4, 1, 130), (2, 3, 100))


def make_costs(fixed_s=1e-3):
    return CostTable(
        model="m",
        model_fingerprint="f",
        hardware={},
        step_overhead_s=0.01,
        configs=tuple(
            ConfigCost(
                config=ParallelConfig(tp=tp, pp=pp, remat="none"),
                capacity_tokens=capacity,
                coefficients=(2e-7, 0.0, 1e-3 / tp**0.8 / pp, 0.0, 0.0, 3e-3 / pp),
                fixed_s=fixed_s,
            )
            for tp, pp, capacity in SHAPES
        ),
    )


def measured(costs, plan, seed):
    """The costs with every micro-batch of the plan timed, half or twice as long as is fitted."""
    rng = np.random.default_rng(seed)
    shapes = {g.config: g.shapes(plan.buckets, num_options=plan.row_options) for g in plan.replicas}
    configs = []
    for cost in costs.configs:
        times = {(b, s): rng.uniform(0.5, 2.0) * cost.micro_batch_s(b, s) for b, s in shapes.get(cost.config, ())}
        timed = tuple(ShapeTime(rows=b, length=s, seconds=seconds) for (b, s), seconds in times.items())
        configs.append(dataclasses.replace(cost, timed=timed))
    return dataclasses.replace(costs, configs=tuple(configs))


def make_plan(counts, buckets, row_options=3):
    groups = tuple(
        ReplicaGroup(count=count, config=ParallelConfig(tp=tp, pp=pp, remat="none"), capacity_tokens=capacity)
        for count, (tp, pp, capacity) in zip(counts, SHAPES, strict=True)
        if count
    )
    devices = sum(group.num_devices for group in groups)
    return Plan(model="m", num_devices=devices, replicas=groups, buckets=buckets, row_options=row_options)


@st.composite
def steps(draw):
    counts = draw(st.lists(st.integers(0, 3), min_size=5, max_size=5).filter(any))
    cap = max(capacity for count, (_, _, capacity) in zip(counts, SHAPES, strict=True) if count)
    buckets = tuple(sorted(draw(st.sets(st.integers(1, cap), min_size=1, max_size=6))))
    lengths = draw(st.lists(st.integers(1, buckets[-1]), min_size=0, max_size=60))
    tasks = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    plan = make_plan(counts, buckets, row_options=draw(st.integers(1, 4)))
    return plan, np.array(lengths, dtype=np.int64), np.array(tasks, dtype=np.int64)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps(), st.sampled_from(METHODS), st.integers(1, 6), st.none() | st.integers(0, 99))
def test_dispatch_serves_every_sequence_once_within_capacity(step, method, max_buckets, seed):
    plan, lengths, tasks = step
    costs = make_costs() if seed is None else measured(make_costs(), plan, seed)
    out = dispatch(plan, costs, lengths, tasks, method=method, max_buckets=max_buckets, time_limit_s=0.05)
    served = [i for batches in out.replicas for batch in batches for i in batch.sequences]
    assert sorted(served) == list(range(len(lengths)))
    assert len(out.replicas) == plan.num_replicas
    assert len({batch.length for batches in out.replicas for batch in batches}) <= max_buckets
    assert evaluate(plan, costs, out, lengths).violations == ()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps(), st.none() | st.integers(0, 99))
def test_balance_is_never_worse_than_its_heuristic_nor_better_than_its_bound(step, seed):
    plan, lengths, tasks = step
    costs = make_costs() if seed is None else measured(make_costs(), plan, seed)
    quick = dispatch(plan, costs, lengths, tasks, max_buckets=8, time_limit_s=0.0)
    solved = dispatch(plan, costs, lengths, tasks, max_buckets=8, time_limit_s=0.1)
    assert max(solved.predicted_s) <= max(quick.predicted_s) * (1 + 1e-9)
    for out in (quick, solved):
        assert out.bound_s <= max(solved.predicted_s) * (1 + 1e-9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(range(len(SHAPES))), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), min_size=1, max_size=2),
)
def test_balance_finds_the_least_slowest_replica(chosen, counts):
    buckets = (17, 33)[: len(counts)]
    configs = [usable_config(cost, buckets) for cost in make_costs().configs]
    replicas = [configs[index] for index in chosen]
    table = balance.tables(replicas, counts)
    share = improve(table, balance.list_schedule(table, counts))
    share, bound_s = balance_model.refine(replicas, table, counts, share, time_limit_s=5.0, gap_limit=0.0)
    per_bucket = [
        [split for split in itertools.product(range(n + 1), repeat=len(replicas)) if sum(split) == n] for n in counts
    ]
    best = min(
        max(usable.replica_s([split[r] for split in splits]) for r, usable in enumerate(replicas))
        for splits in itertools.product(*per_bucket)
    )
    assert share.loads.sum(axis=0).tolist() == counts
    assert share.max_s == pytest.approx(best, rel=1e-6)
    assert bound_s == pytest.approx(best, rel=1e-6)


def test_a_bucket_that_fits_no_replica_is_said_at_once():
    narrow = usable_config(make_costs().configs[0], (16, 10**6))
    table = balance.tables([narrow], [3, 1])
    assert balance.list_schedule(table, [3, 0]).tolist() == [[3, 0]]
    with pytest.raises(ValueError, match="fits no replica"):
        balance.list_schedule(table, [3, 1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps(), st.sampled_from(METHODS), st.integers(1, 6))
def test_dispatch_does_not_depend_on_the_time_limit(step, method, max_buckets):
    plan, lengths, tasks = step
    few, many = (
        dispatch(plan, make_costs(), lengths, tasks, method=method, max_buckets=max_buckets, time_limit_s=limit)
        for limit in (5.0, 60.0)
    )
    assert not few.stopped_early and not many.stopped_early
    assert dataclasses.replace(few, solve_s=0.0) == dataclasses.replace(many, solve_s=0.0)


def test_a_search_far_from_its_gap_is_ended_by_the_node_limit(monkeypatch):
    # Six like replicas: the gap is not proven within the node limit, and the time limit is far off.
    lengths = np.random.default_rng(0).geometric(1 / 8, size=60).clip(max=40)
    tasks = np.arange(60) % 4
    plan = make_plan((6, 0, 0, 0, 0), (10, 20, 40))
    outcomes = []
    solve = scip.solve
    monkeypatch.setattr(scip, "solve", lambda *args, **limits: outcomes.append(solve(*args, **limits)) or outcomes[-1])
    first, again = (dispatch(plan, make_costs(), lengths, tasks, max_buckets=5, time_limit_s=60.0) for _ in range(2))
    assert [outcome.status for outcome in outcomes] == ["totalnodelimit"] * 2
    assert dataclasses.replace(first, solve_s=0.0) == dataclasses.replace(again, solve_s=0.0)


def test_a_dispatch_that_the_time_limit_cut_says_so():
    plan, lengths = make_plan((2, 1, 0, 0, 0), (20, 60)), np.array([15] * 9 + [50] * 4)
    cut = dispatch(plan, make_costs(), lengths, np.zeros(13, int), max_buckets=2, time_limit_s=0.0)
    assert cut.stopped_early
    assert evaluate(plan, make_costs(), cut, lengths).violations == ()


def test_many_replicas_are_balanced_close_to_the_bound():
    plan = make_plan((20, 6, 3, 2, 1), (8, 16, 32, 64, 128))
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 14, size=1500), 128)
    out = dispatch(plan, make_costs(0.0), lengths, rng.integers(0, 5, 1500), max_buckets=5, time_limit_s=1.0)
    assert evaluate(plan, make_costs(0.0), out, lengths).violations == ()
    assert max(out.predicted_s) <= 1.03 * out.bound_s


def test_full_micro_batches_are_of_one_task_and_remainders_share():
    plan = make_plan((1, 0, 0, 0, 0), (10,))
    tasks = np.array([0] * 6 + [1] * 5 + [2] * 2)
    out = dispatch(plan, make_costs(), np.full(13, 10), tasks, max_buckets=1, time_limit_s=0.1)
    mixes = sorted(sorted(tasks[list(batch.sequences)].tolist()) for batch in out.replicas[0])
    assert mixes == [[0, 0, 0, 0], [0, 0, 1, 2], [1, 1, 1, 1], [2]]
    assert sorted(batch.rows for batch in out.replicas[0]) == [1, 4, 4, 4]


def test_group_sends_each_bucket_to_the_smallest_capacity_that_fits():
    plan = make_plan((2, 1, 0, 1, 0), (20, 60, 120))
    lengths = np.array([15] * 9 + [50] * 4 + [100] * 2)
    out = dispatch(plan, make_costs(), lengths, np.zeros(15, int), method="group", max_buckets=3, time_limit_s=0.1)
    per_replica = [{batch.length for batch in batches} for batches in out.replicas]
    assert per_replica == [{20}, {20}, {60}, {120}]


def test_uniform_gives_replicas_equal_numbers():
    plan = make_plan((2, 1, 0, 1, 0), (20,))
    out = dispatch(
        plan, make_costs(), np.full(10, 20), np.zeros(10, int), method="uniform", max_buckets=1, time_limit_s=1
    )
    assert sorted(sum(len(batch.sequences) for batch in batches) for batches in out.replicas) == [2, 2, 3, 3]


def test_a_step_without_sequences_leaves_every_replica_idle():
    none = np.array([], dtype=int)
    out = dispatch(make_plan((2, 0, 0, 0, 0), (16,)), make_costs(), none, none, max_buckets=2, time_limit_s=0.1)
    assert out.replicas == ((), ()) and out.predicted_s == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_sequence_over_every_capacity_is_named(method):
    with pytest.raises(UserError, match=r"41 tokens fits no replica.*at most 40"):
        dispatch(
            make_plan((1, 0, 0, 0, 0), (16, 40)),
            make_costs(),
            np.array([3, 41]),
            np.array([0, 0]),
            method=method,
            max_buckets=2,
            time_limit_s=0.1,
        )


def test_unknown_method_and_unknown_config_are_user_errors():
    plan, one = make_plan((1, 0, 0, 0, 0), (16,)), np.array([3])
    with pytest.raises(UserError, match="balance, group, uniform"):
        dispatch(plan, make_costs(), one, one, method="best", max_buckets=2, time_limit_s=0.1)
    other = dataclasses.replace(make_costs(), configs=make_costs().configs[1:])
    with pytest.raises(UserError, match=r"no config \(tp1,pp1,none\)"):
        dispatch(plan, other, one, one, max_buckets=2, time_limit_s=0.1)


def replace_first_batch(out, **changes):
    first, *rest = out.replicas[0]
    return dataclasses.replace(out, replicas=((dataclasses.replace(first, **changes), *rest), *out.replicas[1:]))


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        (lambda o: replace_first_batch(o, sequences=o.replicas[0][0].sequences[1:]), "is served 0 times"),
        (lambda o: replace_first_batch(o, sequences=o.replicas[0][0].sequences[:1] * 2), "is served 2 times"),
        (lambda o: replace_first_batch(o, sequences=(*o.replicas[0][0].sequences[1:], 999)), "no sequence 999"),
        (lambda o: replace_first_batch(o, rows=1), "sequences in 1 rows"),
        (lambda o: replace_first_batch(o, rows=64), "exceeds the capacity 40"),
        (lambda o: replace_first_batch(o, rows=3), "not on the lattice"),
        (lambda o: replace_first_batch(o, length=9), "is not a bucket"),
        (lambda o: replace_first_batch(o, length=5), "is cut to 5"),
        (lambda o: dataclasses.replace(o, replicas=o.replicas[:1]), "dispatch has 1 replicas, the plan 2"),
        (lambda o: dataclasses.replace(o, predicted_s=(9.0, *o.predicted_s[1:])), "predicted 9 s"),
        (lambda o: dataclasses.replace(o, bound_s=9.0), "bound 9 s exceeds"),
        (
            lambda o: dataclasses.replace(o, replicas=(o.replicas[0][::-1], *o.replicas[1:])),
            "not most expensive first",
        ),
        (
            lambda o: dataclasses.replace(
                o, replicas=((*o.replicas[0], MicroBatch(rows=1, length=5, sequences=())), *o.replicas[1:])
            ),
            "is empty",
        ),
    ],
)
def test_evaluator_finds_planted_violations(plant, complaint):
    plan, costs = make_plan((2, 0, 0, 0, 0), (5, 10)), make_costs()
    lengths = np.array([10] * 8 + [4] * 6)
    out = dispatch(plan, costs, lengths, np.zeros(14, int), max_buckets=2, time_limit_s=0.2)
    assert evaluate(plan, costs, out, lengths).violations == ()
    found = evaluate(plan, costs, plant(out), lengths).violations
    assert any(complaint in line for line in found), found


def test_evaluation_numbers_of_a_step_worked_by_hand():
    # One (1,1) replica, capacity 40, bucket 10: 4 full rows, then 1. t(b, 10) = 2e-7 b 100 + 1e-3 b 10 + 3e-3.
    plan, costs, lengths = make_plan((1, 0, 0, 0, 0), (10,)), make_costs(), np.array([10, 9, 8, 7, 6])
    out = dispatch(plan, costs, lengths, np.zeros(5, int), max_buckets=1, time_limit_s=0.1)
    seen = evaluate(plan, costs, out, lengths)
    slots = (4 * 2e-5 + 4 * 1e-2 + 3e-3, 2e-5 + 1e-2 + 3e-3)
    assert seen.replica_s == pytest.approx((1e-3 + sum(slots),))
    assert seen.step_s == pytest.approx(1e-3 + sum(slots) + 0.01)
    assert (seen.tokens, seen.padded_tokens) == (40, 50)
    assert seen.padding_share == pytest.approx(0.2)
    assert seen.idle_share == pytest.approx(0.0)


def test_plan_violations_are_found():
    costs = make_costs()
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=2, lengths={10: 0.5, 60: 0.5}),))
    good = make_plan((1, 1, 0, 0, 0), (16, 64))
    assert plan_violations(good, costs, workload) == ()
    assert any(
        "exceed the largest bucket" in v for v in plan_violations(make_plan((1, 0, 0, 0, 0), (16,)), costs, workload)
    )
    greedy = dataclasses.replace(good, replicas=(dataclasses.replace(good.replicas[0], capacity_tokens=64),))
    assert any("is given 64 tokens of 40" in v for v in plan_violations(greedy, costs, workload))
    used = sum(group.num_devices for group in good.replicas)
    honest = Prediction(step_s=2.0, bound_s=1.5, gap=0.25, gpu_seconds=2.0 * used, solve_s=0.1)
    assert plan_violations(dataclasses.replace(good, predicted=honest), costs, workload) == ()
    for change, complaint in (
        ({"bound_s": 2.5, "gap": -0.25}, "exceeds step_s"),
        ({"gap": 0.01}, "make 0.25"),
        ({"gpu_seconds": 1.0}, f"{used} devices for 2 s make"),
        ({"step_s": 0.0}, "no time"),
    ):
        told = dataclasses.replace(good, predicted=dataclasses.replace(honest, **change))
        (said,) = plan_violations(told, costs, workload)
        assert complaint in said
    other = dataclasses.replace(costs, model="other", configs=costs.configs[1:])
    assert any("not in the cost table" in v for v in plan_violations(good, other, workload))
    assert any("model" in v for v in plan_violations(good, other, workload))
