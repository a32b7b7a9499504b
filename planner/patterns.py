"""What one replica runs in a step, for `planner.pricing` and `planner.master`: slots, patterns of them, lattices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from planner.lattice import rows_for
from planner.problem import UsableConfig


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """What a replica of configs[config] may run: `rows` [J] sequences of each bucket at most, in `seconds`."""

    config: int
    rows: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Every kind of slot of one config that can serve part of the counts, arrays [S], buckets ascending.

    Attributes:
      bucket, rows, seconds: what a slot serves of which bucket, and how long it takes.
      most: how often it may be used; 1 for a remainder.
      is_remainder: whether it has less than the full rows.
      order: their indices by increasing seconds.
      per_row_s: [S, J] least seconds a row of each bucket in the slots up to each position of `order`; inf for none.
    """

    bucket: np.ndarray
    rows: np.ndarray
    seconds: np.ndarray
    most: np.ndarray
    is_remainder: np.ndarray
    order: np.ndarray
    per_row_s: np.ndarray

    def __len__(self) -> int:
        return len(self.seconds)


def slots_of(usable: UsableConfig, counts: Sequence[int]) -> Slots:
    """The slots of a config for counts [J]."""
    found: list[tuple[int, int, float, int, bool]] = []
    for bucket, count in enumerate(counts):
        if count == 0 or not usable.fits(bucket):
            continue
        options, times = usable.rows[bucket], usable.slot_s[bucket]
        num_full, rest = divmod(count, options[-1])
        if num_full:
            found.append((bucket, options[-1], times[-1], num_full, False))
        largest_rest = rest if num_full == 0 else options[-1] - 1
        last = rows_for(largest_rest, options) if largest_rest else 0
        for rows, seconds in zip(options, times, strict=True):
            most_rows = min(rows, rest if rows == options[-1] else largest_rest)
            if rows <= last and most_rows:
                found.append((bucket, most_rows, seconds, 1, True))
    return _slots(found, len(counts))


def _slots(found: Sequence[tuple[int, int, float, int, bool]], num_buckets: int) -> Slots:
    columns = zip(*found, strict=True) if found else ((),) * 5
    kinds = (np.int64, np.int64, np.float64, np.int64, np.bool_)
    bucket, rows, seconds, most, is_remainder = (np.array(c, dtype=k) for c, k in zip(columns, kinds, strict=True))
    order = np.argsort(seconds, kind="stable")
    per_row_s = np.full((len(found), num_buckets), np.inf)
    per_row_s[np.arange(len(found)), bucket[order]] = (seconds / rows)[order]
    return Slots(
        bucket=bucket,
        rows=rows,
        seconds=seconds,
        most=most,
        is_remainder=is_remainder,
        order=order,
        per_row_s=np.minimum.accumulate(per_row_s, axis=0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lattice:
    """A config's row options [J, O], ascending, the last being `full` [J], and their seconds; 1 row in no time where a
    bucket does not fit."""

    full: np.ndarray
    options: np.ndarray
    slot_s: np.ndarray


def lattice_of(usable: UsableConfig) -> Lattice:
    """Its row options as arrays; where a bucket has fewer than others, the first is repeated."""
    width = max(len(options) for options in usable.rows)
    padded = [(options or (1,), times or (0.0,)) for options, times in zip(usable.rows, usable.slot_s, strict=True)]
    rows = np.array([(options[0],) * (width - len(options)) + options for options, _ in padded])
    slot_s = np.array([(times[0],) * (width - len(times)) + times for _, times in padded])
    return Lattice(full=rows[:, -1].copy(), options=rows, slot_s=slot_s)
