"""Chooses padded lengths: for a plan (its lattice) and for one step (some of the lattice's lengths).

Both minimise padded tokens by one dynamic programme. Over candidate lengths s_1 < ... < s_n, with C_j the number of
sequences no longer than s_j, the least padded total of sequences up to s_j in k buckets, the last being s_j, is

    P(1, j) = s_j C_j        P(k, j) = min over i < j of P(k - 1, i) + s_j (C_j - C_i)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.errors import UserError
from planner.workload import Workload

STATIC_7 = (256, 512, 1024, 2048, 4096, 8192, 16384)
STATIC_16 = (
    256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 12288, 16384,
)  # fmt: skip
PRESETS = {"static7": STATIC_7, "static16": STATIC_16}

DEFAULT_ALIGN = 16
"""Padded lengths are multiples of this many tokens."""


def choose_buckets(lengths: np.ndarray, candidates: Sequence[int], max_buckets: int) -> tuple[int, ...]:
    """At most `max_buckets` of the ascending `candidates` that pad `lengths` [n] least; the largest covers them all.

    Raises `UserError` for a length over the largest candidate.
    """
    if max_buckets < 1:
        raise UserError("bad value", key="max_buckets", value=max_buckets, expected="an integer >= 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        return ()
    options = np.asarray(candidates, dtype=np.int64)
    if lengths.max() > options[-1]:
        raise UserError(
            f"a sequence of {int(lengths.max())} tokens is longer than the plan's largest bucket",
            expected=f"at most {int(options[-1])} tokens",
        )
    counts = np.bincount(np.searchsorted(options, lengths), minlength=len(options))
    used = counts > 0
    return _least_padding(options[used], counts[used].astype(np.float64), max_buckets)


def least_padding_buckets(lengths: np.ndarray, max_buckets: int, align: int = DEFAULT_ALIGN) -> tuple[int, ...]:
    """At most `max_buckets` multiples of `align` that pad `lengths` [n], n >= 1, least: LobRA's dynamic buckets."""
    aligned = -(-np.asarray(lengths, dtype=np.int64) // align) * align
    options, counts = np.unique(aligned, return_counts=True)
    return _least_padding(options, counts.astype(np.float64), max_buckets)


def planning_buckets(workload: Workload, num_buckets: int, align: int = DEFAULT_ALIGN) -> tuple[int, ...]:
    """At most `num_buckets` lengths, multiples of `align`, that pad the expected batch least; covers `max_length`.

    A length listed with share 0 weighs nothing, but the last bucket covers it.
    """
    if num_buckets < 1:
        raise UserError("bad value", key="num_buckets", value=num_buckets, expected="an integer >= 1")
    longest = workload.max_length
    counts = {length: count for length, count in workload.expected_counts().items() if count > 0 or length == longest}
    aligned = -(-np.fromiter(counts, dtype=np.int64) // align) * align
    options, where = np.unique(aligned, return_inverse=True)
    weights = np.bincount(where, weights=np.fromiter(counts.values(), dtype=np.float64))
    return _least_padding(options, weights, num_buckets)


def bucket_lengths(
    workload: Workload, buckets: str | Sequence[int], *, num_buckets: int, max_capacity_tokens: int
) -> tuple[int, ...]:
    """The plan's padded lengths for `buckets`: "dynamic", a preset's name, or a list; none longer than needed.

    The last one is the first that covers `workload.max_length`, cut to `max_capacity_tokens` (which covers it too).
    Raises `UserError` for an unknown name, a bad list, or a list that is too short for the workload.
    """
    if buckets == "dynamic":
        lengths = planning_buckets(workload, num_buckets)
    elif isinstance(buckets, str):
        if buckets not in PRESETS:
            raise UserError(
                "bad value",
                key="buckets",
                value=buckets,
                expected=f"dynamic, {', '.join(PRESETS)} or a list of lengths",
            )
        lengths = PRESETS[buckets]
    else:
        lengths = tuple(buckets)
        if not lengths or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in lengths):
            raise UserError("bad value", key="buckets", value=list(lengths), expected="a list of integers >= 1")
        lengths = tuple(sorted(set(lengths)))
    if workload.max_length > lengths[-1]:
        raise UserError(
            f"sequences of {workload.max_length} tokens are longer than the largest bucket",
            key="buckets",
            value=lengths[-1],
            expected=f"a bucket of at least {workload.max_length}",
        )
    needed = lengths[: int(np.searchsorted(np.asarray(lengths), workload.max_length)) + 1]
    return tuple(sorted({min(length, max_capacity_tokens) for length in needed}))


def _least_padding(options: np.ndarray, weights: np.ndarray, max_buckets: int) -> tuple[int, ...]:
    """At most `max_buckets` of ascending `options` [n], the last included, that pad `weights` [n] sequences least.

    P(k - 1, i) - x C_i are lines in x = s_j of falling slope, so the least of them is on their lower envelope. Lines of
    i > j may be the least there, but never less than P(k - 1, j): the bucket that holds s_j may end at s_j.
    """
    num = len(options)
    if num <= max_buckets:
        return tuple(options.tolist())
    below = np.cumsum(weights)
    padded = options * below
    parents: list[np.ndarray] = []
    for _ in range(max_buckets - 1):
        envelope = _lower_hull(below.tolist(), padded.tolist())
        ends = np.diff(padded[envelope]) / np.diff(below[envelope])  # the x from which the next line is less
        parent = envelope[np.searchsorted(ends, options)]
        totals = padded[parent] + options * (below - below[parent])
        better = (parent < np.arange(num)) & (totals < padded)
        parents.append(np.where(better, parent, -1))
        padded = np.where(better, totals, padded)
    chosen = [num - 1]
    for parent in reversed(parents):
        previous = int(parent[chosen[-1]])
        if previous >= 0:
            chosen.append(previous)
    return tuple(options[sorted(chosen)].tolist())


def _lower_hull(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Indices of the points (x, y), x not falling, on the lower side of their convex hull; of equal x the lowest."""
    hull: list[int] = []
    for at, (right, height) in enumerate(zip(x, y, strict=True)):
        while hull and x[hull[-1]] == right and y[hull[-1]] >= height:
            hull.pop()
        if hull and x[hull[-1]] == right:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (right - x[b]) < (height - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(at)
    return np.array(hull)
