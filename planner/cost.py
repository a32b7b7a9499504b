"""The cost table, `costs.json`: measured seconds and bytes, and the cost model fitted to them (`planner.config_cost`).

`step_overhead_s` (gradient sum over replicas, update, new adapters out) is paid once a step by all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.config_cost import (
    NUM_COEFFICIENTS,
    NUM_PACKED_COEFFICIENTS,
    ConfigCost,
    CostPoint,
    FitError,
    PackedCost,
    PackedPoint,
    ShapeTime,
    mixed,
)
from planner.files import write_json
from planner.plan import REMATS, ParallelConfig, ReplicaGroup
from planner.reading import MISSING, Value, load_json

COST_TABLE_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Everything the planner knows about a model on a kind of device. `model` is checked against the run's model.

    `file` is where it was read, for messages.
    """

    model: str
    model_fingerprint: str
    hardware: Mapping[str, Any]
    configs: tuple[ConfigCost, ...]
    step_overhead_s: float = 0.0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str | None = dataclasses.field(default=None, compare=False, repr=False)

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

    @property
    def is_timed(self) -> bool:
        """Whether micro-batches of a plan were timed."""
        return any(cost.timed for cost in self.configs)

    def fitted(self) -> CostTable:
        """The same without them: what is fitted is as wrong of any plan, timed micro-batches are one plan's."""
        if not self.is_timed:
            return self
        configs = tuple(dataclasses.replace(cost, timed=()) for cost in self.configs)
        return dataclasses.replace(self, configs=configs)

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
        but = ", but for the micro-batches of a plan" if self.is_timed else ""
        return f"costs are estimated for {device}, not measured{but}: times and capacities may be off"

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
        """Reads the format of `to_dict`; keys that it does not have are let be, but for slips of the pen."""
        return cls._read(Value(raw=raw, file=file))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        return cls._read(load_json(path, "the cost table", EXPECTED_FILE))

    @classmethod
    def _read(cls, table: Value) -> CostTable:
        table.mapping(EXPECTED_FILE)
        version = table.field("version")
        if version.integer() != COST_TABLE_VERSION:
            raise version.refused(str(COST_TABLE_VERSION), "unsupported cost table version")
        table.no_slips(TABLE_KEYS)
        configs = table.field("configs").items("a list of parallel configs")
        provenance = {} if table.field("provenance").raw is MISSING else table.field("provenance").mapping()
        if "estimated" in provenance:
            table.field("provenance").field("estimated").field("device").text()
        with table.checked():
            return cls(
                model=table.field("model").text(),
                model_fingerprint=table.field("model_fingerprint").text(),
                hardware=table.field("hardware").mapping(),
                provenance=provenance,
                step_overhead_s=table.field("step_overhead_s").seconds(),
                configs=tuple(_read_config(item) for item in configs),
                file=None if table.file is None else str(table.file),
            )


def _config_to_dict(cost: ConfigCost) -> dict[str, Any]:
    packed = {} if cost.packed is None else {"packed": dataclasses.asdict(cost.packed)}
    timed = {"timed": [dataclasses.asdict(time) for time in cost.timed]} if cost.timed else {}
    return {
        **dataclasses.asdict(cost.config),
        "capacity_tokens": cost.capacity_tokens,
        "fixed_s": cost.fixed_s,
        "coefficients": list(cost.coefficients),
        "fit_error": None if cost.fit_error is None else dataclasses.asdict(cost.fit_error),
        "points": [dataclasses.asdict(point) for point in cost.points],
        **packed,
        **timed,
    }


def _read_config(item: Value) -> ConfigCost:
    item.no_slips(CONFIG_KEYS)
    with item.checked():
        config = ParallelConfig(
            tp=item.field("tp").integer(least=1),
            pp=item.field("pp").integer(least=1),
            remat=item.field("remat").text(f"one of {', '.join(REMATS)}"),
        )
    place, item = item, item.called(config)
    if len(config.remats) > 1:
        raise item.field("remat").refused("one policy, mixtures are made of them")
    error, points, packed, timed = map(item.given, ("fit_error", "points", "packed", "timed"))
    with place.checked():
        return ConfigCost(
            config=config,
            capacity_tokens=item.field("capacity_tokens").integer(least=1),
            fixed_s=item.field("fixed_s").seconds(),
            coefficients=_read_coefficients(item, NUM_COEFFICIENTS),
            fit_error=None if error is None else _read_fit_error(error),
            points=() if points is None else tuple(map(_read_point, points.items("a list of points"))),
            packed=None if packed is None else _read_packed(packed),
            timed=() if timed is None else tuple(map(_read_time, timed.items("a list of timed shapes"))),
        )


def _read_coefficients(item: Value, number: int) -> tuple[float, ...]:
    given = item.field("coefficients")
    values = given.items(f"a list of {number} numbers")
    if len(values) != number:
        raise given.refused(f"{number} numbers", f"{len(values)} coefficients")
    return tuple(value.number() for value in values)


def _read_fit_error(item: Value) -> FitError:
    item.only(FIT_ERROR_KEYS)
    return FitError(
        mean=item.field("mean").number(),
        max=item.field("max").number(),
        num_held_out=item.field("num_held_out").integer(least=0),
    )


def _read_point(item: Value) -> CostPoint:
    item.only(POINT_KEYS)
    held_out = item.given("held_out")
    return CostPoint(
        rows=item.field("rows").integer(least=1),
        length=item.field("length").integer(least=1),
        seconds=item.field("seconds").seconds(),
        peak_bytes=item.field("peak_bytes").integer(least=0),
        held_out=held_out is not None and held_out.flag(),
    )


def _read_time(item: Value) -> ShapeTime:
    item.only(TIME_KEYS)
    rows, length = (item.field(name).integer(least=1) for name in ("rows", "length"))
    seconds = item.field("seconds")
    if seconds.seconds() == 0:
        raise seconds.refused("seconds > 0")
    return ShapeTime(rows=rows, length=length, seconds=seconds.seconds())


def _read_packed(item: Value) -> PackedCost:
    item.no_slips(PACKED_KEYS)
    points = item.given("points")
    return PackedCost(
        capacity_tokens=item.field("capacity_tokens").integer(least=1),
        coefficients=_read_coefficients(item, NUM_PACKED_COEFFICIENTS),
        points=() if points is None else tuple(map(_read_packed_point, points.items("a list of points"))),
    )


def _read_packed_point(item: Value) -> PackedPoint:
    item.only(PACKED_POINT_KEYS)
    return PackedPoint(
        rows=item.field("rows").integer(least=1),
        length=item.field("length").integer(least=1),
        squares=item.field("squares").integer(least=0),
        seconds=item.field("seconds").seconds(),
        peak_bytes=item.field("peak_bytes").integer(least=0),
    )


def _keys(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))


EXPECTED_FILE = "a costs.json of `lobra profile`"
TABLE_KEYS = _keys(CostTable) - {"file"} | {"version"}
CONFIG_KEYS = _keys(ConfigCost) - {"config"} | _keys(ParallelConfig)
FIT_ERROR_KEYS, POINT_KEYS, TIME_KEYS = _keys(FitError), _keys(CostPoint), _keys(ShapeTime)
PACKED_KEYS, PACKED_POINT_KEYS = _keys(PackedCost), _keys(PackedPoint)
