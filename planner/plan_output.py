"""What a planning command writes and prints: the plan, how it was chosen, and how it fares over sampled batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.bucket_choice import BucketRow, best_row
from planner.cost import CostTable
from planner.files import write_json
from planner.inputs import beside
from planner.plan import Plan, Prediction
from planner.planning import PlanningFlags, choose_plan
from planner.robust import MEAN, Robust, StepTimes
from planner.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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
    costs.save(beside(out, "costs"))
    workload.save(beside(out, "lengths"))
    plan.save(out)
    if robust is not None:
        write_json(beside(out, "robust"), _robust_dict(robust))
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
