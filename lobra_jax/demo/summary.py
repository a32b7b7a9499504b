"""What the demo has to show: losses before and after, the plan's replicas, and device-seconds against Task-Fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lobra_jax.demo import DEFAULT_STEPS
from lobra_jax.metrics import METRICS_FILE, read_metrics
from lobra_jax.report import Summary, Table
from planner.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console


WARM_UP_STEPS = 2
"""Steps of a run that are not compared: most programs run for the first time in them."""

EXPECTED_FALL = 0.1
"""Share of its held-out loss that every task is expected to lose in a demo of the default length."""


def demo_summary(run: Path, fused_run: Path) -> Summary:
    """From the run directories of the plan and of the baseline, whose first steps have the same batches."""
    plan, fused_plan = Plan.load(run / "plan.yaml"), Plan.load(fused_run / "plan.yaml")
    steps = read_metrics(run / METRICS_FILE, "step")
    fused_steps = read_metrics(fused_run / METRICS_FILE, "step")
    first = min(WARM_UP_STEPS, len(fused_steps) - 1)
    ours, fused = steps[first : len(fused_steps)], fused_steps[first:]
    saved = 1 - _total(ours, "gpu_seconds") / _total(fused, "gpu_seconds")
    idle, padding = _mean(steps, "idle_share"), _mean(steps, "padding_share")
    return Summary(
        title="lobra demo",
        lines=(
            f"{len(steps)} joint steps of {len({r['task'] for r in _tasks(run)})} tasks on {plan.num_devices} simulated"
            f" devices. Padding share {padding:.1%}, idle share {idle:.1%} (means over steps).",
            "Simulated devices share the host's cores: times compare with each other, not with real devices.",
        ),
        tables=(
            _task_table(run),
            _replica_table(plan, steps),
            Table(
                title=f"Device-seconds of steps {first + 1} to {first + len(ours)}: same batches, same devices",
                head=("plan", "replicas", "device-seconds", "s a step", "padding", "idle"),
                rows=(
                    _plan_row("ours", plan, ours),
                    _plan_row("Task-Fused", fused_plan, fused),
                ),
                note=f"Ours costs {abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} device-seconds than Task-Fused.",
            ),
        ),
    )


def print_summary(summary: Summary, console: Console) -> None:
    from rich.table import Table as View

    for table in summary.tables:
        view = View(title=table.title)
        for index, name in enumerate(table.head):
            view.add_column(name, justify="left" if index == 0 else "right")
        for row in table.rows:
            view.add_row(*row)
        console.print(view)
        if table.note:
            console.print(table.note, highlight=False)
    for line in summary.lines:
        console.print(line, highlight=False)


def _tasks(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / METRICS_FILE, "task")


def _task_table(run: Path) -> Table:
    evals = read_metrics(run / METRICS_FILE, "eval")
    trained = _tasks(run)
    rows, falls = [], {}
    for name in dict.fromkeys(record["task"] for record in trained):
        losses = [record["loss"] for record in evals if record["task"] == name]
        own = [record for record in trained if record["task"] == name]
        falls[name] = 1 - losses[-1] / losses[0]
        rows.append(
            (
                name,
                f"{losses[0]:.3f}",
                f"{losses[-1]:.3f}",
                f"{losses[-1] / losses[0] - 1:+.1%}",
                f"{sum(record['tokens'] for record in own):,}",
                str(len(own)),
            )
        )
    return Table(
        title="Held-out loss by task (nats a token)",
        head=("task", "before", "after", "change", "target tokens", "steps"),
        rows=tuple(rows),
        note=weak_falls(falls, num_steps=len(read_metrics(run / METRICS_FILE, "step"))),
    )


def weak_falls(falls: Mapping[str, float], *, num_steps: int) -> str:
    """One line that names the tasks whose loss fell by a share below `EXPECTED_FALL`; "" if all fell by more.

    Args:
      falls: by task name, 1 - after / before; a share that is not finite counts as no fall.
      num_steps: joint steps of the run.
    """
    weak = [name for name, fall in falls.items() if not fall >= EXPECTED_FALL]
    if not weak:
        return ""
    reason = f", as expected of {num_steps} of the usual {DEFAULT_STEPS} steps" if num_steps < DEFAULT_STEPS else ""
    return f"Held-out loss fell by less than {EXPECTED_FALL:.0%}{reason}: {', '.join(weak)}."


def _replica_table(plan: Plan, steps: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for index, group in enumerate(plan.expanded()):
        predicted = fmean(record["predicted_s"][index] for record in steps)
        measured = fmean(record["measured_s"][index] for record in steps)
        batches = fmean(record["num_micro_batches"][index] for record in steps)
        rows.append(
            (
                f"{index} {group.config}",
                f"{group.capacity_tokens:,}",
                f"{batches:.1f}",
                f"{predicted:.2f}",
                f"{measured:.2f}",
            )
        )
    whole = fmean(record["seconds"]["total"] for record in steps)
    rows.append(("step", "", "", f"{_mean(steps, 'predicted_step_s'):.2f}", f"{whole:.2f}"))
    return Table(
        title=f"The plan: {plan}",
        head=("replica", "capacity", "micro-batches", "predicted s", "measured s"),
        rows=tuple(rows),
        note="Means over steps.",
    )


def _plan_row(name: str, plan: Plan, steps: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return (
        name,
        str(plan),
        f"{_total(steps, 'gpu_seconds'):.1f}",
        f"{fmean(record['seconds']['total'] for record in steps):.2f}",
        f"{_mean(steps, 'padding_share'):.1%}",
        f"{_mean(steps, 'idle_share'):.1%}",
    )


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float:
    return fmean(record[name] for record in steps)


def _total(steps: Sequence[dict[str, Any]], name: str) -> float:
    return sum(record[name] for record in steps)
