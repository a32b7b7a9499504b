"""What configs could hold with more memory on each device, from the bytes that were measured of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError

MORE_BYTES = 10 * 1024**3
"""What is asked for on devices that have at least as much; smaller ones are asked for twice what they have."""

FILLED = 0.8
"""A config whose largest measured micro-batch takes less than this share of the memory is not limited by it."""


MORE_ROOM = 1.25
"""Where bytes are not known: capacities as multiples of the present ones."""


def with_more_room(costs: CostTable) -> CostTable:
    """The table with every capacity `MORE_ROOM` times as large, whatever bytes that takes."""
    return dataclasses.replace(
        costs,
        configs=tuple(
            dataclasses.replace(cost, capacity_tokens=int(MORE_ROOM * cost.capacity_tokens)) for cost in costs.configs
        ),
    )


def extra_bytes(costs: CostTable) -> int:
    """How much more memory is asked for on each device. Raises `UserError` if the table does not tell what it has."""
    memory_bytes = costs.hardware.get("memory_bytes")
    if not isinstance(memory_bytes, int) or isinstance(memory_bytes, bool) or memory_bytes < 1:
        raise UserError("the cost table does not tell the devices' memory", key="hardware.memory_bytes")
    return min(MORE_BYTES, memory_bytes)


def with_more_memory(costs: CostTable) -> CostTable:
    """The table with the capacities that `extra_bytes` more would give; times are those of the fitted cost model.

    A micro-batch's bytes grow with its tokens by the steepest rate between the smallest measured and any other.
    Configs that memory does not limit, or of which fewer than two sizes were measured, keep their capacity.

    Raises:
      UserError: the table does not tell the devices' memory.
    """
    more = extra_bytes(costs)
    limit = costs.hardware["memory_bytes"]
    return dataclasses.replace(costs, configs=tuple(_grown(cost, more, limit) for cost in costs.configs))


def _grown(cost: ConfigCost, more_bytes: int, memory_bytes: int) -> ConfigCost:
    points = sorted((point.rows * point.length, point.peak_bytes) for point in cost.points)
    if not points or max(size for _, size in points) < FILLED * memory_bytes:
        return cost
    (fewest, least), larger = points[0], [point for point in points if point[0] > points[0][0]]
    if not larger:
        return cost
    tokens, sizes = np.array(larger, dtype=float).T
    bytes_per_token = float(np.max((sizes - least) / (tokens - fewest)))
    if bytes_per_token <= 0:
        return cost
    return dataclasses.replace(cost, capacity_tokens=cost.capacity_tokens + int(more_bytes / bytes_per_token))
