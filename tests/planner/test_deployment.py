"""The exact planner against brute force on small instances, and what it must never get wrong."""

import math
import re

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import closing, deployment, search
from planner.bracket import bracket
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.evaluate import plan_violations
from planner.plan import ParallelConfig, Plan
from planner.planners import make_plan
from planner.problem import Constraints, build_problem
from planner.relaxation import Relaxation
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 64)

CONFIGS = [ParallelConfig(tp=t, pp=p, remat=r) for t, p, r in ((1, 1, "none"), (1, 1, "full"), (2, 1, "none"))]
CONFIGS += [ParallelConfig(tp=t, pp=p, remat="none") for t, p in ((1, 2), (2, 2), (4, 1), (1, 3))]


def config_cost(config, capacity, per_token=1e-3, per_slot=4e-3, quadratic=0.0, fixed_s=0.0):
    return ConfigCost(
        config=config,
        capacity_tokens=capacity,
        coefficients=(quadratic, 0.0, per_token, 0.0, 0.0, per_slot),
        fixed_s=fixed_s,
    )


def cost_table(*configs, overhead_s=0.0):
    return CostTable(model="m", model_fingerprint="f", hardware={}, configs=configs, step_overhead_s=overhead_s)


def counted_workload(counts, buckets=BUCKETS, *, list_all=False):
    total = sum(counts)
    shares = {b: count / total for b, count in zip(buckets, counts, strict=True) if count or list_all}
    return Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=shares),))


@st.composite
def small_instances(draw):
    num_buckets = draw(st.integers(1, 3))
    counts = [draw(st.integers(0, 4)) for _ in range(num_buckets - 1)] + [draw(st.integers(0, 3))]
    counts[0] += not any(counts)  # the longest may be listed without being expected
    chosen = draw(st.lists(st.sampled_from(CONFIGS), min_size=1, max_size=4, unique=True))
    second = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 7.0])
    costs = []
    for index, config in enumerate(chosen):
        longest = BUCKETS[num_buckets - 1]
        capacity = draw(st.integers(longest if index == 0 else 8, 200))
        costs.append(
            ConfigCost(
                config=config,
                capacity_tokens=capacity,
                coefficients=(
                    draw(second) * 1e-6,
                    0.0,
                    (1 + draw(second)) * 1e-4,
                    draw(second) * 1e-4,
                    draw(second) * 1e-3,
                    draw(second) * 1e-3,
                ),
                fixed_s=draw(second) * 1e-3,
            )
        )
    num_devices = draw(st.integers(chosen[0].num_devices, 6))
    table = cost_table(*costs, overhead_s=draw(second) * 1e-3)
    return (
        counted_workload(counts, BUCKETS[:num_buckets], list_all=True),
        table,
        num_devices,
        BUCKETS[:num_buckets],
        counts,
    )


def brute_force_s(table, num_devices, buckets, counts):
    """Least step time over every deployment and every share-out."""
    every = deployments(table.configs, num_devices, buckets, counts)
    return min(seconds for _, seconds in every) + table.step_overhead_s


def deployments(costs, num_devices, buckets, counts):
    """(replicas of each config, least seconds of the slowest), by min-max convolution over replicas."""
    shape = tuple(n + 1 for n in counts)
    alone = [replica_times(cost, buckets, shape) for cost in costs]
    nothing = np.full(shape, np.inf)
    nothing[(0,) * len(shape)] = 0.0
    pending = [((0,) * len(costs), 0, num_devices, nothing)]  # configs from the first index on may still be added
    while pending:
        replicas, first, left, served = pending.pop()
        fits_longest = any(n and cost.capacity_tokens >= buckets[-1] for n, cost in zip(replicas, costs, strict=True))
        yield replicas, served[tuple(counts)] if fits_longest else math.inf
        for index in range(first, len(alone)):
            devices = costs[index].config.num_devices
            if devices <= left:
                more = (*replicas[:index], replicas[index] + 1, *replicas[index + 1 :])
                pending.append((more, index, left - devices, add_replica(served, alone[index])))


def replica_times(cost, buckets, shape):
    times = np.full(shape, np.inf)
    for loads in np.ndindex(*shape):
        slots, fits = [], True
        for length, load in zip(buckets, loads, strict=True):
            full = cost.capacity_tokens // length
            if load and not full:
                fits = False
                break
            while load > 0:
                taken = min(load, full)
                rows = min(r for r in (math.ceil(full / 2**k) for k in range(3)) if r >= taken)
                # halvings of halvings rounded up are the same as one division rounded up
                slots.append(cost.micro_batch_s(rows, length))
                load -= taken
        if fits:
            bubble = (cost.config.pp - 1) * max(slots, default=0.0)
            times[loads] = cost.fixed_s + sum(slots) + bubble if slots else 0.0
    return times


