"""What a set of sequence lengths looks like in numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from planner.synthetic import moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthStatistics:
    """Of lengths in tokens; `kurtosis` is excess kurtosis (0 for a normal distribution)."""

    count: int
    total: int
    mean: float
    max: int
    skewness: float
    kurtosis: float
    p50: float
    p95: float


def length_statistics(lengths: np.ndarray) -> LengthStatistics:
    """Statistics of at least one length."""
    values, counts = np.unique(lengths, return_counts=True)
    shape = moments({int(v): float(c) / len(lengths) for v, c in zip(values, counts, strict=True)})
    return LengthStatistics(
        count=len(lengths),
        total=int(np.sum(lengths)),
        mean=float(np.mean(lengths)),
        max=int(values[-1]),
        skewness=shape.skewness,
        kurtosis=shape.kurtosis,
        p50=float(np.percentile(lengths, 50)),
        p95=float(np.percentile(lengths, 95)),
    )
