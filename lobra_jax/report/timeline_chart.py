"""The picture of one step: replicas x stages x micro-batches, measured beside predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lobra_jax.report.run import Action, ReplicaTimeline, Timeline
from lobra_jax.report.style import IDLE, INK, MUTED, WIDTH_INCHES, bucket_colours, figure, lighter, plain

MEASURED_HEIGHT, PREDICTED_HEIGHT, STAGE_GAP, REPLICA_GAP = 0.62, 0.22, 0.12, 0.35
"""Heights of a stage's two bars and of the gaps, in rows."""

BACKWARD_WHITE = 0.45
"""Backward bars are the bucket's colour mixed with this share of white."""

CHARS_PER_INCH = 15.0
"""Of a bar's label, which is left out where it does not fit."""

AXES_WIDTH_SHARE = 0.78
SUM_UPDATE_COLOUR = "#c9b8d8"
PREDICTED_LOOK = {"hatch": "/////", "edgecolor": "white", "linewidth": 0}


def timeline_figure(timeline: Timeline) -> Figure:
    """Each stage has two bars: above what was measured, below what the cost model predicts."""
    rows = list(_rows(timeline.replicas))
    bottom = rows[-1][2] + MEASURED_HEIGHT + PREDICTED_HEIGHT
    fig = figure(1.9 + 0.5 * bottom)
    axes = fig.add_subplot()
    end_s = max(timeline.step_s, *(action.end_s for action in _actions(timeline)), 1e-9)
    colours = bucket_colours(timeline.lengths)
    for replica, stage, top in rows:
        _stage(axes, replica, stage, top, timeline, colours, end_s)
    _sum_update(axes, timeline, bottom)
    axes.set(xlim=(0, end_s * 1.01), ylim=(bottom + 0.15, -0.25), xlabel="seconds from the start of the step")
    axes.set_yticks([top + MEASURED_HEIGHT / 2 for _, _, top in rows], [_label(r, s) for r, s, _ in rows])
    axes.set_title(f"Step {timeline.step}: what every stage did", loc="left", fontsize=12, color=INK)
    plain(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    _legend(fig, colours)
    return fig


def _rows(replicas: Sequence[ReplicaTimeline]) -> Iterator[tuple[ReplicaTimeline, int, float]]:
    """(replica, stage, top of the stage's bars) from the top of the picture down."""
    top = 0.0
    for replica in replicas:
        for stage in range(len(replica.measured)):
            yield replica, stage, top
            top += MEASURED_HEIGHT + PREDICTED_HEIGHT + STAGE_GAP
        top += REPLICA_GAP


def _actions(timeline: Timeline) -> Iterator[Action]:
    for replica in timeline.replicas:
        for stage in (*replica.measured, *replica.predicted):
            yield from stage


def _label(replica: ReplicaTimeline, stage: int) -> str:
    return replica.name if len(replica.measured) == 1 else f"{replica.name}  stage {stage}"


def _stage(
    axes: Axes,
    replica: ReplicaTimeline,
    stage: int,
    top: float,
    timeline: Timeline,
    colours: dict[int, str],
    end_s: float,
) -> None:
    axes.add_patch(Rectangle((0, top), timeline.step_s, MEASURED_HEIGHT, facecolor=IDLE))
    inches_per_s = WIDTH_INCHES * AXES_WIDTH_SHARE / end_s
    for action in replica.measured[stage]:
        colour = colours[action.length]
        face = colour if action.phase == "forward" else lighter(colour, BACKWARD_WHITE)
        width = action.end_s - action.start_s
        axes.add_patch(
            Rectangle((action.start_s, top), width, MEASURED_HEIGHT, facecolor=face, edgecolor="white", linewidth=0.6)
        )
        label = f"{action.rows}×{action.length}"
        if action.phase == "backward" and width * inches_per_s * CHARS_PER_INCH >= len(label) + 1:
            middle = (action.start_s + width / 2, top + MEASURED_HEIGHT / 2)
            axes.text(*middle, label, ha="center", va="center", fontsize=7.5, color=INK)
    for action in replica.predicted[stage]:
        width = action.end_s - action.start_s
        face = lighter(colours[action.length], 0.0 if action.phase == "forward" else BACKWARD_WHITE)
        below = (action.start_s, top + MEASURED_HEIGHT)
        axes.add_patch(Rectangle(below, width, PREDICTED_HEIGHT, facecolor=face, **PREDICTED_LOOK))


def _sum_update(axes: Axes, timeline: Timeline, bottom: float) -> None:
    start = timeline.step_s - timeline.sum_update_s
    axes.add_patch(
        Rectangle(
            (start, -0.1), timeline.sum_update_s, bottom + 0.1, facecolor=SUM_UPDATE_COLOUR, alpha=0.5, zorder=1.2
        )
    )


def _legend(fig: Figure, colours: dict[int, str]) -> None:
    handles = [Patch(facecolor=colour, label=f"bucket {length}") for length, colour in colours.items()]
    handles += [
        Patch(facecolor=MUTED, label="forward"),
        Patch(facecolor=lighter(MUTED, BACKWARD_WHITE), label="backward"),
        Patch(facecolor=lighter(MUTED, 0.3), **PREDICTED_LOOK, label="predicted (thin bar below)"),
        Patch(facecolor=IDLE, label="idle"),
        Patch(facecolor=SUM_UPDATE_COLOUR, alpha=0.5, label="gradient sum and update"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8.5, frameon=False)
