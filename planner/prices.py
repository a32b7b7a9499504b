"""The least seconds that any share-out can take, and what a sequence of each bucket is worth at that.

Given kinds k of replicas (mu_k alike of each) and counts N_j. In T seconds one replica of kind k that runs nothing but
micro-batches of bucket j with o rows serves at most

    a_kj(T) = max over o of  o (T - fixed_k - (pp_k - 1) t_kjo) / t_kjo                  sequences, fractions allowed

A replica with several buckets does no better: its pipeline's largest slot is at least that of each bucket, so the
shares of its time that the buckets take add up to at most 1. So whatever the share-out, T is at least the least T at
which

    (1)  sum over j of x_kj / a_kj(T) <= mu_k         every kind's time
    (2)  sum over k of x_kj >= N_j                    every sequence is served

has a solution x >= 0. For given prices pi_j >= 0 of a sequence, (1) and (2) give

    (3)  sum over k of mu_k max over j of a_kj(T) pi_j  >=  sum over j of N_j pi_j

so the least T that satisfies (3) is a bound for any prices: the linear programme finds good ones, and its rounding
errors cannot make the bound wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from planner.balance import ROUNDING
from planner.problem import UsableConfig
from planner.whole_slots import MOST_SLOTS, least_covers, num_slots

MAX_SOLVES = 6
"""Linear programmes solved while T settles: each raises the bound, the third hardly."""

SETTLED = 1e-3
"""Relative rise of the bound below which T has settled."""

PIVOTS_PER_ROW = 20
"""Pivots of one linear programme, as a multiple of its rows, after which its prices are taken as they are."""

PIVOT_TOLERANCE = 1e-11
NEWTON_STEPS = 50

MOST_COVERED = 2.0
"""Multiple of the relaxation's time up to which whole slots may raise it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxed:
    """The relaxation's answer.

    Attributes:
      bound_s: no share-out has a faster slowest replica.
      prices: [J] worth of a sequence of each bucket, summing to 1 over all sequences.
      kind_prices: [K] worth of all the time of one replica of each kind.
      shares: [K, J] sequences of each bucket on all replicas of each kind, fractions allowed, summing to the counts.
    """

    bound_s: float
    prices: np.ndarray
    kind_prices: np.ndarray
    shares: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Every slot: `rows` sequences of a bucket with a count, `slot_s` seconds; 0 and 1 where there is none.

    Attributes:
      rows, slot_s: [K, J, options].
      rates, offsets: a_kj(T) / N_j as lines in T, rates * T - offsets, [K, J, options].
      bubbles, fixed_s: [K, 1, 1].
    """

    rows: np.ndarray
    slot_s: np.ndarray
    rates: np.ndarray
    offsets: np.ndarray
    bubbles: np.ndarray
    fixed_s: np.ndarray

    @property
    def is_curved(self) -> bool:
        """Whether a slot's share of T seconds is other than slot_s / T."""
        return bool(self.bubbles.any() or self.fixed_s.any())

    def most(self, seconds: float) -> np.ndarray:
        """[K, J] share of one bucket's count that a replica serves in so many seconds."""
        return np.maximum(self.rates * seconds - self.offsets, 0.0).max(axis=2)

    def fraction(self, seconds: float) -> np.ndarray:
        """[K, J, options] share of a replica's seconds that a slot takes at least, its part of the bubbles included."""
        room = seconds - self.fixed_s - self.bubbles * self.slot_s
        return np.where(room > 0, self.slot_s / np.where(room > 0, room, 1.0), np.inf)


def relax(kinds: Sequence[UsableConfig], multiplicity: Sequence[int], counts: Sequence[int]) -> Relaxed:
    """Bound, prices and shares; every bucket with counts[j] > 0 must fit some kind."""
    wanted = np.asarray(counts, dtype=np.float64)
    shares = np.zeros((len(kinds), len(counts)))
    prices = np.zeros(len(counts))
    used = np.flatnonzero(wanted)
    if not len(used):
        return Relaxed(bound_s=0.0, prices=prices, kind_prices=np.zeros(len(kinds)), shares=shares)
    mu, number = np.asarray(multiplicity, dtype=np.float64), wanted[used]
    slots = slot_lines(kinds, used, number)
    devices = np.array([usable.num_devices for usable in kinds], dtype=np.float64)
    each_s = np.where(slots.rows > 0, devices[:, None, None] * slots.slot_s / np.maximum(slots.rows, 1), np.inf)
    work_s = float(number @ each_s.min(axis=(0, 2)))
    bound_s = max(quickest_s(kinds, used.tolist()), work_s / float(devices @ mu))
    relaxed_s, share, worth, basis = _settle(slots, mu, np.ones(len(used)), bound_s)
    covered_s, excess = _covered_s(slots, mu, number, worth, relaxed_s)
    if covered_s > relaxed_s * (1 + SETTLED):
        # Prices that know of the slots that cannot be full prove more, and share the work out better.
        _, share, worth, _ = _settle(slots, mu, excess, relaxed_s, basis)
    prices[used] = worth / number / max(worth.sum(), PIVOT_TOLERANCE)
    kind_prices = (slots.most(relaxed_s) * worth).max(axis=1)
    served = share.sum(axis=0)
    shares[:, used] = share * (number / np.where(served > 0, served, 1.0))
    return Relaxed(
        bound_s=max(bound_s, relaxed_s, covered_s) * (1 - ROUNDING),
        prices=prices,
        kind_prices=kind_prices / max(float(mu @ kind_prices), PIVOT_TOLERANCE),
        shares=shares,
    )


