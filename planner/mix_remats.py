"""Replicas of several rematerialisation policies: each padded length is run with the first that holds it.

What rematerialisation spares is memory, and short micro-batches do not need what long ones do. A replica of one policy
must hold its longest sequence with it, and makes activations of all the others anew for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from planner.config_cost import ConfigCost, mixed
from planner.plan import REMATS, ParallelConfig


def mix_remats(
    configs: Sequence[ConfigCost],
    buckets: Sequence[int],
    counts: Sequence[int],
    *,
    keep: Collection[ParallelConfig] = (),
) -> tuple[ConfigCost, ...]:
    """The configs, and for each tp a replica without a pipeline of several policies, where that gains anything.

    Those of one policy stay: just below what a policy holds one row fills a micro-batch badly, and with other counts
    they may be better. But those go, except what to `keep`, that the new one is as good as with all that they hold.

    Args:
      buckets: padded lengths; every config holds the shortest.
      counts: sequences of each of them in a batch.
    """
    single = [cost for cost in configs if len(cost.config.remats) == 1 and cost.config.pp == 1]
    widths = dict.fromkeys(cost.config.tp for cost in single)
    made = [_put_together([cost for cost in single if cost.config.tp == tp], buckets, counts) for tp in widths]
    there = {cost.config for cost in configs}
    new = [cost for cost in made if cost.config not in there]
    stay = [c for c in configs if c.config in keep or not any(_covers(mixture, c, buckets) for mixture in new)]
    return (*stay, *new)


def _covers(mixture: ConfigCost, cost: ConfigCost, buckets: Sequence[int]) -> bool:
    """Whether a mixture runs all that a config holds as that does."""
    held = [length for length in buckets if length <= cost.capacity_tokens]
    return mixture.fixed_s <= cost.fixed_s and all(mixture.of_length(n).config == cost.config for n in held)


def _put_together(configs: Sequence[ConfigCost], buckets: Sequence[int], counts: Sequence[int]) -> ConfigCost:
    """The one that holds most; then, from little memory to much, each that is sooner with what it holds."""
    chosen = [max(configs, key=lambda cost: cost.capacity_tokens)]
    for cost in sorted(configs, key=_rank, reverse=True):
        held = [(length, n) for length, n in zip(buckets, counts, strict=True) if length <= cost.capacity_tokens]
        if _rank(cost) < _rank(chosen[0]) and _seconds(cost, held) < _seconds(mixed(chosen), held):
            chosen = [cost, *(one for one in chosen if one.capacity_tokens > cost.capacity_tokens)]
    return chosen[0] if len(chosen) == 1 else mixed(chosen)


def _rank(cost: ConfigCost) -> int:
    return REMATS.index(cost.config.remat)


def _seconds(cost: ConfigCost, held: Sequence[tuple[int, int]]) -> float:
    """What so many sequences of each length take in full micro-batches."""
    seconds = 0.0
    for length, n in held:
        rows = cost.of_length(length).capacity_tokens // length
        seconds += n * cost.micro_batch_s(rows, length) / rows if rows else math.inf
    return seconds
