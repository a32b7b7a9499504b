"""A plan whose replicas ran out of memory: the same with the next smaller capacity of their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from planner.errors import UserError
from planner.lattice import Shape
from planner.plan import ParallelConfig, Plan

SHRINK = 7 / 8
"""A micro-batch that ran out of memory is followed by those of at most this share of its tokens: predicted and real
bytes differ by less, and each try costs compiling new shapes."""


def lower_capacities(
    plan: Plan, failed: Iterable[tuple[ParallelConfig, Shape]], *, longest: int, suspects: bool = False
) -> Plan:
    """The plan in which no replica of these configs runs micro-batches as large as those that ran out of memory.

    Of several policies of a replica only the one that failed holds less; what it no longer holds goes to the next.
    Buckets that no replica takes any longer go, as does the prediction, which was of other shapes.

    Args:
      failed: configs, and (rows, length) of a micro-batch for which one had no room.
      longest: tokens of the longest sequence that must still be served.
      suspects: that any of these is at fault is all that is known: those that cannot go lower stay as they are, unless
        none can.

    Raises:
      UserError: no smaller capacity serves the longest sequence, or a config's smallest micro-batch is too much.
    """
    tokens: dict[tuple[ParallelConfig, int], int] = {}
    for config, (rows, length) in failed:
        policy = min(group.policy_of(length) for group in plan.replicas if group.config == config)
        tokens[config, policy] = min(rows * length, tokens.get((config, policy), rows * length))
    lowered = plan
    refused: UserError | None = None
    for (config, policy), too_many in tokens.items():
        try:
            lowered = _lower(lowered, config, policy, too_many, longest)
        except UserError as error:
            if not suspects:
                raise
            refused = error
    if lowered is plan and refused is not None:
        raise refused
    return lowered


def _lower(plan: Plan, config: ParallelConfig, policy: int, failed: int, longest: int) -> Plan:
    """The next smaller capacity: the largest micro-batch of the buckets of at most `SHRINK` of the failed one's tokens.

    Where the longest sequence needs more and neither the next policy nor another replica takes it, it is that
    sequence's bucket.
    """
    others = max((group.capacity_tokens for group in plan.replicas if group.config != config), default=0)
    needed = next((bucket for bucket in plan.buckets if bucket >= longest), plan.buckets[-1])
    least = plan.buckets[0] if others >= needed else needed
    if policy < len(config.remats) - 1:
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
    replicas = tuple(
        group.holding(*(min(one, capacity) if i <= policy else one for i, one in enumerate(group.capacities)))
        if group.config == config
        else group
        for group in plan.replicas
    )
    room = max(group.capacity_tokens for group in replicas)
    buckets = tuple(bucket for bucket in plan.buckets if bucket <= room)
    return dataclasses.replace(plan, replicas=replicas, buckets=buckets, predicted=None)
