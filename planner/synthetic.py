"""Length distributions made from published statistics (mean, skewness, kurtosis) where the data itself is not at hand.

Three moments leave the spread open. Of all distributions on 1..context_length with the wanted mean, skewness and
kurtosis we take the one closest (least relative entropy) to a log-normal, over every spread. For a fixed spread that
is the log-normal q tilted by a quartic, p(x) ~ q(x) exp(l1 z + l2 z^2 + l3 z^3 + l4 z^4) with z = (x - mean) / std,
and l solves a smooth convex problem in four unknowns. A small quadratic penalty on l stands for moments that no
distribution below the context length has: it then comes as near as it can, the mean first and the kurtosis last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from planner.errors import UserError
from planner.lobra_files import LobraTask, csv_rows
from planner.workload import TaskLengths, Workload

COLUMNS = ("dataset", "mean_length", "skewness", "kurtosis", "context_length")
NUM_SAMPLES = 400_000
"""Lengths drawn for a task: enough for the six sequences in a hundred thousand that make XSum's kurtosis."""

KURTOSIS_TOLERANCE = 0.05
"""Relative error of a sample's kurtosis above which shorter limits than the context length are tried."""

SPREADS = tuple(np.geomspace(0.12, 3.5, 14).tolist())
"""Standard deviations tried, as multiples of the mean."""

PENALTIES = np.array([1e-8, 1e-8, 1e-7, 1e-5])
"""Penalty on each multiplier: how unwilling we are to miss mean, spread, skewness and kurtosis."""

SEARCH_POINTS = 384
NEWTON_STEPS = 100
NEWTON_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Published length statistics of a data set, tokens; `kurtosis` is excess kurtosis (0 for a normal)."""

    dataset: str
    mean: float
    skewness: float
    kurtosis: float
    context_length: int

    def __post_init__(self) -> None:
        who = f"data set {self.dataset!r}"
        if not 1 <= self.mean < self.context_length:
            raise ValueError(f"{who}: mean_length = {self.mean}, expected 1 to context_length = {self.context_length}")
        if self.kurtosis + 2 < self.skewness**2:
            raise ValueError(f"{who}: kurtosis = {self.kurtosis}, expected >= skewness^2 - 2 as for any distribution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation in tokens, skewness, excess kurtosis."""

    mean: float
    std: float
    skewness: float
    kurtosis: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """What a synthetic task was asked for and what its lengths have."""

    task: str
    wanted: DatasetStatistics
    moments: Moments


def read_statistics(path: str | Path) -> tuple[DatasetStatistics, ...]:
    """Reads a CSV with the columns dataset, mean_length, skewness, kurtosis, context_length (others are ignored)."""
    found = []
    for line, row in csv_rows(path, COLUMNS):
        try:
            found.append(
                DatasetStatistics(
                    dataset=row["dataset"],
                    mean=float(row["mean_length"]),
                    skewness=float(row["skewness"]),
                    kurtosis=float(row["kurtosis"]),
                    context_length=int(row["context_length"]),
                )
            )
        except ValueError as error:
            raise UserError(f"bad row: {error}", file=f"{path}:{line}", expected=",".join(COLUMNS)) from error
    if not found:
        raise UserError("no rows", file=path, expected=",".join(COLUMNS))
    return tuple(found)


def moments(lengths: Mapping[int, float]) -> Moments:
    """Moments of {length: share}."""
    values = np.fromiter(lengths.keys(), dtype=np.float64)
    shares = np.fromiter(lengths.values(), dtype=np.float64)
    mean = float(shares @ values)
    centred = values - mean
    std = float(np.sqrt(shares @ centred**2))
    if std == 0:
        return Moments(mean=mean, std=0.0, skewness=0.0, kurtosis=0.0)
    z = centred / std
    return Moments(mean=mean, std=std, skewness=float(shares @ z**3), kurtosis=float(shares @ z**4) - 3)


def synthetic_lengths(statistics: DatasetStatistics, *, seed: int, num_samples: int = NUM_SAMPLES) -> dict[int, float]:
    """{length: share} of `num_samples` lengths drawn from `density`.

    A tail too thin to be drawn loses its kurtosis; the limit of the lengths is then halved, which brings the tail in,
    until the sample has the kurtosis, and the nearest is returned.
    """
    offset = np.random.default_rng(seed).random()
    limit, best, best_error = statistics.context_length, {}, np.inf
    while limit > 2 * statistics.mean or not best:
        lengths = _drawn(statistics, limit, offset, num_samples)
        error = abs(moments(lengths).kurtosis - statistics.kurtosis) / max(abs(statistics.kurtosis), 1.0)
        if error < best_error:
            best, best_error = lengths, error
        if best_error <= KURTOSIS_TOLERANCE:
            break
        limit //= 2
    return best


