"""Writes RUN/report.html, self-contained, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lobra_jax.report.run import Run, load_run

REPORT_FILE = "report.html"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
code { background: #eef1f6; padding: .1rem .3rem; }
img { width: 100%; height: auto; }
p.note { color: #5b6472; margin: .3rem 0; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #d6dbe4; text-align: right; }
td:first-child, th:first-child { text-align: left; }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of ready text: the first column names the row, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"Table {self.title!r}: row {row} has {len(row)} cells, expected {len(self.head)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What stands at the top of the page: sentences, then tables."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of the report, already written."""

    file: Path
    title: str
    caption: str


def write_report(run_folder: str | Path, *, summary: Summary) -> Path:
    """Makes the pictures and the page of a run, which opens with `summary`; returns the page's path.

    Raises UserError when the folder is no run directory, has no step yet, or a file in it is damaged.
    """
    run = load_run(run_folder)
    pictures = _write_pictures(run)
    path = run.folder / REPORT_FILE
    path.write_text(_html(run, summary, pictures), encoding="utf-8")
    return path


def _write_pictures(run: Run) -> list[Picture]:
    from lobra_jax.report.charts import dispatch_figure, loss_figure, shares_figure, step_time_figure
    from lobra_jax.report.timeline_chart import timeline_figure

    figures = []
    if run.timeline is not None:
        figures += [
            (
                "timeline",
                timeline_figure(run.timeline),
                f"Timeline of step {run.timeline.step}",
                "Each stage's micro-batches as rows × padded length. Thick bars are measured, thin ones predicted from"
                " the cost table.",
            ),
            (
                "dispatch",
                dispatch_figure(run.timeline),
                f"Dispatch of step {run.timeline.step}",
                "Which replica got which buckets; rows and tokens as computed, padding included.",
            ),
        ]
    figures += [
        ("losses", loss_figure(run), "Losses by task", "Means over the tokens that count in the loss."),
        ("shares", shares_figure(run), "Padding and idling", ""),
        ("step_time", step_time_figure(run), "Predicted and measured time", ""),
    ]
    pictures = []
    for name, figure, title, caption in figures:
        file = run.folder / f"{name}.png"
        figure.savefig(file)
        pictures.append(Picture(file=file, title=title, caption=caption))
    return pictures


def _html(run: Run, summary: Summary, pictures: Sequence[Picture]) -> str:
    body = [
        f"<h1>{escape(summary.title)}</h1>",
        f"<p>Plan: <code>{escape(str(run.plan))}</code>, {run.plan.used_devices} of {run.plan.num_devices} devices</p>",
        *(f"<p>{escape(line)}</p>" for line in summary.lines),
        *(_table(table) for table in summary.tables),
    ]
    if run.timeline is None:
        body.append('<p class="note">No timeline was recorded in this run.</p>')
    body += [_picture(picture) for picture in pictures]
    if run.events:
        rows = tuple((str(e["step"]), e["task"] or "", e["event"], e["message"]) for e in run.events)
        body.append(_table(Table(title="Events", head=("step", "task", "event", "message"), rows=rows)))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(summary.title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<h2>{escape(table.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>{note}"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode("ascii")
    caption = f'<p class="note">{escape(picture.caption)}</p>' if picture.caption else ""
    image = f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(picture.title)}</h2>\n{caption}{image}"
