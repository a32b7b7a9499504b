"""`lobra trace`: where the time of traced steps went, read without a device."""

from __future__ import annotations

from pathlib import Path

import click

from planner.errors import UserError
from planner.files import check_folder, check_out, write_json, writing

DEFAULT_TOP = 15


@click.command(
    epilog="\b\nExample:\n  lobra train --config run.yaml --out runs/first --trace 3-4\n"
    "  lobra trace runs/first --out trace.json --pictures pictures"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the summary as JSON.")
@click.option(
    "--pictures", type=click.Path(path_type=Path, file_okay=False), help="Folder for PNG files of it and of a step."
)
@click.option("--top", type=click.IntRange(min=1), default=DEFAULT_TOP, show_default=True, help="Kernels to name.")
def trace(run: Path, out: Path | None, pictures: Path | None, top: int) -> None:
    """Sum up a profiler trace: RUN is a run directory, a trace folder or an .xplane.pb file.

    Time by kernel class, by replica, stage and phase, idle share of each device, and the kernels that take most.
    """
    if not run.exists():
        raise UserError(
            "no such folder", key="RUN", value=str(run), expected="a run of lobra train --trace, or a trace"
        )
    check_out(out)
    if pictures is not None:
        check_folder(pictures, key="--pictures")
    from profiling.trace.summary import summarise
    from profiling.trace.text import lines

    summary = summarise(run, top=top)
    click.echo("\n".join(lines(summary)))
    if out is not None:
        write_json(out, summary)
    if pictures is not None:
        from profiling.trace.charts import write_pictures

        with writing(pictures, key="--pictures"):
            paths = write_pictures(summary, pictures)
        for path in paths:
            click.echo(str(path))
