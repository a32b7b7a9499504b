"""Plans keep to what users ask of them, at the price that brute force finds; what cannot be kept is said in a line."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner import config_subsets, deployment
from planner.config_cost import ConfigCost
from planner.constraints import Constraints, parse_replicas
from planner.cost import CostTable
from planner.errors import UserError
from planner.evaluate import plan_violations
from planner.plan import ParallelConfig
from planner.planners import make_plan
from planner.problem import build_problem
from planner.workload import TaskLengths, Workload

PUBLISHED = Path(__file__).resolve().parents[2] / "configs"
BUCKETS = (16, 32, 48, 64)
CONFIGS = [ParallelConfig(tp=t, pp=p, remat="none") for t, p in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 1))]


def table_of(*costs, overhead_s=0.0):
    return CostTable(model="m", model_fingerprint="f", hardware={}, configs=costs, step_overhead_s=overhead_s)


def cost(config, capacity, per_token=1e-3, per_slot=4e-3, fixed_s=0.0):
    coefficients = (0.0, 0.0, per_token, 0.0, 0.0, per_slot)
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=coefficients, fixed_s=fixed_s)


def workload_of(counts, buckets):
    total = sum(counts)
    shares = {b: n / total for b, n in zip(buckets, counts, strict=True)}
    return Workload(tasks=(TaskLengths(name="t", batch_size=total, lengths=shares),))


@st.composite
def instances(draw):
    """(workload, table, devices, buckets, counts) of at most 8 devices, 4 buckets and 6 configs."""
    num_buckets = draw(st.integers(1, 4))
    counts = [draw(st.integers(0, 3)) for _ in range(num_buckets)]
    counts[0] += not any(counts)
    chosen = draw(st.lists(st.sampled_from(CONFIGS), min_size=1, max_size=6, unique=True))
    longest = BUCKETS[num_buckets - 1]
    units = st.integers(0, 6)
    costs = [
        cost(
            config,
            draw(st.integers(longest if index == 0 else 8, 160)),
            per_token=(1 + draw(units)) * 1e-4,
            per_slot=draw(units) * 1e-3,
            fixed_s=draw(units) * 1e-3,
        )
        for index, config in enumerate(chosen)
    ]
    devices = draw(st.integers(chosen[0].num_devices, 8))
    buckets = BUCKETS[:num_buckets]
    return workload_of(counts, buckets), table_of(*costs, overhead_s=draw(units) * 1e-3), devices, buckets, counts


def alone_s(config_cost, buckets, counts):
    """Seconds of one replica for every load, [N_1 + 1, ..., N_J + 1]."""
    times = np.full([n + 1 for n in counts], np.inf)
    for loads in np.ndindex(*times.shape):
        slots = []
        for length, load in zip(buckets, loads, strict=True):
            full = config_cost.capacity_tokens // length
            if load and not full:
                break
            sizes = sorted({math.ceil(full / 2**k) for k in range(3)}) if load else []
            slots += [(full, length)] * (load // full if load else 0)
            if load and load % full:
                slots.append((min(size for size in sizes if size >= load % full), length))
        else:
            times[loads] = config_cost.replica_s(slots)
    return times


def best_s(table, devices, buckets, counts, pins, max_configs):
    """Least step time over all replica counts that keep to the constraints, and all share-outs."""
    times = [alone_s(config_cost, buckets, counts) for config_cost in table.configs]
    sizes = [config_cost.config.num_devices for config_cost in table.configs]
    start = np.full([n + 1 for n in counts], np.inf)
    start[(0,) * len(counts)] = 0.0
    best = math.inf
    known = {(): start}
    for numbers in itertools.product(*(range(devices // size + 1) for size in sizes)):
        fits = any(n and c.capacity_tokens >= buckets[-1] for n, c in zip(numbers, table.configs, strict=True))
        if (
            sum(n * size for n, size in zip(numbers, sizes, strict=True)) > devices
            or not fits
            or any(n < pin for n, pin in zip(numbers, pins, strict=True))
            or (max_configs is not None and sum(n > 0 for n in numbers) > max_configs)
        ):
            continue
        replicas = tuple(index for index, n in enumerate(numbers) for _ in range(n))
        for stop in range(1, len(replicas) + 1):
            if replicas[:stop] not in known:
                known[replicas[:stop]] = joined(known[replicas[: stop - 1]], times[replicas[stop - 1]])
        best = min(best, float(known[replicas][tuple(counts)]))
    return best + table.step_overhead_s


def joined(served, alone):
    """Least largest time over all ways of adding one replica's load to what others serve."""
    out = np.full(served.shape, np.inf)
    for loads in zip(*np.nonzero(np.isfinite(alone)), strict=True):
        to = tuple(slice(n, None) for n in loads)
        source = tuple(slice(0, size - n) for n, size in zip(loads, served.shape, strict=True))
        out[to] = np.minimum(out[to], np.maximum(served[source], alone[loads]))
    return out


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(), st.data())
def test_exact_equals_brute_force_with_pins_and_few_configs(instance, data):
    workload, table, devices, buckets, counts = instance
    max_configs = data.draw(st.none() | st.integers(1, 3))
    pins = [data.draw(st.integers(0, 2)) if c.capacity_tokens >= buckets[0] else 0 for c in table.configs]
    best = best_s(table, devices, buckets, counts, pins, max_configs)
    assume(math.isfinite(best))
    pinned = tuple(f"{n}x{c.config}" for n, c in zip(pins, table.configs, strict=True) if n)
    constraints = Constraints(pinned=pinned, max_configs=max_configs)
    plan = make_plan("exact", workload, table, devices, buckets=buckets, constraints=constraints)
    assert plan.predicted.bound_s <= best * (1 + 1e-6)
    assert best * (1 - 1e-6) <= plan.predicted.step_s <= best * (1 + 1.02 * deployment.TARGET_GAP)
    assert plan_violations(plan, table, workload) == ()
    have = {group.config: group.count for group in plan.replicas}
    assert all(have.get(c.config, 0) >= n for n, c in zip(pins, table.configs, strict=True))
    assert max_configs is None or len(plan.replicas) <= max_configs


