"""Evaluation: every held-out example once, in shapes that were compiled, on the replicas that are asked for."""

import dataclasses

import numpy as np
import pytest

from lobra_jax.config import PlannerConfig
from lobra_jax.feeder import Feeder, evaluation_shapes
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.plan import ParallelConfig, Plan, ReplicaGroup

NARROW, WIDE = (ParallelConfig(tp=tp, pp=1, remat="none") for tp in (1, 2))
PLAN = Plan(
    model="m",
    num_devices=5,
    replicas=(
        ReplicaGroup(count=1, config=WIDE, capacity_tokens=48),
        ReplicaGroup(count=3, config=NARROW, capacity_tokens=20),
    ),
    buckets=(8, 16, 24),
)
COSTS = CostTable(
    model="m",
    model_fingerprint="f",
    hardware={},
    step_overhead_s=0.0,
    configs=tuple(
        ConfigCost(
            config=group.config,
            capacity_tokens=group.capacity_tokens,
            coefficients=(0.0, 0.0, 1e-3, 0.0, 0.0, 1e-3),
            fixed_s=0.0,
        )
        for group in PLAN.replicas
    ),
)


@pytest.mark.parametrize(("eval_replicas", "working"), [("all", {0, 1, 2, 3}), ("one", {0, 1})])
def test_every_held_out_example_is_evaluated_once_in_compiled_shapes(world, eval_replicas, working):
    data = [dataclasses.replace(task.data, evaluation=task.data.train) for task in world.tasks.values()]
    names = [task.name for task in data]
    compiled = evaluation_shapes(PLAN, eval_replicas)
    with Feeder(data, PLAN, COSTS, PlannerConfig(), eval_replicas=eval_replicas) as feeder:
        chunks = list(feeder.evaluation(names, max_sequences=64))
    targets = np.zeros(len(data), np.int64)
    used = set()
    for chunk in chunks:
        assert len(chunk.arrays) == PLAN.num_replicas
        for replica, micro_batches in enumerate(chunk.arrays):
            used |= {replica} if micro_batches else set()
            for arrays in micro_batches:
                assert arrays.tokens.shape in compiled[replica]
                for task, weights in zip(arrays.task_ids, arrays.loss_weights, strict=True):
                    targets[task] += np.count_nonzero(weights)
    expected = sum(chunk.batch.num_target_tokens for chunk in chunks)
    assert targets.tolist() == expected.tolist() and expected.min() > 0
    assert used == working
    assert {replica for replica, shapes in enumerate(compiled) if shapes} == working
