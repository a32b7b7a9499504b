"""How long each planner takes on the original LobRA's files, and how good its plans are.

For every number of devices and every planner: wall and CPU seconds of planning (process start and reading files
excluded), the step time planned for, the planner's own bound and gap, and the gap to the best bound that any planner
proved. LobRA's published planning seconds (its 70B model and its machine; here the published 7B costs) go beside them.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from planner.files import check_file, write_json
from planner.inputs import FILE
from planner.lobra_files import read_cost_table, read_tasks
from planner.plan import Plan
from planner.planners import PLANNERS, solver
from planner.problem import PlanningProblem, build_problem
from planner.synthetic import read_statistics, synthetic_workload
from planner.workload import Workload
from profiling.bench.options import published_files
from profiling.bench.provenance import provenance

TABLE_WIDTH = 100
"""Columns that the table takes where nothing says how wide the terminal is."""

TIMES = "lobra_time_llama_7b_a100_40g.csv"
MEMORY = "lobra_memory_llama_7b_a100_40g_6tasks.csv"
STATISTICS = "table4_datasets.csv"
PUBLISHED = "table5_planning_seconds.csv"
NUM_LAYERS = 32
"""Of the model behind TIMES."""

BASE_DEVICES = 16
"""Devices that the task files' batch sizes are meant for; `--grow` scales batches with the devices from here."""

LIBRARIES = ("pyscipopt", "numpy", "scipy")


@click.command(
    epilog="\b\nExample:\n"
    "  python -m profiling.bench.planning --reference DIR --out profiling/results/planning_seconds.json"
)
@published_files
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The JSON to write.")
@click.option("--tasks", default="exp_task6.json", show_default=True, help="Task file in the folder.")
@click.option("--devices", default="16,64,256,1024", show_default=True, help="Numbers of devices.")
@click.option("--planners", default=",".join(PLANNERS), show_default=True, help="Which planners.")
@click.option("--grow/--fixed", default=True, show_default=True, help="Scale batch sizes with the devices, or not.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True,
              help="Runs of exact, of which the one of median CPU time is reported.")  # fmt: skip
@click.option("--time-limit", type=float, default=60.0, show_default=True, help="Seconds for exact.")
@click.option("--baseline-limit", type=float, default=60.0, show_default=True, help="Seconds for each other planner.")
def bench(
    reference: Path,
    out: Path,
    tasks: str,
    devices: str,
    planners: str,
    grow: bool,
    repeats: int,
    time_limit: float,
    baseline_limit: float,
) -> None:
    """Times the planners and writes a table as JSON."""
    check_file(out)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    costs = read_cost_table(reference / TIMES, reference / MEMORY, num_layers=NUM_LAYERS, model="llama-7b")
    workload, _ = synthetic_workload(read_tasks(reference / tasks), read_statistics(reference / STATISTICS), seed=0)
    rows: list[dict[str, Any]] = []
    for num_devices in (int(item) for item in devices.split(",")):
        grown = scaled(workload, num_devices / BASE_DEVICES) if grow else workload
        mine = []
        for planner in planners.split(","):
            is_exact = planner == "exact"
            problem = build_problem(grown, costs, num_devices, time_limit_s=time_limit if is_exact else baseline_limit)
            runs = [timed(planner, problem) for _ in range(repeats if is_exact else 1)]
            row = sorted(runs, key=lambda run: run["cpu_s"])[len(runs) // 2]
            mine.append(row)
            console.print(_line(row), highlight=False, soft_wrap=True)
        bound_s = max(row["bound_s"] for row in mine)
        rows += [{**row, "gap_to_best_bound": 1 - bound_s / row["step_s"]} for row in mine]
    published = (reference / PUBLISHED).read_text(encoding="utf-8") if (reference / PUBLISHED).is_file() else None
    settings = {"tasks": tasks, "grow": grow, "time_limit_s": time_limit, "baseline_limit_s": baseline_limit}
    written = {**provenance(LIBRARIES), "settings": settings, "rows": rows, "published_planning_seconds_csv": published}
    write_json(out, written)
    console.print(_table(rows))
    if published:
        console.print(f"published planning seconds (70B, 4 tasks):\n{published}", highlight=False)


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload with every task's batch size times `factor`, at least 1."""
    return Workload(
        tasks=tuple(
            dataclasses.replace(task, batch_size=max(1, round(task.batch_size * factor))) for task in workload.tasks
        )
    )


def timed(planner: str, problem: PlanningProblem) -> dict[str, Any]:
    """A planner's plan for a problem, what it says of it, and the seconds that it took."""
    solve = solver(planner)
    wall, cpu = time.perf_counter(), time.process_time()
    plan: Plan = solve(problem)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    predicted = plan.predicted
    return {
        "planner": planner,
        "num_devices": problem.num_devices,
        "num_configs": len(problem.configs),
        "num_buckets": len(problem.buckets),
        "num_sequences": sum(problem.counts),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "step_s": predicted.step_s,
        "bound_s": predicted.bound_s,
        "gap": predicted.gap,
        "status": predicted.status,
        "num_nodes": predicted.num_nodes,
        "plan": str(plan),
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['num_devices']:>5} devices {row['planner']:<6} {row['wall_s']:8.2f} s wall {row['cpu_s']:8.2f} s CPU  "
        f"step {row['step_s']:.4f} s  bound {row['bound_s']:.4f} s  gap {row['gap']:.2%}  {row['plan']}"
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("devices", justify="right", no_wrap=True)
    table.add_column("planner", no_wrap=True)
    for name in ("wall s", "CPU s", "step s", "bound s", "gap", "to best bound"):
        table.add_column(name, justify="right")
    table.add_column("ended", min_width=8)
    for row in rows:
        numbers = (f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}", f"{row['step_s']:#.4g}", f"{row['bound_s']:#.4g}")
        gaps = (f"{row['gap']:.2%}", f"{row['gap_to_best_bound']:.2%}")
        table.add_row(str(row["num_devices"]), row["planner"], *numbers, *gaps, row["status"] or "")
    return table


if __name__ == "__main__":
    bench()
