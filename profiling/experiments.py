"""LobRA's experiments in simulation, on its published 7B costs and lengths: `python -m profiling.experiments`.

Every plan is dispatched on the same seeded batches and timed by `planner.evaluate` at micro-batch granularity, pipeline
bubbles included. GPU-seconds are the step's seconds times all devices given, idle ones too.

What a rematerialising config costs is not in the published data. It is derived from its config without remat:

    dots   4 times the tokens, 1.05 times the time      full   16 times the tokens, 1.5 times the time

Tokens: on one device held to 40 GiB a Llama-7B replica took micro-batches of 2,048 tokens without remat, of 8,192 with
dots and of 32,768 with full (H200, JAX 0.11.2). Time: with a frozen base the backward pass multiplies by the weights as
often as the forward pass and makes no weight gradients, so forward and backward cost 2 forward passes and full remat,
which redoes the forward pass, at most 3 / 2; dots redoes only what is cheap beside the matmuls. On that H200 full took
1.19 times and dots 0.94 times as long as none, so both factors are on the safe side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from planner import task_fused
from planner.config_cost import ConfigCost
from planner.constraints import Constraints
from planner.cost import CostTable
from planner.files import check_folder, write_json, writing
from planner.lobra_files import LobraTask, parse_plan_lists
from planner.plan import Plan
from planner.planners import solver
from planner.problem import PlanningProblem, build_problem
from planner.simulate import simulate
from planner.synthetic import DatasetStatistics, read_statistics, synthetic_workload
from planner.workload import TaskLengths, Workload
from profiling.bench.provenance import provenance
from profiling.systems import SYSTEMS, System, plan_part, workloads

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

REMAT_FACTORS = {"dots": (4, 1.05), "full": (16, 1.5)}
"""Remat -> (capacity, time) as multiples of the config without."""

LOBRA_PLAN = ("2048,4096,16384", "6,1,1", "1,2,8", "1,1,1")
"""LobRA's own plan for six tasks on 16 devices, as its scripts give it: capacities, replicas, tp, pp."""

METHODS = ("task-sequential", "task-fused", "lobra", "ours", "ours-remat", "ours-robust", "ours-mixed")
LOBRA_REMAT = "none"
"""LobRA keeps everything for the backward pass, and so do the baselines."""

DEVICES = (16, 32, 64, 128, 256)
TASK_COUNTS = (4, 8, 12, 16)
TASK_DEVICES = 32
"""Devices on which the number of tasks is varied."""

BASE_DEVICES = 16
BUCKET_COUNTS = (4, 6, 8, 12, 16, 24, 32)
NUM_BUCKETS = 16
STATIC = "static7"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every experiment shares: batches a plan is simulated on, their seed, seconds for one plan."""

    steps: int
    seed: int
    time_limit_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way of training on one workload; seconds and GPU-seconds of a step, means over the simulated batches."""

    name: str
    plan: str
    num_devices: int
    step_s: float
    gpu_seconds: float
    padding_share: float
    idle_share: float


@click.command(
    epilog="\b\nExample:\n  python -m profiling.experiments --out profiling/results\n"
    "  python -m profiling.experiments --out profiling/results --only main --steps 16"
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for JSON and chart."
)
@click.option("--only", type=click.Choice(["main", "ablation", "buckets", "devices", "tasks"]), help="Only this one.")
@click.option("--steps", type=click.IntRange(min=1), default=16, show_default=True, help="Simulated batches a plan.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of lengths and batches.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=20.0, show_default=True,
              help="Seconds for one plan.")  # fmt: skip
