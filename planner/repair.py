"""Brings a share-out under a target time: what is over it, or not placed yet, is placed by chains of ejections.

A micro-batch that fits no replica in the target takes the place of a less worthy one of a shorter bucket, which is then
placed in the same way. Shorter buckets fit more replicas, so a chain ends where there is room, or with what is left.
"""

from __future__ import annotations

import numpy as np

from planner.balance import ROUNDING, Tables, list_schedule

MAX_PLACEMENTS = 400
"""Rounds of placing before the rest goes wherever it ends earliest: a limit that does not depend on the machine."""


def repair(
    table: Tables,
    loads: np.ndarray,
    left: np.ndarray,
    prices: np.ndarray,
    kind_worth: np.ndarray,
    target_s: float,
    *,
    max_placements: int = MAX_PLACEMENTS,
) -> np.ndarray:
    """Loads [R, J] of all of `loads` and `left` [J], as many replicas as can be within `target_s`.

    Args:
      prices: [J] worth of a sequence; what is ejected is worth little.
      kind_worth: [K] worth of a second on a replica of each kind; what is placed goes where it costs little.
    """
    loads, left = loads.copy(), left.copy()
    state = _State(table, loads)
    for replica in np.flatnonzero(state.seconds > target_s).tolist():
        while state.seconds[replica] > target_s and _eject(state, replica, left, prices, target_s):
            pass
    unplaced = np.zeros_like(left)
    for _ in range(max_placements):
        waiting = np.flatnonzero(left)
        if not len(waiting):
            break
        bucket = int(waiting[-1])
        if not (_place(state, bucket, left, kind_worth, target_s) or _exchange(state, bucket, left, prices, target_s)):
            unplaced[bucket] += left[bucket]
            left[bucket] = 0
    return list_schedule(table, (left + unplaced).tolist(), loads)


class _State:
    """Loads [R, J] with what they take: `sums` [R, J], `top` [R] and `seconds` [R], an idle replica's fixed_s too."""

    def __init__(self, table: Tables, loads: np.ndarray) -> None:
        self.table, self.loads = table, loads
        self.kind = table.kind[:, None]
        self.every = np.arange(loads.shape[1])[None, :]
        self.bubbles = table.bubbles[table.kind]
        self.full = np.array([[rows[-1] if rows else 0 for rows in options] for options in table.options])[table.kind]
        self.sums = table.sums[self.kind, self.every, loads]
        self.top = table.tops[self.kind, self.every, loads].max(axis=1, initial=0.0)
        self.seconds = table.fixed_s[table.kind] + self.sums.sum(axis=1) + self.bubbles * self.top

    def add(self, which: np.ndarray, bucket: int, number: np.ndarray) -> None:
        """Adds number [n] of a bucket to replicas which [n], each listed once."""
        kind, table = self.table.kind[which], self.table
        self.loads[which, bucket] += number
        rows = self.loads[which]
        sums = table.sums[kind[:, None], self.every, rows]
        self.sums[which] = sums
        top = table.tops[kind[:, None], self.every, rows].max(axis=1)
        self.top[which] = top
        self.seconds[which] = table.fixed_s[kind] + sums.sum(axis=1) + self.bubbles[which] * top

    def added_s(self, bucket: int, number: np.ndarray) -> np.ndarray:
        """[R] more seconds of each replica with number [R] more of a bucket; inf for none."""
        after = self.loads[:, bucket] + number
        slot_s = self.table.sums[self.table.kind, bucket, after] - self.sums[:, bucket]
        top = np.maximum(self.table.tops[self.table.kind, bucket, after], self.top)
        return np.where(number > 0, slot_s + np.where(self.bubbles > 0, self.bubbles * (top - self.top), 0.0), np.inf)

    def removed_s(self, which: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
        """(sequences, seconds saved at the least) [4, len(which), buckets] of what could leave: remainder, slots."""
        loads, full = self.loads[which, :buckets], np.maximum(self.full[which, :buckets], 1)
        rest = loads % full
        number = np.stack([rest, full, rest + full, 2 * full])
        number = np.where(number <= loads, number, 0)
        kind, every = self.kind[which], self.every[:, :buckets]
        after = self.table.sums[kind, every, loads - number]
        return number, self.sums[which, :buckets] - after


def _eject(state: _State, replica: int, left: np.ndarray, prices: np.ndarray, target_s: float) -> bool:
    """Takes off a replica what is worth least of all that brings it under the target, else what saves most."""
    number, saved = (x[:, 0] for x in state.removed_s(np.array([replica]), len(left)))
    if not number.any():
        return False
    enough = (number > 0) & (saved >= state.seconds[replica] - target_s)
    worth = np.where(enough, number * prices, np.inf)
    choice, bucket = np.unravel_index(int(worth.argmin() if enough.any() else saved.argmax()), worth.shape)
    left[bucket] += number[choice, bucket]
    state.add(np.array([replica]), int(bucket), -number[choice, bucket])
    return True


def _place(state: _State, bucket: int, left: np.ndarray, kind_worth: np.ndarray, target_s: float) -> bool:
    """Places what waits of a bucket, a slot at the most, where it costs least a sequence within the target."""
    full = state.full[:, bucket]
    for number in (np.minimum(full, left[bucket]), np.minimum(full, 1)):
        added_s = state.added_s(bucket, number)
        fits = state.seconds + added_s <= target_s
        if fits.any():
            seconds = np.where(fits, added_s, 0.0)  # inf times a worth of 0 is no number
            cost = np.where(fits, seconds * kind_worth[state.table.kind] / np.maximum(number, 1), np.inf)
            alike = np.flatnonzero(cost <= cost.min() * (1 + ROUNDING))
            alike = alike[: max(1, int((np.cumsum(number[alike]) <= left[bucket]).sum()))]
            left[bucket] -= number[alike].sum()
            state.add(alike, bucket, number[alike])
            return True
    return False


def _exchange(state: _State, bucket: int, left: np.ndarray, prices: np.ndarray, target_s: float) -> bool:
    """Places what waits of a bucket, a slot at the most, in the stead of something shorter that is worth least."""
    if bucket == 0:
        return False
    full = state.full[:, bucket]
    for number in (np.minimum(full, left[bucket]), np.minimum(full, 1)):
        which = np.flatnonzero(number > 0)
        over_s = (state.seconds + state.added_s(bucket, number))[which] - target_s
        leaves, saved = state.removed_s(which, bucket)
        enough = (leaves > 0) & (saved >= over_s[None, :, None])
        if enough.any():
            gain = prices[bucket] * number[which][None, :, None]
            worth = np.where(enough, leaves * prices[:bucket] - gain, np.inf)
            choice, at, other = np.unravel_index(int(worth.argmin()), worth.shape)
            replica, amount = int(which[at]), int(leaves[choice, at, other])
            left[bucket] -= number[replica]
            left[other] += amount
            state.add(which[at : at + 1], int(other), np.array([-amount]))
            state.add(which[at : at + 1], bucket, number[replica : replica + 1])
            return True
    return False