def add_replica(served, alone):
    out = np.full(served.shape, np.inf)
    for loads in np.ndindex(*alone.shape):
        if np.isfinite(alone[loads]):
            to = tuple(slice(load, None) for load in loads)
            source = tuple(slice(0, size - load) for load, size in zip(loads, served.shape, strict=True))
            out[to] = np.minimum(out[to], np.maximum(served[source], alone[loads]))
    return out


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_instances(), st.floats(0.9, 1.6))
def test_no_plan_within_the_horizon_has_a_replica_that_is_left_out(instance, factor):
    workload, table, num_devices, buckets, counts = instance
    problem = build_problem(workload, table, num_devices, buckets=buckets)
    costs = [usable.cost for usable in problem.configs]
    found = dict(deployments(costs, num_devices, buckets, counts))
    relaxation = Relaxation(problem)
    _, prices, _ = bracket(relaxation, deadline=math.inf)
    horizon_s = min(found.values()) * factor
    # A plan file takes no NumPy numbers, and bounds come from here.
    assert type(relaxation.most_served(np.where(relaxation.fits_longest, 0.1, 1.0))) is float
    possible = relaxation.limit(prices, horizon_s)
    within = [replicas for replicas, seconds in found.items() if seconds <= horizon_s * (1 - 1e-9)]
    assert possible or not within
    assert all((np.array(replicas) <= relaxation.upper).all() for replicas in within)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_instances())
def test_exact_equals_brute_force(instance):
    workload, table, num_devices, buckets, counts = instance
    best = brute_force_s(table, num_devices, buckets, counts)
    problem = build_problem(workload, table, num_devices, buckets=buckets)
    assert problem.buckets == buckets and list(problem.counts) == counts
    plan = deployment.solve(problem, target_gap=0.0)
    assert plan.predicted.step_s == pytest.approx(best, rel=1e-5)
    assert plan.predicted.bound_s <= best * (1 + 1e-6)
    assert plan.predicted.gap == pytest.approx(0.0, abs=5 * closing.CERTAIN)  # as near as SCIP's proofs are taken for
    assert plan_violations(plan, table, workload) == ()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_instances())
def test_default_gap_brackets_the_optimum(instance):
    workload, table, num_devices, buckets, counts = instance
    best = brute_force_s(table, num_devices, buckets, counts)
    plan = make_plan("exact", workload, table, num_devices, buckets=buckets)
    assert yaml.safe_load(yaml.safe_dump(plan.to_dict())) == plan.to_dict()
    predicted = plan.predicted
    assert predicted.bound_s <= best * (1 + 1e-6)
    assert best <= predicted.step_s * (1 + 1e-9)
    assert predicted.gap <= deployment.TARGET_GAP + 1e-9


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_instances())
def test_more_devices_are_never_worse(instance):
    workload, table, num_devices, buckets, _ = instance
    fewer = deployment.solve(build_problem(workload, table, num_devices, buckets=buckets), target_gap=0.0)
    more = deployment.solve(build_problem(workload, table, num_devices + 1, buckets=buckets), target_gap=0.0)
    assert more.predicted.step_s <= fewer.predicted.step_s * (1 + 1e-5)


def test_long_sequences_get_one_wide_replica_and_short_ones_narrow_replicas():
    # 8 devices; 64-token sequences fit only (4,1), which is half as fast a device. One (4,1) takes the two long
    # sequences in two slots while four (1,1) share the 64 short ones: worked out below by listing share-outs.
    narrow = config_cost(CONFIGS[0], 32, per_token=1e-3, per_slot=0.0)
    wide = config_cost(ParallelConfig(tp=4, pp=1, remat="none"), 64, per_token=5e-4, per_slot=0.0)
    workload = counted_workload((64, 0, 2))
    plan = make_plan("exact", workload, cost_table(narrow, wide), 8, buckets=BUCKETS)
    assert str(plan) == "1x(tp4,pp1,none) 4x(tp1,pp1,none)"
    # work: 64 x 16 + 2 x 64 = 1152 tokens; rates 4 x 1000 + 2000 = 6000 tokens/s: 0.192 s if it divides evenly.
    # Slots on (1,1) are 16 or 32 tokens, on (4,1) 16, 32 or 64: 0.192 s = 12 half slots and 384 tokens: it does.
    assert plan.predicted.step_s == pytest.approx(0.192, rel=0.01)
    assert plan.predicted.bound_s <= 0.192 * (1 + 1e-9)


