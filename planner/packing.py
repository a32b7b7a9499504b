"""Packed rows: what one may hold, and how sequences are laid into them.

The limits are compiled into a packed program: (1) the sequences of a row, one after another, fit its length; (2) they
are of at most `max_tasks` tasks; (3) there are fewer than `max_segments` of them, what is left of the row being one.
"""

from __future__ import annotations

MAX_TASKS_OF_A_ROW = 4
"""A row pays for the low-rank work of so many tasks whether it has them or not."""

TOKENS_A_SEGMENT = 32
"""A row has room for one segment to so many tokens: shorter sequences are rare, and an empty segment costs a little."""

MIN_SEGMENTS = 8
"""Room in the shortest rows."""


def max_tasks(num_tasks: int) -> int:
    """Tasks that a packed row may hold, of a run's `num_tasks`."""
    return min(num_tasks, MAX_TASKS_OF_A_ROW)


def max_segments(length: int) -> int:
    """Segments of a packed row of `length` tokens, the unused rest of the row counted as one."""
    return max(length // TOKENS_A_SEGMENT, MIN_SEGMENTS)
