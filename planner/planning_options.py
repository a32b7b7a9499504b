"""The flags of `PlanningFlags`, for commands that plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from planner.batching import BATCHINGS
from planner.defaults import DEFAULT_COMPILE_S, DEFAULT_STEPS
from planner.errors import UserError
from planner.lattice import MAX_ROW_OPTIONS
from planner.plan import REMATS
from planner.planners import PLANNERS
from planner.robust import percentile


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