def test_devices_left_over_by_the_pins_stay_idle_rather_than_have_one_config_too_many():
    table = table_of(
        cost(CONFIGS[0], 16, per_token=1e-4, per_slot=0.0),
        cost(CONFIGS[2], 16, per_token=1e-4, per_slot=0.0, fixed_s=1e-3),
    )
    constraints = Constraints(pinned=("1x(tp4,pp1,none)",), max_configs=1)
    plan = make_plan("exact", workload_of([1], (16,)), table, 5, buckets=(16,), constraints=constraints)
    assert [(group.count, group.config) for group in plan.replicas] == [(1, CONFIGS[2])]
    assert plan.predicted.step_s == pytest.approx(2.6e-3)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances())
def test_every_planners_plan_is_valid_and_none_beats_the_bound(instance):
    workload, table, devices, buckets, _ = instance
    bound_s = make_plan("exact", workload, table, devices, buckets=buckets).predicted.bound_s
    for planner in ("exact", "minlp", "prune", "group"):
        plan = make_plan(planner, workload, table, devices, buckets=buckets, time_limit_s=2.0)
        assert plan_violations(plan, table, workload) == ()
        assert plan.predicted.bound_s <= plan.predicted.step_s
        assert plan.predicted.step_s >= bound_s * (1 - 1e-6)


TABLE = table_of(
    cost(ParallelConfig(tp=1, pp=1, remat="none"), 32),
    cost(ParallelConfig(tp=2, pp=1, remat="none"), 64, per_token=7e-4),
    cost(ParallelConfig(tp=4, pp=1, remat="none"), 64, per_token=5e-4),
)
MIXED = workload_of((20, 6, 0, 2), BUCKETS)


def planned(**constraints):
    return make_plan("exact", MIXED, TABLE, 8, buckets=BUCKETS, constraints=Constraints(**constraints))


def test_pinned_replicas_are_in_the_plan_and_cost_no_less():
    free, pinned = planned(), planned(pinned=("1x(tp4,pp1,none)",))
    assert {str(g.config): g.count for g in pinned.replicas}["(tp4,pp1,none)"] == 1
    assert "tp4" not in str(free)
    assert pinned.predicted.step_s >= free.predicted.bound_s


def test_one_config_of_many_is_chosen_within_the_gap_of_the_best():
    """The relaxation over all configs mixes them, and its bound is a fifth below what any one of them attains."""
    table = CostTable.load(PUBLISHED / "costs" / "llama2_7b_a100_40g.json")
    workload = Workload.load(PUBLISHED / "lengths" / "lobra_six_tasks.json")

    def problem(costs, **constraints):
        return build_problem(workload, costs, 32, num_buckets=8, constraints=Constraints(**constraints))

    plan = deployment.solve(problem(table, max_configs=1))
    alone = []
    for known in table.configs:
        if known.capacity_tokens >= workload.max_length and known.config.num_devices <= 32:
            alone.append(deployment.solve(problem(dataclasses.replace(table, configs=(known,)))).predicted.step_s)
    assert len(plan.replicas) == 1 and plan.predicted.gap <= deployment.TARGET_GAP
    assert len(alone) > 1
    assert plan.predicted.bound_s <= min(alone) * (1 + 1e-6)
    assert plan.predicted.step_s <= min(alone) * (1 + deployment.TARGET_GAP)


