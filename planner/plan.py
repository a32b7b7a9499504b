"""What a plan is: parallel configs, groups of like replicas, and the plan file.

`plan.yaml` is written and read here and nowhere else.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from planner.errors import UserError
from planner.files import write_whole
from planner.lattice import DEFAULT_ROW_OPTIONS, MAX_ROW_OPTIONS, row_options
from planner.reading import MISSING, Value
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
      file: where it was read, for messages.
    """

    model: str
    num_devices: int
    replicas: tuple[ReplicaGroup, ...]
    buckets: tuple[int, ...]
    row_options: int = DEFAULT_ROW_OPTIONS
    predicted: Prediction | None = None
    planner: str = "manual"
    file: str | None = dataclasses.field(default=None, compare=False, repr=False)

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
        plan = Value(raw=raw, file=file)
        plan.only({field.name for field in dataclasses.fields(cls)} - {"file"} | {"version"})
        version = plan.field("version")
        if version.raw != PLAN_VERSION:
            raise version.refused(str(PLAN_VERSION), "unsupported plan version")
        groups = tuple(_read_group(item) for item in plan.field("replicas").items("a list of replicas"))
        predicted, planner, row_options = (plan.given(name) for name in ("predicted", "planner", "row_options"))
        with plan.checked():
            return cls(
                model=plan.field("model").text(),
                num_devices=plan.field("num_devices").integer(least=1),
                replicas=groups,
                buckets=tuple(item.integer() for item in plan.field("buckets").items("a list of integers")),
                row_options=DEFAULT_ROW_OPTIONS if row_options is None else row_options.integer(),
                predicted=None if predicted is None else _read_prediction(predicted),
                planner="manual" if planner is None else planner.text(),
                file=None if file is None else str(file),
            )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the plan: {error.strerror}", file=path, expected="a plan.yaml") from error
        except UnicodeDecodeError as error:
            raise UserError("not UTF-8 text", file=path, expected="a plan.yaml") from error
        return cls.from_dict(parse_yaml(text, file=path, expected="a plan.yaml"), file=path)


def _read_group(item: Value) -> ReplicaGroup:
    item.only({"count", "tp", "pp", "remat", "capacity_tokens"})
    count, tokens = item.field("count"), item.field("capacity_tokens")
    with item.checked():
        return ReplicaGroup(
            count=1 if count.raw is MISSING else count.integer(least=1),
            config=ParallelConfig(
                tp=item.field("tp").integer(least=1),
                pp=item.field("pp").integer(least=1),
                remat=item.field("remat").text(f"one of {', '.join(REMATS)}"),
            ),
            **_read_capacities(tokens),
        )


def _read_capacities(tokens: Value) -> dict[str, Any]:
    """A number, or a list of one for each policy."""
    if not isinstance(tokens.raw, list):
        return {"capacity_tokens": tokens.integer(least=1)}
    given = [one.integer(least=1) for one in tokens.items()]
    if not given:
        raise tokens.refused("an integer, or a list of them")
    return {"capacity_tokens": given[-1], "smaller_capacities": tuple(given[:-1])}


def _read_prediction(item: Value) -> Prediction:
    item.only({field.name for field in dataclasses.fields(Prediction)})
    status, num_nodes = item.given("status"), item.given("num_nodes")
    return Prediction(
        **{name: item.field(name).number() for name in ("step_s", "bound_s", "gap", "gpu_seconds", "solve_s")},
        status=None if status is None else status.text(),
        num_nodes=None if num_nodes is None else num_nodes.integer(),
    )
