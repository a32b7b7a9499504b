"""The cost model: what a parallel config's micro-batches and replicas take, in seconds.

Micro-batch time follows LobRA, appendix D: for a config c, rows b and padded length s,

    t_c(b, s) = (c1 b + c2) s^2 + (c3 b + c4) s + c5 b + c6      [seconds, the slowest stage's slot]

unless micro-batches of that very (b, s) were timed (`ConfigCost.timed`), and a replica that runs micro-batches
m_1..m_n in one step takes

    T_c = fixed_s + sum_i t_c(m_i) + (pp - 1) max_i t_c(m_i)     (0 if it has none)

A packed micro-batch of b rows of s tokens, whose sequences' lengths have the sum of squares q, takes, where it was
measured (`PackedCost`),

    t_c(b, s, q) = p1 b s^2 + p2 q + p3 b s + p4

p1 where attention goes over whole rows and masks (no flash kernel), p2 where it goes over each sequence alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Sequence

from planner.plan import MIXED, ParallelConfig, first_that_holds

NUM_COEFFICIENTS = 6
NUM_PACKED_COEFFICIENTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostPoint:
    """One measured shape: `rows` sequences padded to `length` tokens; `held_out` points are not fitted."""

    rows: int
    length: int
    seconds: float
    peak_bytes: int
    held_out: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeTime:
    """Seconds that micro-batches of `rows` x `length` tokens were measured to occupy the slowest stage."""

    rows: int
    length: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitError:
    """Relative error |predicted - measured| / measured over the held-out points."""

    mean: float
    max: float
    num_held_out: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedPoint:
    """One measured packed shape: `rows` of `length` tokens, `squares` the sum of its sequences' squared lengths."""

    rows: int
    length: int
    squares: int
    seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCost:
    """What is known of packed micro-batches on one config: capacity in tokens, coefficients, the points behind them."""

    capacity_tokens: int
    coefficients: tuple[float, ...]
    points: tuple[PackedPoint, ...] = ()

    def __post_init__(self) -> None:
        if len(self.coefficients) != NUM_PACKED_COEFFICIENTS:
            raise ValueError(f"packed: {len(self.coefficients)} coefficients, expected {NUM_PACKED_COEFFICIENTS}")
        _check_numbers("packed", self.capacity_tokens, self.coefficients)

    def micro_batch_s(self, rows: int, length: int, squares: float) -> float:
        """Seconds that one packed micro-batch occupies the slowest stage."""
        p1, p2, p3, p4 = self.coefficients
        return p1 * rows * length * length + p2 * squares + p3 * rows * length + p4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigCost:
    """What is known of one parallel config: capacity in tokens, fitted coefficients, the points behind them.

    `packed`: the same of packed micro-batches, None where they were not measured. `timed`: micro-batches of a plan,
    which take what they were measured to, whatever is fitted.
    """

    config: ParallelConfig
    capacity_tokens: int
    coefficients: tuple[float, ...]
    fixed_s: float = 0.0
    points: tuple[CostPoint, ...] = ()
    fit_error: FitError | None = None
    packed: PackedCost | None = None
    timed: tuple[ShapeTime, ...] = ()

    def __post_init__(self) -> None:
        if len(self.coefficients) != NUM_COEFFICIENTS:
            raise ValueError(f"{self.config}: {len(self.coefficients)} coefficients, expected {NUM_COEFFICIENTS}")
        _check_numbers(f"{self.config}", self.capacity_tokens, self.coefficients)
        if not 0 <= self.fixed_s < math.inf:
            raise ValueError(f"{self.config}: fixed_s = {self.fixed_s}, expected seconds >= 0")

    @property
    def capacities(self) -> tuple[int, ...]:
        """Tokens of a micro-batch that each of the config's policies holds."""
        return (self.capacity_tokens,)

    def of_length(self, length: int) -> ConfigCost:
        """What is known of the policy that runs micro-batches of a padded length: see `MixedCost`."""
        return self

    def holding(self, capacities: Sequence[int]) -> ConfigCost:
        """The same with these capacities, one for each policy."""
        return dataclasses.replace(self, capacity_tokens=capacities[-1])

    def micro_batch_s(self, rows: int, length: int) -> float:
        """Seconds that one micro-batch of `rows` x `length` tokens occupies the slowest stage."""
        measured = self._measured_s.get((rows, length))
        if measured is not None:
            return measured
        c1, c2, c3, c4, c5, c6 = self.coefficients
        return (c1 * rows + c2) * length * length + (c3 * rows + c4) * length + c5 * rows + c6

    @functools.cached_property
    def _measured_s(self) -> dict[tuple[int, int], float]:
        return {(time.rows, time.length): time.seconds for time in self.timed}

    def replica_s(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Seconds of one step on a replica that runs micro-batches of these (rows, length); 0 without any."""
        return self.slots_s([self.micro_batch_s(rows, length) for rows, length in shapes])

    def slots_s(self, slots: Sequence[float]) -> float:
        """Seconds of one step on a replica whose micro-batches take these seconds each; 0 without any."""
        if not slots:
            return 0.0
        return self.fixed_s + sum(slots) + (self.config.pp - 1) * max(slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedCost(ConfigCost):
    """A config of several policies, made by `mixed`; a length is run with the first of `parts` that holds it.

    What it shares with other configs' costs is of the last part, `fixed_s` the largest of all.
    """

    parts: tuple[ConfigCost, ...]

    @property
    def capacities(self) -> tuple[int, ...]:
        return tuple(part.capacity_tokens for part in self.parts)

    def of_length(self, length: int) -> ConfigCost:
        return self.parts[first_that_holds(self.capacities, length)]

    def holding(self, capacities: Sequence[int]) -> ConfigCost:
        return mixed([part.holding([one]) for part, one in zip(self.parts, capacities, strict=True)])

    def micro_batch_s(self, rows: int, length: int) -> float:
        return self.of_length(length).micro_batch_s(rows, length)


def mixed(parts: Sequence[ConfigCost]) -> ConfigCost:
    """The costs of a config with the policies of all `parts`, which have the same tp and no pipeline.

    Padded micro-batches only.
    """
    last = parts[-1]
    return MixedCost(
        config=last.config.with_remat(MIXED.join(part.config.remat for part in parts)),
        capacity_tokens=last.capacity_tokens,
        coefficients=last.coefficients,
        fixed_s=max(part.fixed_s for part in parts),
        parts=tuple(parts),
    )


def _check_numbers(name: str, capacity_tokens: object, coefficients: Sequence[float]) -> None:
    if isinstance(capacity_tokens, bool) or not isinstance(capacity_tokens, numbers.Integral) or capacity_tokens < 1:
        raise ValueError(f"{name}: capacity_tokens = {capacity_tokens!r}, expected an integer >= 1")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"{name}: coefficients = {list(coefficients)}, expected finite numbers")
