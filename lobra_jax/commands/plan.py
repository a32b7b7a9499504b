"""`lobra plan`: the plan of a run config, or of a cost table and length histograms alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax.run_folder import CONFIG_FILE, COSTS_FILE, LENGTHS_FILE, METRICS_FILE, PLAN_FILE
from planner.compare import Compared, compare_tables, comparison_lines, load_compared
from planner.cost import CostTable
from planner.errors import UserError
from planner.files import check_file
from planner.inputs import FILE, Inputs, input_options, read_costs, read_lengths
from planner.plan_output import bucket_table, plan_and_write
from planner.planning import PlanningFlags, bucket_report
from planner.planning_options import planning_options
from planner.problem import DEFAULT_TIME_LIMIT_S
from planner.workload import TaskLengths, Workload

if TYPE_CHECKING:
    from lobra_jax.config import RunConfig


@click.command(
    epilog="\b\nExample:\n  lobra plan --config C.yaml --costs costs.json --out plan.yaml\n"
    "  lobra plan --lobra-time T.csv --lobra-memory M.csv --num-layers 32 --lengths hist.json --devices 16 "
    "--out plan.yaml\n"
    "  lobra plan --config C.yaml --costs costs.json --robust p95 --samples 64 --out plan.yaml\n"
    "  lobra plan --check runs/first"
)
@click.option("--config", "config_path", type=FILE, metavar="FILE", help="The run's config; it brings the lengths.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key of the config. Repeatable.")
@input_options
@click.option(
    "--devices", type=click.IntRange(min=1), help="Devices to plan for; by default the config's, else the cost table's."
)
@planning_options
@click.option("--out", type=FILE, metavar="FILE", help="The plan.yaml to write.")
@click.option(
    "--check",
    "run",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="RUN",
    help="Plan nothing: say whether a run's plan is still within 5 % of the best for the lengths it has seen.",
)
@click.option(
    "--compare",
    type=FILE,
    metavar="FILE",
    multiple=True,
    help="Also plan on this cost table, of another model.quantization, and print what each would take. Repeatable.",
)
@click.option(
    "--buckets-report",
    is_flag=True,
    help="Plan nothing: padding, programs and seconds a step for each number of padded lengths.",
)
def plan(
    config_path: Path | None,
    overrides: tuple[str, ...],
    devices: int | None,
    out: Path | None,
    run: Path | None,
    compare: tuple[Path, ...],
    buckets_report: bool,
    **rest: Any,
) -> None:
    """Choose the replicas that finish a step soonest and write a plan.

    With --config the lengths are those of its data (tokenised if need be) and flags here win over its `planner`
    section. Without it, name costs, lengths and --devices. What was planned from is written beside the plan, as
    PLAN.costs.json and PLAN.lengths.json, where `lobra explain` and `lobra simulate` find it. With --robust the plan is
    judged on sampled batches in place of the expected one, and PLAN.robust.json says how it fared. What --compare says
    changes nothing in the plan: how the base is stored changes what is trained, so model.quantization says it.
    """
    from rich.console import Console

    flags = PlanningFlags(**{field.name: rest.pop(field.name) for field in dataclasses.fields(PlanningFlags)})
    inputs = Inputs(**rest)
    console = Console()
    if compare and (run is not None or buckets_report):
        flag = "--check" if run is not None else "--buckets-report"
        raise UserError(f"--compare with {flag}", key="--compare", value=str(compare[0]), expected="--out beside it")
    if run is not None:
        _check(run, flags, console)
        return
    if buckets_report:
        out = None
    elif out is None:
        raise UserError("missing", key="--out", expected="the plan.yaml to write")
    else:
        check_file(out)
    if config_path is None:
        if overrides:
            raise UserError(
                "--set without a config", key="--set", value=overrides[0], expected="--config FILE beside it"
            )
        _plan_from_files(inputs, devices, out, flags, console, compare)
        return
    _plan_from_config(config_path, overrides, inputs, devices, out, flags, console, compare)


def _check(run: Path, flags: PlanningFlags, console: Any) -> None:
    """Prints whether the run's plan is still good for the lengths in its metrics."""
    from planner.defaults import DEFAULT_SAMPLES
    from planner.drift import GOOD_SHARE, check_drift
    from planner.plan import Plan
    from planner.plan_output import times_text

    present, costs = Plan.load(run / PLAN_FILE), CostTable.load(run / COSTS_FILE)
    seen, num_steps = seen_lengths(run, present.buckets[-1])
    constraints = _run_flags(run, flags).constraints
    with console.status("planning for the lengths seen"):
        drift = check_drift(
            present,
            costs,
            seen,
            num_samples=flags.samples or DEFAULT_SAMPLES,
            seed=0,
            time_limit_s=flags.time_limit or DEFAULT_TIME_LIMIT_S,
            constraints=constraints,
        )
    lines = [f"lengths of {num_steps} steps; present plan {present}: {times_text(drift.present_times)}"]
    if drift.best is not present:
        lines.append(f"best plan found {drift.best}: {times_text(drift.best_times)}")
    verdict = "still good" if drift.is_good else "worth planning anew"
    lines.append(f"{verdict}: {drift.excess:.1%} over the best plan found, where up to {GOOD_SHARE:.0%} counts as good")
    if not drift.is_sure:
        lines.append(
            f"the search ended {drift.gap:.0%} from proven: with a longer --time-limit it may find better plans"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _run_flags(run: Path, flags: PlanningFlags) -> PlanningFlags:
    """The flags, with what the run's own config says where a flag was not given."""
    from lobra_jax.config import load_config

    path = run / CONFIG_FILE
    return merged_flags(load_config(path, check_files=False), flags) if path.is_file() else flags


def seen_lengths(run: Path, longest: int) -> tuple[Workload, int]:
    """(the lengths of every task's sequences in a run's metrics, the steps they are of).

    Lengths were rounded up when they were recorded: to no more than `longest`, the plan's longest bucket.

    Raises:
      UserError: no metrics there, or none of a task's lengths in them.
    """
    from lobra_jax.metrics import read_metrics

    planned = {task.name: task.batch_size for task in Workload.load(run / LENGTHS_FILE).tasks}
    seen: dict[str, dict[int, int]] = {}
    steps = set()
    metrics, expected = run / METRICS_FILE, "a run that has trained a step: lobra train first"
    if not metrics.exists():
        raise UserError("no metrics, so no lengths that the run has seen", file=metrics, expected=expected)
    for record in read_metrics(metrics, "task"):
        counts = seen.setdefault(record["task"], {})
        for length, number in (record.get("lengths") or {}).items():
            tokens = min(int(length), longest)
            counts[tokens] = counts.get(tokens, 0) + number
            steps.add(record["step"])
    seen = {name: counts for name, counts in seen.items() if counts and name in planned}
    if not seen:
        raise UserError("no lengths recorded", file=metrics, key="lengths", expected=expected)
    tasks = tuple(
        TaskLengths(
            name=name,
            batch_size=planned[name],
            lengths={length: number / sum(counts.values()) for length, number in sorted(counts.items())},
        )
        for name, counts in seen.items()
    )
    return Workload(tasks=tasks), len(steps)


def _plan_from_files(
    inputs: Inputs,
    devices: int | None,
    out: Path | None,
    flags: PlanningFlags,
    console: Any,
    compare: tuple[Path, ...],
) -> None:
    if devices is None:
        raise UserError("missing", key="--devices", expected="the number of devices to plan for, or --config")
    costs = read_costs(inputs)
    workload, reached = read_lengths(inputs)
    if reached:
        from planner.explain_text import reached_table

        console.print(reached_table(reached))
    _plan_or_report(workload, costs, devices, out, flags, console, compare)


def _plan_from_config(
    config_path: Path,
    overrides: tuple[str, ...],
    inputs: Inputs,
    devices: int | None,
    out: Path | None,
    flags: PlanningFlags,
    console: Any,
    compare: tuple[Path, ...],
) -> None:
    from lobra_jax.config import load_config
    from lobra_jax.data.load import task_lengths

    for name in ("lobra_time", "lobra_memory", "num_layers", "model", "lengths", "lobra_tasks", "lobra_statistics"):
        if getattr(inputs, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError("not with --config", key=flag, expected="a config alone, which says model and data")
    config = load_config(config_path, overrides)
    costs = config_costs(config, inputs.costs, config_path)
    number = planned_devices(config, costs, devices)
    with console.status("reading the tasks' lengths"):
        workload = task_lengths(config, config_path)
    _plan_or_report(workload, costs, number, out, merged_flags(config, flags), console, compare)


def _plan_or_report(
    workload: Workload,
    costs: CostTable,
    devices: int,
    out: Path | None,
    flags: PlanningFlags,
    console: Any,
    compare: tuple[Path, ...],
) -> None:
    """Plans into `out`; without one prints what each number of padded lengths would cost."""
    others = load_compared(compare, costs)
    if out is not None:
        plan = plan_and_write(workload, costs, devices, out, flags, console)
        if others:
            with console.status("planning on the other cost tables"):
                compared = compare_tables(workload, others, devices, flags)
            for line in comparison_lines((Compared(quantization=costs.quantization, plan=plan), *compared)):
                console.print(line, highlight=False, soft_wrap=True)
        return
    with console.status("dispatching with each number of padded lengths"):
        rows = bucket_report(workload, costs, devices, flags)
    console.print(bucket_table(rows))


def planned_devices(config: RunConfig, costs: CostTable, flag: int | None) -> int:
    """The number of devices to plan for.

    Args:
      config: `devices.num_devices` comes after `flag`, then `devices.simulated`.
      costs: the number of devices that it was measured on comes last; that one is printed if it is taken.
      flag: `--devices`; None if it was not given.

    Raises:
      UserError: none of them says.
    """
    number = flag or config.devices.num_devices or config.devices.simulated
    if number is not None:
        return number
    measured = costs.hardware.get("num_devices")
    if not isinstance(measured, int) or isinstance(measured, bool) or measured < 1:
        raise UserError(
            "missing, and the cost table does not tell it",
            key="devices.num_devices",
            value=measured,
            expected="the number of devices to plan for, in the config or as --devices of `lobra plan`",
        )
    click.echo(f"planning for {measured} devices, as many as the cost table was measured on")
    return measured


def config_costs(config: RunConfig, path: Path | None, config_path: Path) -> CostTable:
    """The cost table of a run, `path` or else the config's `planner.costs`; of another model it is a `UserError`."""
    from lobra_jax.config import model_config

    path = path or config.planner.costs
    if path is None:
        raise UserError("missing", file=config_path, key="planner.costs", expected="a costs.json there, or --costs")
    costs = CostTable.load(path)
    shapes = model_config(config)
    if costs.model_fingerprint != shapes.fingerprint:
        raise UserError(
            "cost table of another model",
            file=path,
            key="model",
            value=f"{costs.model} {costs.model_fingerprint}",
            expected=f"{shapes.name} {shapes.fingerprint}, as the config says",
        )
    check_quantization_of(costs, config, path)
    return costs


def check_quantization_of(costs: CostTable, config: RunConfig, path: Path) -> None:
    """Refuses a cost table whose times and capacities are of a base stored in another way than the config's."""
    measured, wanted = costs.quantization, config.model.quantization
    if measured != wanted:
        raise UserError(
            "the cost table was measured with another model.quantization",
            file=path,
            key="provenance.quantization",
            value=measured,
            expected=f"{wanted} as the config says, or --set model.quantization={measured}",
        )


def merged_flags(config: RunConfig, flags: PlanningFlags) -> PlanningFlags:
    """The flags, with the config's `planner` section where a flag was not given."""
    defaults = config_flags(config)
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value is not None}
    return dataclasses.replace(defaults, **given)


def config_flags(config: RunConfig) -> PlanningFlags:
    """The config's `planner` section as flags."""
    section = config.planner
    return PlanningFlags(
        planner=section.planner,
        proposal=section.proposal,
        buckets=section.buckets,
        num_buckets=section.num_buckets,
        row_options=section.row_options,
        compile_s=section.compile_s,
        amortise_steps=max(task.steps for task in config.tasks),
        max_tp=section.max_tp,
        max_pp=section.max_pp,
        tps=section.tps,
        pps=section.pps,
        remats=section.remats,
        mix_remats=section.mix_remats,
        devices_per_host=section.devices_per_host,
        pinned=section.pinned,
        max_configs=section.max_configs,
        time_limit=section.solve_time_limit_s,
        robust=section.robust,
        samples=section.samples,
        batching=config.training.batching,
    )
