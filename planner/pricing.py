"""Prices patterns: the most that one replica can be worth within a time, when a sequence of bucket j is worth pi_j.

A *pattern* of a config is what one replica runs in a step: numbers of slots (bucket j, rows o, seconds t) with

    (1)  fixed_s + sum t + (pp - 1) max t <= T
    (2)  at most N_j sequences of bucket j                  more than there are is of no use
    (3)  at most one slot of bucket j with less than the full rows

`Pricer.price` gives z_c(pi) for each config c, about the most that sum_j pi_j n_j can be over its patterns:

- First each config is bounded without whole slots: time goes to the buckets that pay best for it (a fractional
  knapsack), for every value of the largest slot where (pp - 1) max t matters. That bound is always proven.
- Configs whose bound is above what is asked for get a dynamic programme over time in equal cells. Steps are chunks of
  2^q like slots. With pp > 1 slots enter by increasing seconds, so one pass has an answer for every largest slot, but
  for (3); the best are looked at alone, with (3), until no other can be better. A `proven` pricer rounds each chunk's
  seconds down to cells, so that z_c is a bound; otherwise to the nearest cell, which is what patterns are found with.

A slot may also be paid for what it adds to cuts (`planner.cuts`): prices are then pi and after them those of the cuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from planner.cuts import Cut, SlotWorths
from planner.knapsack import best_rows, by_largest_slot, chunks_of, fractional_worth, replica_seconds
from planner.patterns import Lattice, Pattern, Slots
from planner.problem import ReplicaProblem

NUM_CELLS = 2048
"""Cells of time with which patterns are found: a chunk of slots is off by up to 1/4096 of T."""

NUM_COARSE_CELLS = 1024
"""Cells where it is only asked about where T lies."""

NUM_PROVEN_CELLS = 8192
"""Cells of a proven pricer: a chunk of slots is priced as if it were up to 1/8192 of T shorter."""

EDGE = 1e-9
"""Relative room given to every comparison of seconds, so that rounding never cuts a true pattern off."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Chunks:
    """Steps of the dynamic programme, arrays [I]: take slot number `slot` `times` times, for `cells` of time, or not.

    `seconds` are those of all its slots.
    """

    slot: np.ndarray
    times: np.ndarray
    cells: np.ndarray
    seconds: np.ndarray

    def __getitem__(self, which: np.ndarray) -> _Chunks:
        return _Chunks(
            slot=self.slot[which], times=self.times[which], cells=self.cells[which], seconds=self.seconds[which]
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Steps:
    """Chunks by bucket, arrays [I]: each serves `rows` of `bucket`. `group` is the bucket of remainders, of which one
    is taken at the most, and -1 for others."""

    chunks: _Chunks
    group: np.ndarray
    bucket: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Programme:
    """The steps for one config at one T, by increasing seconds of their slots.

    `ends_at` [E] and `ends_cells` [E]: for each largest slot, how many steps, and cells for slots.
    """

    chunks: _Chunks
    ends_at: np.ndarray
    ends_cells: np.ndarray
    _sorted: dict[int, _Steps] = dataclasses.field(default_factory=dict)

    def by_bucket(self, slots: Slots, end: int) -> _Steps:
        """The steps up to one largest slot by bucket, remainders last."""
        if end not in self._sorted:
            slot = self.chunks.slot[: self.ends_at[end]]
            order = np.lexsort((slots.is_remainder[slot], slots.bucket[slot]))
            chunks = self.chunks[order]
            bucket = slots.bucket[chunks.slot]
            self._sorted[end] = _Steps(
                chunks=chunks,
                group=np.where(slots.is_remainder[chunks.slot], bucket, -1),
                bucket=bucket,
                rows=chunks.times * slots.rows[chunks.slot],
            )
        return self._sorted[end]


class Pricer:
    """Prices the patterns of a problem's configs within `replica_s` seconds (step overhead excluded).

    `slots` are the `slots_of` each config, `lattices` the `lattice_of` each; a config without slots has no patterns.
    """

    def __init__(
        self,
        problem: ReplicaProblem,
        slots: Sequence[Slots],
        lattices: Sequence[Lattice],
        replica_s: float,
        *,
        num_cells: int | None = None,
        proven: bool = False,
        cuts: Sequence[Cut] = (),
    ) -> None:
        self.problem = problem
        self.replica_s = replica_s
        self.proven = proven
        self._num_cells = num_cells or (NUM_PROVEN_CELLS if proven else NUM_CELLS)
        self._round_up = 0.0 if proven else 0.5
        self._slots = slots
        self._lattices = lattices
        self._programmes: dict[int, _Programme] = {}
        self._cuts = list(cuts)
        self._slot_worths: SlotWorths | None = None
        self._classes(slots)

    def _classes(self, slots: Sequence[Slots]) -> None:
        """Fills the arrays of the fractional bound over classes (config, largest slot) q.

        `_class_config` [Q], `_class_end` [Q] position of the largest slot in its config's `order`, `_room` [Q] seconds
        for slots, `_rate` [Q, J] most sequences a second, `_all_s` [Q, J] seconds for all N_j.
        """
        num_buckets = len(self.problem.counts)
        configs, ends, rooms, per_row = [], [], [np.zeros(0)], [np.zeros((0, num_buckets))]
        for index, mine in enumerate(slots):
            bubbles = self.problem.configs[index].config.pp - 1
            left_s = self._left_s(index)
            seconds = mine.seconds[mine.order]
            fitting = int(np.searchsorted(seconds * (1 + bubbles), left_s, side="right"))
            if not fitting:
                continue
            largest = np.array([fitting - 1])
            if bubbles:
                largest = np.flatnonzero(np.append(seconds[1:fitting] > seconds[: fitting - 1], True))
            configs += [index] * len(largest)
            ends += largest.tolist()
            rooms.append(left_s - bubbles * seconds[largest])
            per_row.append(mine.per_row_s[largest])
        self._class_config, self._class_end = np.array(configs, dtype=np.int64), np.array(ends, dtype=np.int64)
        self._room = np.concatenate(rooms)
        per_row_s = np.concatenate(per_row)
        self._rate = 1 / per_row_s  # 0 where the bucket does not fit
        self._all_s = np.where(np.isfinite(per_row_s), per_row_s, 0.0) * np.array(self.problem.counts)

    def _left_s(self, config: int) -> float:
        return (self.replica_s - self.problem.configs[config].cost.fixed_s) * (1 + EDGE)

    def add(self, cuts: Sequence[Cut]) -> None:
        """Prices are of these cuts too from now on."""
        self._cuts += cuts
        if self._slot_worths is not None:
            self._slot_worths.add(cuts)

    @property
    def can_serve(self) -> np.ndarray:
        """[J] whether some replica can serve a sequence of each bucket within the time."""
        return (self._rate > 0).any(axis=0)

    def price(
        self, prices: np.ndarray, enough: np.ndarray, *, most: int | None = None
    ) -> tuple[np.ndarray, list[Pattern]]:
        """(z [C], patterns worth more than enough[c]).

        Args:
          prices: [J] pi >= 0, and after them those of cuts, of the first ones at least.
          enough: [C] where the worth is at most this, z may be this.
          most: run the dynamic programme for so many configs only, those whose bound promises most for a device.
        """
        num_buckets = len(self.problem.counts)
        worths = None
        if prices[num_buckets:].any():
            if self._slot_worths is None:
                self._slot_worths = SlotWorths(self._slots, num_buckets)
                self._slot_worths.add(self._cuts)
            worths = self._slot_worths.at(prices)
            ratio, all_s = self._slot_worths.seconds(worths, self._class_config, self._class_end)
        else:
            ratio, all_s = prices[:num_buckets] * self._rate, self._all_s
        bound, last = fractional_worth(ratio, all_s, self._room, EDGE)
        z = np.zeros(len(self.problem.configs))
        np.maximum.at(z, self._class_config, bound)
        found = []
        chosen = np.flatnonzero(z > enough)
        if most is not None and len(chosen) > most:
            promise = (z - enough)[chosen] / np.array([self.problem.configs[c].num_devices for c in chosen])
            chosen = chosen[np.argsort(-promise)[:most]]
        for config in chosen.tolist():
            mine = slice(*np.searchsorted(self._class_config, [config, config + 1]))
            slots = self._slots[config]
            own = prices[slots.bucket] * slots.rows if worths is None else worths[config, : len(slots)]
            worth, pattern = self._solve(config, own, bound[mine], last[mine], float(enough[config]))
            z[config] = min(z[config], max(worth, enough[config]))
            if pattern is not None:
                found.append(pattern)
        return z, found

    def _solve(
        self, config: int, slot_worth: np.ndarray, bound: np.ndarray, last: np.ndarray, enough: float
    ) -> tuple[float, Pattern | None]:
        """(a bound on every pattern's worth, or `enough`; the best pattern found if it is worth more than `enough`).

        `slot_worth` [S] is what each of the config's slots is worth; `bound` [E] and `last` [E] are what
        `fractional_worth` says of its classes. One pass over all classes lets a bucket have several remainders; those
        that it leaves above `enough` are looked at alone, best first, until the best is known.
        """
        programme = self._programmes.get(config)
        if programme is None:
            programme = self._programmes[config] = self._programme(config)
        relaxed = bound
        if np.count_nonzero(bound > enough) > 1:
            chunks = programme.chunks
            served = by_largest_slot(
                chunks.cells,
                chunks.times * slot_worth[chunks.slot],
                chunks.seconds,
                bound - enough,
                last,
                programme.ends_at,
                programme.ends_cells,
                self._num_cells + 1,
            )
            relaxed = np.minimum(served, bound)
        best, pattern = enough, None
        for end in np.argsort(-relaxed).tolist():
            if relaxed[end] <= best:
                break
            value, found = self._exact(config, programme, slot_worth, end, bound, last, best)
            if found is not None:
                best, pattern = value, found
        return best, pattern

    def _exact(
        self,
        config: int,
        programme: _Programme,
        slot_worth: np.ndarray,
        end: int,
        bound: np.ndarray,
        last: np.ndarray,
        enough: float,
    ) -> tuple[float, Pattern | None]:
        """The best pattern of one class: buckets one after the other, of the remainders of each at most one."""
        steps = programme.by_bucket(self._slots[config], end)
        best, rows = best_rows(
            steps.chunks.cells,
            steps.chunks.times * slot_worth[steps.chunks.slot],
            steps.chunks.seconds,
            steps.group,
            steps.bucket,
            steps.rows,
            bound[end] - enough,
            last[end],
            len(self.problem.counts),
            programme.ends_cells[end],
            enough,
        )
        if best <= enough:
            return enough, None
        lattice, usable = self._lattices[config], self.problem.configs[config]
        seconds = replica_seconds(
            rows, lattice.options, lattice.slot_s, usable.cost.fixed_s, float(usable.config.pp - 1)
        )
        return best, Pattern(config=config, rows=rows, seconds=seconds)

    def _programme(self, config: int) -> _Programme:
        bubbles = self.problem.configs[config].config.pp - 1
        left_s, slots = self._left_s(config), self._slots[config]
        order = slots.order[: int(self._class_end[self._class_config == config].max()) + 1]
        cell_s = (left_s - bubbles * float(slots.seconds[order[0]])) / self._num_cells
        rooms = left_s - bubbles * slots.seconds[order]
        fitting = np.minimum(slots.most[order], (rooms / slots.seconds[order]).astype(np.int64))
        slot, times = chunks_of(order, fitting)
        ends = self._class_end[self._class_config == config]
        seconds = times * slots.seconds[slot]
        position = np.empty(len(slots), dtype=np.int64)
        position[slots.order] = np.arange(len(slots))
        return _Programme(
            chunks=_Chunks(
                slot=slot,
                times=times,
                cells=np.floor(seconds / cell_s + self._round_up).astype(np.int64),
                seconds=seconds,
            ),
            ends_at=np.searchsorted(position[slot], ends, side="right"),
            ends_cells=((rooms[ends] if bubbles else np.array([left_s])) / cell_s).astype(np.int64),
        )
