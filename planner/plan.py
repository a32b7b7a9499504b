"""What a plan is: parallel configs, groups of like replicas, and the plan file.

`plan.yaml` is written and read here and nowhere else.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from planner.errors import UserError
from planner.files import write_whole
from planner.lattice import DEFAULT_ROW_OPTIONS, MAX_ROW_OPTIONS, row_options
from planner.yaml_text import parse_yaml

REMATS = ("none", "dots", "attention", "full")
"""Rematerialisation policies, from most memory to least."""

MIXED = "+"
"""What joins the policies of a replica that has several."""

PLAN_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class ParallelConfig:
    """How one replica is sharded: tensor parallel over `tp` devices, `pp` pipeline stages, remat policy.

    A replica without a pipeline may have several policies, "dots+attention", from most memory to least: every padded
    length is run with the first that holds it (`ReplicaGroup.remat_of`).
    """

    tp: int
    pp: int
    remat: str

    def __post_init__(self) -> None:
        for name in ("tp", "pp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ParallelConfig.{name} = {value!r}: expected an integer >= 1")
        if self.remats != tuple(remat for remat in REMATS if remat in self.remats):
            expected = f"one of {', '.join(REMATS)}, or some of them in this order joined by {MIXED}"
            raise ValueError(f"ParallelConfig.remat = {self.remat!r}: expected {expected}")
        if len(self.remats) > 1 and self.pp > 1:
            raise ValueError(
                f"ParallelConfig.remat = {self.remat!r} with pp = {self.pp}: expected one policy, as micro-batches "
                "share the memory of a pipeline"
            )

    @property
    def remats(self) -> tuple[str, ...]:
        """Its policies, one or several."""
        return tuple(self.remat.split(MIXED))

    def with_remat(self, remat: str) -> ParallelConfig:
        return dataclasses.replace(self, remat=remat)

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"(tp{self.tp},pp{self.pp},{self.remat})"


def first_that_holds(capacities: Sequence[int], length: int) -> int:
    """The number of the first of ascending capacities that holds a padded length, else of the last."""
    return min(bisect.bisect_left(capacities, length), len(capacities) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaGroup:
    """`count` replicas of one parallel config; each micro-batch holds at most `capacity_tokens` padded tokens.

    Where the config has several policies, that is what the last one holds, and `smaller_capacities` what each of those
    before it does.
    """

    count: int
    config: ParallelConfig
    capacity_tokens: int
    smaller_capacities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("count", "capacity_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"ReplicaGroup.{name} = {value!r}: expected an integer >= 1")
        known = self.capacities
        if len(known) != len(self.config.remats) or list(known) != sorted(known) or known[0] < 1:
            raise ValueError(
                f"ReplicaGroup.capacity_tokens = {list(known)}: expected {len(self.config.remats)} ascending, one for "
                f"each policy of {self.config}"
            )

    @property
    def num_devices(self) -> int:
        return self.count * self.config.num_devices

    @property
    def capacities(self) -> tuple[int, ...]:
        """Of each of the config's policies."""
        return (*self.smaller_capacities, self.capacity_tokens)

    @property
    def tokens(self) -> str:
        """The capacities, to be read: 32/64."""
        return "/".join(map(str, self.capacities))

    def policy_of(self, length: int) -> int:
        """The number of the policy that runs a padded length: the first that holds it, else the last."""
        return first_that_holds(self.capacities, length)

    def remat_of(self, length: int) -> str:
        """The policy that runs micro-batches of a padded length."""
        return self.config.remats[self.policy_of(length)]

    def capacity_of(self, length: int) -> int:
        """The tokens that a micro-batch of a padded length may hold; 0 where no policy holds it."""
        capacity = self.capacities[self.policy_of(length)]
        return capacity if capacity >= length else 0

    def holding(self, *capacities: int) -> ReplicaGroup:
        """The same with these capacities, one for each policy."""
        return dataclasses.replace(self, capacity_tokens=capacities[-1], smaller_capacities=capacities[:-1])

    def shapes(self, buckets: Iterable[int], *, num_options: int) -> tuple[tuple[int, int], ...]:
        """All (rows, length) that one of these may be asked to run: what is compiled ahead of time."""
        return tuple(
            (rows, length)
            for length in buckets
            for rows in row_options(length, self.capacity_of(length), num_options=num_options)
        )

    def __str__(self) -> str:
        return f"{self.count}x{self.config}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expects of a plan; seconds a step, `gap` = (step_s - bound_s) / step_s.

    `status` is how the search ended and `num_nodes` how many branch-and-bound nodes and pricings it took; None in files
    that do not say.
    """

    step_s: float
    bound_s: float
    gap: float
    gpu_seconds: float
    solve_s: float
    status: str | None = None
    num_nodes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The multiset of replicas that a mesh is cut into, and the padded lengths that are compiled for it.

    Attributes:
      model: name of the model the plan was made for (the cost table's model name).
      num_devices: devices the plan may use; replicas may leave some idle.
      replicas: groups of like replicas.
      buckets: the shape lattice's padded lengths, ascending, tokens.
      row_options: row counts of the shape lattice for each bucket on a replica, see `planner.lattice`.
      predicted: the planner's expectation, absent for plans written by hand.
      planner: which planner made it ("exact", "minlp", "prune", "group", "manual").
    """

    model: str
    num_devices: int
    replicas: tuple[ReplicaGroup, ...]
    buckets: tuple[int, ...]
    row_options: int = DEFAULT_ROW_OPTIONS
    predicted: Prediction | None = None
    planner: str = "manual"

    def __post_init__(self) -> None:
        if not self.replicas:
            raise ValueError("Plan.replicas is empty: expected at least one replica")
        if self.used_devices > self.num_devices:
            raise ValueError(
                f"Plan.replicas use {self.used_devices} devices: expected at most num_devices = {self.num_devices}"
            )
        if not self.buckets or any(b < 1 for b in self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"Plan.buckets = {list(self.buckets)}: expected ascending positive lengths")
        if not 1 <= self.row_options <= MAX_ROW_OPTIONS:
            raise ValueError(f"Plan.row_options = {self.row_options}: expected 1 to {MAX_ROW_OPTIONS}")
        if self.buckets[-1] > self.max_capacity_tokens:
            raise ValueError(
                f"Plan.buckets: {self.buckets[-1]} exceeds every replica's capacity, at most {self.max_capacity_tokens}"
            )

    @property
    def used_devices(self) -> int:
        return sum(group.num_devices for group in self.replicas)

    @property
    def num_replicas(self) -> int:
        return sum(group.count for group in self.replicas)

    @property
    def max_capacity_tokens(self) -> int:
        return max(group.capacity_tokens for group in self.replicas)

    def expanded(self) -> Iterator[ReplicaGroup]:
        """One group of count 1 for each replica, in the order replicas are numbered everywhere."""
        for group in self.replicas:
            for _ in range(group.count):
                yield dataclasses.replace(group, count=1)

    def __str__(self) -> str:
        return " ".join(str(group) for group in self.replicas)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "version": PLAN_VERSION,
            "model": self.model,
            "planner": self.planner,
            "num_devices": self.num_devices,
            "replicas": [
                {
                    "count": g.count,
                    "tp": g.config.tp,
                    "pp": g.config.pp,
                    "remat": g.config.remat,
                    "capacity_tokens": list(g.capacities) if g.smaller_capacities else g.capacity_tokens,
                }
                for g in self.replicas
            ],
        }
        if self.predicted is not None:
            known = dataclasses.asdict(self.predicted)
            out["predicted"] = {name: value for name, value in known.items() if value is not None}
        out["buckets"] = list(self.buckets)
        out["row_options"] = self.row_options
        return out

    def save(self, path: str | Path) -> None:
        write_whole(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, file: object = None) -> Plan:
        """Reads the plan format of `to_dict`; a wrong or missing field raises `UserError` naming it."""
        raw = _require_mapping(raw, file, None)
        known = {"version", "model", "planner", "num_devices", "replicas", "predicted", "buckets", "row_options"}
        _reject_unknown(raw, known, file, None)
        if raw.get("version") != PLAN_VERSION:
            raise UserError(
                "unsupported plan version",
                file=file,
                key="version",
                value=raw.get("version"),
                expected=str(PLAN_VERSION),
            )
        groups = []
        replicas = _field(raw, "replicas", list, file, None)
        for index, item in enumerate(replicas):
            key = f"replicas[{index}]"
            item = _require_mapping(item, file, key)
            _reject_unknown(item, {"count", "tp", "pp", "remat", "capacity_tokens"}, file, key)
            try:
                groups.append(
                    ReplicaGroup(
                        count=item.get("count", 1),
                        config=ParallelConfig(
                            tp=_field(item, "tp", int, file, key),
                            pp=_field(item, "pp", int, file, key),
                            remat=_field(item, "remat", str, file, key),
                        ),
                        **_capacities(item, file, key),
                    )
                )
            except ValueError as error:
                raise UserError(str(error), file=file, key=key) from error
        predicted = None
        if raw.get("predicted") is not None:
            values = _require_mapping(raw["predicted"], file, "predicted")
            names = ("step_s", "bound_s", "gap", "gpu_seconds", "solve_s")
            _reject_unknown(values, {*names, "status", "num_nodes"}, file, "predicted")
            for name in names:
                number = values.get(name)
                if isinstance(number, bool) or not isinstance(number, int | float) or math.isnan(number):
                    raise UserError("bad value", file=file, key=f"predicted.{name}", value=number, expected="a number")
            predicted = Prediction(
                **{name: float(values[name]) for name in names},
                status=_optional(values, "status", str, file),
                num_nodes=_optional(values, "num_nodes", int, file),
            )
        buckets = _field(raw, "buckets", list, file, None)
        if not all(isinstance(b, int) and not isinstance(b, bool) for b in buckets):
            raise UserError("bad value", file=file, key="buckets", value=buckets, expected="a list of integers")
        row_options = DEFAULT_ROW_OPTIONS
        if "row_options" in raw:
            row_options = _field(raw, "row_options", int, file, None)
        try:
            return cls(
                model=_field(raw, "model", str, file, None),
                num_devices=_field(raw, "num_devices", int, file, None),
                replicas=tuple(groups),
                buckets=tuple(buckets),
                row_options=row_options,
                predicted=predicted,
                planner=raw.get("planner", "manual"),
            )
        except ValueError as error:
            raise UserError(str(error), file=file) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the plan: {error.strerror}", file=path, expected="a plan.yaml") from error
        except UnicodeDecodeError as error:
            raise UserError("not UTF-8 text", file=path, expected="a plan.yaml") from error
        return cls.from_dict(parse_yaml(text, file=path, expected="a plan.yaml"), file=path)