def _settle(
    slots: Slots, mu: np.ndarray, size: np.ndarray, start_s: float, basis: np.ndarray | None = None
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray | None]:
    """(least T of the relaxation, [K, J] shares of the counts, [J] worth of all sequences of a bucket, last basis).

    `size` [J] multiplies the counts; `basis` is one to start from.
    """
    seconds = start_s
    share, worth = np.zeros(0), np.zeros(0)
    for _ in range(MAX_SOLVES):
        share, worth, basis = _transport(slots.most(seconds) / size, mu, basis)
        raised = _least_s(slots, mu, worth, size)
        settled = raised <= seconds * (1 + SETTLED) or not slots.is_curved  # else prices do not depend on T
        seconds = max(seconds, raised)
        if settled:
            break
    return seconds, share, worth / size, basis


def _covered_s(
    slots: Slots, mu: np.ndarray, number: np.ndarray, worth: np.ndarray, relaxed_s: float
) -> tuple[float, np.ndarray]:
    """(a bound that counts whole slots, [J] by how much a bucket's whole slots exceed fractional ones at these prices).

    With v_k the worth of a replica's time, N_j sequences take slots worth at least

        C_j(T) = min of  sum over k, o of  v_k t_kjo / (T - fixed_k - (pp_k - 1) t_kjo) n_kjo

    over integers n with sum of o n_kjo >= N_j, and T is too little as long as the sum over j of C_j(T) exceeds the sum
    over k of mu_k v_k.
    """
    paid = (slots.most(relaxed_s) * worth).max(axis=1)
    have = float(mu @ paid)

    def needs(seconds: float) -> tuple[np.ndarray, np.ndarray]:
        return _covers(slots.fraction(seconds), paid, slots.rows, number)

    whole, fractional = needs(relaxed_s)
    excess = np.where(fractional > 0, whole / np.where(fractional > 0, fractional, 1.0), 1.0)
    seconds = relaxed_s * min(float(whole.sum()) / have, MOST_COVERED)
    if slots.is_curved and seconds > relaxed_s:
        # Shares of T seconds grow at least as T falls, so what is needed at one T tells of all below.
        seconds *= min(float(needs(seconds)[0].sum()) / have, 1.0)
    return max(seconds * (1 - ROUNDING), relaxed_s), excess


