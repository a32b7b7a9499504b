"""`lobra plan`: the plan of a run config, or of a cost table and length histograms alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli import PlanningFlags, plan_and_write, planning_options
from planner.cost import CostTable
from planner.errors import UserError
from planner.inputs import FILE, Inputs, input_options, read_costs, read_lengths

if TYPE_CHECKING:
    from lobra_jax.config import RunConfig


@click.command(
    epilog="\b\nExample:\n  lobra plan --config C.yaml --costs costs.json --out plan.yaml\n"
    "  lobra plan --lobra-time T.csv --lobra-memory M.csv --num-layers 32 --lengths hist.json --devices 16 "
    "--out plan.yaml"
)
@click.option("--config", "config_path", type=FILE, metavar="FILE", help="The run's config; it brings the lengths.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key of the config. Repeatable.")
@input_options
@click.option(
    "--devices", type=click.IntRange(min=1), help="Devices to plan for; by default the config's, else the cost table's."
)
@planning_options
@click.option("--out", type=FILE, required=True, metavar="FILE", help="The plan.yaml to write.")
def plan(config_path: Path | None, overrides: tuple[str, ...], devices: int | None, out: Path, **rest: Any) -> None:
    """Choose the replicas that finish a step soonest and write a plan.

    With --config the lengths are those of its data (tokenised if need be) and flags here win over its `planner`
    section. Without it, name costs, lengths and --devices. What was planned from is written beside the plan, as
    PLAN.costs.json and PLAN.lengths.json, where `lobra explain` and `lobra simulate` find it.
    """
    from rich.console import Console

    flags = PlanningFlags(**{field.name: rest.pop(field.name) for field in dataclasses.fields(PlanningFlags)})
    inputs = Inputs(**rest)
    console = Console()
    if config_path is None:
        if overrides:
            raise UserError(
                "--set without a config", key="--set", value=overrides[0], expected="--config FILE beside it"
            )
        _plan_from_files(inputs, devices, out, flags, console)
        return
    _plan_from_config(config_path, overrides, inputs, devices, out, flags, console)


def _plan_from_files(inputs: Inputs, devices: int | None, out: Path, flags: PlanningFlags, console: Any) -> None:
    if devices is None:
        raise UserError("missing", key="--devices", expected="the number of devices to plan for, or --config")
    costs = read_costs(inputs)
    workload, reached = read_lengths(inputs)
    if reached:
        from planner.explain_text import reached_table

        console.print(reached_table(reached))
    plan_and_write(workload, costs, devices, out, flags, console)


def _plan_from_config(
    config_path: Path,
    overrides: tuple[str, ...],
    inputs: Inputs,
    devices: int | None,
    out: Path,
    flags: PlanningFlags,
    console: Any,
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
        workload = task_lengths(config)
    plan_and_write(workload, costs, number, out, merged_flags(config, flags), console)


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
    return costs


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
        max_tp=section.max_tp,
        max_pp=section.max_pp,
        tps=section.tps,
        pps=section.pps,
        remats=section.remats,
        devices_per_host=section.devices_per_host,
        pinned=section.pinned,
        max_configs=section.max_configs,
        time_limit=section.solve_time_limit_s,
    )
