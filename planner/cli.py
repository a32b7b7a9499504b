"""The commands that need no run config: `lobra explain`, `lobra simulate`, and what `lobra plan` shares with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.batching import BATCHINGS
from planner.bucket_choice import (
    DEFAULT_COMPILE_S,
    DEFAULT_STEPS,
    BucketRow,
    best_row,
)
from planner.cost import CostTable
from planner.dispatch import METHODS
from planner.errors import UserError
from planner.inputs import (
    FILE,
    Inputs,
    beside,
    check_one_plan,
    input_options,
    load_plan,
    plan_argument,
    read_costs,
    read_lengths,
)
from planner.lattice import MAX_ROW_OPTIONS
from planner.plan import REMATS, Plan, Prediction
from planner.planners import PLANNERS
from planner.planning import PlanningFlags, choose_plan
from planner.robust import MEAN, Robust, StepTimes, percentile
from planner.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from planner.simulate import Simulation


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags of `PlanningFlags`."""
    count = click.IntRange(min=1)
    options = (
        click.option("--planner", type=click.Choice(tuple(PLANNERS)), help="How to plan; exact by default."),
        click.option("--proposal", type=click.Choice(["on", "off"]), callback=_on_off, help="LobRA's config proposal."),
        click.option(
            "--buckets", metavar="KIND", callback=_bucket_list, help="dynamic, static7, static16 or 256,512,..."
        ),
        click.option(
            "--num-buckets",
            type=count,
            help="Most padded lengths with dynamic buckets; by default chosen by step time and compile time.",
        ),
        click.option(
            "--compile-s",
            type=click.FloatRange(min=0),
            help=f"Seconds to compile one program, for that choice; {DEFAULT_COMPILE_S:g} by default.",
        ),
        click.option(
            "--amortise-steps",
            type=count,
            help=f"Steps to spread compile time over; by default the config's, else {DEFAULT_STEPS}.",
        ),
        click.option(
            "--row-options",
            type=click.IntRange(1, MAX_ROW_OPTIONS),
            help="Row counts compiled for each bucket on a replica: full, half, ...",
        ),
        click.option("--max-tp", type=count, help="Most devices that share a layer."),
        click.option("--max-pp", type=count, help="Most pipeline stages."),
        click.option("--tps", metavar="1,2,..", callback=_int_list, help="Allowed tensor-parallel sizes."),
        click.option("--pps", metavar="1,2,..", callback=_int_list, help="Allowed numbers of pipeline stages."),
        click.option("--remats", metavar="A,B", callback=_remat_list, help=f"Allowed of {','.join(REMATS)}."),
        click.option(
            "--mix-remats/--no-mix-remats",
            default=None,
            help="Also plan replicas of several policies: each padded length runs with the first that holds it.",
        ),
        click.option("--devices-per-host", type=count, help="A layer's devices stay within a host of so many."),
        click.option(
            "--pin",
            "pinned",
            metavar="REPLICAS",
            multiple=True,
            callback=lambda _, __, value: value or None,
            help="Replicas the plan must have, e.g. '1x(tp4,pp1,none)'. Repeatable.",
        ),
        click.option("--max-configs", type=count, help="Most unlike replicas in a plan."),
        click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), help="Seconds to plan at the most."),
        click.option(
            "--robust",
            metavar="mean|p95|..|off",
            callback=_objective,
            help="Choose by the mean, or a percentile from p1 to p99, of the step time over sampled batches.",
        ),
        click.option("--samples", type=count, help="Batches to sample with --robust, and for --check."),
        click.option("--batching", type=click.Choice(BATCHINGS), help="Plan for padded or packed rows, or the sooner."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _on_off(_: click.Context, __: click.Parameter, value: str | None) -> bool | None:
    return None if value is None else value == "on"


def _objective(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value not in (None, "off"):
        percentile(value)
    return value


def _bucket_list(_: click.Context, __: click.Parameter, value: str | None) -> str | tuple[int, ...] | None:
    if value is None or not value.replace(",", "").isdigit():
        return value
    return tuple(int(item) for item in value.split(",") if item)


def _int_list(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = value.split(",")
    if not all(item.isdigit() and int(item) > 0 for item in items):
        raise UserError("bad value", key=f"--{option.name}", value=value, expected="integers >= 1, as in 1,2,4")
    return tuple(int(item) for item in items)


def _remat_list(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(value.split(","))
    for name in names:
        if name not in REMATS:
            raise UserError("unknown policy", key="--remats", value=name, expected=", ".join(REMATS))
    return names


def plan_and_write(
    workload: Workload, costs: CostTable, num_devices: int, out: Path, flags: PlanningFlags, console: Console
) -> Plan:
    """Plans, writes the plan with its costs and lengths beside it, and prints what came out."""
    with console.status(f"planning {num_devices} devices"):
        chosen = choose_plan(workload, costs, num_devices, flags)
    plan, robust = chosen.plan, chosen.robust
    if chosen.lengths is not None:
        line = f"{bucket_line(chosen.lengths)}; their number chosen in {chosen.lengths_s:.3g} s"
        console.print(line, highlight=False, soft_wrap=True)
    with _writing(out):
        costs.save(beside(out, "costs"))
        workload.save(beside(out, "lengths"))
        plan.save(out)
        if robust is not None:
            beside(out, "robust").write_text(json.dumps(_robust_dict(robust), indent=1) + "\n", encoding="utf-8")
    console.print(str(plan), style="bold", highlight=False, soft_wrap=True)
    predicted = plan.predicted
    if predicted is not None:
        console.print(
            f"step {predicted.step_s:.4g} s, proven bound {predicted.bound_s:.4g} s, "
            f"gap {predicted.gap:.2%}{_how_it_ended(predicted)}; "
            f"{predicted.gpu_seconds:.4g} GPU-seconds a step; solved in {predicted.solve_s:.3g} s by {plan.planner}",
            highlight=False,
            soft_wrap=True,
        )
    if robust is not None:
        for line in robust_lines(robust):
            console.print(line, highlight=False, soft_wrap=True)
    elif _may_use_more(plan, costs):
        console.print(
            f"{plan.num_devices - plan.used_devices} of {plan.num_devices} devices hold no replica: with them the "
            "expected batch would end no sooner, within the gap; most sampled batches may (--robust mean)",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{out} (explain it: lobra explain {out})", highlight=False, markup=False, soft_wrap=True)
    return plan


def _may_use_more(plan: Plan, costs: CostTable) -> bool:
    """Whether devices are idle that a replica would fit on, in a plan that is proven for the expected batch."""
    idle = plan.num_devices - plan.used_devices
    proven = plan.predicted is not None and plan.predicted.status in ("optimal", "gap limit")
    return proven and any(cost.config.num_devices <= idle for cost in costs.configs)


def bucket_line(row: BucketRow) -> str:
    """What was chosen and what it costs."""
    return (
        f"{row.num_buckets} padded lengths: {row.padding_share:.1%} padding, {row.num_programs} programs; "
        f"a step of {row.step_s:.4g} s and {row.compile_step_s:.3g} s of compile time spread over the steps"
    )


def bucket_table(rows: Sequence[BucketRow]) -> Table:
    """The rows of `bucket_report`, the choice marked."""
    from rich.table import Table

    view = Table(title="padded lengths: padding against programs")
    for name in ("lengths", "padding", "programs", "step, s", "compile, s a step", "together, s", ""):
        view.add_column(name, justify="right")
    best = best_row(rows)
    for row in rows:
        view.add_row(
            str(row.num_buckets),
            f"{row.padding_share:.1%}",
            str(row.num_programs),
            f"{row.step_s:.4g}",
            f"{row.compile_step_s:.3g}",
            f"{row.total_s:.4g}",
            "least" if row is best else "",
        )
    return view


def robust_lines(robust: Robust) -> tuple[str, ...]:
    """What choosing over sampled batches gave, a line each."""
    alone = robust.num_candidates == 1
    searched = "the only one that the time limit left time for" if alone else f"of {robust.num_candidates} deployments"
    measure = "mean" if robust.objective == MEAN else f"{robust.objective.removeprefix('p')}th percentile"
    return (
        f"chosen by the {measure} of the step over {robust.num_samples} sampled batches, {searched}; "
        f"on {robust.num_samples} other batches: {times_text(robust.times)}",
        f"the plan of the expected batch, {robust.mean_plan}: {times_text(robust.mean_plan_times)}; "
        f"its regret is {robust.regret:.2%} of the {measure}",
    )


def times_text(times: StepTimes) -> str:
    """Mean, p50, p95 and how near the mean is to the mean of the batches' bounds."""
    return (
        f"mean {times.mean_s:.4g} s, p50 {times.p50_s:.4g} s, p95 {times.p95_s:.4g} s "
        f"(no dispatch on these replicas has a mean under {times.bound_s:.4g} s)"
    )


def _robust_dict(robust: Robust) -> dict[str, Any]:
    return {
        "objective": robust.objective,
        "num_samples": robust.num_samples,
        "seed": robust.seed,
        "num_candidates": robust.num_candidates,
        "plan": str(robust.plan),
        "times": dataclasses.asdict(robust.times),
        "mean_plan": str(robust.mean_plan),
        "mean_plan_times": dataclasses.asdict(robust.mean_plan_times),
        "regret": robust.regret,
    }


def _how_it_ended(predicted: Prediction) -> str:
    if predicted.status is None:
        return ""
    nodes = "" if predicted.num_nodes is None else f", {predicted.num_nodes} nodes"
    return f" ({predicted.status}{nodes})"


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", file=out, expected="a path that can be written") from error


@click.command(
    epilog="\b\nExample:\n  lobra explain plan.yaml\n  lobra explain plan.yaml --html plan.html\n"
    "  lobra explain --lobra-plan 2048,4096,16384 6,1,1 1,2,8 1,1,1 --costs costs.json --lengths hist.json"
)
@click.argument("plan", type=FILE, required=False)
@plan_argument
@input_options
@click.option("--compare/--no-compare", default=True, help="Also plan in other ways, to show what they would cost.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
              help="Seconds for each of those plans.")  # fmt: skip
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
        with _writing(html_out):
            html_out.write_text(html(explanation), encoding="utf-8")
        console.print(f"\n{html_out}", highlight=False, markup=False, soft_wrap=True)


@click.command(
    epilog="\b\nExample:\n  lobra simulate --plan plan.yaml --steps 64 --seed 0\n"
    "  lobra simulate --plan plan.yaml --steps 64 --dispatch group --out simulated.json"
)
@click.option("--plan", type=FILE, metavar="FILE", help="A plan.yaml, or a strategy YAML of the original LobRA.")
@plan_argument
@input_options
@click.option("--steps", type=click.IntRange(min=1), default=32, show_default=True, help="Batches to sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the batches.")
@click.option("--dispatch", "method", type=click.Choice(METHODS), default="balance", show_default=True,
              help="How sequences are sent to replicas.")  # fmt: skip
@click.option("--batching", type=click.Choice(("padded", "packed")), default="padded", show_default=True,
              help="A sequence a row, or several (the costs must have packed times).")  # fmt: skip
@click.option("--max-dispatch-buckets", type=click.IntRange(min=1), default=16, show_default=True,
              help="Most padded lengths in one step.")  # fmt: skip
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Seconds for one dispatch.")  # fmt: skip
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
        with _writing(out):
            out.write_text(json.dumps(_simulation_dict(simulation), indent=1) + "\n", encoding="utf-8")


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