def main(out: Path, only: str | None, steps: int, seed: int, time_limit: float) -> None:
    """Run the experiments and write experiments.json and experiments.png."""
    check_folder(out)
    settings = Settings(steps=steps, seed=seed, time_limit_s=time_limit)
    costs = CostTable.load(CONFIGS / "costs" / "llama2_7b_a100_40g.json")
    six = Workload.load(CONFIGS / "lengths" / "lobra_six_tasks.json")
    lobra = published_plan(six, costs)
    experiments: dict[str, tuple[Sequence[int], Callable[[int], list[Row]]]] = {
        "main": ((BASE_DEVICES,), lambda number: methods(six, costs, number, settings, lobra=lobra)),
        "ablation": ((BASE_DEVICES,), lambda _: ablation(six, costs, settings)),
        "buckets": ((BASE_DEVICES,), lambda _: bucket_counts(six, costs, settings)),
        "devices": (DEVICES, lambda number: by_devices(six, costs, number, settings)),
        "tasks": (TASK_COUNTS, lambda number: by_tasks(costs, number, settings)),
    }
    results: dict[str, dict[str, list[Row]]] = {}
    for name in experiments if only is None else (only,):
        numbers, experiment = experiments[name]
        results[name] = {}
        for number in numbers:
            rows = results[name][str(number)] = experiment(number)
            _print(f"{name}, {number} {'tasks' if name == 'tasks' else 'devices'}", rows)
    record = {
        "what": "simulated steps on LobRA's published Llama-2-7B costs (A100-40GB); judged by planner.evaluate",
        "command": f"python -m profiling.experiments --steps {steps} --seed {seed} --time-limit {time_limit:g}",
        "remat_factors": {name: {"capacity": c, "time": t} for name, (c, t) in REMAT_FACTORS.items()},
        **provenance(("numpy", "pyscipopt")),
        "results": {
            name: {case: [dataclasses.asdict(row) for row in rows] for case, rows in cases.items()}
            for name, cases in results.items()
        },
    }
    write_json(out / "experiments.json", record)
    with writing(out / "experiments.png"):
        chart(results, out / "experiments.png")
    click.echo(f"{out / 'experiments.json'}, {out / 'experiments.png'}")


def with_remat(costs: CostTable) -> CostTable:
    """The table with a dots and a full config beside every one without remat (see the module's docstring)."""
    made = [
        ConfigCost(
            config=dataclasses.replace(cost.config, remat=remat),
            capacity_tokens=cost.capacity_tokens * capacity,
            coefficients=tuple(value * time for value in cost.coefficients),
            fixed_s=cost.fixed_s,
        )
        for cost in costs.configs
        for remat, (capacity, time) in REMAT_FACTORS.items()
    ]
    return dataclasses.replace(costs, configs=(*costs.configs, *made))


def methods(
    workload: Workload, costs: CostTable, num_devices: int, settings: Settings, *, lobra: Plan | None = None
) -> list[Row]:
    """A row for each of `METHODS`; LobRA's plan is `lobra`, or its planner's where none is given."""
    table = with_remat(costs)
    rows = []
    for key in METHODS:
        system = SYSTEMS[key]
        if lobra is not None and key == "lobra":
            rows.append(judged(system.name, lobra, workload, costs, num_devices, settings))
        else:
            rows.append(simulated(system, workload, table, num_devices, settings))
    return rows


def simulated(system: System, workload: Workload, costs: CostTable, num_devices: int, settings: Settings) -> Row:
    """A system's row; of one that trains its tasks one after the other, seconds and GPU-seconds add up."""

    def build(part: Workload, costs: CostTable, constraints: Constraints) -> PlanningProblem:
        return build_problem(
            part,
            costs,
            num_devices,
            num_buckets=NUM_BUCKETS,
            constraints=constraints,
            time_limit_s=settings.time_limit_s,
        )

    rows = []
    for own in workloads(system, workload):
        plan = plan_part(system, own, costs, LOBRA_REMAT, build)
        name = system.name if system.is_joint else own.tasks[0].name
        rows.append(judged(name, plan, own, costs, num_devices, settings))
    if system.is_joint:
        return rows[0]
    weights = [row.step_s for row in rows]
    return Row(
        name=system.name,
        plan="; ".join(f"{row.name}: {row.plan}" for row in rows),
        num_devices=num_devices,
        step_s=sum(weights),
        gpu_seconds=sum(row.gpu_seconds for row in rows),
        padding_share=float(np.average([row.padding_share for row in rows], weights=weights)),
        idle_share=float(np.average([row.idle_share for row in rows], weights=weights)),
    )


def judged(
    name: str,
    plan: Plan,
    workload: Workload,
    costs: CostTable,
    num_devices: int,
    settings: Settings,
    *,
    method: str = "balance",
) -> Row:
    """The plan on the settings' batches."""
    simulation = simulate(plan, costs, workload, num_steps=settings.steps, seed=settings.seed, method=method)
    return Row(
        name=name,
        plan=str(plan),
        num_devices=num_devices,
        step_s=simulation.mean_step_s,
        gpu_seconds=simulation.mean_step_s * num_devices,
        padding_share=simulation.padding_share,
        idle_share=simulation.idle_share,
    )


def published_plan(workload: Workload, costs: CostTable, buckets: str = "dynamic") -> Plan:
    """LobRA's own plan for the six tasks on 16 devices."""
    groups = parse_plan_lists(*LOBRA_PLAN)
    problem = build_problem(workload, costs, BASE_DEVICES, buckets=buckets, num_buckets=NUM_BUCKETS)
    return Plan(model=costs.model, num_devices=BASE_DEVICES, replicas=groups, buckets=problem.buckets)


