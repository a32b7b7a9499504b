"""The commands that need no run config: `lobra explain` and `lobra simulate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cost import CostTable
from planner.dispatch import METHODS
from planner.errors import UserError
from planner.files import check_file, write_json, write_whole
from planner.inputs import (
    FILE,
    Inputs,
    check_one_plan,
    input_options,
    load_plan,
    plan_argument,
    read_costs,
    read_lengths,
)
from planner.plan import Plan
from planner.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console

    from planner.simulate import Simulation


@click.command(
    epilog="\b\nExample:\n  lobra explain plan.yaml\n  lobra explain plan.yaml --html plan.html\n"
    "  lobra explain --lobra-plan 2048,4096,16384 6,1,1 1,2,8 1,1,1 --costs costs.json --lengths hist.json"
)
@click.argument("plan", type=FILE, required=False)
@plan_argument
@input_options
@click.option("--compare/--no-compare", default=True, help="Also plan in other ways, to show what they would cost.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True,
              help="Seconds for all of those plans together.")  # fmt: skip
@click.option("--html", "html_out", type=FILE, metavar="FILE", help="Also write the explanation with a chart as HTML.")
def explain(
    plan: Path | None,
    lobra_plan: tuple[str, str, str, str] | None,
    compare: bool,
    time_limit: float,
    html_out: Path | None,
    **inputs: Any,
) -> None:
    """Say why PLAN has these replicas and what limits its step.

    PLAN is a plan.yaml, or a strategy YAML of the original LobRA. Without --costs and --lengths the files that `lobra
    plan` left beside the plan are read: PLAN.costs.json and PLAN.lengths.json, else costs.json and lengths.json.
    """
    from rich.console import Console

    from planner.explain import explain as explained
    from planner.explain_html import html
    from planner.explain_text import render

    if html_out is not None:
        check_file(html_out, key="--html")
    console = Console()
    chosen, costs, workload = _read(plan, lobra_plan, Inputs(**inputs), console)
    with console.status("timing the plan") as status:
        explanation = explained(
            chosen,
            costs,
            workload,
            compare=compare,
            time_limit_s=time_limit,
            on_progress=lambda what: status.update(f"planning for comparison: {what}"),
        )
    console.print(render(explanation), highlight=False)
    if html_out is not None:
        write_whole(html_out, html(explanation))
        console.print(f"\n{html_out}", highlight=False, markup=False, soft_wrap=True)


@click.command(
    epilog="\b\nExample:\n  lobra simulate --plan plan.yaml --steps 64 --seed 0\n"
    "  lobra simulate --plan plan.yaml --steps 64 --dispatch group --out simulated.json"
)
@click.option("--plan", type=FILE, metavar="FILE", help="A plan.yaml, or a strategy YAML of the original LobRA.")
@plan_argument
@input_options
@click.option("--steps", type=click.IntRange(min=1), default=32, show_default=True, help="Batches to sample.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the batches.")
@click.option("--dispatch", "method", type=click.Choice(METHODS), default="balance", show_default=True,
              help="How sequences are sent to replicas.")  # fmt: skip
@click.option("--batching", type=click.Choice(("padded", "packed")), default="padded", show_default=True,
              help="A sequence a row, or several (the costs must have packed times).")  # fmt: skip
@click.option("--max-dispatch-buckets", type=click.IntRange(min=1), default=16, show_default=True,
              help="Most padded lengths in one step.")  # fmt: skip
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Seconds into a dispatch at which SCIP stops, if it was asked.")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE", help="Also write every step as JSON.")
def simulate(
    plan: Path | None,
    lobra_plan: tuple[str, str, str, str] | None,
    steps: int,
    seed: int,
    method: str,
    batching: str,
    max_dispatch_buckets: int,
    time_limit: float,
    out: Path | None,
    **inputs: Any,
) -> None:
    """Dispatch sampled batches on a plan without devices.

    Uses the dispatcher that training uses and the cost table's times. Prints step times, GPU-seconds, padding, how long
    each replica waits, and a timeline of the median step. Costs and lengths are found as by `lobra explain`.
    """
    from rich.console import Console
    from tqdm import tqdm

    from planner.explain_text import simulation_line, simulation_table
    from planner.simulate import replica_names
    from planner.simulate import simulate as simulated
    from planner.timeline import timeline_lines

    if out is not None:
        check_file(out)
    console = Console()
    chosen, costs, workload = _read(plan, lobra_plan, Inputs(**inputs), console)
    with tqdm(total=steps, unit="step", desc="simulate", disable=None) as bar:
        simulation = simulated(
            chosen,
            costs,
            workload,
            num_steps=steps,
            seed=seed,
            method=method,
            batching=batching,
            max_buckets=max_dispatch_buckets,
            time_limit_s=time_limit,
            on_step=lambda _: bar.update(),
        )
    console.print(str(chosen), style="bold", highlight=False, soft_wrap=True)
    console.print(simulation_table(simulation))
    console.print(simulation_line(simulation), highlight=False, soft_wrap=True)
    timeline = simulation.timeline
    title = f"\nTimeline of step {timeline.step}, {timeline.step_s:#.3g} s from left to right"
    kinds = [str(group.config) for group in chosen.expanded()]
    for line in (title, *timeline_lines(timeline, replica_names(chosen), kinds)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        write_json(out, _simulation_dict(simulation))


def _read(
    path: Path | None, lists: tuple[str, str, str, str] | None, inputs: Inputs, console: Console
) -> tuple[Plan, CostTable, Workload]:
    """Costs, lengths and the plan that the options name; prints what synthetic lengths reached."""
    check_one_plan(path, lists)
    if path is not None and not path.is_file():
        raise UserError("no such file", file=path, expected="a plan.yaml")
    costs = read_costs(inputs, path)
    workload, reached = read_lengths(inputs, path)
    if reached:
        from planner.explain_text import reached_table

        console.print(reached_table(reached))
    return load_plan(path, lists, costs=costs, workload=workload), costs, workload


def _simulation_dict(simulation: Simulation) -> dict[str, Any]:
    return {
        "plan": simulation.plan.to_dict(),
        "dispatch": simulation.method,
        "seed": simulation.seed,
        "mean_step_s": simulation.mean_step_s,
        "p50_step_s": simulation.quantile_s(0.5),
        "p95_step_s": simulation.quantile_s(0.95),
        "gpu_seconds": simulation.gpu_seconds,
        "tokens_per_s": simulation.tokens_per_s,
        "padding_share": simulation.padding_share,
        "idle_share": simulation.idle_share,
        "idle_shares": list(simulation.idle_shares),
        "steps": [dataclasses.asdict(step) for step in simulation.steps],
        "timeline": dataclasses.asdict(simulation.timeline),
    }
