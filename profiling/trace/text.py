"""A trace's summary as tables for people; milliseconds are of one step, means over a stage's devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from profiling.trace.kernel_classes import CLASSES

MS = 1e3
MAX_NAME = 64
"""Characters of a kernel's name that are shown."""


def lines(summary: Mapping[str, Any]) -> list[str]:
    num_steps = len(summary["steps"])
    names = [str(step["step"]) for step in summary["steps"] if step["step"] is not None]
    what = f"steps {', '.join(names)}" if names else "no marks of steps: all the time in which anything runs"
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    seconds = summary["window_s"] / num_steps
    return [
        f"{summary['hardware']}, {versions}: {what}, {seconds * MS:.2f} ms a step, idle {summary['idle_share']:.1%}",
        "",
        *_devices(summary, num_steps),
        "",
        *_stages(summary, num_steps),
        "",
        *_kernels(summary, num_steps),
        *_left_over(summary),
    ]


def _devices(summary: Mapping[str, Any], num_steps: int) -> list[str]:
    classes = _present(summary["classes"])
    head = ["device", "stage", "busy, ms", "idle, ms", "idle", *classes]
    rows = [
        [
            str(row["device"]),
            _place(row),
            *(f"{row[key] * MS / num_steps:.2f}" for key in ("busy_s", "idle_s")),
            f"{row['idle_share']:.1%}",
            *(f"{row['classes'].get(name, 0.0) * MS / num_steps:.2f}" for name in classes),
        ]
        for row in summary["devices"]
    ]
    shares = [
        f"{s / summary['busy_s']:.1%}" if summary["busy_s"] else "-" for s in map(summary["classes"].get, classes)
    ]
    rows.append(["all", "share of busy", "", "", f"{summary['idle_share']:.1%}", *shares])
    return _table(head, rows, num_names=2)


def _stages(summary: Mapping[str, Any], num_steps: int) -> list[str]:
    classes = _present(summary["classes"])
    rows = []
    for stage in summary["stages"]:
        per = MS / num_steps / stage["num_devices"]
        for phase, own in sorted(stage["phases"].items(), key=lambda item: -sum(item[1].values())):
            cells = [f"{own.get(name, 0.0) * per:.2f}" for name in classes]
            rows.append([_place(stage), phase, f"{sum(own.values()) * per:.2f}", *cells])
    return _table(["stage", "phase", "ms", *classes], rows, num_names=2)


def _kernels(summary: Mapping[str, Any], num_steps: int) -> list[str]:
    rows = [
        [
            kernel["name"] if len(kernel["name"]) <= MAX_NAME else kernel["name"][: MAX_NAME - 1] + "…",
            kernel["class"],
            kernel["phase"],
            str(kernel["names"]),
            str(kernel["count"]),
            f"{kernel['seconds'] * MS / num_steps:.2f}",
            f"{kernel['share']:.1%}",
        ]
        for kernel in summary["top_kernels"]
    ]
    return _table(["kernel", "class", "phase", "kernels", "times", "ms a step", "of busy"], rows, num_names=3)


def _left_over(summary: Mapping[str, Any]) -> Iterable[str]:
    left = summary["unattributed"]
    if left:
        named = ", ".join(f"{name} {seconds * MS:.2f} ms" for name, seconds in left.items())
        yield f"\nunattributed: {named}"
    if summary["unread_lines"]:
        named = ", ".join(f"{name!r} ({count} events)" for name, count in summary["unread_lines"].items())
        yield f"\nlines without work, as far as is known: {named}"


def _present(classes: Mapping[str, float]) -> list[str]:
    return [name for name in CLASSES if classes.get(name, 0.0) > 0]


def _place(row: Mapping[str, Any]) -> str:
    if row["replica"] is None:
        return "-"
    return f"replica {row['replica']} {row['config']} stage {row['stage']}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int) -> list[str]:
    """Columns as wide as they need to be: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < num_names else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
