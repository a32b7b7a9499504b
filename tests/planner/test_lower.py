"""Smaller capacities after a replica ran out of memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UserError
from planner.lower import lower_capacities
from planner.plan import ParallelConfig, Plan, Prediction, ReplicaGroup

NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="dots"), ParallelConfig(tp=2, pp=1, remat="none")
PREDICTED = Prediction(step_s=1, bound_s=1, gap=0, gpu_seconds=2, solve_s=0)


def plan_of(*groups: tuple[int, ParallelConfig, int], buckets: tuple[int, ...]) -> Plan:
    made = tuple(ReplicaGroup(count=n, config=config, capacity_tokens=capacity) for n, config, capacity in groups)
    return Plan(model="m", num_devices=8, replicas=made, buckets=buckets, predicted=PREDICTED)


@st.composite
def failures(draw: st.DrawFn) -> tuple[Plan, ParallelConfig, tuple[int, int], int]:
    """A plan, a config of it, (rows, length) of one of its micro-batches, and the longest sequence."""
    buckets = tuple(sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=4))))
    narrow, wide = draw(st.integers(buckets[0], 300)), draw(st.integers(buckets[-1], 300))
    plan = plan_of((2, NARROW, narrow), (1, WIDE, wide), buckets=buckets)
    config = draw(st.sampled_from((NARROW, WIDE)))
    group = next(group for group in plan.replicas if group.config == config)
    return plan, config, draw(st.sampled_from(group.shapes(buckets, num_options=3))), draw(st.integers(1, buckets[-1]))


@given(failures())
def test_no_micro_batch_as_large_as_the_failed_one_is_left_and_the_longest_sequence_is_served(case):
    plan, config, failed, longest = case
    try:
        lowered = lower_capacities(plan, [(config, failed)], longest=longest)
    except UserError as error:
        others = max(group.capacity_tokens for group in plan.replicas if group.config != config)
        needed = min(bucket for bucket in plan.buckets if bucket >= longest)
        assert math.prod(failed) <= (plan.buckets[0] if others >= needed else needed), error
        return
    for old, new in zip(plan.replicas, lowered.replicas, strict=True):
        assert (old.count, old.config) == (new.count, new.config)
        if old.config != config:
            assert new == old
        else:
            sizes = [rows * length for rows, length in new.shapes(lowered.buckets, num_options=3)]
            assert sizes and max(sizes) < math.prod(failed)
            assert new.capacity_tokens == max(sizes) or new.capacity_tokens == old.capacity_tokens
    assert lowered.buckets[-1] >= longest
    assert set(lowered.buckets) == {b for b in plan.buckets if b <= lowered.max_capacity_tokens}
    assert lowered.predicted is None


def test_capacities_fall_in_steps_down_to_the_longest_sequence():
    plan, seen = plan_of((1, NARROW, 128), buckets=(16, 64)), []
    with pytest.raises(UserError, match=r"no smaller capacity takes the longest sequence \(50 tokens\)"):
        while True:
            plan = lower_capacities(plan, [(NARROW, (1, plan.max_capacity_tokens))], longest=50)
            seen.append(plan.max_capacity_tokens)
    assert seen == [112, 96, 80, 64]


def test_a_replica_that_need_not_take_the_longest_goes_below_it():
    plan = plan_of((1, NARROW, 64), (1, WIDE, 64), buckets=(16, 64))
    lowered = lower_capacities(plan, [(NARROW, (1, 64))], longest=64)
    assert [group.capacity_tokens for group in lowered.replicas] == [48, 64]
    with pytest.raises(UserError, match="takes any sequence"):
        lower_capacities(plan, [(NARROW, (1, 16))], longest=64)


def test_of_suspects_those_that_can_go_lower_do():
    plan = plan_of((1, NARROW, 64), (1, WIDE, 64), buckets=(16, 64))
    lowered = lower_capacities(plan, [(NARROW, (1, 64)), (WIDE, (1, 64))], longest=64, suspects=True)
    assert [group.capacity_tokens for group in lowered.replicas] == [48, 64]
    with pytest.raises(UserError, match="no smaller capacity"):
        lower_capacities(plan, [(NARROW, (1, 64)), (WIDE, (1, 64))], longest=64)
    one = plan_of((1, NARROW, 64), buckets=(64,))
    with pytest.raises(UserError, match="no smaller capacity"):
        lower_capacities(one, [(NARROW, (1, 64))], longest=64, suspects=True)


def test_of_several_policies_the_one_that_failed_holds_less_and_what_it_held_goes_to_the_next():
    mixed = ParallelConfig(tp=1, pp=1, remat="none+dots+full")
    group = ReplicaGroup(count=2, config=mixed, capacity_tokens=128, smaller_capacities=(32, 64))
    plan = Plan(model="m", num_devices=2, replicas=(group,), buckets=(16, 48, 128))

    def capacities(rows: int, length: int) -> tuple[int, ...]:
        return lower_capacities(plan, [(mixed, (rows, length))], longest=120).replicas[0].capacities

    assert capacities(1, 48) == (32, 32, 128)
    assert capacities(2, 16) == (16, 64, 128)
    assert capacities(1, 16) == (1, 64, 128)
    with pytest.raises(UserError, match="no smaller capacity takes the longest sequence"):
        capacities(1, 128)
    both = lower_capacities(plan, [(mixed, (1, 48)), (mixed, (2, 16))], longest=40)
    assert both.replicas[0].capacities == (16, 32, 128)


def test_groups_of_one_config_may_hold_unlike_many_tokens():
    plan = plan_of((1, NARROW, 128), (1, NARROW, 32), buckets=(16, 64))
    lowered = lower_capacities(plan, [(NARROW, (2, 64))], longest=64)
    assert [group.capacity_tokens for group in lowered.replicas] == [112, 32]
