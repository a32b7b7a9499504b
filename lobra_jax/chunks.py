"""How finely a micro-batch is cut along its length where work on all of its tokens at once would take too much room."""

from __future__ import annotations


def num_chunks(rows: int, length: int, max_tokens: int) -> int:
    """The fewest equal chunks along the length of at most `max_tokens` tokens each (at least one position)."""
    wanted = max(1, -(-rows * length // max_tokens))
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)
