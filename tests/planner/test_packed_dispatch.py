"""Packed dispatch: every sequence once and whole, rows within their limits, replicas about equally busy."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.batching import choose_batching, packed_prices
from planner.config_cost import ConfigCost, PackedCost, ShapeTime
from planner.cost import CostTable
from planner.errors import UserError
from planner.evaluate import evaluate
from planner.packed_dispatch import least_s, packed_dispatch, packed_replicas
from planner.packing import MAX_SEGMENTS, packed_shapes
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.planning import PlanningFlags, choose_plan
from planner.row_fit import fit
from planner.simulate import simulate
from planner.workload import TaskLengths, Workload

SMALL = ParallelConfig(tp=1, pp=1, remat="none")
WIDE = ParallelConfig(tp=2, pp=1, remat="none")
DEEP = ParallelConfig(tp=1, pp=2, remat="full")


def config_cost(config, capacity, token_s, square_s=2e-9):
    packed = PackedCost(capacity_tokens=capacity, coefficients=(0.0, square_s, token_s, 1e-4))
    padded = (square_s, 0.0, token_s, 0.0, 0.0, 1e-4)
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=padded, fixed_s=1e-3, packed=packed)


COSTS = CostTable(
    model="m",
    model_fingerprint="f",
    hardware={},
    configs=(config_cost(SMALL, 1024, 1e-5), config_cost(WIDE, 4096, 0.6e-5), config_cost(DEEP, 2048, 0.7e-5)),
)


def plan_of(*groups):
    replicas = tuple(ReplicaGroup(count=n, config=c, capacity_tokens=COSTS[c].capacity_tokens) for n, c in groups)
    longest = max(group.capacity_tokens for group in replicas)
    buckets = tuple(b for b in (256, 1024, 2048, 4096) if b <= longest)
    return Plan(model="m", num_devices=16, replicas=replicas, buckets=buckets)


PLANS = [plan_of((3, SMALL), (1, WIDE)), plan_of((2, DEEP)), plan_of((1, SMALL), (2, DEEP), (1, WIDE))]


@settings(max_examples=40)
@given(
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 150),
    num_tasks=st.integers(1, 9),
)
def test_every_sequence_lies_once_in_a_row_with_room(plan, seed, count, num_tasks):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(5, 1.3, count).astype(np.int64) + 1, plan.buckets[-1])
    task_ids = rng.integers(0, num_tasks, count)
    found = packed_dispatch(plan, COSTS, lengths, task_ids)
    judged = evaluate(plan, COSTS, found, lengths, task_ids)
    assert judged.violations == ()
    again = packed_dispatch(plan, COSTS, lengths, task_ids)
    assert again.replicas == found.replicas
    shapes = [set(replica.shapes) for replica in packed_replicas(plan, COSTS)]
    for own, allowed in zip(found.replicas, shapes, strict=True):
        assert {(m.rows, m.length) for m in own} <= allowed


@pytest.mark.parametrize("plan", PLANS)
def test_replicas_are_about_equally_busy_near_the_bound(plan):
    """Of many sequences: what is lost is less than a micro-batch's rounding and a little padding."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1.0, 1200).astype(np.int64) + 1, plan.buckets[-1])
    found = packed_dispatch(plan, COSTS, lengths, rng.integers(0, 6, 1200))
    assert max(found.predicted_s) < 1.1 * found.bound_s
    assert min(found.predicted_s) > 0.85 * max(found.predicted_s)
    judged = evaluate(plan, COSTS, found, lengths)
    assert judged.padding_share < 0.05


def test_short_sequences_share_rows_with_long_ones_where_a_row_takes_only_so_many():
    """First-fit would fill the first row with the long ones and leave more short ones than the last may hold."""
    per_row = MAX_SEGMENTS - 1
    lengths, rows = np.array([2000, 2000] + [10] * (2 * per_row - 2)), [4096, 4096]
    placed = fit(lengths, np.zeros(len(lengths), int), rows)
    assert placed is not None and np.bincount(placed).tolist() == [per_row, per_row]
    assert fit(np.append(lengths, 10), np.zeros(len(lengths) + 1, int), rows) is None
    fewer = lengths[: per_row + 9]
    spread = fit(fewer, np.arange(len(fewer)) % 6, rows)  # of six tasks a row may hold four
    assert spread is not None and all(len({i % 6 for i, at in enumerate(spread) if at == row}) <= 4 for row in (0, 1))


