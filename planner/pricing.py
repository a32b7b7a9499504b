"""Prices patterns: the most that one replica can be worth within a time, when a sequence of bucket j is worth pi_j.

A *pattern* of a config is what one replica runs in a step: numbers of slots (bucket j, rows o, seconds t) with

    (1)  fixed_s + sum t + (pp - 1) max t <= T
    (2)  at most N_j sequences of bucket j                  more than there are is of no use
    (3)  at most one slot of bucket j with less than the full rows

`Pricer.price` gives z_c(pi) for each config c, about the most that sum_j pi_j n_j can be over its patterns:

- First each config is bounded without whole slots: time goes to the buckets that pay best for it (a fractional
  knapsack), for every value of the largest slot where (pp - 1) max t matters. That bound is always proven.
- Configs whose bound is above what is asked for get a dynamic programme over time in equal cells. Steps are chunks of
  2^q like slots. With pp > 1 slots enter by increasing seconds, so one pass has the answer for every largest slot, and
  a remainder is mostly what it adds to the next smaller one of its bucket (`STEEP`): (3) holds but for additions taken
  alone. A `proven` pricer rounds each chunk's seconds down to cells, so that z_c is a bound; otherwise to the nearest
  cell, which is what patterns are found with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from planner.lattice import rows_for
from planner.problem import PlanningProblem, UsableConfig

NUM_CELLS = 2048
"""Cells of time with which patterns are found: a chunk of slots is off by up to 1/4096 of T."""

NUM_COARSE_CELLS = 1024
"""Cells where it is only asked about where T lies."""

NUM_PROVEN_CELLS = 8192
"""Cells of a proven pricer: a chunk of slots is priced as if it were up to 1/8192 of T shorter."""

STEEP = 0.9
"""A remainder of a pipeline counts as an addition to the next smaller one if that costs this share of its own price of
a row at the least: a cheaper addition, taken alone, would make the bound worse than two remainders side by side."""

LONGER = 1.002
"""A pipeline's pattern may take this many times as long as T: cells are no finer."""

EDGE = 1e-9
"""Relative room given to every comparison of seconds, so that rounding never cuts a true pattern off."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """What a replica of configs[config] may run: `rows` [J] sequences of each bucket at most, in `seconds`."""

    config: int
    rows: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A kind of slot: `rows` sequences of `bucket` in `seconds`, at most `most` times; a remainder has `most` = 1."""

    bucket: int
    rows: int
    seconds: float
    most: int
    is_remainder: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Chunks:
    """Steps of the dynamic programme, arrays [I]: take `rows` sequences of `bucket` in `seconds`, or not.

    `cells` are the seconds in cells. Of the `joined` neighbours of one bucket at most one is taken. Where a chunk adds
    to a smaller remainder, `slot_rows` and `slot_s` are of the whole slot, else those of the chunk; `is_remainder` says
    which chunks build on one another.
    """

    bucket: np.ndarray
    rows: np.ndarray
    seconds: np.ndarray
    slot_rows: np.ndarray
    slot_s: np.ndarray
    is_remainder: np.ndarray
    joined: np.ndarray
    cells: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Programme:
    """The steps for one config at one T; each end is a largest slot: how many steps, cells for slots."""

    chunks: _Chunks
    ends_at: np.ndarray
    ends_cells: np.ndarray


def slots_of(usable: UsableConfig, counts: Sequence[int]) -> tuple[Slot, ...]:
    """Every kind of slot that can serve part of the counts, buckets ascending."""
    out = []
    for bucket, count in enumerate(counts):
        if count == 0 or not usable.fits(bucket):
            continue
        options, times = usable.rows[bucket], usable.slot_s[bucket]
        num_full, rest = divmod(count, options[-1])
        if num_full:
            out.append(Slot(bucket=bucket, rows=options[-1], seconds=times[-1], most=num_full, is_remainder=False))
        largest_rest = rest if num_full == 0 else options[-1] - 1
        last = rows_for(largest_rest, options) if largest_rest else 0
        for rows, seconds in zip(options, times, strict=True):
            most_rows = min(rows, rest if rows == options[-1] else largest_rest)
            if rows <= last and most_rows:
                out.append(Slot(bucket=bucket, rows=most_rows, seconds=seconds, most=1, is_remainder=True))
    return tuple(out)


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
    return Lattice(full=rows[:, -1], options=rows, slot_s=slot_s)


