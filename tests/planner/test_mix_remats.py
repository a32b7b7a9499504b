"""Replicas of several policies: what runs a length, what that costs, and plans that the evaluator agrees with."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.batching import packed_problem
from planner.config_cost import ConfigCost, CostPoint, PackedCost
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.deployment import solve
from planner.dispatch import dispatch
from planner.drift import check_drift
from planner.errors import UserError
from planner.evaluate import evaluate, plan_violations
from planner.explain import explain
from planner.explain_text import words
from planner.mix_remats import mix_remats
from planner.packed_dispatch import packed_replicas
from planner.plan import REMATS, ParallelConfig, Plan, ReplicaGroup
from planner.planning import PlanningFlags, choose_plan
from planner.problem import build_problem
from planner.timeline import step_timeline
from planner.workload import TaskLengths, Workload

BUCKETS = (16, 32, 48, 64)
MIXED = Constraints(mix_remats=True)


def cost(remat, capacity, per_token, *, tp=1, pp=1, fixed_s=0.0):
    return ConfigCost(
        config=ParallelConfig(tp=tp, pp=pp, remat=remat),
        capacity_tokens=capacity,
        coefficients=(0.0, 0.0, per_token, 0.0, 0.0, 1e-3),
        fixed_s=fixed_s,
        points=(CostPoint(rows=1, length=16, seconds=16 * per_token + 1e-3, peak_bytes=1),),
    )


def table(*costs):
    return CostTable(model="m", model_fingerprint="f", hardware={}, configs=costs, step_overhead_s=0.01)


COSTS = table(cost("none", 40, 1e-3, fixed_s=0.002), cost("dots", 60, 1.1e-3), cost("full", 256, 1.5e-3, fixed_s=0.001))
ALL = ParallelConfig(tp=1, pp=1, remat="none+dots+full")
WORKLOAD = Workload(
    tasks=(
        TaskLengths(name="short", batch_size=40, lengths={10: 0.5, 30: 0.4, 45: 0.1}),
        TaskLengths(name="long", batch_size=4, lengths={40: 0.75, 64: 0.25}),
    )
)


def test_a_length_is_run_with_the_first_policy_that_holds_it():
    group = ReplicaGroup(count=1, config=ALL, capacity_tokens=256, smaller_capacities=(40, 60))
    assert [group.remat_of(length) for length in (1, 40, 41, 60, 61, 256)] == [
        "none", "none", "dots", "dots", "full", "full",
    ]  # fmt: skip
    assert [group.capacity_of(length) for length in (40, 41, 256, 257)] == [40, 60, 256, 0]
    assert group.shapes((32, 64, 128, 300), num_options=1) == ((1, 32), (4, 64), (2, 128))
    known = COSTS[ALL]
    assert known.capacities == group.capacities
    assert known.micro_batch_s(1, 40) == COSTS.configs[0].micro_batch_s(1, 40)
    assert known.micro_batch_s(2, 41) == COSTS.configs[1].micro_batch_s(2, 41)
    assert known.fixed_s == 0.002
    held = known.holding((10, 20, 30))
    assert (held.capacities, held.config) == ((10, 20, 30), ALL)
    assert held.micro_batch_s(1, 20) == COSTS.configs[1].micro_batch_s(1, 20)
    with pytest.raises(KeyError, match="tp1,pp1,attention"):
        COSTS[ALL.with_remat("none+attention")]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"remat": "dots+none"}, "in this order"),
        ({"remat": "dots+dots"}, "in this order"),
        ({"remat": "dots+"}, "in this order"),
        ({"remat": "dots+full", "pp": 2}, "share the memory of a pipeline"),
        ({"remat": "dots+full", "capacity_tokens": 64}, "2 ascending"),
        ({"remat": "dots+full", "capacity_tokens": [64, 32]}, "2 ascending"),
        ({"capacity_tokens": [32, 64]}, "1 ascending"),
        ({"capacity_tokens": ["32", 64]}, r"capacity_tokens\[0\]: bad value \(got '32'\)"),
        ({"capacity_tokens": []}, "an integer, or a list of them"),
    ],
)
def test_a_bad_mixture_in_a_plan_file_is_named(changes, complaint):
    raw = {"version": 1, "model": "m", "num_devices": 2, "buckets": [16], "replicas": [
        {"count": 1, "tp": 1, "pp": 1, "remat": "dots", "capacity_tokens": 64} | changes
    ]}  # fmt: skip
    with pytest.raises(UserError, match=complaint):
        Plan.from_dict(raw, file="plan.yaml")


@st.composite
def mixtures(draw):
    """Configs of tp 1 and 2 that hold the shortest bucket, those with more memory to spare as a rule slower."""
    costs = []
    for tp in (1, 2):
        remats = draw(st.lists(st.sampled_from(REMATS), min_size=tp == 1, unique=True))
        for remat in remats:
            capacity = draw(st.integers(16, 300))
            costs.append(cost(remat, capacity, draw(st.integers(5, 20)) * 1e-4, tp=tp))
    if max(one.capacity_tokens for one in costs) < BUCKETS[-1]:
        costs[0] = dataclasses.replace(costs[0], capacity_tokens=BUCKETS[-1])
    counts = draw(st.lists(st.integers(0, 9), min_size=len(BUCKETS), max_size=len(BUCKETS)))
    return costs, counts


@given(mixtures())
def test_what_is_put_together_is_no_slower_and_holds_no_less_than_what_holds_most(case):
    costs, counts = case
    for together in [one for one in mix_remats(costs, BUCKETS, counts) if len(one.config.remats) > 1]:
        own = [one for one in costs if one.config.tp == together.config.tp]
        last = max(own, key=lambda one: one.capacity_tokens)
        assert together.capacities == tuple(sorted(set(together.capacities)))
        assert together.capacity_tokens == last.capacity_tokens
        assert set(together.config.remats) <= {one.config.remat for one in own}
        assert _seconds(together, counts) <= _seconds(last, counts) * (1 + 1e-9)


def _seconds(known, counts):
    seconds = 0.0
    for length, n in zip(BUCKETS, counts, strict=True):
        part = known.of_length(length)
        if rows := part.capacity_tokens // length:
            seconds += n * part.micro_batch_s(rows, length) / rows
    return seconds


def test_a_policy_that_gains_nothing_is_left_out_and_all_others_stay():
    slow = (
        cost("none", 40, 2e-3),
        cost("dots", 60, 1.1e-3),
        cost("full", 256, 1.5e-3, fixed_s=1e-3),
        cost("full", 256, 1e-3, pp=2),
    )
    found = mix_remats(slow, BUCKETS, (5, 5, 5, 5))
    assert found[:4] == slow and [str(one.config) for one in found[4:]] == ["(tp1,pp1,dots+full)"]
    assert mix_remats(slow[2:], BUCKETS, (5, 5, 5, 5)) == slow[2:]


def test_a_kind_that_the_mixture_equals_goes_unless_it_is_pinned():
    costs = (cost("dots", 60, 1.1e-3, fixed_s=0.001), cost("full", 256, 1.5e-3, fixed_s=0.001))
    assert [str(one.config) for one in mix_remats(costs, BUCKETS, (5, 5, 5, 5))] == [
        "(tp1,pp1,full)", "(tp1,pp1,dots+full)",
    ]  # fmt: skip
    assert len(mix_remats(costs, BUCKETS, (5, 5, 5, 5), keep=[costs[0].config])) == 3
    slower = (costs[0], dataclasses.replace(costs[1], fixed_s=0.002))
    assert len(mix_remats(slower, BUCKETS, (5, 5, 5, 5))) == 3
    pinned = Constraints(mix_remats=True, pinned=("1x(tp1,pp1,dots)",))
    assert "1x(tp1,pp1,dots)" in str(
        solve(build_problem(WORKLOAD, table(*costs), 2, buckets=BUCKETS, constraints=pinned))
    )


def test_no_plan_without_mixtures_beats_the_bound_of_those_with():
    """One row of 64 tokens with none is a worse share of a micro-batch than two with full."""
    known = table(
        dataclasses.replace(cost("none", 80, 1e-3), coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 0.03)),
        dataclasses.replace(cost("full", 256, 1.155e-3), coefficients=(0.0, 0.0, 1.155e-3, 0.0, 0.0, 0.06)),
    )
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=12, lengths={16: 0.818, 64: 0.165, 128: 0.017}),))
    alone, both = (
        solve(build_problem(workload, known, 3, buckets=(16, 64, 128), constraints=constraints))
        for constraints in (Constraints(), MIXED)
    )
    assert both.predicted.bound_s <= alone.predicted.step_s and both.predicted.step_s <= 1.01 * alone.predicted.step_s


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(2, 6), st.integers(0, 1000))
def test_plans_of_mixed_replicas_are_sound_and_batches_dispatched_on_them_too(case, num_devices, seed):
    costs, counts = case
    counts[-1] += 1
    workload = Workload(
        tasks=(
            TaskLengths(
                name="t",
                batch_size=sum(counts),
                lengths={b: n / sum(counts) for b, n in zip(BUCKETS, counts, strict=True)},
            ),
        )
    )
    known = table(*costs)
    problem = build_problem(workload, known, num_devices, buckets=BUCKETS, constraints=MIXED, time_limit_s=5)
    plan = solve(problem)
    assert not plan_violations(plan, known, workload)
    assert Plan.from_dict(plan.to_dict()) == plan
    lengths, tasks = np.random.default_rng(seed).choice(BUCKETS, 20), np.zeros(20, dtype=int)
    made = dispatch(plan, known, lengths, tasks, max_buckets=4, time_limit_s=5)
    assert not evaluate(plan, known, made, lengths).violations


def test_mixing_shortens_a_step_and_is_explained():
    alone = solve(build_problem(WORKLOAD, COSTS, 1, buckets=BUCKETS))
    plan = solve(build_problem(WORKLOAD, COSTS, 1, buckets=BUCKETS, constraints=MIXED))
    assert str(plan) == "1x(tp1,pp1,none+dots+full)"
    assert plan.predicted.step_s < 0.85 * alone.predicted.step_s
    explanation = explain(plan, COSTS, WORKLOAD, time_limit_s=2)
    assert explanation.step_s == pytest.approx(plan.predicted.step_s)
    assert "40 with none, 60 with dots, 256 with full tokens at a time" in " ".join(words(explanation))
    drift = check_drift(plan, COSTS, WORKLOAD, num_samples=8, seed=0, time_limit_s=5, constraints=MIXED)
    assert drift.is_good
    with pytest.raises(UserError, match=r"no config \(tp1,pp1,dots\)"):
        check_drift(plan, table(COSTS.configs[0], COSTS.configs[2]), WORKLOAD, num_samples=8, seed=0, time_limit_s=5)


def test_a_mixture_may_be_pinned_where_the_table_has_its_parts():
    pinned = Constraints(pinned=("1x(tp1,pp1,dots+full)",))
    plan = solve(build_problem(WORKLOAD, COSTS, 2, buckets=BUCKETS, constraints=pinned))
    assert "1x(tp1,pp1,dots+full)" in str(plan)
    both = dataclasses.replace(pinned, mix_remats=True)
    assert "dots+full)" in str(solve(build_problem(WORKLOAD, COSTS, 2, buckets=BUCKETS, constraints=both)))
    with pytest.raises(UserError, match="not a config that a plan may use"):
        build_problem(WORKLOAD, COSTS, 2, constraints=Constraints(pinned=("1x(tp1,pp1,attention+full)",)))
    with pytest.raises(UserError, match="not a config that a plan may use"):
        build_problem(WORKLOAD, COSTS, 2, constraints=dataclasses.replace(pinned, remats=("none", "full")))
    with pytest.raises(UserError, match="replicas as plans print them"):
        build_problem(WORKLOAD, COSTS, 2, constraints=Constraints(pinned=("1x(tp1,pp1,full+dots)",)))
    upside_down = table(cost("none", 100, 1e-3), cost("dots", 64, 1.1e-3))
    with pytest.raises(UserError, match="its policies hold 100, 64 tokens"):
        build_problem(WORKLOAD, upside_down, 2, constraints=Constraints(pinned=("1x(tp1,pp1,none+dots)",)))
    with pytest.raises(UserError, match="expected one policy, mixtures are made of them"):
        raw = table(COSTS.configs[0]).to_dict()
        CostTable.from_dict({**raw, "configs": [{**raw["configs"][0], "remat": "none+dots"}]})


def test_what_holds_less_after_all_is_priced_with_the_policy_that_runs_it():
    """As after a device ran out of memory: what none does not hold any more, dots runs."""
    plan = Plan(
        model="m",
        num_devices=1,
        replicas=(ReplicaGroup(count=1, config=ALL, capacity_tokens=256, smaller_capacities=(16, 60)),),
        buckets=BUCKETS,
    )
    lengths = np.array([32] * 5)
    made = dispatch(plan, COSTS, lengths, np.zeros(5, dtype=int), max_buckets=4, time_limit_s=5)
    assert not evaluate(plan, COSTS, made, lengths).violations
    (seconds,) = made.predicted_s
    assert seconds == pytest.approx(5 * (32 * 1.1e-3 + 1e-3) + 0.002)
    assert step_timeline(0, plan, COSTS, made).work_s == pytest.approx(seconds)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=5, lengths={32: 1.0}),))
    assert explain(plan, COSTS, workload, compare=False).step_s == pytest.approx(seconds + COSTS.step_overhead_s)


def test_packed_rows_run_with_one_policy():
    packed = PackedCost(capacity_tokens=64, coefficients=(0.0, 0.0, 1e-3, 1e-3))
    known = table(*(dataclasses.replace(one, packed=packed) for one in COSTS.configs))
    group = ReplicaGroup(count=1, config=ALL, capacity_tokens=256, smaller_capacities=(40, 60))
    plan = Plan(model="m", num_devices=1, replicas=(group,), buckets=BUCKETS)
    assert packed_problem(plan, known, WORKLOAD) == "replicas of several remat policies run padded rows"
    with pytest.raises(UserError, match="packed rows run with one policy"):
        packed_replicas(plan, known)
    flags = PlanningFlags(
        **dict.fromkeys(PlanningFlags.__dataclass_fields__)
        | {"batching": "packed", "pinned": ("1x(tp1,pp1,dots+full)",)}
    )
    with pytest.raises(UserError, match="packed rows run with one policy"):
        choose_plan(WORKLOAD, known, 2, flags)
