"""One step's share-out, near its proven bound in milliseconds: prices, then fills towards targets a little over it.

`planner.prices` bounds the slowest replica and prices every bucket; `planner.fill` makes loads that end by a target,
`planner.repair` places what did not fit, and `planner.local_search` moves slots about. The first share-out within
the wanted gap is taken. Where slots are long, the bound counts them whole (`planner.tighten`). A share-out that is
still far from it, or that is made while another step runs, is worked on further (`planner.pattern_share`,
`planner.resplit`): for less than is to be gained, or for part of the time that its own step takes. Nothing here looks
at a clock: the same step gives the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from planner import balance, pattern_share, prices, tighten
from planner.balance import Share, Tables
from planner.fill import fill, own_worth
from planner.local_search import improve
from planner.problem import UsableConfig
from planner.repair import repair
from planner.resplit import resplit

JUST_INSIDE = 0.98
"""The first target is the bound and this share of the wanted gap."""

MAX_ATTEMPTS = 3
"""Fills at the most. Beyond, the gap that is left is the bound's, or takes seconds to close."""

SMALL_FLEET = 16
"""Replicas up to which one fill less is made: local search then finds most of what another fill would."""

FAR = 1.05
"""Multiple of the bound beyond which more is looked for: steps that long are worth some milliseconds more, and patterns
where these take less than the step is over the bound."""

MORE_ATTEMPTS = 2
"""Fills more for a share-out beyond that."""

RISEN = 5e-4
"""Rise of the first target, by a bound that came later, from which a small fleet tries it again."""

MAX_PLACEMENTS = (25, 200)
"""Rounds of `planner.repair` after each fill, and after one of those more: what needs many is seldom good."""

MAX_ROUNDS = 16
"""Rounds of local search on each share-out."""

COARSE = 0.02
"""Share of all time, by worth, that a slot of a kind takes from which its whole slots are counted before any fill."""

LONG = 0.125
"""Share of a replica's time that a slot takes from which the whole slots of every replica are counted."""

TIGHTEN_UP_TO = 1.0125
"""Multiple of the bound up to which whole slots of one kind may raise it."""

AHEAD_SHARE = 0.3
"""Share of its own step's least seconds that a share-out made ahead may take longer, or about that: by patterns, where
that is enough for them, and the rest at `PAIR_S` a re-split."""

AHEAD_GAP = 0.5
"""Share of the gap limit within which a share-out made ahead need not get any nearer."""

PAIR_S = 1e-4
"""About what a re-split takes."""

AHEAD_PAIRS = 32
"""Re-splits a replica at the most: what they have not found then, more of them seldom find."""

LEAST_WORTH = 0.01
"""Worth of a sequence that prices say is free, as a share of what its time would be worth on its best kind."""


def share_out(
    replicas: Sequence[UsableConfig],
    table: Tables,
    counts: Sequence[int],
    *,
    gap_limit: float,
    ahead: bool = False,
    patterns: bool = True,
) -> tuple[Share, float]:
    """(a valid share-out, proven least seconds of the slowest replica); looks until `gap_limit` is met or it gives up.

    Every bucket with counts[j] > 0 must fit some replica. With `ahead` it gives up later, see `AHEAD_SHARE`; without
    `patterns` sooner where it is `FAR` from the bound.
    """
    kinds = [replicas[int(index)] for index in np.unique(table.kind, return_index=True)[1]]
    multiplicity = np.bincount(table.kind).tolist()
    relaxed = prices.relax(kinds, multiplicity, counts)
    loads = balance.list_schedule(table, counts)
    best = Share(loads=loads, replica_s=table.replica_s(loads))
    if len(replicas) == 1:
        return best, best.max_s
    good, first = 1 + gap_limit, 1 + JUST_INSIDE * gap_limit
    bound_s = relaxed.bound_s
    if best.max_s <= bound_s * (1 + gap_limit * AHEAD_GAP if ahead else good):
        return best, min(bound_s, best.max_s)
    slot_shares = tighten.slot_shares(kinds, relaxed)
    slot_worth = relaxed.kind_prices * slot_shares
    coarsest = int(slot_worth.argmax())
    up_to_s, counted_s = relaxed.bound_s * TIGHTEN_UP_TO, 0.0
    if slot_worth[coarsest] >= COARSE:
        bound_s = counted_s = tighten.by_kind(kinds, multiplicity, counts, relaxed, coarsest, up_to_s)
    own = np.max([own_worth(table, kind, counts) for kind in range(len(kinds))], axis=0)
    worth = np.maximum(relaxed.prices, LEAST_WORTH * own)
    second = relaxed.kind_prices + LEAST_WORTH * relaxed.kind_prices.max()

    def attempt(target_s: float, widest_first: bool, max_placements: int) -> Share:
        loads, left = fill(table, counts, relaxed, target_s, widest_first=widest_first)
        loads = repair(table, loads, left, worth, second, target_s, max_placements=max_placements)
        return improve(table, loads, max_rounds=MAX_ROUNDS, good_s=bound_s * good)

    if best.max_s > bound_s * good:
        target_s = first * bound_s
        best = min(best, attempt(target_s, True, MAX_PLACEMENTS[0]), key=lambda share: share.max_s)
        if best.max_s > bound_s * good:
            if slot_shares.max() >= LONG:
                bound_s = max(bound_s, tighten.by_replica(kinds, multiplicity, counts, relaxed, best.max_s))
            # Without bubbles and fixed seconds what was counted before stands, where it did not end at its limit.
            if not 0 < counted_s < up_to_s or table.bubbles.any() or table.fixed_s.any():
                bound_s = max(bound_s, tighten.by_kind(kinds, multiplicity, counts, relaxed, coarsest, best.max_s))
            best = _more_attempts(attempt, best, bound_s, target_s, gap_limit, len(replicas))
    if ahead:
        best, bound_s = _ahead(replicas, table, counts, relaxed, best, bound_s, gap_limit)
    elif patterns and best.max_s > bound_s * FAR:
        best, bound_s, _ = _by_patterns(replicas, table, counts, best, bound_s, gap_limit, spare_s=0.0)
    return best, min(bound_s, best.max_s)


