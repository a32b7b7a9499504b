"""Shares a step out over a deployment by patterns: what the exact planner does with replica counts that are given.

The relaxation (`planner.relaxation`) finds the time from which fractional patterns of these replicas serve the counts.
It knows that a pipeline pays the bubbles of its longest slot for all that it runs, which prices of single buckets do
not (`planner.prices`), and so it proves more. A dive (`planner.rounding`) then gives each replica a whole pattern. That
takes tens to hundreds of milliseconds: a share-out that is made while another step runs has them, and one that is
seconds from its bound saves more. Nothing here looks at a clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.balance import Share, Tables
from planner.problem import ReplicaProblem, UsableConfig

BUCKET_S, REPLICA_S = 0.004, 0.0004
"""At the most what it usually takes, in CPU seconds, for each bucket and each replica. With 16 buckets and 8 and 64
replicas half of that was measured in the median, and up to 1.7 times that."""

FIRST = 1.005
"""The time that is looked at first, as a multiple of the bound that is known."""

RATIO = 1.006
"""How near the least time that fractional patterns need is found."""

DIVES = (1.0, 1.004)
"""Where share-outs are looked for, as multiples of the least time found, until one is near enough."""


def seconds(num_replicas: int, counts: Sequence[int]) -> float:
    """About how long `pattern_share` takes."""
    return REPLICA_S * num_replicas + BUCKET_S * sum(count > 0 for count in counts)


def pattern_share(
    replicas: Sequence[UsableConfig], table: Tables, counts: Sequence[int], *, bound_s: float, gap_limit: float
) -> tuple[Share, float]:
    """(the best share-out found; proven least seconds of the slowest replica, `bound_s` or more).

    The last bucket must have sequences.
    """
    from planner import rounding
    from planner.bracket import bracket, proven_s
    from planner.relaxation import Relaxation

    kinds = tuple(replicas[int(index)] for index in np.unique(table.kind, return_index=True)[1])
    each = tuple(np.bincount(table.kind).tolist())
    num_devices = sum(usable.num_devices for usable in replicas)
    problem = ReplicaProblem(num_devices=num_devices, counts=tuple(counts), configs=kinds, pinned=each)
    relaxation = Relaxation(problem)
    low_s, prices, high_s = bracket(relaxation, np.inf, low_s=bound_s, first_s=bound_s * FIRST, ratio=RATIO)
    bound_s = proven_s(relaxation, low_s, prices, bound_s)
    shares: list[Share] = []
    for factor in DIVES:
        dived = rounding.dive(problem, high_s * factor, relaxation.pool, lower=each, upper=each, most_resplits=0)
        shares.append(dived.in_order())
        if shares[-1].max_s <= bound_s * (1 + gap_limit):
            break
    best = min(shares, key=lambda share: share.max_s)
    of_kinds = np.argsort(table.kind, kind="stable")
    loads, replica_s = np.empty_like(best.loads), np.empty_like(best.replica_s)
    loads[of_kinds], replica_s[of_kinds] = best.loads, best.replica_s
    return Share(loads=loads, replica_s=replica_s), bound_s
