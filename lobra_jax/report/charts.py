"""The pictures made from a run's records: losses, dispatch, padding and idling, step times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from lobra_jax.report.run import Run, Timeline
from lobra_jax.report.style import EVAL, INK, MEASURED, MUTED, PREDICTED, TRAIN, bucket_colours, figure, plain

MAX_COLUMNS = 4
MIN_LABEL_SHARE = 0.06
"""A part of a bar narrower than this share of the longest bar goes without its number."""


def loss_figure(run: Run) -> Figure:
    """One small chart a task: training loss of each step, held-out loss where it was measured."""
    names = run.task_names
    columns = min(MAX_COLUMNS, len(names))
    num_rows = math.ceil(len(names) / columns)
    fig = figure(0.9 + 2.3 * num_rows)
    grid = fig.subplots(num_rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _task_losses(axes, run, name)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats a token)", fontsize=9, color=INK)
    fig.legend(
        *grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False
    )
    return fig


def _task_losses(axes: Axes, run: Run, name: str) -> None:
    trained = _finite([r for r in run.tasks if r["task"] == name], "task_step", "loss")
    held_out = _finite([r for r in run.evals if r["task"] == name], "task_step", "loss")
    axes.plot(*trained, color=TRAIN, linewidth=1.6, label="training")
    axes.plot(*held_out, color=EVAL, linewidth=1.4, marker="o", markersize=4, label="held out")
    title = name
    if len(held_out[1]) > 1:
        title += f"  {held_out[1][-1] / held_out[1][0] - 1:+.0%}"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlabel("task step", fontsize=9, color=INK)
    plain(axes)


def _finite(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the records; a loss that was not finite is recorded as null and left out."""
    kept = [record for record in records if record[y] is not None]
    return [record[x] for record in kept], [record[y] for record in kept]


def dispatch_figure(timeline: Timeline) -> Figure:
    """Rows and padded tokens of each replica in one step, by bucket."""
    names = [replica.name for replica in timeline.replicas]
    fig = figure(1.7 + 0.38 * len(names))
    rows_axes, tokens_axes = fig.subplots(1, 2, sharey=True)
    colours = bucket_colours(timeline.lengths)
    amounts = {"rows": rows_axes, "padded tokens": tokens_axes}
    for (label, axes), of in zip(amounts.items(), (_rows, _padded_tokens), strict=True):
        totals = [sum(of(*shape) for shape in replica.shapes) for replica in timeline.replicas]
        left = [0] * len(names)
        for length, colour in colours.items():
            widths = [
                sum(of(*shape) for shape in replica.shapes if shape[1] == length) for replica in timeline.replicas
            ]
            bars = axes.barh(names, widths, left=left, color=colour, edgecolor="white", height=0.72, label=f"{length}")
            shown = [f"{w:,}" if w >= MIN_LABEL_SHARE * max(1, *totals) else "" for w in widths]
            axes.bar_label(bars, shown, label_type="center", fontsize=8, color=_ink_on(colour))
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_xlabel(f"{label} in step {timeline.step}", fontsize=9, color=INK)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        plain(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    rows_axes.invert_yaxis()
    handles, labels = rows_axes.get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        title="bucket (padded length, tokens)",
        title_fontsize=9,
        loc="outside lower center",
        ncols=max(1, min(10, len(labels))),
        fontsize=9,
        frameon=False,
    )
    return fig


def _rows(rows: int, length: int) -> int:
    del length
    return rows


def _padded_tokens(rows: int, length: int) -> int:
    return rows * length


def _ink_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (Rec. 709 luma)."""
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140 else "white"


def shares_figure(run: Run) -> Figure:
    """Padding share and idle share of every step."""
    fig = figure(3.2)
    axes = fig.add_subplot()
    steps = [record["step"] for record in run.steps]
    for key, label, colour in (("padding_share", "padding", MEASURED), ("idle_share", "idle devices", PREDICTED)):
        values = [record[key] for record in run.steps]
        mean = sum(values) / len(values)
        axes.plot(steps, values, color=colour, linewidth=1.7, marker=_marker(steps), label=f"{label}, mean {mean:.1%}")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=INK)
    axes.set_title("Padding: share of computed tokens. Idle: share of the plan's device time", loc="left", fontsize=11)
    fig.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    plain(axes)
    return fig


def step_time_figure(run: Run) -> Figure:
    """Left: seconds of every step, measured and predicted. Right: the same for every replica of every step."""
    fig = figure(4.2)
    over_steps, by_replica = fig.subplots(1, 2, width_ratios=(1.35, 1))
    steps = [record["step"] for record in run.steps]
    measured = [record["seconds"]["total"] for record in run.steps]
    predicted = [record["predicted_step_s"] for record in run.steps]
    over_steps.plot(steps, measured, color=MEASURED, linewidth=1.7, marker=_marker(steps), label="measured")
    over_steps.plot(steps, predicted, color=PREDICTED, linewidth=1.7, marker=_marker(steps), label="predicted")
    over_steps.set_ylim(0, 1.08 * max(measured + predicted))
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.set_xlabel("step", color=INK)
    over_steps.set_ylabel("seconds a step", color=INK)
    _legend_below(over_steps)
    over_steps.set_title("Step time", loc="left", fontsize=11)
    plain(over_steps)
    _replica_times(by_replica, run)
    return fig


def _replica_times(axes: Axes, run: Run) -> None:
    groups = [str(group.config) for group in run.plan.expanded()]
    limit = 0.0
    for index, config in enumerate(dict.fromkeys(groups)):
        pairs = [
            (record["predicted_s"][replica], record["measured_s"][replica])
            for record in run.steps
            for replica, name in enumerate(groups)
            if name == config and record["num_micro_batches"][replica]
        ]
        if pairs:
            limit = max(limit, *(value for pair in pairs for value in pair))
            axes.scatter(*zip(*pairs, strict=True), s=14, alpha=0.65, linewidth=0, color=f"C{index}", label=config)
    axes.plot([0, limit * 1.05], [0, limit * 1.05], color=MUTED, linewidth=1, linestyle="--", label="exact")
    axes.set(xlim=(0, limit * 1.05), ylim=(0, limit * 1.05), xlabel="predicted seconds", ylabel="measured seconds")
    _legend_below(axes)
    axes.set_title("Each replica in each step", loc="left", fontsize=11)
    plain(axes, grid="both")


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8.5, frameon=False)


def _marker(steps: Sequence[int]) -> str:
    """A run of one step has no line to draw."""
    return "o" if len(steps) == 1 else ""