def test_plan_survives_its_file(tmp_path):
    table = cost_table(config_cost(CONFIGS[0], 32), config_cost(CONFIGS[2], 64))
    plan = make_plan("exact", counted_workload((7, 3, 2)), table, 4, buckets=BUCKETS, row_options=2)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    raw = plan.to_dict()
    assert Plan.from_dict({**raw, "row_options": 1}).row_options == 1
    del raw["row_options"]
    assert Plan.from_dict(raw).row_options == 3
    with pytest.raises(UserError, match="row_options = 9: expected 1 to 4"):
        Plan.from_dict({**raw, "row_options": 9})


def test_overhead_is_paid_once_in_step_and_bound():
    workload = counted_workload((6, 0, 0), BUCKETS)
    free, paid = (
        make_plan("exact", workload, cost_table(config_cost(CONFIGS[0], 32), overhead_s=o), 2, buckets=[16])
        for o in (0.0, 0.5)
    )
    assert paid.predicted.step_s == pytest.approx(free.predicted.step_s + 0.5, rel=1e-6)
    assert paid.predicted.bound_s >= 0.5


def test_plan_keeps_a_replica_for_the_rarest_longest_length():
    rare = Workload(tasks=(TaskLengths(name="t", batch_size=4, lengths={16: 1 - 1e-4, 64: 1e-4}),))
    table = cost_table(config_cost(CONFIGS[0], 16), config_cost(CONFIGS[2], 64))
    plan = make_plan("exact", rare, table, 4, buckets=BUCKETS)
    assert plan.buckets == BUCKETS and plan.max_capacity_tokens == 64


def test_plan_fits_a_length_that_is_listed_but_not_expected():
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=4, lengths={16: 1.0, 64: 0.0}),))
    table = cost_table(config_cost(CONFIGS[0], 16), config_cost(CONFIGS[2], 64))
    problem = build_problem(workload, table, 4, buckets=BUCKETS)
    plan = deployment.solve(problem)
    assert problem.counts == (4, 0, 0) and plan.buckets == BUCKETS and plan.max_capacity_tokens == 64
    assert plan_violations(plan, table, workload) == ()


def test_counts_round_up_from_the_longest_and_sum_to_the_batch():
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=10, lengths={16: 0.57, 32: 0.25, 64: 0.18}),))
    problem = build_problem(workload, cost_table(config_cost(CONFIGS[0], 64)), 1, buckets=BUCKETS)
    assert problem.expected == pytest.approx((5.7, 2.5, 1.8))
    assert problem.counts == (5, 3, 2)  # tails 1.8, 4.3, 10 -> 2, 5, 10


def test_capacities_come_from_the_cost_table():
    plan = make_plan("exact", counted_workload((4, 0, 1)), cost_table(config_cost(CONFIGS[2], 77)), 4, buckets=BUCKETS)
    assert [group.capacity_tokens for group in plan.replicas] == [77]


def test_no_time_still_gives_a_valid_plan_with_an_honest_gap():
    workload = counted_workload((40, 9, 3))
    table = cost_table(config_cost(CONFIGS[0], 32), config_cost(CONFIGS[2], 64))
    plan = make_plan("exact", workload, table, 6, buckets=BUCKETS, time_limit_s=0.0)
    best = make_plan("exact", workload, table, 6, buckets=BUCKETS)
    assert plan_violations(plan, table, workload) == ()
    assert plan.predicted.bound_s <= best.predicted.step_s
    assert plan.predicted.gap == pytest.approx(1 - plan.predicted.bound_s / plan.predicted.step_s)


