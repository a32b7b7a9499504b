"""A length that may occur but is expected in no batch (share 0) still has to fit every plan."""

import pytest

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig
from planner.planners import PLANNERS, make_plan
from planner.workload import TaskLengths, Workload


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_keeps_a_replica_for_it(planner):
    configs = tuple(
        ConfigCost(
            config=ParallelConfig(tp=tp, pp=1, remat="none"),
            capacity_tokens=64 * tp,
            coefficients=(0.0, 0.0, 1e-4, 0.0, 0.0, 1e-4 * tp * tp),
        )
        for tp in (1, 2, 4)
    )
    costs = CostTable(model="m", model_fingerprint="f", hardware={}, configs=configs)
    workload = Workload(tasks=(TaskLengths(name="t", batch_size=16, lengths={32: 1.0, 250: 0.0}),))
    plan = make_plan(planner, workload, costs, 6, buckets=[32, 64, 256], time_limit_s=10)
    assert plan.max_capacity_tokens >= 250 and plan.buckets[-1] == 256
    assert {group.config.tp for group in plan.replicas} == {1, 4}