def _covers(
    fraction: np.ndarray, paid: np.ndarray, rows: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([J] least worth of whole slots that hold number [J] sequences, the same with fractions of slots).

    A slot is worth its `fraction` [K, J, options] of paid[k]; inf, or rows of 0, where there is none. Whole slots are
    counted where these are MOST_SLOTS at the most; elsewhere fractions.
    """
    num_buckets = len(number)
    costs = np.where(
        np.isfinite(fraction), np.where(np.isfinite(fraction), fraction, 0.0) * paid[:, None, None], np.inf
    )
    costs, rows = (np.moveaxis(x, 1, 0).reshape(num_buckets, -1) for x in (costs, rows))
    costs, rows = np.where(rows > 0, costs, np.inf), np.maximum(rows, 1).astype(np.int64)
    fractional = number * (costs / rows).min(axis=1)
    few = np.flatnonzero(num_slots(rows, costs, number) <= MOST_SLOTS)
    whole = fractional.copy()
    if len(few):
        counted = number[few].astype(np.int64)
        least = least_covers(rows[few], costs[few], counted)[np.arange(len(few)), counted]
        whole[few] = np.maximum(least, fractional[few])
    return whole, fractional


def quickest_s(kinds: Sequence[UsableConfig], used: Sequence[int]) -> float:
    """Seconds of the quickest replica that runs one micro-batch of a bucket and nothing else, the slowest bucket's."""
    return max(
        min(usable.cost.fixed_s + usable.config.pp * min(usable.slot_s[j]) for usable in kinds if usable.fits(j))
        for j in used
    )


def slot_lines(kinds: Sequence[UsableConfig], used: np.ndarray, number: np.ndarray) -> Slots:
    most = max(len(rows) for usable in kinds for rows in usable.rows)
    rows, slot_s = np.zeros((len(kinds), len(used), most)), np.ones((len(kinds), len(used), most))
    for k, usable in enumerate(kinds):
        for at, j in enumerate(used.tolist()):
            options = len(usable.rows[j])
            rows[k, at, :options], slot_s[k, at, :options] = usable.rows[j], usable.slot_s[j]
    bubbles = np.array([usable.config.pp - 1.0 for usable in kinds])[:, None, None]
    fixed_s = np.array([usable.cost.fixed_s for usable in kinds])[:, None, None]
    rows = np.minimum(rows, number[:, None])
    rates = rows / slot_s / number[:, None]
    return Slots(
        rows=rows,
        slot_s=slot_s,
        rates=rates,
        offsets=rates * (fixed_s + bubbles * slot_s),
        bubbles=bubbles,
        fixed_s=fixed_s,
    )


def _least_s(slots: Slots, mu: np.ndarray, worth: np.ndarray, size: np.ndarray) -> float:
    """The least T that satisfies (3), by Newton's method on its left side, a convex function of T, from the right."""
    num_kinds = len(mu)
    slopes = (slots.rates * (worth / size)[:, None]).reshape(num_kinds, -1)
    starts = (slots.offsets * (worth / size)[:, None]).reshape(num_kinds, -1)
    need, every = float(worth.sum()), np.arange(num_kinds)
    steep = slopes > 0
    seconds = float(((starts[steep] + need) / slopes[steep]).min())
    for _ in range(NEWTON_STEPS):
        values = slopes * seconds - starts
        best = values.argmax(axis=1)
        value = np.maximum(values[every, best], 0.0)
        slope = float(mu @ np.where(value > 0, slopes[every, best], 0.0))
        excess = float(mu @ value) - need
        if slope <= 0 or excess <= ROUNDING * need:
            break
        seconds -= excess / slope
    return seconds


def _transport(most: np.ndarray, mu: np.ndarray, basis: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maximises the share theta of every bucket that is served, most[k, j] being what one replica serves of one.

        theta - sum over k of most_kj z_kj <= 0  for every j        sum over j of z_kj <= mu_k  for every k

    by the primal simplex method on a dense tableau, from `basis` where that is still feasible. Returns (most * z
    [K, J], the prices of the buckets [J], the last basis).
    """
    num_kinds, num_buckets = most.shape
    rows, columns = num_buckets + num_kinds, num_kinds * num_buckets + 1
    system = np.zeros((rows, columns + rows + 1))
    at = np.arange(columns - 1)
    kind, bucket = np.divmod(at, num_buckets)
    system[bucket, at] = -most.ravel()
    system[num_buckets + kind, at] = 1.0
    system[:num_buckets, columns - 1] = 1.0
    system[np.arange(rows), columns + np.arange(rows)] = 1.0
    system[num_buckets:, -1] = mu
    solved = None
    if basis is not None:
        with contextlib.suppress(np.linalg.LinAlgError):  # the old basis may not be one any more
            solved = np.linalg.solve(system[:, basis], system)
    if solved is None or solved[:, -1].min() < 0:
        basis = _first_basis(most, mu)
        solved = np.linalg.solve(system[:, basis], system)
    tableau = np.zeros((rows + 1, columns + rows + 1))
    tableau[:-1] = solved
    worth = (basis == columns - 1).astype(np.float64)
    tableau[-1] = worth @ tableau[:-1]
    tableau[-1, columns - 1] -= 1.0
    basis = basis.copy()
    _pivot_to_optimum(tableau, basis)
    values = np.zeros(columns + rows)
    values[basis] = np.maximum(tableau[:-1, -1], 0.0)
    prices = np.maximum(tableau[-1, columns : columns + num_buckets], 0.0)
    return most * values[: columns - 1].reshape(most.shape), prices, basis


def _first_basis(most: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """Every bucket on the kind that serves most of it; theta is what the busiest kind then allows."""
    num_kinds, num_buckets = most.shape
    columns = num_kinds * num_buckets + 1
    chosen = most.argmax(axis=0)
    work = np.bincount(chosen, weights=1 / most[chosen, np.arange(num_buckets)], minlength=num_kinds) / mu
    ends = columns + num_buckets + np.arange(num_kinds)
    ends[int(work.argmax())] = columns - 1
    return np.concatenate([chosen * num_buckets + np.arange(num_buckets), ends])


def _pivot_to_optimum(tableau: np.ndarray, basis: np.ndarray) -> None:
    rows = len(basis)
    for _ in range(PIVOTS_PER_ROW * rows):
        entering = int(tableau[-1, :-1].argmin())
        if tableau[-1, entering] >= -PIVOT_TOLERANCE:
            return
        column = tableau[:-1, entering]
        positive = np.flatnonzero(column > PIVOT_TOLERANCE)
        if not len(positive):
            return
        ratios = np.maximum(tableau[positive, -1], 0.0) / column[positive]
        tied = positive[ratios <= ratios.min() + PIVOT_TOLERANCE]
        leaving = int(tied[column[tied].argmax()])
        tableau[leaving] /= tableau[leaving, entering]
        others = tableau[:, entering].copy()
        others[leaving] = 0.0
        tableau -= others[:, None] * tableau[leaving]
        basis[leaving] = entering
