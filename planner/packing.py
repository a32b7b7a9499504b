"""Packed rows: what one may hold, and how sequences are laid into them.

The limits are compiled into a packed program: (1) the sequences of a row, one after another, fit its length; (2) they
are of at most `max_tasks` tasks; (3) there are fewer than `max_segments` of them, what is left of the row being one.
"""

from __future__ import annotations

from planner.lattice import DEFAULT_ROW_OPTIONS

MAX_TASKS_OF_A_ROW = 4
"""A row pays for the low-rank work of so many tasks whether it has them or not."""

TOKENS_A_SEGMENT = 32
"""A row has room for one segment to so many tokens: shorter sequences are rare."""

MIN_SEGMENTS, MAX_SEGMENTS = 8, 32
"""Room in the shortest and in the longest rows. cuDNN's flash kernel takes the more working memory the more
segments there is room for: with room for 256 in each of two rows of 8,192 tokens, 8 layers of a 7B model asked for 80
GiB of an H100 (profiling/results/h100_tries.json)."""


def max_tasks(num_tasks: int) -> int:
    """Tasks that a packed row may hold, of a run's `num_tasks`."""
    return min(num_tasks, MAX_TASKS_OF_A_ROW)


def max_segments(length: int) -> int:
    """Segments of a packed row of `length` tokens, the unused rest of the row counted as one."""
    return min(max(length // TOKENS_A_SEGMENT, MIN_SEGMENTS), MAX_SEGMENTS)


ROW_ALIGN = 16
"""Rows are multiples of so many tokens, except where the longest sequence asks for others."""


def packed_shapes(
    capacity_tokens: int, longest: int, *, num_options: int = DEFAULT_ROW_OPTIONS
) -> tuple[tuple[int, int], ...]:
    """(rows, length) of the packed programs of a replica, largest first: all its capacity, half of it, a quarter ...

    Rows are as short as they can be and still take a sequence of `longest` <= `capacity_tokens` tokens, as attention
    over a whole row costs more in longer ones; shapes of less than that are one row.
    """
    if not 1 <= longest <= capacity_tokens:
        raise ValueError(f"packed_shapes: longest = {longest}, expected 1 to capacity_tokens = {capacity_tokens}")
    shapes: list[tuple[int, int]] = []
    tokens = capacity_tokens
    for _ in range(num_options):
        rows = max(tokens // longest, 1)
        length = max(longest, tokens // rows // ROW_ALIGN * ROW_ALIGN)
        if tokens < longest:
            length = min(-(-tokens // ROW_ALIGN) * ROW_ALIGN, longest)
        shapes.append((rows, length))
        tokens = -(-tokens // 2)
    return tuple(dict.fromkeys(shapes))
