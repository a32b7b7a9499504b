"""What the demo has to show: losses before and after, the plan's replicas, and device-seconds against Task-Fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lobra_jax.demo import DEFAULT_STEPS
from lobra_jax.demo.baseline import Predicted
from lobra_jax.metrics import read_metrics
from lobra_jax.report import Summary, Table
from lobra_jax.run_folder import METRICS_FILE
from planner.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console


EXPECTED_FALL = 0.1
"""Share of its held-out loss that every task is expected to lose in a demo of the default length."""


def demo_summary(run: Path, ours: Predicted, fused: Predicted) -> Summary:
    """From the run directory and from what the cost table says of the run's batches on its plan and on Task-Fused's."""
    plan = ours.plan
    steps = read_metrics(run / METRICS_FILE, "step")
    saved = 1 - ours.gpu_seconds / fused.gpu_seconds
    idle, padding = _mean(steps, "idle_share"), _mean(steps, "padding_share")
    return Summary(
        title="lobra demo",
        lines=(
            f"{len(steps)} joint steps of {len({r['task'] for r in _tasks(run)})} tasks on {plan.num_devices} simulated"
            f" devices. Padding share {padding:.1%}, idle share {idle:.1%} (means over steps, measured).",
            "Simulated devices share the host's cores: times compare with each other, not with real devices.",
        ),
        tables=(
            _task_table(run),
            _replica_table(plan, steps),
            Table(
                title=f"Device-seconds of the same {len(steps)} batches on the same {plan.num_devices} devices",
                head=("plan", "replicas", "predicted", "measured", "padding", "idle"),
                rows=(
                    _plan_row("ours", ours, f"{sum(record['gpu_seconds'] for record in steps):.1f}"),
                    _plan_row("Task-Fused", fused, "-"),
                ),
                note=f"Ours costs {abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} device-seconds than Task-Fused,"
                " the best plan of one kind of replica, by the cost table measured above; its own error shows in the"
                " measured column. Padding and idle shares are predicted too.",
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
                group.tokens,
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


def _plan_row(name: str, predicted: Predicted, measured: str) -> tuple[str, ...]:
    return (
        name,
        str(predicted.plan),
        f"{predicted.gpu_seconds:.1f}",
        measured,
        f"{fmean(step.padding_share for step in predicted.steps):.1%}",
        f"{fmean(step.idle_share for step in predicted.steps):.1%}",
    )


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float:
    return fmean(record[name] for record in steps)
