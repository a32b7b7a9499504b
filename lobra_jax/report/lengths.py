"""A picture of how long each task's sequences are: one small histogram a task, lengths on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lobra_jax.data.batches import TaskData
from lobra_jax.data.statistics import length_statistics
from lobra_jax.report.style import EVAL, INK, TRAIN, figure, plain
from planner.errors import UserError
from planner.files import writing

MAX_COLUMNS = 4
NUM_BINS = 40
KINDS = (".png", ".svg", ".pdf")


def save_length_picture(tasks: Sequence[TaskData], path: Path) -> None:
    """Draws `length_figure` into a file whose ending says the format."""
    if path.suffix not in KINDS:
        raise UserError("unknown kind of picture", key="--picture", value=str(path), expected=f"a name in {KINDS}")
    with writing(path, key="--picture"):
        path.parent.mkdir(parents=True, exist_ok=True)
        length_figure(tasks).savefig(path)


def length_figure(tasks: Sequence[TaskData]) -> Figure:
    """Training lengths as bars, the mean as a line; bins are equally wide on the logarithmic axis, the same for all."""
    columns = min(MAX_COLUMNS, len(tasks))
    num_rows = math.ceil(len(tasks) / columns)
    fig = figure(0.9 + 2.3 * num_rows)
    grid = fig.subplots(num_rows, columns, squeeze=False, sharex=True)
    longest = max(int(task.train.lengths.max()) for task in tasks)
    bins = np.geomspace(1, longest + 1, NUM_BINS + 1)
    for axes, task in zip(grid.flat, tasks, strict=False):
        numbers = length_statistics(task.train.lengths)
        axes.hist(task.train.lengths, bins=bins, color=TRAIN)
        axes.axvline(numbers.mean, color=EVAL, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_title(f"{task.name}  mean {numbers.mean:.0f}", loc="left", fontsize=10, color=INK)
        axes.set_xlabel("tokens", fontsize=9, color=INK)
        plain(axes)
    for axes in grid.flat[len(tasks) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("sequences", fontsize=9, color=INK)
    return fig