def ablation(workload: Workload, costs: CostTable, settings: Settings) -> list[Row]:
    """LobRA's steps one by one: homogeneous, length-based planning and dispatch, its balanced plan, dynamic buckets."""
    problem = build_problem(workload, costs, BASE_DEVICES, buckets=STATIC, time_limit_s=settings.time_limit_s)
    static, dynamic = published_plan(workload, costs, STATIC), published_plan(workload, costs)
    return [
        judged("homogeneous", task_fused.solve(problem), workload, costs, BASE_DEVICES, settings, method="uniform"),
        judged("length-based", solver("group")(problem), workload, costs, BASE_DEVICES, settings, method="group"),
        judged("balanced", static, workload, costs, BASE_DEVICES, settings),
        judged("dynamic buckets", dynamic, workload, costs, BASE_DEVICES, settings),
    ]


def bucket_counts(workload: Workload, costs: CostTable, settings: Settings) -> list[Row]:
    """LobRA's plan with more and fewer padded lengths."""
    plan = published_plan(workload, costs)
    rows = []
    for number in BUCKET_COUNTS:
        problem = build_problem(workload, costs, BASE_DEVICES, num_buckets=number)
        changed = dataclasses.replace(plan, buckets=problem.buckets)
        rows.append(judged(f"{number} lengths", changed, workload, costs, BASE_DEVICES, settings))
    return rows


def by_devices(workload: Workload, costs: CostTable, num_devices: int, settings: Settings) -> list[Row]:
    """The methods with batches that grow with the devices, so that a device has as much to do."""
    scale = num_devices // BASE_DEVICES
    tasks = tuple(dataclasses.replace(task, batch_size=task.batch_size * scale) for task in workload.tasks)
    return methods(Workload(tasks=tasks), costs, num_devices, settings)


def by_tasks(costs: CostTable, number: int, settings: Settings) -> list[Row]:
    """The methods with tasks made from the published statistics of data sets, in their order, again after the last."""
    return methods(tasks_of_statistics(number, settings.seed), costs, TASK_DEVICES, settings)


def tasks_of_statistics(number: int, seed: int) -> Workload:
    """The first `number` data sets of the published statistics as tasks, beginning again after the last."""
    path = CONFIGS / "statistics" / "lobra_datasets.csv"
    statistics = read_statistics(path)
    sizes = _batch_sizes(path)
    chosen = [statistics[index % len(statistics)] for index in range(min(number, len(statistics)))]
    workload, _ = synthetic_workload([_task(row, sizes[row.dataset]) for row in chosen], statistics, seed=seed)
    tasks = [
        TaskLengths(
            name=task.name if index < len(workload.tasks) else f"{task.name}-{1 + index // len(workload.tasks)}",
            batch_size=task.batch_size,
            lengths=task.lengths,
        )
        for index in range(number)
        for task in (workload.tasks[index % len(workload.tasks)],)
    ]
    return Workload(tasks=tuple(tasks))


def _batch_sizes(path: Path) -> dict[str, int]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = header.split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    return {row["dataset"]: int(row["batch_size"]) for row in rows}


def _task(row: DatasetStatistics, batch_size: int) -> LobraTask:
    return LobraTask(
        name=row.dataset,
        dataset=row.dataset,
        batch_size=batch_size,
        context_length=row.context_length,
        rank=16,
        alpha=16.0,
        targets=("q", "k", "v", "o"),
        steps=1,
    )


def _print(title: str, rows: Sequence[Row]) -> None:
    click.echo(title)
    reference = next((row.gpu_seconds for row in rows if row.name == "LobRA"), rows[-1].gpu_seconds)
    for row in rows:
        click.echo(
            f"  {row.name:20} {row.step_s:8.3f} s  {row.gpu_seconds:9.1f} GPU-s  {row.gpu_seconds / reference:6.3f} x  "
            f"padding {row.padding_share:5.1%}  idle {row.idle_share:5.1%}  {row.plan}"
        )


def chart(results: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """One panel an experiment: GPU-seconds of a step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(5 * len(results), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (name, cases) in zip(axes[0], results.items(), strict=True):
        axis.set_title(name)
        axis.set_ylabel("GPU-seconds a step")
        if len(cases) == 1:
            rows = next(iter(cases.values()))
            axis.bar([row.name for row in rows], [row.gpu_seconds for row in rows])
            axis.tick_params(axis="x", rotation=45)
        else:
            for index, row in enumerate(next(iter(cases.values()))):
                axis.plot(list(cases), [rows[index].gpu_seconds for rows in cases.values()], marker="o", label=row.name)
            axis.set_xlabel(name)
            axis.set_yscale("log")
            axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
