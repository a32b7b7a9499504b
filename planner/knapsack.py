"""The loops of `planner.pricing`: knapsacks over one replica's time, in fractions and in equal cells."""

from __future__ import annotations

import numpy as np
from numba import float64, int64
from numba.types import Tuple

from planner.compiled import BOOLS, FLOAT_TABLE, FLOATS, INT_TABLE, INTS, compiled


@compiled(Tuple((FLOATS, FLOATS)), FLOAT_TABLE, FLOAT_TABLE, FLOATS, float64)
def fractional_worth(
    ratio: np.ndarray, all_s: np.ndarray, room_s: np.ndarray, edge: float
) -> tuple[np.ndarray, np.ndarray]:
    """([Q] most that room_s [Q] seconds are worth where any part of a slot may be used, [Q] worth of the last second).

    `ratio` [Q, J] is the most that a second on each bucket is worth, `all_s` [Q, J] for how many seconds. The last
    second is worth nothing where time is left, but for a share `edge` of it.
    """
    num_classes, num_buckets = ratio.shape
    bound, last = np.zeros(num_classes), np.zeros(num_classes)
    order = np.empty(num_buckets, dtype=np.int64)
    for q in range(num_classes):
        for bucket in range(num_buckets):  # insertion sort, best first
            at = bucket
            while at > 0 and ratio[q, order[at - 1]] < ratio[q, bucket]:
                order[at] = order[at - 1]
                at -= 1
            order[at] = bucket
        used = 0.0
        for bucket in order:
            taken = min(all_s[q, bucket], room_s[q] - used)
            used += taken
            bound[q] += taken * ratio[q, bucket]
            if used >= room_s[q] * (1 - edge):
                last[q] = ratio[q, bucket]
                break
    return bound, last


@compiled(Tuple((INTS, INTS)), INTS, INTS)
def chunks_of(slots: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slot, times) of each chunk: for every one of `slots` 1, 2, 4, ... and a rest that add up to its `most`."""
    size = 0
    for number in most:
        while number > 0:
            size += 1
            number >>= 1
    slot, times = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    at = 0
    for index in range(len(slots)):
        left, chunk = most[index], 1
        while left > 0:
            slot[at], times[at] = slots[index], min(chunk, left)
            left -= times[at]
            chunk *= 2
            at += 1
    return slot, times


@compiled(FLOAT_TABLE, INTS, FLOATS, BOOLS, int64)
def fill_table(cells: np.ndarray, worth: np.ndarray, follows: np.ndarray, size: int) -> np.ndarray:
    """[I + 1, size] most that the first i steps are worth in 0, 1, ... cells: `cells` [I] each, worth `worth` [I].

    A step that `follows` [I] is taken instead of the one before it, not with it.
    """
    table = np.empty((len(worth) + 1, size))
    for cell in range(size):
        table[0, cell] = 0.0
    base_step = 0
    for step in range(len(worth)):
        if not follows[step]:
            base_step = step
        width, gain = min(cells[step], size), worth[step]
        before, base, row = table[step], table[base_step], table[step + 1]
        for cell in range(width):
            row[cell] = before[cell]
        for cell in range(width, size):  # not max(): with its care for NaN this loop is not vectorised
            value = base[cell - width] + gain
            row[cell] = value if value > before[cell] else before[cell]
    return table


@compiled(FLOATS, INTS, FLOATS, FLOATS, FLOATS, FLOATS, INTS, INTS, int64)
def by_largest_slot(
    cells: np.ndarray,
    worth: np.ndarray,
    seconds: np.ndarray,
    excess: np.ndarray,
    last: np.ndarray,
    ends_at: np.ndarray,
    ends_cells: np.ndarray,
    size: int,
) -> np.ndarray:
    """[E] most that the first ends_at[e] steps are worth in ends_cells[e] cells, fewer than `size`; `ends_at` ascends.

    A step of v worth and t seconds loses last[e] t - v against the fractional bound of e, which is excess[e] above what
    is of interest: steps that lose more in all are left out.
    """
    kept = np.empty(len(worth), dtype=np.int64)
    num_kept = 0
    rows = np.zeros(len(ends_at), dtype=np.int64)
    end = 0
    for step in range(len(worth) + 1):
        while end < len(ends_at) and ends_at[end] == step:
            rows[end] = num_kept
            end += 1
        if step == len(worth):
            break
        for e in range(len(ends_at)):
            if last[e] * seconds[step] - worth[step] - excess[e] < 0:
                kept[num_kept] = step
                num_kept += 1
                break
    kept = kept[:num_kept]
    table = fill_table(cells[kept], worth[kept], np.zeros(num_kept, dtype=np.bool_), size)
    out = np.empty(len(ends_at))
    for end in range(len(ends_at)):
        out[end] = table[rows[end], ends_cells[end]]
    return out


@compiled(Tuple((float64, INTS)), INTS, FLOATS, FLOATS, INTS, INTS, INTS, float64, float64, int64, int64, float64)
def best_rows(
    cells: np.ndarray,
    worth: np.ndarray,
    seconds: np.ndarray,
    group: np.ndarray,
    bucket: np.ndarray,
    num_rows: np.ndarray,
    excess: float,
    last: float,
    num_buckets: int,
    num_cells: int,
    enough: float,
) -> tuple[float, np.ndarray]:
    """(most that steps are worth in `num_cells`, rows [J] behind it); where that is at most `enough`: `enough`, zeros.

    Of the steps of a `group` [I] at least 0, one after the other, one is taken at the most. Each serves num_rows[i] of
    bucket[i]. `excess` and `last` as in `by_largest_slot`.
    """
    kept = np.flatnonzero(last * seconds - worth - excess < 0)
    cells, worth = cells[kept], worth[kept]
    follows = np.zeros(len(kept), dtype=np.bool_)
    for step in range(1, len(kept)):
        follows[step] = group[kept[step]] >= 0 and group[kept[step]] == group[kept[step - 1]]
    table = fill_table(cells, worth, follows, num_cells + 1)
    rows = np.zeros(num_buckets, dtype=np.int64)
    best = table[len(kept), num_cells]
    if best <= enough:
        return enough, rows
    step, cell = len(kept), num_cells
    while step > 0:
        if table[step, cell] == table[step - 1, cell]:
            step -= 1
            continue
        step -= 1
        rows[bucket[kept[step]]] += num_rows[kept[step]]
        cell -= cells[step]
        while step > 0 and follows[step]:
            step -= 1
    return best, rows


@compiled(float64, INTS, INT_TABLE, FLOAT_TABLE, float64, float64)
def replica_seconds(rows: np.ndarray, options: np.ndarray, slot_s: np.ndarray, fixed_s: float, bubbles: float) -> float:
    """Seconds of rows [J], some of them, in slots of `options` [J, O] rows, ascending, that take `slot_s` [J, O].

    `bubbles` is how often the largest is waited for.
    """
    total = top = 0.0
    last = options.shape[1] - 1
    for bucket in range(len(rows)):
        num_full, rest = divmod(rows[bucket], options[bucket, last])
        if num_full:
            total += num_full * slot_s[bucket, last]
            top = max(top, slot_s[bucket, last])
        if rest:
            option = 0
            while options[bucket, option] < rest:
                option += 1
            total += slot_s[bucket, option]
            top = max(top, slot_s[bucket, option])
    return fixed_s + total + bubbles * top
