"""`lobra tokenize`: builds the token cache and shows what the tasks' lengths look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lobra_jax.commands.options import config_options

if TYPE_CHECKING:
    from rich.table import Table

    from lobra_jax.data.batches import TaskData

WIDTH_IN_FILES = 120
"""Columns of the table where there is no terminal to ask."""


@click.command(
    epilog="\b\nExample:\n  lobra tokenize --config C.yaml\n  lobra tokenize --config C.yaml --lengths-out hist.json"
)
@config_options
@click.option(
    "--lengths-out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write each task's distribution of training lengths (hist.json), as `lobra plan --lengths` reads it.",
)
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw each task's histogram of lengths (.png, .svg or .pdf).",
)
def tokenize(config_path: Path, overrides: tuple[str, ...], lengths_out: Path | None, picture: Path | None) -> None:
    """Turn the tasks' text into the token cache and print length statistics.

    The cache is reused as long as data files, tokenizer, template and context length stay the same.
    """
    from rich.console import Console

    from lobra_jax.config import load_config
    from lobra_jax.data.load import load_tasks, workload_of
    from planner.files import check_file

    for key, path in (("--lengths-out", lengths_out), ("--picture", picture)):
        if path is not None:
            check_file(path, key=key)
    config = load_config(config_path, overrides)
    tasks = load_tasks(config)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_IN_FILES
    console.print(statistics_table(tasks))
    for task in tasks:
        for source in task.sources:
            console.print(
                f"{task.name} ({source.split}): {source.origin}, {source.num_records} records, "
                f"{source.num_truncated} truncated, {source.num_dropped} dropped",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    if lengths_out is not None:
        workload_of(tasks).save(lengths_out)
        console.print(f"lengths written to {lengths_out}", highlight=False, markup=False, soft_wrap=True)
    if picture is not None:
        from lobra_jax.report.lengths import save_length_picture

        save_length_picture(tasks, picture)
        console.print(f"histograms drawn in {picture}", highlight=False, markup=False, soft_wrap=True)


def statistics_table(tasks: Sequence[TaskData]) -> Table:
    """One row a task and split: lengths in tokens fed to the model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lobra_jax.data.statistics import length_statistics

    table = Table(title="Sequence lengths [tokens]", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "split"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "mean", "p50", "p95", "max", "skewness", "kurtosis", "tokens"):
        table.add_column(name, justify="right")
    for task in tasks:
        for split, dataset in (("train", task.train), ("eval", task.evaluation)):
            if dataset is None:
                continue
            s = length_statistics(dataset.lengths)
            numbers = (f"{s.mean:.1f}", f"{s.p50:.0f}", f"{s.p95:.0f}", str(s.max), f"{s.skewness:.2f}")
            table.add_row(task.name, split, str(s.count), *numbers, f"{s.kurtosis:.2f}", str(s.total))
    return table
