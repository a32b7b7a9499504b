"""Pictures of a trace's summary: where each device's time went, and each stage's, by kernel class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lobra_jax.report.run import timeline_of
from lobra_jax.report.style import IDLE, figure, plain
from lobra_jax.report.timeline_chart import timeline_figure
from profiling.trace.kernel_classes import (
    ATTENTION,
    CLASSES,
    COLLECTIVE,
    CONTROL,
    COPY,
    ELEMENTWISE,
    MATMUL,
    OTHER,
    REDUCTION,
    TRANSFER,
)

COLOURS = {
    MATMUL: "#2563a8",
    ATTENTION: "#7b4fa3",
    ELEMENTWISE: "#d97706",
    REDUCTION: "#e8b44c",
    COPY: "#b4232a",
    OTHER: "#8a94a3",
    COLLECTIVE: "#2f8f6b",
    TRANSFER: "#7cc4a4",
    CONTROL: "#c3cad4",
}
HEIGHT_AROUND, HEIGHT_A_BAR = 1.5, 0.34
"""Inches."""

MIN_SHARE = 0.002
MS = 1e3


def write_pictures(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """devices.png, phases.png, and timeline.png where the trace has a run's step; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"devices": devices_figure(summary), "phases": phases_figure(summary)}
    if summary["timeline"] is not None:
        figures["timeline"] = step_figure(summary)
    paths = []
    for name, drawn in figures.items():
        paths.append(folder / f"{name}.png")
        drawn.savefig(paths[-1])
    return paths


def step_figure(summary: Mapping[str, Any]) -> Figure:
    """The last traced step: what every stage did, measured beside predicted."""
    return timeline_figure(timeline_of(summary["timeline"]))


def devices_figure(summary: Mapping[str, Any]) -> Figure:
    """A bar for each device: a step's milliseconds by class, and idle."""
    per = MS / len(summary["steps"])
    labels = [f"device {row['device']}{_place(row)}" for row in summary["devices"]]
    rows = [row["classes"] for row in summary["devices"]]
    idle = [row["idle_s"] * per for row in summary["devices"]]
    return _bars(labels, rows, per, idle, "milliseconds of a step")


def phases_figure(summary: Mapping[str, Any]) -> Figure:
    """A bar for each stage and phase: a step's milliseconds by class, means over the stage's devices.

    Phases of less than `MIN_SHARE` of a step are left to the table.
    """
    per_step = MS / len(summary["steps"])
    labels, rows = [], []
    for stage in summary["stages"]:
        for phase, own in stage["phases"].items():
            if sum(own.values()) < MIN_SHARE * summary["window_s"] * stage["num_devices"]:
                continue
            labels.append(f"{phase}{_place(stage)}")
            rows.append({name: seconds / stage["num_devices"] for name, seconds in own.items()})
    return _bars(labels, rows, per_step, None, "milliseconds of a step, on each of the stage's devices")


def _bars(
    labels: Sequence[str], rows: Sequence[Mapping[str, float]], per: float, idle: Sequence[float] | None, unit: str
) -> Figure:
    fig = figure(HEIGHT_AROUND + HEIGHT_A_BAR * len(labels))
    axes: Axes = fig.add_subplot()
    places = range(len(labels))
    left = [0.0] * len(labels)
    for name in CLASSES:
        widths = [row.get(name, 0.0) * per for row in rows]
        if any(widths):
            axes.barh(places, widths, left=left, color=COLOURS[name], height=0.72, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    if idle is not None:
        axes.barh(places, idle, left=left, color=IDLE, edgecolor="#c3cad4", height=0.72, label="idle")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    plain(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    fig.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return fig


def _place(row: Mapping[str, Any]) -> str:
    return "" if row["replica"] is None else f", replica {row['replica']} {row['config']} stage {row['stage']}"
