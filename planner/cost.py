"""The cost table (`costs.json`: measured seconds and bytes) and the cost model fitted to it.

Micro-batch time follows LobRA, appendix D: for a config c, rows b and padded length s,

    t_c(b, s) = (c1 b + c2) s^2 + (c3 b + c4) s + c5 b + c6      [seconds, the slowest stage's slot]

and a replica that runs micro-batches m_1..m_n in one step takes

    T_c = fixed_s + sum_i t_c(m_i) + (pp - 1) max_i t_c(m_i)     (0 if it has none)

A packed micro-batch of b rows of s tokens, whose sequences' lengths have the sum of squares q, takes, where it was
measured (`PackedCost`),

    t_c(b, s, q) = p1 b s^2 + p2 q + p3 b s + p4

p1 where attention goes over whole rows and masks (no flash kernel), p2 where it goes over each sequence alone.

`step_overhead_s` (gradient sum over replicas, update, new adapters out) is paid once a step by all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import UserError
from planner.files import write_json
from planner.plan import MIXED, ParallelConfig, ReplicaGroup, first_that_holds

COST_TABLE_VERSION = 1
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

    `packed`: the same of packed micro-batches, None where they were not measured.
    """

    config: ParallelConfig
    capacity_tokens: int
    coefficients: tuple[float, ...]
    fixed_s: float = 0.0
    points: tuple[CostPoint, ...] = ()
    fit_error: FitError | None = None
    packed: PackedCost | None = None

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
        c1, c2, c3, c4, c5, c6 = self.coefficients
        return (c1 * rows + c2) * length * length + (c3 * rows + c4) * length + c5 * rows + c6

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Everything the planner knows about a model on a kind of device. `model` is checked against the run's model."""

    model: str
    model_fingerprint: str
    hardware: Mapping[str, Any]
    configs: tuple[ConfigCost, ...]
    step_overhead_s: float = 0.0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.configs:
            raise ValueError("configs is empty, expected at least one parallel config")
        if not 0 <= self.step_overhead_s < math.inf:
            raise ValueError(f"step_overhead_s = {self.step_overhead_s}, expected seconds >= 0")
        seen: set[ParallelConfig] = set()
        for cost in self.configs:
            if cost.config in seen:
                raise ValueError(f"configs names {cost.config} twice")
            seen.add(cost.config)

    def __getitem__(self, config: ParallelConfig) -> ConfigCost:
        """The costs of a config; of one with several policies, made of those of each."""
        for cost in self.configs:
            if cost.config == config:
                return cost
        if len(config.remats) == 1:
            raise KeyError(str(config))
        return mixed([self[config.with_remat(remat)] for remat in config.remats])

    def of(self, group: ReplicaGroup) -> ConfigCost:
        """The costs of a plan's replicas, at the plan's capacities, on which their policies depend."""
        return self[group.config].holding(group.capacities)

    @property
    def quantization(self) -> str:
        """How the base was stored when this was measured; tables that do not say are of one not quantised."""
        return str(self.provenance.get("quantization", "none"))

    @property
    def max_capacity_tokens(self) -> int:
        return max(cost.capacity_tokens for cost in self.configs)

    @property
    def estimate_note(self) -> str | None:
        """One line for who uses a table that was estimated; None for a measured one."""
        if "estimated" not in self.provenance:
            return None
        device = self.provenance["estimated"]["device"]
        return f"costs are estimated for {device}, not measured: times and capacities may be off"

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": COST_TABLE_VERSION,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "hardware": dict(self.hardware),
            "provenance": dict(self.provenance),
            "step_overhead_s": self.step_overhead_s,
            "configs": [_config_to_dict(cost) for cost in self.configs],
        }

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, file: object = None) -> CostTable:
        """Reads the format of `to_dict`; keys that it does not have are let be."""
        if not isinstance(raw, Mapping):
            raise UserError("not a mapping", file=file, value=raw, expected="a cost table of `lobra profile`")
        try:
            if raw["version"] != COST_TABLE_VERSION:
                raise UserError(
                    "unsupported cost table version",
                    file=file,
                    key="version",
                    value=raw["version"],
                    expected=str(COST_TABLE_VERSION),
                )
            return cls(
                model=raw["model"],
                model_fingerprint=raw["model_fingerprint"],
                hardware=raw["hardware"],
                provenance=raw.get("provenance", {}),
                step_overhead_s=float(raw["step_overhead_s"]),
                configs=tuple(_config_from_dict(item) for item in raw["configs"]),
            )
        except KeyError as error:
            raise UserError(f"missing key {error}", file=file, expected="a cost table of `lobra profile`") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"bad cost table: {error}", file=file, expected="a cost table of `lobra profile`"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot read the cost table: {error.strerror}", file=path, expected="a costs.json of `lobra profile`"
            ) from error
        except ValueError as error:
            raise UserError(f"not JSON: {error}", file=path, expected="a costs.json of `lobra profile`") from error
        return cls.from_dict(raw, file=path)


def _check_numbers(name: str, capacity_tokens: object, coefficients: Sequence[float]) -> None:
    if not isinstance(capacity_tokens, numbers.Integral) or capacity_tokens < 1:
        raise ValueError(f"{name}: capacity_tokens = {capacity_tokens!r}, expected an integer >= 1")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"{name}: coefficients = {list(coefficients)}, expected finite numbers")


def _config_to_dict(cost: ConfigCost) -> dict[str, Any]:
    packed = {} if cost.packed is None else {"packed": dataclasses.asdict(cost.packed)}
    return {
        **dataclasses.asdict(cost.config),
        "capacity_tokens": cost.capacity_tokens,
        "fixed_s": cost.fixed_s,
        "coefficients": list(cost.coefficients),
        "fit_error": None if cost.fit_error is None else dataclasses.asdict(cost.fit_error),
        "points": [dataclasses.asdict(point) for point in cost.points],
        **packed,
    }


def _config_from_dict(raw: Mapping[str, Any]) -> ConfigCost:
    error, config = raw.get("fit_error"), ParallelConfig(tp=raw["tp"], pp=raw["pp"], remat=raw["remat"])
    if len(config.remats) > 1:
        raise ValueError(f"remat = {config.remat!r}: expected one policy, mixtures are made of them")
    return ConfigCost(
        config=config,
        capacity_tokens=raw["capacity_tokens"],
        fixed_s=float(raw["fixed_s"]),
        coefficients=tuple(float(c) for c in raw["coefficients"]),
        fit_error=None if error is None else FitError(**error),
        points=tuple(CostPoint(**point) for point in raw.get("points", ())),
        packed=None if raw.get("packed") is None else _packed_from_dict(raw["packed"]),
    )


def _packed_from_dict(raw: Mapping[str, Any]) -> PackedCost:
    return PackedCost(
        capacity_tokens=raw["capacity_tokens"],
        coefficients=tuple(float(c) for c in raw["coefficients"]),
        points=tuple(PackedPoint(**point) for point in raw.get("points", ())),
    )
