"""Lays sequences into packed rows, within the limits (1) to (3) of `planner.packing`: tokens, tasks and segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from planner.packing import MAX_TASKS_OF_A_ROW, max_segments


class _Rows:
    """What rows have left while sequences are laid into them.

    Attributes:
      free, segments, slots: [R] tokens, segments, and slots for tasks beside those that each `holds`.
      holds: [T, R] whether a row has a slot of a task.
      need: [R] tokens left to each segment left.
      spare: slots left beside one for each task that has none yet.
    """

    def __init__(self, lengths: Sequence[int], num_tasks: int) -> None:
        self.free = np.array(lengths, dtype=np.int64)
        self.segments = np.array([max_segments(length) - 1 for length in lengths], dtype=np.int64)
        self.slots = np.full(len(lengths), MAX_TASKS_OF_A_ROW, dtype=np.int64)
        self.holds = np.zeros((num_tasks, len(lengths)), dtype=bool)
        self.need = self.free / self.segments
        self.spare = int(self.slots.sum()) - num_tasks

    def room(self, length: int) -> np.ndarray:
        """[R] bool: which have room for a sequence, were it of a task that they hold."""
        return (self.free >= length) & (self.segments > 0)

    def put(self, row: int, length: int, task: int) -> None:
        if not self.holds[task, row]:
            self.spare -= bool(self.holds[task].any())
            self.holds[task, row] = True
            self.slots[row] -= 1
        self.free[row] -= length
        self.segments[row] -= 1
        self.need[row] = self.free[row] / max(self.segments[row], 1)


Choice = Callable[[_Rows, int, int], int | None]
"""(what rows have left, a sequence's length, its task) -> its row, None where there is none."""


def fit(lengths: np.ndarray, task_ids: np.ndarray, row_lengths: Sequence[int]) -> list[int] | None:
    """The row of each sequence; None where they do not fit. First-fit, and where that finds no room, evenly.

    Args:
      lengths, task_ids: [n], longest first.
      row_lengths: tokens of each row; earlier ones are filled first.
    """
    if int(np.sum(lengths)) > sum(row_lengths):
        return None
    names, tasks = np.unique(task_ids, return_inverse=True)

    def laid(choose: Choice) -> list[int] | None:
        rows, placed = _Rows(row_lengths, len(names)), []
        for length, task in zip(lengths.tolist(), tasks.tolist(), strict=True):
            row = choose(rows, length, task)
            if row is None:
                return None
            rows.put(row, length, task)
            placed.append(row)
        return placed

    placed = laid(_first)
    return laid(_evenly) if placed is None else placed


def _first(rows: _Rows, length: int, task: int) -> int | None:
    """The first row with room that holds the task already, else the first with room."""
    room = rows.room(length)
    own = room & rows.holds[task]
    row = int(own.argmax())
    if own[row]:
        return row
    room &= rows.slots > 0
    row = int(room.argmax())
    return row if room[row] else None


def _evenly(rows: _Rows, length: int, task: int) -> int | None:
    """The row which has most tokens left to each segment left.

    Every row gets long ones and short ones, where first-fit leaves the shortest to the last rows, which have no room
    for so many. A task takes a slot of one more row only while there are slots left for the tasks that have none.
    """
    able = rows.holds[task]
    if rows.spare > 0 or not able.any():
        able = able | (rows.slots > 0)
    able = able & rows.room(length)
    row = int(np.where(able, rows.need, -1.0).argmax())
    return row if able[row] else None
