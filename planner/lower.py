"""A plan whose replicas ran out of memory: the same with the next smaller capacity of their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from planner.errors import UserError
from planner.plan import ParallelConfig, Plan, ReplicaGroup

SHRINK = 7 / 8
"""A micro-batch that ran out of memory is followed by those of at most this share of its tokens: predicted and real
bytes differ by less, and each try costs compiling new shapes."""


def lower_capacities(
    plan: Plan, failed: Mapping[ParallelConfig, tuple[int, int]], *, longest: int, suspects: bool = False
) -> Plan:
    """The plan in which no replica of these configs runs micro-batches as large as those that ran out of memory.

    Buckets that no replica takes any longer go, as does the prediction, which was of other shapes.

    Args:
      failed: by config, (rows, length) of a micro-batch for which there was no room.
      longest: tokens of the longest sequence that must still be served.
      suspects: that any of these configs is at fault is all that is known: those that cannot go lower stay as they are,
        unless none can.

    Raises:
      UserError: no smaller capacity serves the longest sequence, or a config's smallest micro-batch is too much.
    """
    lowered = plan
    refused: UserError | None = None
    for config, (rows, length) in failed.items():
        try:
            lowered = _lower(lowered, config, rows, length, longest)
        except UserError as error:
            if not suspects:
                raise
            refused = error
    if lowered is plan and refused is not None:
        raise refused
    return lowered


def _lower(plan: Plan, config: ParallelConfig, rows: int, length: int, longest: int) -> Plan:
    """The next smaller capacity: the largest micro-batch of the buckets of at most `SHRINK` of the failed one's tokens.

    Where the longest sequence needs more and no other replica takes it, it is that sequence's bucket. Of a replica of
    several policies it is the capacity of the one that failed; what it no longer holds goes to the next.
    """
    failed = rows * length
    groups = [group for group in plan.replicas if group.config == config]
    others = max((group.capacity_tokens for group in plan.replicas if group.config != config), default=0)
    needed = next((bucket for bucket in plan.buckets if bucket >= longest), plan.buckets[-1])
    least = plan.buckets[0] if others >= needed else needed
    if any(group.remat_of(length) != config.remats[-1] for group in groups):
        least = 1  # the next policy takes what this one does not
    if least >= failed:
        takes = "any sequence" if others >= needed else f"the longest sequence ({longest} tokens)"
        raise UserError(
            f"out of device memory: {config} has no room for a micro-batch of {failed} tokens, and no smaller capacity "
            f"takes {takes}",
            key="capacity_tokens",
            expected="a plan of wider replicas or with more rematerialisation, or a shorter context_length",
        )
    limit = max(int(SHRINK * failed), least)
    capacity = max((limit // bucket * bucket for bucket in plan.buckets if bucket <= limit), default=1)
    replicas = tuple(_lowered(group, length, capacity) if group in groups else group for group in plan.replicas)
    room = max(group.capacity_tokens for group in replicas)
    buckets = tuple(bucket for bucket in plan.buckets if bucket <= room)
    return dataclasses.replace(plan, replicas=replicas, buckets=buckets, predicted=None)


def _lowered(group: ReplicaGroup, length: int, capacity: int) -> ReplicaGroup:
    """With at most `capacity` tokens for the policy that runs a padded length, and for those that hold less than it."""
    at = group.config.remats.index(group.remat_of(length))
    capacities = (min(one, capacity) if i <= at else one for i, one in enumerate(group.capacities))
    return group.holding(*capacities)
