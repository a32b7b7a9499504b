"""The shape lattice: which (rows, length) micro-batches are compiled for a parallel config, and how rows fill them.

A config of capacity C tokens runs bucket s with b = C // s full rows, or with a few smaller row counts kept for the
remainder: by default (b, b/2, b/4), rounded up, without repeats. Fewer of them pad more and compile less.
"""

from __future__ import annotations

Shape = tuple[int, int]
"""Of a micro-batch: rows, and the tokens that each is padded to."""

DEFAULT_ROW_OPTIONS = 3
"""Row counts compiled for one bucket on one config: the full one and two halvings."""

MAX_ROW_OPTIONS = 4
"""A remainder that fills an eighth of the rows is rare; further halvings would only be compiled."""


def row_options(length: int, capacity_tokens: int, *, num_options: int = DEFAULT_ROW_OPTIONS) -> tuple[int, ...]:
    """Row counts compiled for padded `length` on a config of `capacity_tokens`, ascending; empty if it does not fit.

    The last is b = capacity_tokens // length, the others its halvings rounded up; at most `num_options` in all.
    """
    if length < 1:
        raise ValueError(f"row_options: length = {length}, expected >= 1")
    options: list[int] = []
    rows = capacity_tokens // length
    while rows >= 1 and len(options) < num_options:
        options.append(rows)
        if rows == 1:
            break
        rows = -(-rows // 2)
    return tuple(reversed(options))


def rows_for(num_sequences: int, options: tuple[int, ...]) -> int:
    """The smallest of the ascending `options` that holds `num_sequences` (1 <= num_sequences <= options[-1])."""
    for rows in options:
        if rows >= num_sequences:
            return rows
    raise ValueError(f"rows_for: {num_sequences} sequences exceed the largest row option of {options}")


def split_rows(num_sequences: int, options: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of the micro-batches that `num_sequences` of one bucket become: full ones, then the remainder's option."""
    num_full, remainder = divmod(num_sequences, options[-1])
    full = (options[-1],) * num_full
    return full if remainder == 0 else (*full, rows_for(remainder, options))
