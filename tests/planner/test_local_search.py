"""Local search against every move and swap tried one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import balance
from planner.balance import IMPROVEMENT
from planner.config_cost import ConfigCost
from planner.local_search import MAX_CHUNKS, SWAP_PARTNERS, improve
from planner.plan import ParallelConfig
from planner.problem import usable_config

BUCKETS = (10, 24, 40, 64)
CONFIGS = [
    usable_config(
        ConfigCost(
            config=ParallelConfig(tp=tp, pp=pp, remat="none"),
            capacity_tokens=capacity,
            coefficients=(2e-7, 0.0, 1e-3 / tp**0.8 / pp, 0.0, 0.0, slot_s),
            fixed_s=fixed_s,
        ),
        BUCKETS,
        num_options=3,
    )
    for tp, pp, capacity, slot_s, fixed_s in (
        (1, 1, 48, 3e-3, 0.0),
        (2, 1, 130, 2e-3, 1e-3),
        (1, 2, 130, 1e-3, 0.0),
        (1, 4, 64, 1e-3, 2e-3),
    )
]


@st.composite
def share_outs(draw):
    """(replicas, loads [R, J] that fit them)."""
    chosen = draw(st.lists(st.integers(0, len(CONFIGS) - 1), min_size=1, max_size=4))
    replicas = [CONFIGS[index] for index in chosen]
    most = draw(st.integers(1, 9))
    loads = [[draw(st.integers(0, most)) if u.fits(j) else 0 for j in range(len(BUCKETS))] for u in replicas]
    return replicas, np.array(loads, dtype=np.int64)


def pieces(usable, load):
    """(bucket, sequences) that local search may take off a replica."""
    for bucket, number in enumerate(load.tolist()):
        if number:
            options = usable.rows[bucket]
            rest = number % options[-1]
            sizes = {1, rest, *options, *(rest - o for o in options), *(rest + options[-1] - o for o in options)}
            yield from [(bucket, size) for size in sorted(s for s in sizes if 0 < s <= number)[:MAX_CHUNKS]]


def seconds(replicas, loads):
    return [u.replica_s(row.tolist()) for u, row in zip(replicas, loads, strict=True)]


def least_after_one_change(replicas, loads, partners):
    """What the worse of both replicas takes after the best move, or else after the best swap with a partner."""
    before = seconds(replicas, loads)
    slowest = int(np.argmax(before))

    def after(other, changes):
        changed = loads.copy()
        for bucket, amount in changes:
            changed[slowest, bucket] -= amount
            changed[other, bucket] += amount
        if not all(replicas[other].fits(bucket) for bucket, amount in changes if amount > 0):
            return np.inf
        if not all(replicas[slowest].fits(bucket) for bucket, amount in changes if amount < 0):
            return np.inf
        return max(replicas[r].replica_s(changed[r].tolist()) for r in (slowest, other))

    given_away = list(pieces(replicas[slowest], loads[slowest]))
    others = [other for other in range(len(replicas)) if other != slowest]
    moves = [after(other, [piece]) for other in others for piece in given_away]
    swaps = [
        after(other, [piece, (bucket, -amount)])
        for other in others
        if other in partners
        for piece, (bucket, amount) in itertools.product(given_away, pieces(replicas[other], loads[other]))
        if bucket != piece[0]
    ]
    wanted = before[slowest] * (1 - IMPROVEMENT)
    return next((min(found) for found in (moves, swaps) if min(found, default=np.inf) < wanted), None)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(share_outs())
def test_each_round_makes_the_best_move_or_else_the_best_swap(instance):
    replicas, loads = instance
    table = balance.tables(replicas, loads.sum(axis=0).tolist())
    partners = np.argsort(seconds(replicas, loads), kind="stable")[:SWAP_PARTNERS].tolist()
    wanted = least_after_one_change(replicas, loads, partners)
    share = improve(table, loads, max_rounds=1)
    changed = np.flatnonzero((share.loads != loads).any(axis=1)).tolist()
    assert share.loads.sum(axis=0).tolist() == loads.sum(axis=0).tolist()
    assert share.replica_s == pytest.approx(seconds(replicas, share.loads))
    if wanted is None:
        assert changed == []
    else:
        assert int(np.argmax(seconds(replicas, loads))) in changed and len(changed) == 2
        assert max(share.replica_s[changed]) == pytest.approx(wanted)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(share_outs(), st.sampled_from([0.0, 0.8, 1.0]))
def test_it_ends_where_nothing_helps_or_all_is_good_enough(instance, good):
    replicas, loads = instance
    table = balance.tables(replicas, loads.sum(axis=0).tolist())
    good_s = good * max(seconds(replicas, loads))
    share = improve(table, loads, good_s=good_s)
    assert share.loads.min() >= 0 and share.loads.sum(axis=0).tolist() == loads.sum(axis=0).tolist()
    assert share.max_s <= max(seconds(replicas, loads)) * (1 + 1e-9)
    if share.max_s > good_s * (1 + 1e-9):
        again = improve(table, share.loads, max_rounds=1, good_s=good_s)
        assert np.array_equal(again.loads, share.loads)


def test_no_time_changes_nothing():
    loads = np.array([[5, 3, 2, 0], [0, 0, 0, 0]])
    table = balance.tables([CONFIGS[1], CONFIGS[1]], loads.sum(axis=0).tolist())
    assert np.array_equal(improve(table, loads, time_limit_s=0.0).loads, loads)
    assert improve(table, loads).max_s < table.replica_s(loads).max()