@pytest.mark.parametrize("few", [0, config_subsets.FEW])
def test_subsets_of_configs_find_the_best_before_and_after_a_search_over_all(monkeypatch, few):
    monkeypatch.setattr(config_subsets, "FEW", few)
    counts = (8, 3, 0, 1)
    for max_configs in (1, 2):
        best = best_s(TABLE, 6, BUCKETS, counts, (0, 0, 0), max_configs)
        constraints = Constraints(max_configs=max_configs)
        problem = build_problem(workload_of(counts, BUCKETS), TABLE, 6, buckets=BUCKETS, constraints=constraints)
        plan = deployment.solve(problem, target_gap=0.0)
        assert plan.predicted.step_s == pytest.approx(best, rel=1e-5)
        assert plan.predicted.bound_s <= best * (1 + 1e-6)
        assert len(plan.replicas) <= max_configs


def test_one_config_makes_a_homogeneous_plan():
    assert len(planned(max_configs=1).replicas) == 1


def test_tensor_parallel_groups_stay_within_a_host():
    assert {g.config.tp for g in planned(devices_per_host=2, pinned=("(tp2,pp1)",)).replicas} <= {1, 2}
    with pytest.raises(UserError, match=r"constraints allow no config.*devices_per_host = 3"):
        planned(devices_per_host=3, tps=(2, 4))


def test_sizes_that_may_not_pack_onto_hosts_are_refused():
    table = table_of(*(cost(ParallelConfig(tp=tp, pp=1, remat="none"), 64) for tp in (2, 3)))
    with pytest.raises(UserError, match="tp2 and tp3 may not pack onto hosts"):
        build_problem(MIXED, table, 12, buckets=BUCKETS, constraints=Constraints(devices_per_host=6))


@pytest.mark.parametrize(
    ("constraints", "complaint"),
    [
        ({"pinned": ("2x(tp8,pp1,none)",)}, r"not a config that a plan may use.*2x\(tp8,pp1,none\)"),
        ({"pinned": ("three of tp2",)}, r"pinned: bad value.*three of tp2.*1x\(tp4,pp1,none\)"),
        ({"pinned": ("3x(tp4,pp1,none)",)}, r"pinned replicas need 12 devices: 4 missing"),
        ({"pinned": ("7x(tp1,pp1,none)",)}, r"pinned replicas need 7 devices and 64 tokens need.*of 2: 1 missing"),
        ({"pinned": ("(tp1,pp1,none)",), "max_configs": 1}, r"max_configs.*need 2 distinct configs|need 2 distinct"),
        ({"max_configs": 0}, "max_configs"),
    ],
)
def test_constraints_that_leave_no_plan_say_why(constraints, complaint):
    with pytest.raises(UserError, match=complaint):
        planned(**constraints)


def test_a_pin_that_holds_no_sequence_says_so():
    small = table_of(cost(CONFIGS[0], 32), cost(CONFIGS[1], 64))
    with pytest.raises(UserError, match=r"pinned: holds 32 tokens.*\(tp1,pp1,none\).*at least 64 tokens"):
        build_problem(MIXED, small, 4, buckets=(64,), constraints=Constraints(pinned=("1x(tp1,pp1,none)",)))


def test_a_length_that_constraints_keep_out_names_them_and_many_configs_are_summed_up():
    configs = [ParallelConfig(tp=t, pp=p, remat=r) for t in (1, 2, 4) for p in (1, 2) for r in ("none", "full")]
    table = table_of(*(cost(config, 64 if config.remat == "full" else 32) for config in configs))
    workload = workload_of((1, 0, 0, 1), BUCKETS)
    with pytest.raises(UserError, match=r"64 tokens fit no config that the constraints \(remats = none\) allow.*32 "):
        build_problem(workload, table, 8, buckets=BUCKETS, constraints=Constraints(remats=("none",)))
    listed = r"12 configs with tp 1\|2\|4, pp 1\|2, remat none\|full"
    with pytest.raises(UserError, match=r"tps = 8 16.*" + listed):
        build_problem(workload, table, 8, buckets=BUCKETS, constraints=Constraints(tps=(8, 16)))
    with pytest.raises(UserError, match=r"not a config that a plan may use.*" + listed):
        build_problem(workload, table, 8, buckets=BUCKETS, constraints=Constraints(pinned=("(tp8,pp1)",)))


@pytest.mark.parametrize("planner", ["minlp", "prune", "group"])
@pytest.mark.parametrize("constraints", [{"pinned": ("(tp2,pp1,none)",)}, {"max_configs": 2}])
def test_lobras_planners_refuse_what_they_do_not_know(planner, constraints):
    with pytest.raises(UserError, match=f"planner {planner} does not know {next(iter(constraints))}"):
        make_plan(planner, MIXED, TABLE, 8, buckets=BUCKETS, constraints=Constraints(**constraints))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3x(tp2,pp4,full)", (3, ParallelConfig(tp=2, pp=4, remat="full"))),
        ("(tp1, pp1)", (1, ParallelConfig(tp=1, pp=1, remat="none"))),
    ],
)
def test_replicas_are_read_as_plans_print_them(text, expected):
    assert parse_replicas(text) == expected
