"""How long the exact planner takes on cost tables and tasks that it was not tuned on.

Each instance is drawn from its seed: the published 7B table with every config a few percent quicker or slower than
another, all of it quicker or slower, more or less memory, some narrow configs missing and half of the time with the
remat axis (`profiling.experiments.with_remat`); three to twelve of the published tasks, batches of half to one and a
half times their size.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from planner.cost import CostTable
from planner.errors import UserError
from planner.files import check_file, write_json
from planner.inputs import FILE
from planner.lobra_files import read_cost_table, read_tasks
from planner.problem import build_problem
from planner.synthetic import read_statistics, synthetic_workload
from planner.workload import Workload
from profiling.bench.options import published_files
from profiling.bench.planning import BASE_DEVICES, LIBRARIES, MEMORY, NUM_LAYERS, STATISTICS, TIMES, scaled, timed
from profiling.bench.provenance import provenance
from profiling.experiments import with_remat

TASKS = "exp_task12.json"
USUAL_NUM_TASKS = 6
"""Tasks whose batches keep BASE_DEVICES devices busy."""

SPEED_NOISE = 0.03
MEMORY_NOISE = 0.1
SPEEDS, MEMORIES, BATCHES = (0.3, 2.0), (0.7, 2.5), (0.5, 1.5)
"""Factors of all configs' seconds, of all capacities, and of batch sizes: least and most."""

MISSING = 0.15
"""Chance of each config below WIDE devices a stage to be missing; wide ones hold the longest sequences."""

WIDE = 8


@click.command(
    epilog="\b\nExample:\n"
    "  python -m profiling.bench.unlike_tables --reference DIR --out profiling/results/planning_unlike_tables.json"
)
@published_files
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The JSON to write.")
@click.option("--devices", default="16,64,256", show_default=True, help="Numbers of devices.")
@click.option("--instances", type=click.IntRange(min=1), default=10, show_default=True, help="For each of them.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first instance.")
@click.option("--time-limit", type=float, default=30.0, show_default=True, help="Seconds for each.")
def bench(reference: Path, out: Path, devices: str, instances: int, seed: int, time_limit: float) -> None:
    """Times the exact planner on drawn instances and writes them as JSON."""
    check_file(out)
    console = Console()
    rows: list[dict[str, Any]] = []
    for num_devices in (int(item) for item in devices.split(",")):
        for number in range(seed, seed + instances):
            row = _planned(reference, num_devices, number, time_limit)
            rows.append(row)
            told = row.get("error") or f"{row['cpu_s']:6.2f} s CPU  gap {row['gap']:.2%}  {row['plan']}"
            console.print(f"{num_devices:>5} devices seed {number:>3}  {told}", highlight=False, soft_wrap=True)
        mine = [row for row in rows if row["num_devices"] == num_devices and "error" not in row]
        seconds = [row["cpu_s"] for row in mine] or [float("nan")]
        within = sum(row["gap"] <= 0.01 for row in mine)
        console.print(
            f"{num_devices:>5} devices: median {np.median(seconds):.2f} s, most {max(seconds):.2f} s CPU; "
            f"{within} of {len(mine)} within 1 %",
            highlight=False,
        )
    written = {**provenance(LIBRARIES), "settings": {"seed": seed, "time_limit_s": time_limit}, "rows": rows}
    write_json(out, written)


def instance(reference: Path, num_devices: int, seed: int) -> tuple[Workload, CostTable]:
    """The workload and the cost table of a seed."""
    rng = np.random.default_rng((num_devices, seed))
    tasks = read_tasks(reference / TASKS)
    number = int(rng.integers(3, len(tasks) + 1))
    chosen = [tasks[index] for index in sorted(rng.choice(len(tasks), number, replace=False).tolist())]
    workload, _ = synthetic_workload(chosen, read_statistics(reference / STATISTICS), seed=seed)
    grown = num_devices / BASE_DEVICES * USUAL_NUM_TASKS / number * rng.uniform(*BATCHES)
    costs = read_cost_table(reference / TIMES, reference / MEMORY, num_layers=NUM_LAYERS, model="llama-7b")
    if rng.random() < 0.5:
        costs = with_remat(costs)
    speed, memory = np.exp(rng.uniform(*np.log(SPEEDS))), rng.uniform(*MEMORIES)
    configs = []
    for cost in costs.configs:
        slower = speed * np.exp(rng.normal(0, SPEED_NOISE))
        capacity = int(cost.capacity_tokens * memory * rng.uniform(1 - MEMORY_NOISE, 1 + MEMORY_NOISE))
        if cost.config.tp < WIDE and rng.random() < MISSING:
            continue
        coefficients = tuple(value * slower for value in cost.coefficients)
        configs.append(dataclasses.replace(cost, capacity_tokens=capacity, coefficients=coefficients))
    return scaled(workload, grown), dataclasses.replace(costs, configs=tuple(configs))


def _planned(reference: Path, num_devices: int, seed: int, time_limit: float) -> dict[str, Any]:
    workload, costs = instance(reference, num_devices, seed)
    row: dict[str, Any] = {"num_devices": num_devices, "seed": seed}
    try:
        problem = build_problem(workload, costs, num_devices, time_limit_s=time_limit)
    except UserError as error:  # a sequence longer than every capacity
        return {**row, "error": str(error)}
    return {**row, **timed("exact", problem)}


if __name__ == "__main__":
    bench()