class Pricer:
    """Prices the patterns of a problem's configs within `replica_s` seconds (step overhead excluded).

    `slots` are the `slots_of` each config, `lattices` the `lattice_of` each; a config without slots has no patterns.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        slots: Sequence[Sequence[Slot]],
        lattices: Sequence[Lattice],
        replica_s: float,
        *,
        num_cells: int = NUM_CELLS,
        proven: bool = False,
    ) -> None:
        self.problem = problem
        self.replica_s = replica_s
        self.proven = proven
        self._num_cells = NUM_PROVEN_CELLS if proven else num_cells
        self._round_up = 0.0 if proven else 0.5
        self._slots = slots
        self._lattices = lattices
        self._programmes: dict[int, _Programme] = {}
        self._classes(slots)

    def _classes(self, slots: Sequence[Sequence[Slot]]) -> None:
        """Fills the arrays of the fractional bound over classes (config, largest slot) q.

        `_class_config` [Q], `_room` [Q] seconds for slots, `_rate` [Q, J] most sequences a second, `_all_s` [Q, J]
        seconds for all N_j.
        """
        configs, rooms, per_row = [], [], []
        num_buckets = len(self.problem.counts)
        for index, mine in enumerate(slots):
            usable = self.problem.configs[index]
            bubbles = usable.config.pp - 1
            left_s = (self.replica_s - usable.cost.fixed_s) * (1 + EDGE)
            fitting = sorted((s for s in mine if s.seconds * (1 + bubbles) <= left_s), key=lambda s: s.seconds)
            best = np.full(num_buckets, np.inf)
            for position, slot in enumerate(fitting):
                best[slot.bucket] = min(best[slot.bucket], slot.seconds / slot.rows)
                is_last = position + 1 == len(fitting)
                if is_last or (bubbles and fitting[position + 1].seconds > slot.seconds):
                    configs.append(index)
                    rooms.append(left_s - bubbles * slot.seconds if bubbles else left_s)
                    per_row.append(best.copy())
        self._class_config = np.array(configs, dtype=np.int64)
        self._room = np.array(rooms)
        per_row_s = np.array(per_row).reshape(-1, num_buckets)
        self._rate = 1 / per_row_s  # 0 where the bucket does not fit
        self._all_s = np.where(np.isfinite(per_row_s), per_row_s, 0.0) * np.array(self.problem.counts)

    @property
    def can_serve(self) -> np.ndarray:
        """[J] whether some replica can serve a sequence of each bucket within the time."""
        return (self._rate > 0).any(axis=0)

    def fractional(self, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([Q] bound of each class without whole slots, [Q] worth of its last second)."""
        ratio = prices * self._rate
        order = np.argsort(-ratio, axis=1)
        ratio = np.take_along_axis(ratio, order, axis=1)
        seconds = np.take_along_axis(self._all_s, order, axis=1)
        used = np.minimum(np.cumsum(seconds, axis=1), self._room[:, None])
        taken = np.diff(used, axis=1, prepend=0.0)
        full = used[:, -1] >= self._room * (1 - EDGE)
        last = np.argmax(used >= self._room[:, None] * (1 - EDGE), axis=1)
        return (taken * ratio).sum(axis=1), np.where(full, ratio[np.arange(len(ratio)), last], 0.0)

    def price(
        self, prices: np.ndarray, enough: np.ndarray, *, most: int | None = None
    ) -> tuple[np.ndarray, list[Pattern]]:
        """(z [C], patterns worth more than enough[c]).

        Args:
          prices: [J] pi >= 0.
          enough: [C] where the worth is at most this, z may be this.
          most: run the dynamic programme for so many configs only, those whose bound promises most for a device.
        """
        bound, last = self.fractional(prices)
        z = np.zeros(len(self.problem.configs))
        np.maximum.at(z, self._class_config, bound)
        found = []
        chosen = np.flatnonzero(z > enough)
        if most is not None and len(chosen) > most:
            promise = (z - enough)[chosen] / np.array([self.problem.configs[c].num_devices for c in chosen])
            chosen = chosen[np.argsort(-promise)[:most]]
        for config in chosen.tolist():
            mine = np.flatnonzero((self._class_config == config) & (bound > enough[config]))
            worth, pattern = self._solve(config, prices, bound[mine] - enough[config], last[mine])
            z[config] = min(z[config], max(worth, enough[config]))
            if worth > enough[config]:
                found.append(pattern)
        return z, found

    def _solve(self, config: int, prices: np.ndarray, excess: np.ndarray, last: np.ndarray) -> tuple[float, Pattern]:
        """The best pattern by the dynamic programme, without chunks that no pattern of worth over `enough` uses.

        A chunk of worth v and t seconds in a class whose last second is worth r loses r t - v against the fractional
        bound, which is `excess` above what is enough.
        """
        programme = self._programmes.get(config)
        if programme is None:
            programme = self._programmes[config] = self._programme(config)
        chunks = programme.chunks
        worth = prices[chunks.bucket] * chunks.rows
        slot_worth = prices[chunks.bucket] * chunks.slot_rows
        useful = ((excess[:, None] - last[:, None] * chunks.slot_s + slot_worth > 0).any(axis=0)) & (worth > 0)
        if self.problem.configs[config].config.pp > 1:
            largest = np.full(len(prices), -1)  # the last useful remainder of each bucket needs the smaller ones
            at = np.flatnonzero(useful & chunks.is_remainder)
            np.maximum.at(largest, chunks.bucket[at], at)
            useful |= chunks.is_remainder & (np.arange(len(useful)) <= largest[chunks.bucket]) & (worth > 0)
        kept = np.flatnonzero(useful)
        table = np.empty((len(kept) + 1, self._num_cells + 1))
        table[0] = 0.0
        spare = np.empty(self._num_cells + 1)
        size = self._num_cells + 1
        follows = np.zeros(len(kept), dtype=bool)  # a remainder after another one of the same bucket
        follows[1:] = (chunks.joined[kept[1:]] & chunks.joined[kept[:-1]]) & (
            chunks.bucket[kept[1:]] == chunks.bucket[kept[:-1]]
        )
        base = 0
        steps = zip(chunks.cells[kept].tolist(), worth[kept].tolist(), follows.tolist(), strict=True)
        for step, (width, gain, after_other) in enumerate(steps):
            base = base if after_other else step
            table[step + 1, :width] = table[step, :width]
            np.add(table[base, : size - width], gain, out=spare[width:])
            np.maximum(table[step, width:], spare[width:], out=table[step + 1, width:])
        ends = np.searchsorted(kept, programme.ends_at)
        worths = table[ends, programme.ends_cells]
        best = int(np.argmax(worths))
        rows = self._traced(chunks, kept, table, follows, int(ends[best]), int(programme.ends_cells[best]))
        seconds = self._seconds(config, rows)
        if self.problem.configs[config].config.pp > 1 and not self.proven and seconds > self.replica_s * LONGER:
            rows, seconds = self._without_loose(config, rows, prices)
        return float(worths[best]), Pattern(config=config, rows=rows, seconds=seconds)

    def _seconds(self, config: int, rows: np.ndarray) -> float:
        """`UsableConfig.replica_s` of rows [J], some of them."""
        lattice = self._lattices[config]
        num_full, rest = np.divmod(rows, lattice.full)
        option = np.minimum((lattice.options < rest[:, None]).sum(axis=1), lattice.slot_s.shape[1] - 1)
        rest_s = np.where(rest > 0, lattice.slot_s[np.arange(len(rows)), option], 0.0)
        largest = max(float(lattice.slot_s[num_full > 0, -1].max(initial=0.0)), float(rest_s.max(initial=0.0)))
        usable = self.problem.configs[config]
        slots_s = float(num_full @ lattice.slot_s[:, -1] + rest_s.sum())
        return usable.cost.fixed_s + slots_s + (usable.config.pp - 1) * largest

    def _without_loose(self, config: int, rows: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, float]:
        """Rows and seconds of a pattern of a pipeline that takes too long: an addition to a remainder was taken alone.

        Remainders are cut to a row option; those worth least go until the pattern is within the time.
        """
        lattice = self._lattices[config]
        rest = rows % lattice.full
        rows = rows - rest
        rest = np.where(lattice.options <= rest[:, None], lattice.options, 0).max(axis=1)
        while (seconds := self._seconds(config, rows + rest)) > self.replica_s * LONGER and rest.any():
            rest[np.where(rest > 0, rest * prices, np.inf).argmin()] = 0
        return rows + rest, seconds

    def _programme(self, config: int) -> _Programme:
        usable = self.problem.configs[config]
        bubbles = usable.config.pp - 1
        left_s = (self.replica_s - usable.cost.fixed_s) * (1 + EDGE)
        fitting = [slot for slot in self._slots[config] if slot.seconds * (1 + bubbles) <= left_s]
        cell_s = (left_s - bubbles * min(slot.seconds for slot in fitting)) / self._num_cells
        if bubbles:
            fitting.sort(key=lambda slot: slot.seconds)
        chunks: list[tuple[int, int, float, int, float, bool]] = []
        ends = []
        smaller: dict[int, tuple[int, float]] = {}
        for slot in fitting:
            room_s = left_s - bubbles * slot.seconds
            if slot.is_remainder and bubbles:
                rows, seconds = smaller.get(slot.bucket, (0, 0.0))
                if slot.seconds - seconds < STEEP * (slot.rows - rows) * slot.seconds / slot.rows:
                    rows, seconds = 0, 0.0
                smaller[slot.bucket] = (slot.rows, slot.seconds)
                chunks.append((slot.bucket, slot.rows - rows, slot.seconds - seconds, slot.rows, slot.seconds, True))
            else:
                chunks += [
                    (slot.bucket, n * slot.rows, n * slot.seconds, n * slot.rows, n * slot.seconds, slot.is_remainder)
                    for n in _chunk_sizes(slot, room_s)
                ]
            ends.append((len(chunks), int(room_s / cell_s)))
        if not bubbles:
            ends = ends[-1:]
        bucket, rows, seconds, slot_rows, slot_s, is_remainder = (np.array(c) for c in zip(*chunks, strict=True))
        return _Programme(
            chunks=_Chunks(
                bucket=bucket,
                rows=rows,
                seconds=seconds,
                slot_rows=slot_rows,
                slot_s=slot_s,
                is_remainder=is_remainder,
                joined=is_remainder & (bubbles == 0),
                cells=np.floor(seconds / cell_s + self._round_up).astype(np.int64),
            ),
            ends_at=np.array([end[0] for end in ends]),
            ends_cells=np.array([end[1] for end in ends]),
        )

    def _traced(
        self, chunks: _Chunks, kept: np.ndarray, table: np.ndarray, follows: np.ndarray, steps: int, cells: int
    ) -> np.ndarray:
        """Rows [J] of the slots behind table[steps, cells]."""
        rows = np.zeros(len(self.problem.counts), dtype=np.int64)
        step = steps
        while step > 0:
            chunk = kept[step - 1]
            if table[step, cells] == table[step - 1, cells]:
                step -= 1
                continue
            rows[chunks.bucket[chunk]] += chunks.rows[chunk]
            cells -= int(chunks.cells[chunk])
            step -= 1
            while step > 0 and follows[step]:
                step -= 1
        return rows


def _chunk_sizes(slot: Slot, room_s: float) -> list[int]:
    """1, 2, 4, ... and a rest that add up to as many of a slot as there may be in `room_s`."""
    out = []
    left = min(slot.most, int(room_s / slot.seconds))
    while left > 0:
        out.append(min(2 ** len(out), left))
        left -= out[-1]
    return out
