"""What users ask of a plan beside being fast: which parallel configs, which replicas, how many unlike ones.

Replicas may always be idle in a step, and devices unused.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Sequence

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.plan import REMATS, ParallelConfig
from planner.workload import Workload

REPLICAS = re.compile(r"(?:([0-9]+)x)?\(tp([0-9]+),pp([0-9]+)(?:,([a-z+]+))?\)")
"""How plans print a group of replicas: 6x(tp1,pp1,none)."""

MOST_LISTED = 8
"""Configs that an error names one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a plan has to keep to; None (for `pinned`: nothing listed) allows all that the cost table holds.

    Attributes:
      max_tp, max_pp: most devices that share a layer, most pipeline stages.
      tps, pps, remats: the values that may be used.
      devices_per_host: a tensor-parallel group stays within a host of so many devices. A tp has to divide it, and of
        any two tps that may be used one has to divide the other (powers of two do). Groups laid out widest first, side
        by side, then never straddle a host, whatever their numbers, so devices are all that a plan needs to count;
        stages of a pipeline may be on unlike hosts.
      pinned: replicas that a plan must have, at the least, as plans print them: "1x(tp4,pp1,none)". Without a count it
        is one, without a policy "none".
      max_configs: most distinct configs in a plan.
      mix_remats: replicas without a pipeline may run each padded length with another policy (`planner.mix_remats`).
    """

    max_tp: int | None = None
    max_pp: int | None = None
    tps: tuple[int, ...] | None = None
    pps: tuple[int, ...] | None = None
    remats: tuple[str, ...] | None = None
    devices_per_host: int | None = None
    pinned: tuple[str, ...] = ()
    max_configs: int | None = None
    mix_remats: bool = False

    def __post_init__(self) -> None:
        for name in ("devices_per_host", "max_configs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError("bad value", key=name, value=value, expected="an integer >= 1")

    def allow(self, config: ParallelConfig) -> bool:
        return (
            (self.max_tp is None or config.tp <= self.max_tp)
            and (self.max_pp is None or config.pp <= self.max_pp)
            and (self.tps is None or config.tp in self.tps)
            and (self.pps is None or config.pp in self.pps)
            and (self.remats is None or set(config.remats) <= set(self.remats))
            and (self.devices_per_host is None or self.devices_per_host % config.tp == 0)
        )

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "mix_remats"]
        given = [(name, value if isinstance(value, tuple) else (value,)) for name, value in given if value is not None]
        return ", ".join(f"{name} = {' '.join(map(str, values))}" for name, values in given if values)


def allowed_configs(
    costs: CostTable, num_devices: int, constraints: Constraints, workload: Workload
) -> tuple[ConfigCost, ...]:
    """The cost table's configs that a plan may use.

    Raises:
      UserError: none is allowed; the longest length fits none, or only configs wider than the devices; tps that cannot
        be laid out on hosts.
    """
    allowed = [cost for cost in (*costs.configs, *_pinned_mixed(costs, constraints)) if constraints.allow(cost.config)]
    if not allowed:
        raise UserError(
            "the constraints allow no config of the cost table",
            key="planner",
            value=str(constraints),
            expected=f"at least one of {_choices(costs.configs)}",
        )
    max_length, key = workload.max_length, f"tasks.{workload.longest.name}"
    where = key if workload.file is None else f"{key} of {workload.file}"
    fitting = [cost for cost in allowed if cost.capacity_tokens >= max_length]
    if not fitting:
        largest = max(allowed, key=lambda cost: cost.capacity_tokens)
        asked = f" that the constraints ({constraints}) allow" if len(allowed) < len(costs.configs) else ""
        raise UserError(
            f"sequences of {max_length} tokens fit no config{asked}",
            file=workload.file,
            key=key,
            expected=f"lengths up to {largest.capacity_tokens} tokens, the capacity of {largest.config}",
        )
    narrowest = min(fitting, key=lambda cost: (cost.config.num_devices, -cost.capacity_tokens))
    missing = narrowest.config.num_devices - num_devices
    if missing > 0:
        raise UserError(
            f"sequences of {max_length} tokens need a replica {narrowest.config} of "
            f"{narrowest.config.num_devices} devices: {missing} missing for {where}",
            key="num_devices",
            value=num_devices,
            expected=f"at least {narrowest.config.num_devices}",
        )
    if constraints.devices_per_host is not None:
        _check_layout(allowed)
    return tuple(cost for cost in allowed if cost.config.num_devices <= num_devices)


def _pinned_mixed(costs: CostTable, constraints: Constraints) -> list[ConfigCost]:
    """Costs of pinned configs of several policies, where the table has those of each."""
    known = {cost.config for cost in costs.configs}
    asked = dict.fromkeys(parse_replicas(text)[1] for text in constraints.pinned)
    pinned = [config for config in asked if config not in known]
    parts = {config: {config.with_remat(remat) for remat in config.remats} for config in pinned}
    mixtures = [costs[config] for config in pinned if parts[config] <= known]
    for cost in mixtures:
        if list(cost.capacities) != sorted(set(cost.capacities)):
            raise UserError(
                f"its policies hold {', '.join(map(str, cost.capacities))} tokens",
                key="pinned",
                value=str(cost.config),
                expected="policies that each hold more than the one before",
            )
    return mixtures


def _choices(configs: Sequence[ConfigCost]) -> str:
    """The configs, or where there are many the values they have: errors are one line."""
    if len(configs) <= MOST_LISTED:
        return ", ".join(str(cost.config) for cost in configs)
    tps, pps = sorted({cost.config.tp for cost in configs}), sorted({cost.config.pp for cost in configs})
    remats = [remat for remat in REMATS if any(remat in cost.config.remats for cost in configs)]
    axes = (("tp", tps), ("pp", pps), ("remat", remats))
    return f"{len(configs)} configs with " + ", ".join(f"{name} {'|'.join(map(str, values))}" for name, values in axes)


def _check_layout(allowed: Sequence[ConfigCost]) -> None:
    for smaller, larger in itertools.pairwise(sorted({cost.config.tp for cost in allowed})):
        if larger % smaller:
            raise UserError(
                f"tp{smaller} and tp{larger} may not pack onto hosts: neither divides the other",
                key="devices_per_host",
                expected="also tps, a list of which each divides the next",
            )


def check_pins_hold(constraints: Constraints, too_small: Sequence[ConfigCost], shortest: int) -> None:
    """Raises `UserError` for a pin of a config that does not hold a sequence of the shortest padded length."""
    capacities = {cost.config: cost.capacity_tokens for cost in too_small}
    for text in constraints.pinned:
        _, config = parse_replicas(text)
        if config in capacities:
            raise UserError(
                f"holds {capacities[config]} tokens, less than the shortest padded length",
                key="pinned",
                value=text,
                expected=f"a config that holds at least {shortest} tokens",
            )


def pinned_counts(
    constraints: Constraints, configs: Sequence[ConfigCost], num_devices: int, max_length: int
) -> tuple[int, ...]:
    """For each config, the replicas pinned; () for none.

    Raises:
      UserError: a pin that cannot be read or is not among the configs; more devices pinned than there are, or too few
        left for a replica that fits the longest length; more distinct configs than allowed.
    """
    pins: Counter[ParallelConfig] = Counter()
    for text in constraints.pinned:
        count, config = parse_replicas(text)
        if config not in [cost.config for cost in configs]:
            raise UserError(
                "not a config that a plan may use", key="pinned", value=text, expected=f"one of {_choices(configs)}"
            )
        pins[config] += count
    counts = tuple(pins[cost.config] for cost in configs)
    left = num_devices - sum(n * cost.config.num_devices for n, cost in zip(counts, configs, strict=True))
    needed = 0
    if not any(n and cost.capacity_tokens >= max_length for n, cost in zip(counts, configs, strict=True)):
        needed = min(cost.config.num_devices for cost in configs if cost.capacity_tokens >= max_length)
    if left < needed:
        also = f" and {max_length} tokens need a replica of {needed}" if needed else ""
        raise UserError(
            f"the pinned replicas need {num_devices - left} devices{also}: {needed - left} missing",
            key="num_devices",
            value=num_devices,
            expected=f"at least {num_devices - left + needed}",
        )
    distinct = len(pins) + (needed > 0)
    if constraints.max_configs is not None and distinct > constraints.max_configs:
        raise UserError(
            f"the pinned replicas and the longest length, {max_length} tokens, need {distinct} distinct configs",
            key="max_configs",
            value=constraints.max_configs,
            expected=f"at least {distinct}",
        )
    return counts if pins else ()


def parse_replicas(text: str) -> tuple[int, ParallelConfig]:
    """(count, config) of a group of replicas as plans print it."""
    match = REPLICAS.fullmatch(text.replace(" ", ""))
    count, tp, pp, remat = match.groups() if match else (None, "0", "0", None)
    try:
        if count == "0":
            raise ValueError
        return int(count or 1), ParallelConfig(tp=int(tp), pp=int(pp), remat=remat or REMATS[0])
    except ValueError:
        expected = f"replicas as plans print them, such as 1x(tp4,pp1,none); policies are {', '.join(REMATS)}"
        raise UserError("bad value", key="pinned", value=text, expected=expected) from None