def test_length_over_every_capacity_is_named_with_its_file_and_task(tmp_path):
    table, workload = cost_table(config_cost(CONFIGS[0], 32)), counted_workload((1, 0, 1))
    expected = r"64 tokens fit no config.*32 tokens.*tp1"
    with pytest.raises(UserError, match=rf"^tasks\.{workload.longest.name}: sequences of {expected}"):
        make_plan("exact", workload, table, 8)
    path = tmp_path / "hist.json"
    workload.save(path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: tasks\..*{expected}"):
        make_plan("exact", Workload.load(path), table, 8)


def test_missing_devices_are_counted():
    table = cost_table(config_cost(CONFIGS[0], 32), config_cost(ParallelConfig(tp=4, pp=1, remat="none"), 64))
    with pytest.raises(UserError, match=r"need a replica \(tp4,pp1,none\) of 4 devices: 1 missing"):
        make_plan("exact", counted_workload((1, 0, 1)), table, 3)


@pytest.mark.parametrize(
    ("constraints", "allowed"),
    [
        (Constraints(max_tp=1), {(1, 1, "none"), (1, 1, "full"), (1, 2, "none")}),
        (Constraints(tps=(2,)), {(2, 1, "none")}),
        (Constraints(max_pp=1, remats=("none",)), {(1, 1, "none"), (2, 1, "none")}),
        (Constraints(pps=(2,)), {(1, 2, "none")}),
    ],
)
def test_constraints_choose_the_configs(constraints, allowed):
    table = cost_table(*(config_cost(config, 64) for config in CONFIGS[:4]))
    problem = build_problem(counted_workload((1, 1, 1)), table, 4, buckets=BUCKETS, constraints=constraints)
    assert {(u.config.tp, u.config.pp, u.config.remat) for u in problem.configs} == allowed


def test_constraints_that_allow_nothing_are_a_user_error():
    with pytest.raises(UserError, match="allow no config"):
        make_plan(
            "exact",
            counted_workload((1, 0, 0)),
            cost_table(config_cost(CONFIGS[0], 64)),
            4,
            constraints=Constraints(tps=(8,)),
        )


def test_a_shape_without_a_positive_time_is_a_user_error():
    cost = ConfigCost(config=CONFIGS[0], capacity_tokens=64, coefficients=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    with pytest.raises(UserError, match=r"predicts 0 s for a micro-batch of 1 x 16"):
        make_plan("exact", counted_workload((1, 0, 0)), cost_table(cost), 1, buckets=[16])


def test_unknown_planner_names_the_known_ones():
    with pytest.raises(UserError, match="exact, minlp, prune, group"):
        make_plan("exakt", counted_workload((1, 0, 0)), cost_table(config_cost(CONFIGS[0], 64)), 1)


def test_prediction_says_how_the_search_ended_and_old_files_need_not(tmp_path):
    table = cost_table(config_cost(CONFIGS[0], 32), config_cost(CONFIGS[2], 64))
    problem = build_problem(counted_workload((7, 3, 2)), table, 4, buckets=BUCKETS)
    exact, near = deployment.solve(problem, target_gap=0.0), deployment.solve(problem)
    assert exact.predicted.status == "optimal" and exact.predicted.num_nodes > 0
    assert near.predicted.status in ("optimal", "gap limit")
    raw = exact.to_dict()
    del raw["predicted"]["status"], raw["predicted"]["num_nodes"]
    old = Plan.from_dict(raw).predicted
    assert (old.step_s, old.status, old.num_nodes) == (exact.predicted.step_s, None, None)


def test_replica_counts_settled_in_too_short_a_time_are_settled_again(monkeypatch):
    limits = []

    def hurried(problem, counts, *, limit_s=0.03, **rest):
        limits.append(limit_s)
        return search.settle(problem, counts, limit_s=limit_s, **rest)

    monkeypatch.setattr(closing, "settle", hurried)
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 40, size=3).tolist()
    costs = []
    for tp, pp in ((1, 1), (2, 1), (1, 2), (4, 1)):
        devices = tp * pp
        capacity = int(64 * devices * rng.uniform(0.7, 1.6)) if costs else 80
        per_token, per_slot = 1e-3 / devices**0.9 * rng.uniform(0.9, 1.1), float(rng.uniform(1e-3, 2e-2))
        costs.append(config_cost(ParallelConfig(tp=tp, pp=pp, remat="none"), capacity, per_token, per_slot))
    problem = build_problem(counted_workload(counts), cost_table(*costs), 8, buckets=BUCKETS, time_limit_s=60)
    plan = deployment.solve(problem, target_gap=0.0)
    assert max(limits) > 0.03 and plan.predicted.status == "optimal"


def test_a_fleet_of_one_kind_is_taken_where_dives_miss_it(monkeypatch):
    """Two wide replicas here end long before as many narrow ones as there are devices for."""
    narrow = config_cost(ParallelConfig(tp=1, pp=1, remat="none"), 64, per_token=9e-3)
    wide = config_cost(ParallelConfig(tp=4, pp=1, remat="none"), 256, per_token=1e-3)
    odd = config_cost(ParallelConfig(tp=2, pp=1, remat="none"), 64, per_token=8e-3)
    problem = build_problem(counted_workload((20, 9, 5)), cost_table(narrow, wide, odd), 8, buckets=BUCKETS)
    for module, name in ((deployment, "dive"), (deployment, "_rebuild"), (closing, "close")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    assert str(deployment.solve(problem)) == "2x(tp4,pp1,none)"
