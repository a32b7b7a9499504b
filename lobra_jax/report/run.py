"""Reads what a report needs from a run directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobra_jax.metrics import read_metrics
from lobra_jax.run_folder import METRICS_FILE, PLAN_FILE, TIMELINE_FILE
from planner.errors import UserError
from planner.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """One micro-batch's forward or backward on one stage; seconds count from the step's start."""

    micro_batch: int
    phase: str
    start_s: float
    end_s: float
    rows: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaTimeline:
    """One replica's step: what each stage did, measured and predicted."""

    name: str
    measured: tuple[tuple[Action, ...], ...]
    predicted: tuple[tuple[Action, ...], ...]
    predicted_s: float

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, padded length) of each micro-batch."""
        seen = {action.micro_batch: (action.rows, action.length) for action in self.measured[0]}
        return tuple(seen[index] for index in sorted(seen))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step of all replicas."""

    step: int
    step_s: float
    sum_update_s: float
    replicas: tuple[ReplicaTimeline, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Padded lengths that occur, ascending."""
        return tuple(sorted({length for replica in self.replicas for _, length in replica.shapes}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory's plan, records by kind in the order written, and recorded step (None before the first)."""

    folder: Path
    plan: Plan
    steps: tuple[Mapping[str, Any], ...]
    tasks: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    timeline: Timeline | None

    @property
    def task_names(self) -> tuple[str, ...]:
        """Tasks that have a record, in the order they first appear."""
        return tuple(dict.fromkeys(record["task"] for record in (*self.evals, *self.tasks)))


def load_run(folder: str | Path) -> Run:
    """Raises UserError when the folder is no run directory, has no step yet, or a file in it is damaged."""
    folder = Path(folder)
    plan = Plan.load(folder / PLAN_FILE)
    by_kind: dict[str, list[Mapping[str, Any]]] = {"step": [], "task": [], "eval": [], "event": []}
    for record in read_metrics(folder / METRICS_FILE):
        by_kind.setdefault(record["kind"], []).append(record)
    if not by_kind["step"]:
        raise UserError("no step is recorded", file=folder / METRICS_FILE, expected="a run that finished a step")
    path = folder / TIMELINE_FILE
    return Run(
        folder=folder,
        plan=plan,
        steps=tuple(by_kind["step"]),
        tasks=tuple(by_kind["task"]),
        evals=tuple(by_kind["eval"]),
        events=tuple(by_kind["event"]),
        timeline=_load_timeline(path) if path.exists() else None,
    )


def timeline_of(raw: Mapping[str, Any]) -> Timeline:
    """From the JSON object that `lobra_jax.timeline` makes."""
    return Timeline(
        step=raw["step"],
        step_s=raw["step_s"],
        sum_update_s=raw["sum_update_s"],
        replicas=tuple(_replica(item) for item in raw["replicas"]),
    )


def _load_timeline(path: Path) -> Timeline:
    try:
        return timeline_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"bad timeline: {error!r}", file=path, expected="the timeline of `lobra train`") from error


def _replica(raw: Mapping[str, Any]) -> ReplicaTimeline:
    measured, predicted = (
        tuple(tuple(Action(**action) for action in stage) for stage in stages)
        for stages in (raw["stages"], raw["predicted_stages"])
    )
    return ReplicaTimeline(name=raw["name"], measured=measured, predicted=predicted, predicted_s=raw["predicted_s"])
