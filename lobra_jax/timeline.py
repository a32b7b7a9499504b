"""One step as a picture's data (`timeline.json`): what each stage did when, measured beside predicted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobra_jax.replica import Replica
from lobra_jax.schedule import BACKWARD, FORWARD, FORWARD_SHARE, one_f_one_b, simulate
from lobra_jax.step_times import ActionTime, StepResult
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.dispatch import Dispatch
from planner.files import write_whole
from planner.plan import Plan


def step_timeline(
    step: int, result: StepResult, dispatch: Dispatch, replicas: Sequence[Replica], plan: Plan, costs: CostTable
) -> dict[str, Any]:
    """The JSON object of one finished step; seconds count from the step's start."""
    priced = [costs.of(group) for group in plan.expanded()]
    return {
        "step": step,
        "step_s": result.total_s,
        "sum_update_s": result.sum_update_s,
        "replicas": [
            {
                "name": str(replica),
                "config": str(replica.parallel),
                "devices": [device.id for device in replica.submesh.devices],
                "stages": _stages(actions, replica.parallel.pp),
                "measured_s": result.replica_s[replica.index],
                "predicted_s": dispatch.predicted_s[replica.index],
                "predicted_stages": _stages(_predicted(replica, dispatch, priced[replica.index]), replica.parallel.pp),
            }
            for replica, actions in zip(replicas, result.actions, strict=True)
        ],
    }


def save_timeline(timeline: dict[str, Any], path: Path) -> None:
    write_whole(path, json.dumps(timeline) + "\n")


def _predicted(replica: Replica, dispatch: Dispatch, cost: ConfigCost) -> list[ActionTime]:
    """The same micro-batches under the cost model, through the same schedule."""
    micro_batches = dispatch.replicas[replica.index]
    num_stages = replica.parallel.pp
    seconds = [[m.slot_s(cost)] * num_stages for m in micro_batches]
    times = simulate(one_f_one_b(num_stages, len(micro_batches)), seconds)
    return [
        ActionTime(
            action=action,
            shape=(micro_batches[action.micro_batch].rows, micro_batches[action.micro_batch].length),
            start_s=start,
            end_s=end,
        )
        for action, (start, end) in times.items()
    ]


def _stages(actions: Sequence[ActionTime], num_stages: int) -> list[list[dict[str, Any]]]:
    stages: list[list[dict[str, Any]]] = [[] for _ in range(num_stages)]
    for item in actions:
        middle = item.start_s + (item.end_s - item.start_s) * FORWARD_SHARE
        fused = [(FORWARD, item.start_s, middle), (BACKWARD, middle, item.end_s)]
        parts = (
            fused if item.action.phase not in (FORWARD, BACKWARD) else [(item.action.phase, item.start_s, item.end_s)]
        )
        for phase, start, end in parts:
            stages[item.action.stage].append(
                {
                    "micro_batch": item.action.micro_batch,
                    "phase": phase,
                    "start_s": start,
                    "end_s": end,
                    "rows": item.shape[0],
                    "length": item.shape[1],
                }
            )
    return stages