def test_the_bound_is_what_full_rows_of_one_replica_take():
    """One replica, sequences that fill its rows: nothing is lost but the fixed time."""
    plan = plan_of((1, SMALL))
    lengths = np.full(64, 256)
    found = packed_dispatch(plan, COSTS, lengths, np.zeros(64, int))
    full_s = 1e-5 * 1024 + 2e-9 * 4 * 256**2 + 1e-4
    assert found.predicted_s[0] == pytest.approx(16 * full_s + 1e-3)
    assert least_s(packed_replicas(plan, COSTS), lengths) == pytest.approx(16 * full_s)


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 4))
def test_packed_shapes_stay_within_capacity_and_the_first_takes_the_longest(a, b, num_options):
    longest, capacity = min(a, b), max(a, b)
    shapes = packed_shapes(capacity, longest, num_options=num_options)
    assert 1 <= len(shapes) <= num_options
    assert all(rows * length <= capacity for rows, length in shapes)
    assert shapes[0][1] >= longest
    assert [r * n for r, n in shapes] == sorted((r * n for r, n in shapes), reverse=True)


def test_a_table_without_packed_times_is_refused_and_loads_as_before(tmp_path):
    bare = dataclasses.replace(COSTS, configs=tuple(dataclasses.replace(c, packed=None) for c in COSTS.configs))
    with pytest.raises(UserError, match="no packed times"):
        packed_dispatch(PLANS[0], bare, np.array([5]), np.array([0]))
    bare.save(tmp_path / "bare.json")
    assert "packed" not in (tmp_path / "bare.json").read_text()
    assert CostTable.load(tmp_path / "bare.json") == bare
    COSTS.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == COSTS


def test_a_sequence_longer_than_every_packed_row_is_refused():
    with pytest.raises(UserError, match="5000 tokens fits no replica's packed rows"):
        packed_dispatch(PLANS[0], COSTS, np.array([5000]), np.array([0]))


def test_the_same_batches_are_simulated_padded_and_packed():
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=64, lengths={100: 0.5, 300: 0.4, 1500: 0.1}),))
    padded, packed = (
        simulate(PLANS[0], COSTS, workload, num_steps=2, batching=batching) for batching in ("padded", "packed")
    )
    assert [step.tokens for step in packed.steps] == [step.tokens for step in padded.steps]
    assert packed.padding_share < padded.padding_share
    assert packed.tokens_per_s > padded.tokens_per_s


def test_the_sooner_way_is_chosen_and_padded_where_packed_times_are_missing():
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=64, lengths={100: 0.5, 300: 0.4, 1500: 0.1}),))
    plan = PLANS[0]

    def choice(costs):
        return choose_batching(plan, costs, workload, max_buckets=4, num_samples=2)

    assert choice(COSTS).batching == "packed"
    slow = tuple(
        dataclasses.replace(c, packed=dataclasses.replace(c.packed, coefficients=(0.0, 0.0, 1e-3, 0.0)))
        for c in COSTS.configs
    )
    assert choice(dataclasses.replace(COSTS, configs=slow)).batching == "padded"
    bare = tuple(dataclasses.replace(c, packed=None) for c in COSTS.configs)
    found = choice(dataclasses.replace(COSTS, configs=bare))
    assert found.batching == "padded" and "no packed times" in str(found)


@pytest.mark.parametrize(("batching", "expected"), [("padded", SMALL), ("packed", DEEP), ("auto", DEEP)])
def test_plans_are_made_for_the_prices_of_packed_rows(batching, expected):
    """Padded (1,1) is cheap and packed it is dear; on (1,2) it is the other way round."""
    prices = {SMALL: (1e-5, 9e-5), DEEP: (9e-5, 1e-6)}
    configs = tuple(
        dataclasses.replace(config_cost(c, 1024, padded), packed=config_cost(c, 1024, packed).packed)
        for c, (padded, packed) in prices.items()
    )
    costs = dataclasses.replace(COSTS, configs=configs)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=32, lengths={100: 0.5, 700: 0.5}),))
    flags = PlanningFlags(**{**dict.fromkeys(PlanningFlags.__dataclass_fields__), "batching": batching})
    plan = choose_plan(workload, costs, 2, flags).plan
    assert {group.config for group in plan.replicas} == {expected}
    # Padded micro-batches that were timed are no packed ones.
    times = tuple(
        ShapeTime(rows=rows, length=length, seconds=9.0)
        for length in range(16, 1025, 16)
        for rows in range(1, 1024 // length + 1)
    )
    timed = dataclasses.replace(costs, configs=tuple(dataclasses.replace(c, timed=times) for c in configs))
    assert packed_prices(timed) == packed_prices(costs)
    again = choose_plan(workload, timed, 2, flags).plan
    assert (again.replicas, again.buckets) == (plan.replicas, plan.buckets)