def density(statistics: DatasetStatistics, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lengths 1..limit [n], by default up to the context length, and the share of each [n]."""
    limit = limit or statistics.context_length
    coarse = np.unique(np.geomspace(1, limit, SEARCH_POINTS).round()).astype(np.float64)
    widths = np.gradient(coarse)
    divergences = [_tilted(coarse, widths, statistics, spread)[1] for spread in SPREADS]
    support = np.arange(1, limit + 1)
    best = SPREADS[int(np.argmin(divergences))]
    shares, _ = _tilted(support.astype(np.float64), np.ones(len(support)), statistics, best)
    return support, shares


def synthetic_workload(
    tasks: Sequence[LobraTask], statistics: Sequence[DatasetStatistics], *, seed: int
) -> tuple[Workload, tuple[Reached, ...]]:
    """The workload of a trainer JSON's tasks from published statistics, and how near each task's lengths came."""
    made, reached = [], []
    for index, task in enumerate(tasks):
        wanted = dataclasses.replace(_statistics_of(task, statistics), context_length=task.context_length)
        lengths = synthetic_lengths(wanted, seed=int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
        made.append(TaskLengths(name=task.name, batch_size=task.batch_size, lengths=lengths))
        reached.append(Reached(task=task.name, wanted=wanted, moments=moments(lengths)))
    return Workload(tasks=tuple(made)), tuple(reached)


def _drawn(statistics: DatasetStatistics, limit: int, offset: float, num_samples: int) -> dict[int, float]:
    """One draw from each of `num_samples` equal slices of probability, which keeps the moments, far tail included."""
    support, shares = density(statistics, limit)
    cumulative = np.cumsum(shares)
    slices = (np.arange(num_samples) + offset) / num_samples
    drawn = support[np.searchsorted(cumulative / cumulative[-1], slices, side="right").clip(max=limit - 1)]
    values, counts = np.unique(drawn, return_counts=True)
    return {int(value): float(count) / num_samples for value, count in zip(values, counts, strict=True)}


def _statistics_of(task: LobraTask, statistics: Sequence[DatasetStatistics]) -> DatasetStatistics:
    """The row of the task's data set; names match without case and punctuation, or by being part of one name only."""
    wanted = _plain(task.dataset)
    found = [row for row in statistics if _plain(row.dataset) == wanted]
    found = found or [row for row in statistics if wanted in _plain(row.dataset) or _plain(row.dataset) in wanted]
    if len(found) != 1:
        raise UserError(
            f"{len(found)} rows of the statistics match the data set",
            key="dataset_name",
            value=task.dataset,
            expected="one of " + ", ".join(row.dataset for row in statistics),
        )
    return found[0]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _tilted(
    support: np.ndarray, widths: np.ndarray, statistics: DatasetStatistics, spread: float
) -> tuple[np.ndarray, float]:
    """The tilted log-normal on `support` [n] (each point standing for `widths` [n] lengths) and its divergence.

    Newton's method on  min over l  log sum q exp(l f) + 1/2 sum penalty l^2, whose gradient is E[f] + penalty l.
    """
    log_base = _log_normal(support, statistics.mean, spread) + np.log(widths)
    log_base -= _log_sum_exp(log_base)
    f = _moment_errors(support, statistics, spread)
    multipliers = np.zeros(len(PENALTIES))

    def objective(candidate: np.ndarray) -> float:
        return _log_sum_exp(log_base + candidate @ f) + 0.5 * float(PENALTIES @ candidate**2)

    def shares_of(candidate: np.ndarray) -> np.ndarray:
        log_shares = log_base + candidate @ f
        return np.exp(log_shares - _log_sum_exp(log_shares))

    value = objective(multipliers)
    for _ in range(NEWTON_STEPS):
        shares = shares_of(multipliers)
        expected = f @ shares
        gradient = expected + PENALTIES * multipliers
        hessian = (f * shares) @ f.T - np.outer(expected, expected) + np.diag(PENALTIES)
        step = np.linalg.solve(hessian, gradient)
        decrease = float(gradient @ step)
        if decrease < NEWTON_TOLERANCE:
            break
        size = 1.0
        while size > NEWTON_TOLERANCE and objective(multipliers - size * step) > value - 1e-4 * size * decrease:
            size /= 2
        if size <= NEWTON_TOLERANCE:
            break
        multipliers = multipliers - size * step
        value = objective(multipliers)
    return shares_of(multipliers), -value


def _log_sum_exp(x: np.ndarray) -> float:
    """SciPy's takes ten times as long for the few hundred points here, and is asked 40,000 times."""
    largest = float(x.max())
    return largest + float(np.log(np.exp(x - largest).sum()))


def _log_normal(support: np.ndarray, mean: float, spread: float) -> np.ndarray:
    variance = np.log1p(spread**2)
    return -np.log(support) - (np.log(support) - np.log(mean) + variance / 2) ** 2 / (2 * variance)


def _moment_errors(support: np.ndarray, statistics: DatasetStatistics, spread: float) -> np.ndarray:
    """Functions of the length [4, n] whose expectations are zero exactly when the four moments are as wanted."""
    z = (support - statistics.mean) / (spread * statistics.mean)
    skewness, fourth = statistics.skewness, statistics.kurtosis + 3
    return np.stack([z, z**2 - 1, (z**3 - skewness) / max(abs(skewness), 1.0), (z**4 - fourth) / max(fourth, 1.0)])