def _ahead(
    replicas: Sequence[UsableConfig],
    table: Tables,
    counts: Sequence[int],
    relaxed: prices.Relaxed,
    best: Share,
    bound_s: float,
    gap_limit: float,
) -> tuple[Share, float]:
    """Looks on, by patterns and re-splits, as far as AHEAD_SHARE of the step allows: (share-out, proven bound)."""
    spare_s, starts = bound_s * AHEAD_SHARE, [best]
    if best.max_s > bound_s * (1 + gap_limit * AHEAD_GAP):
        best, bound_s, spare_s = _by_patterns(replicas, table, counts, best, bound_s, gap_limit, spare_s=spare_s)
        starts = [best] if best is starts[0] else [best, *starts]
    for start in starts:
        if best.max_s <= bound_s * (1 + gap_limit):
            break
        pairs = min(AHEAD_PAIRS * len(replicas), int(spare_s / PAIR_S))
        spare_s -= pairs * PAIR_S
        target_s = bound_s * (1 + JUST_INSIDE * gap_limit)
        found = resplit(table, start, target_s, relaxed.prices, relaxed.kind_prices, max_pairs=pairs)
        best = min(best, found, key=lambda share: share.max_s)
    return best, bound_s


def _by_patterns(
    replicas: Sequence[UsableConfig],
    table: Tables,
    counts: Sequence[int],
    best: Share,
    bound_s: float,
    gap_limit: float,
    *,
    spare_s: float,
) -> tuple[Share, float, float]:
    """(share-out, proven bound, seconds still to spare): by patterns where there is time, or so much to be gained."""
    pattern_s = pattern_share.seconds(len(replicas), counts)
    # A dive sees to it that some replica takes the last bucket.
    if pattern_s > max(spare_s, best.max_s - bound_s) or counts[-1] == 0:
        return best, bound_s, spare_s
    found, bound_s = pattern_share.pattern_share(replicas, table, counts, bound_s=bound_s, gap_limit=gap_limit)
    return min(best, found, key=lambda share: share.max_s), bound_s, max(spare_s - pattern_s, 0.0)


def _more_attempts(
    attempt: Callable[[float, bool, int], Share],
    best: Share,
    bound_s: float,
    failed_s: float,
    gap_limit: float,
    num_replicas: int,
) -> Share:
    """The best share-out of `best` and some attempts at targets between `failed_s`, which was tried, and the best."""
    small = num_replicas <= SMALL_FLEET
    first_s = (1 + JUST_INSIDE * gap_limit) * bound_s
    enough = MAX_ATTEMPTS - small
    for number in range(1, enough + MORE_ATTEMPTS):
        if best.max_s <= bound_s * (1 + gap_limit if number < enough else FAR):
            break
        again = number == 1 and (not small or first_s > failed_s * (1 + RISEN))
        target_s = first_s if again else (failed_s + best.max_s) / 2
        found = attempt(target_s, number % 2 == 0, MAX_PLACEMENTS[number >= enough])
        if found.max_s > target_s:
            failed_s = max(failed_s, target_s)
        best = min(best, found, key=lambda share: share.max_s)
    return best
