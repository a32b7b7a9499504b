"""From measured configs to the cost table, each saved when it is kept, so that an interrupted profile can go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.errors import UserError
from planner.files import write_json
from planner.plan import ParallelConfig

PARTIAL_SUFFIX = ".partial"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What is known so far: costs by config, and why the others were left out."""

    measured: Mapping[ParallelConfig, ConfigCost]
    dropped: Mapping[ParallelConfig, str]

    def __contains__(self, config: ParallelConfig) -> bool:
        return config in self.measured or config in self.dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Everything of a cost table but its configs; two profiles with equal headers may share measurements."""

    model: str
    model_fingerprint: str
    hardware: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def table(self, configs: Sequence[ConfigCost], step_overhead_s: float = 0.0) -> CostTable:
        return CostTable(**_fields(self), configs=tuple(configs), step_overhead_s=step_overhead_s)


def _fields(header: Header) -> dict[str, Any]:
    return {field.name: getattr(header, field.name) for field in dataclasses.fields(header)}


def partial_path(out: Path) -> Path:
    return out.with_name(out.name + PARTIAL_SUFFIX)


def save_partial(path: Path, header: Header, progress: Progress) -> None:
    """Replaces the file as a whole, so that an interruption leaves the old one."""
    table = header.table(list(progress.measured.values())).to_dict() if progress.measured else None
    dropped = [{**dataclasses.asdict(config), "reason": reason} for config, reason in progress.dropped.items()]
    write_json(path, {"header": _fields(header), "table": table, "dropped": dropped})


def load_partial(path: Path, header: Header) -> tuple[Progress, list[str]]:
    """What an interrupted profile of the same set-up left, and the header's keys in which it differs, if any.

    A profile of another set-up counts for nothing. Raises `UserError` for a file that is no partial profile.
    """
    nothing = Progress(measured={}, dropped={})
    if not path.exists():
        return nothing, []
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        differing = differing_keys(raw["header"], json.loads(json.dumps(_fields(header))))
        if differing:
            return nothing, differing
        measured = CostTable.from_dict(raw["table"], file=path).configs if raw["table"] else ()
        dropped = {ParallelConfig(tp=d["tp"], pp=d["pp"], remat=d["remat"]): d["reason"] for d in raw["dropped"]}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        expected = "what an interrupted `lobra profile` left; or delete it"
        raise UserError("cannot go on from this file", file=path, expected=expected) from error
    return Progress(measured={cost.config: cost for cost in measured}, dropped=dropped), []


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    keys = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


Keep = Callable[[ParallelConfig, ConfigCost | str], None]
"""Takes a config's costs, or the reason why it cannot hold a micro-batch."""


def measure_all(
    rounds: Sequence[Sequence[ParallelConfig]],
    measure: Callable[[Sequence[ParallelConfig], Keep], None],
    *,
    partial: Path,
    header: Header,
    progress: Progress,
    on_config: Keep,
) -> Progress:
    """Measures round by round; what `measure` keeps of a round's configs is saved to `partial` and told `on_config`."""

    def keep(config: ParallelConfig, outcome: ConfigCost | str) -> None:
        nonlocal progress
        if isinstance(outcome, str):
            progress = dataclasses.replace(progress, dropped={**progress.dropped, config: outcome})
        else:
            progress = dataclasses.replace(progress, measured={**progress.measured, config: outcome})
        save_partial(partial, header, progress)
        on_config(config, outcome)

    for configs in rounds:
        measure(configs, keep)
    return progress
