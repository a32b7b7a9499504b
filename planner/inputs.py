"""What planning commands read: costs and lengths, in our formats or in the original LobRA's, and plans of either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from planner.bucketing import bucket_lengths
from planner.cost import CostTable
from planner.errors import UserError
from planner.lobra_files import is_strategy_file, parse_plan_lists, read_cost_table, read_strategy, read_tasks
from planner.plan import Plan
from planner.problem import DEFAULT_NUM_BUCKETS
from planner.synthetic import Reached, read_statistics, synthetic_workload
from planner.workload import Workload

FILE = click.Path(path_type=Path, dir_okay=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The values of `input_options`: which files to read, nothing read yet."""

    costs: Path | None
    lobra_time: Path | None
    lobra_memory: Path | None
    num_layers: int | None
    model: str | None
    lengths: Path | None
    lobra_tasks: Path | None
    lobra_statistics: Path | None
    lengths_seed: int


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say where costs and lengths come from; a command collects them as `Inputs(**rest)`."""
    options = (
        click.option("--costs", type=FILE, metavar="FILE", help="Cost table of `lobra profile` (costs.json)."),
        click.option("--lobra-time", type=FILE, metavar="CSV", help="Instead of --costs: LobRA's time profile,"),
        click.option("--lobra-memory", type=FILE, metavar="CSV", help="LobRA's memory profile,"),
        click.option("--num-layers", type=click.IntRange(min=1), help="and the layers of the profiled model."),
        click.option("--model", metavar="NAME", help="Name of that model in plans; by default the time file's."),
        click.option("--lengths", type=FILE, metavar="FILE", help="Length histogram of every task (hist.json)."),
        click.option("--lobra-tasks", type=FILE, metavar="JSON", help="Instead of --lengths: LobRA's trainer config,"),
        click.option(
            "--lobra-statistics",
            type=FILE,
            metavar="CSV",
            help="and mean, skewness and kurtosis of its data sets, which synthetic lengths then match.",
        ),
        click.option(
            "--lengths-seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Seed of synthetic lengths.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def plan_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--lobra-plan` (argument `lobra_plan: tuple of four strings or None`)."""
    return click.option(
        "--lobra-plan",
        nargs=4,
        metavar="TOKENS DPS TPS PPS",
        help="Instead of a plan file: LobRA's four comma lists, for example 2048,16384 8,1 1,8 1,1.",
    )(command)


def beside(plan: Path, name: str) -> Path:
    """Where `lobra plan` leaves what it planned from: plan.yaml -> plan.costs.json, plan.lengths.json."""
    return plan.with_name(f"{plan.stem}.{name}.json")


def read_costs(inputs: Inputs, plan: Path | None = None) -> CostTable:
    """The cost table that the options name, else the one beside the plan."""
    lobra = {
        "--lobra-time": inputs.lobra_time,
        "--lobra-memory": inputs.lobra_memory,
        "--num-layers": inputs.num_layers,
    }
    if _chosen("--costs", inputs.costs, lobra):
        return read_cost_table(inputs.lobra_time, inputs.lobra_memory, num_layers=inputs.num_layers, model=inputs.model)
    costs = CostTable.load(inputs.costs or _found(plan, "costs"))
    if costs.estimate_note is not None:
        click.echo(costs.estimate_note)
    return costs


def read_lengths(inputs: Inputs, plan: Path | None = None) -> tuple[Workload, tuple[Reached, ...]]:
    """The workload that the options name, else the one beside the plan; and what synthetic lengths reached."""
    lobra = {"--lobra-tasks": inputs.lobra_tasks, "--lobra-statistics": inputs.lobra_statistics}
    if _chosen("--lengths", inputs.lengths, lobra):
        statistics = read_statistics(inputs.lobra_statistics)
        return synthetic_workload(read_tasks(inputs.lobra_tasks), statistics, seed=inputs.lengths_seed)
    return Workload.load(inputs.lengths or _found(plan, "lengths")), ()


def check_one_plan(path: Path | None, lists: tuple[str, str, str, str] | None) -> None:
    """Raises `UserError` unless a plan is named in exactly one of the ways `load_plan` knows."""
    if (path is None) == (lists is None):
        raise UserError("name one plan", key="PLAN", expected="a plan file or --lobra-plan TOKENS DPS TPS PPS")


def load_plan(
    path: Path | None, lists: tuple[str, str, str, str] | None, *, costs: CostTable, workload: Workload
) -> Plan:
    """A plan.yaml, a LobRA strategy YAML or LobRA's four comma lists.

    The original's formats name neither model nor buckets: such a plan gets the cost table's model and buckets that pad
    the workload least.
    """
    check_one_plan(path, lists)
    if path is not None and not is_strategy_file(path):
        return Plan.load(path)
    groups = parse_plan_lists(*lists) if path is None else read_strategy(path)
    capacity = max(group.capacity_tokens for group in groups)
    if workload.max_length > capacity:
        raise UserError(
            f"sequences of {workload.max_length} tokens fit no replica",
            file=path or "--lobra-plan",
            key="max_tokens",
            value=capacity,
            expected=f"at least {workload.max_length}",
        )
    buckets = bucket_lengths(workload, "dynamic", num_buckets=DEFAULT_NUM_BUCKETS, max_capacity_tokens=capacity)
    used = sum(group.num_devices for group in groups)
    return Plan(model=costs.model, num_devices=used, replicas=groups, buckets=buckets)


def _chosen(flag: str, value: Path | None, lobra: dict[str, Any]) -> bool:
    """Whether the original's files are meant; half of them, or both kinds, are a mistake."""
    given = [name for name, file in lobra.items() if file is not None]
    if not given:
        return False
    if value is not None:
        raise UserError(f"both {flag} and {given[0]}", key=given[0], expected=f"{flag} or {', '.join(lobra)}")
    for name, file in lobra.items():
        if file is None:
            raise UserError("missing", key=name, expected=f"{', '.join(lobra)} together")
    return True


def found_beside(plan: Path, name: str) -> Path | None:
    """The input file of that name beside a plan of `lobra plan` or in its run directory, if there is one."""
    return next((path for path in _places(plan, name) if path.is_file()), None)


def _places(plan: Path, name: str) -> tuple[Path, Path]:
    return beside(plan, name), plan.with_name(f"{name}.json")


def _found(plan: Path | None, name: str) -> Path:
    if plan is None:
        raise UserError("missing", key=f"--{name}", expected=f"the path of a {name}.json")
    path = found_beside(plan, name)
    if path is not None:
        return path
    expected = f"{' or '.join(path.name for path in _places(plan, name))} there, or --{name}"
    raise UserError(f"no {name} beside the plan", file=plan, expected=expected)
