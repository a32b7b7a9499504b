"""Capacities with more memory: by the measured bytes of a token, only where memory is what limits."""

import dataclasses

import pytest

from planner.config_cost import ConfigCost, CostPoint
from planner.cost import CostTable
from planner.errors import UserError
from planner.explain import explain
from planner.more_memory import MORE_BYTES, extra_bytes, with_more_memory
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.workload import TaskLengths, Workload

GIB = 1024**3
NARROW, WIDE = (ParallelConfig(tp=tp, pp=1, remat="none") for tp in (1, 4))


def point(rows, length, size):
    return CostPoint(rows=rows, length=length, seconds=1.0, peak_bytes=size)


def cost(config, capacity, *points, per_token=1e-3):
    coefficients = (0.0, 0.0, per_token, 0.0, 0.0, 0.0)
    return ConfigCost(config=config, capacity_tokens=capacity, coefficients=coefficients, points=points)


def table(*configs, **hardware):
    return CostTable(model="m", model_fingerprint="f", hardware=hardware, configs=configs)


def test_tokens_grow_by_the_bytes_of_the_dearest_token_measured():
    # 10 GiB at 100 tokens, then 0.1 and 0.2 GiB a token: another 10 GiB hold 50 tokens of the dearer kind.
    tight = cost(NARROW, 200, point(1, 100, 10 * GIB), point(1, 200, 20 * GIB), point(2, 100, 30 * GIB))
    grown = with_more_memory(table(tight, memory_bytes=30 * GIB))
    assert grown[NARROW].capacity_tokens == 200 + 50
    assert dataclasses.replace(grown[NARROW], capacity_tokens=200) == tight


@pytest.mark.parametrize("points", [(), (point(1, 100, 29 * GIB),), (point(1, 100, 10 * GIB), point(1, 200, 20 * GIB))])
def test_capacity_stays_where_memory_does_not_limit_it_or_nothing_tells(points):
    costs = table(cost(NARROW, 200, *points), memory_bytes=30 * GIB)
    assert with_more_memory(costs) == costs


def test_small_devices_are_asked_for_twice_their_memory():
    assert extra_bytes(table(cost(NARROW, 1), memory_bytes=40 * GIB)) == MORE_BYTES
    assert extra_bytes(table(cost(NARROW, 1), memory_bytes=GIB)) == GIB
    with pytest.raises(UserError, match="hardware.memory_bytes"):
        extra_bytes(table(cost(NARROW, 1)))


def test_the_explanation_says_what_more_memory_would_give():
    # Four narrow replicas are four times as fast as the wide one, which alone holds 256 tokens until memory grows.
    narrow = cost(NARROW, 128, point(1, 64, 5 * GIB), point(1, 128, 10 * GIB))
    costs = table(narrow, cost(WIDE, 256, per_token=1e-3), memory_bytes=11 * GIB)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={256: 1.0}),))
    plan = Plan(
        model="m",
        num_devices=4,
        replicas=(ReplicaGroup(count=1, config=WIDE, capacity_tokens=256),),
        buckets=(256,),
    )
    explanation = explain(plan, costs, workload)
    (found,) = [a for a in explanation.alternatives if a.change == "10 GiB more memory a device"]
    assert str(found.plan) == "4x(tp1,pp1,none)" and not found.same_devices
    assert found.step_s == pytest.approx(explanation.step_s / 4)


def test_a_table_without_measured_bytes_is_asked_for_more_room_though_it_tells_the_memory():
    costs = table(cost(NARROW, 128), cost(WIDE, 256), memory_bytes=11 * GIB)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=8, lengths={128: 1.0}),))
    replicas = (ReplicaGroup(count=4, config=NARROW, capacity_tokens=128),)
    explanation = explain(Plan(model="m", num_devices=4, replicas=replicas, buckets=(128,)), costs, workload)
    assert [a.change for a in explanation.alternatives][-1] == "memory for 25% more tokens (the costs tell no bytes)"