def _capacities(item: Mapping[str, Any], file: object, key: str) -> dict[str, Any]:
    """A number, or a list of one for each policy."""
    given = item.get("capacity_tokens")
    if not isinstance(given, list):
        return {"capacity_tokens": _field(item, "capacity_tokens", int, file, key)}
    if not given or not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        raise UserError(
            "bad value", file=file, key=f"{key}.capacity_tokens", value=given, expected="an integer, or a list of them"
        )
    return {"capacity_tokens": given[-1], "smaller_capacities": tuple(given[:-1])}


def _require_mapping(raw: Any, file: object, key: str | None) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError("bad value", file=file, key=key, value=raw, expected="a mapping")
    return raw


def _reject_unknown(raw: Mapping[str, Any], known: set[str], file: object, key: str | None) -> None:
    for name in raw:
        if name not in known:
            raise UserError(f"unknown key {name!r}", file=file, key=key, expected="one of " + ", ".join(sorted(known)))


def _optional(raw: Mapping[str, Any], name: str, kind: type, file: object) -> Any:
    return None if raw.get(name) is None else _field(raw, name, kind, file, "predicted")


def _field(raw: Mapping[str, Any], name: str, kind: type, file: object, key: str | None) -> Any:
    full = name if key is None else f"{key}.{name}"
    if name not in raw:
        raise UserError("missing", file=file, key=full, expected=f"a value of type {kind.__name__}")
    value = raw[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError("bad value", file=file, key=full, value=value, expected=f"a value of type {kind.__name__}")
    return value
