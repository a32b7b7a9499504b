"""`lobra profile`: measures parallel configs on the devices present into a cost table."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax import __version__
from lobra_jax.commands.options import config_options
from planner.errors import UserError
from planner.files import check_out
from profiling.device_specs import SPECS

if TYPE_CHECKING:
    from rich.console import Console

    from lobra_jax.config import RunConfig
    from planner.config_cost import ConfigCost
    from planner.cost import CostTable
    from planner.plan import ParallelConfig
    from profiling.measure import Setup
    from profiling.table import Header

DEFAULT_REPEATS = 3
ABOUT_ALL = 0.95
"""Capacities found with less than this share of the memory that there is now are told to be too small."""

CORES_A_SEARCH = 3
"""For each of the capacity searches at a time: it compiles up to seven programs at once, then waits for the slowest."""


@click.command(
    epilog="\b\nExample:\n  lobra profile --config run.yaml --out costs.json\n"
    "  lobra profile --config run.yaml --estimate h200 --devices 4 --out costs.json\n"
    "  lobra profile --config run.yaml --plan plan.yaml --out plan.costs.json"
)
@config_options
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), required=True, help="The costs.json to write.")
@click.option("--configs", metavar="TPxPP,...", help="Measure only these, such as 1x1,2x1; by default all.")
@click.option("--lengths", metavar="L,L,...", help="Lengths to measure at; by default a short, a middle, the longest.")
@click.option("--max-tokens", type=click.IntRange(min=16), help="Largest micro-batch of interest, in tokens.")
@click.option("--repeats", type=click.IntRange(min=1), default=DEFAULT_REPEATS, show_default=True, help="Readings.")
@click.option("--num-tasks", type=click.IntRange(min=1), help="Adapters stacked; by default the config's tasks.")
@click.option("--rank", type=click.IntRange(min=1), help="Padded rank; by default the largest of the config's tasks.")
@click.option(
    "--capacities",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An earlier costs.json of the model: its capacities are confirmed where they fit, even where more would.",
)
@click.option("--estimate", metavar="DEVICE", help=f"Estimate for devices that are not here: {', '.join(SPECS)}.")
@click.option(
    "--devices", type=click.IntRange(min=1), help="With --estimate: how many; by default devices.num_devices."
)
@click.option(
    "--plan",
    "plan_path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Time this plan's own micro-batches instead, into the costs that it was made from.",
)
def profile(config_path: Path, overrides: tuple[str, ...], out: Path, **options: Any) -> None:
    """Measure parallel configs on these devices into a cost table.

    Which configs: every (tp, pp, remat) that divides the model and fits the devices, within planner.max_tp, max_pp and
    remats. With training.batching: packed or auto, packed micro-batches too. On accelerators as many configs are timed
    at the same time as there are devices for. An interrupted run goes on where it stopped when it is started again.

    With --estimate nothing is measured, allocated or run: times come from published numbers of the device and from the
    work counted in traced programs, padded ones only. `lobra bench estimate` tells how far off such a table is.

    With --plan every micro-batch that the plan's replicas may run is timed: the costs of the plan, with these times in
    place of fitted ones, foretell its steps better and let dispatch share them out more evenly.
    """
    from rich.console import Console

    from lobra_jax.commands.plan import config_costs
    from lobra_jax.config import load_config
    from lobra_jax.devices import configure

    check_out(out)
    plan_path = options.pop("plan_path")
    config = load_config(config_path, overrides, check_files=options["lengths"] is None and plan_path is None)
    if plan_path is not None:
        from profiling.refine import run_refine

        _refuse_beside_plan(options)
        run_refine(config, plan_path, out, Console(), repeats=options["repeats"])
        return
    estimate, devices = options.pop("estimate"), options.pop("devices")
    if estimate is not None:
        from profiling.estimate_table import run_estimate

        if (capacities := options.pop("capacities")) is not None:
            expected = "a table to be measured; estimates count their own capacities"
            raise UserError("not with --estimate", key="--capacities", value=str(capacities), expected=expected)
        run_estimate(config, out, Console(), device=estimate, num_devices=devices, **options)
        return
    if devices is not None:
        raise UserError("only with --estimate", key="--devices", value=devices, expected="devices.num_devices")
    path = options.pop("capacities")
    earlier = None if path is None else config_costs(config, path, config_path)
    configure(config.devices, cache_dir=config.data.cache_dir)
    run_profile(config, out, Console(), earlier=earlier, **options)


def _refuse_beside_plan(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name != "repeats" and value is not None:
            key = f"--{name.replace('_', '-')}"
            raise UserError("not with --plan", key=key, value=str(value), expected="--repeats alone beside it")


def run_profile(
    config: RunConfig,
    out: Path,
    console: Console,
    *,
    configs: str | None = None,
    lengths: str | None = None,
    max_tokens: int | None = None,
    repeats: int = DEFAULT_REPEATS,
    num_tasks: int | None = None,
    rank: int | None = None,
    earlier: CostTable | None = None,
) -> CostTable:
    """Measures, saves to `out` and prints; devices have been configured. Raises `UserError`.

    `earlier` is a table of the same base whose capacities are confirmed instead of searched.
    """
    from profiling.ahead import Searches
    from profiling.config_cost import search_capacity
    from profiling.overhead import measure_step_overhead
    from profiling.rounds import measure_round, rounds_of
    from profiling.table import load_partial, measure_all, partial_path

    started = time.perf_counter()
    setup = make_setup(config, lengths, max_tokens, repeats, num_tasks, rank)
    if earlier is not None:
        setup = dataclasses.replace(setup, expected=_expected_capacities(earlier, setup))
        memory_bytes = earlier.hardware.get("memory_bytes")
        if memory_bytes is not None and memory_bytes < ABOUT_ALL * setup.limit_bytes:
            console.print(
                f"the earlier capacities were found with {memory_bytes:,} bytes a device; with the "
                f"{setup.limit_bytes:,} here more tokens may fit than are looked for",
                highlight=False,
            )
    wanted = wanted_configs(config, setup, configs)
    header = make_header(setup, wanted_configs(config, setup, None))
    partial = partial_path(out)
    progress, differing = load_partial(partial, header)
    if differing:
        console.print(f"{partial} is of another set-up ({', '.join(differing)}): measuring everything anew")
    known = [c for c in wanted if c in progress]
    if known:
        console.print(f"{len(known)} of {len(wanted)} configs were measured before")
    pending = [c for c in wanted if c not in progress]
    rounds = rounds_of(setup, pending)
    first_device = {c: first for placed in rounds for c, first in placed}
    searches = Searches(
        lambda c: search_capacity(setup, c, first_device=first_device[c]),
        pending,
        at_once=setup.num_threads // CORES_A_SEARCH,
    )
    with progress_bar(console, len(wanted), len(known)) as advance:
        progress = measure_all(
            [[c for c, _ in placed] for placed in rounds],
            lambda configs, keep: measure_round(setup, searches, {c: first_device[c] for c in configs}, keep),
            partial=partial,
            header=header,
            progress=progress,
            on_config=advance,
        )
    costs = [progress.measured[c] for c in wanted if c in progress.measured]
    dropped = {c: progress.dropped[c] for c in wanted if c in progress.dropped}
    if not costs:
        reason = f"more: of {wanted[-1]} {dropped[wanted[-1]]}"
        raise UserError("no config fits the devices' memory", key="devices.memory_bytes", expected=reason)
    narrowest = min((cost.config for cost in costs), key=lambda c: c.num_devices)
    overhead_s = measure_step_overhead(setup, narrowest)
    table = header.table(costs, overhead_s)
    table.save(out)
    partial.unlink(missing_ok=True)
    print_summary(console, table, dropped, out, time.perf_counter() - started)
    return table


def _expected_capacities(earlier: CostTable, setup: Setup) -> dict[ParallelConfig, int]:
    """Those of an earlier table, but for what stopped at the largest micro-batch of interest then, a smaller one."""
    then = earlier.provenance.get("max_tokens")
    found = {cost.config: cost.capacity_tokens for cost in earlier.configs}
    return {c: tokens for c, tokens in found.items() if tokens != then or tokens >= setup.max_tokens}


def make_setup(
    config: RunConfig,
    lengths: str | None,
    max_tokens: int | None,
    repeats: int,
    num_tasks: int | None,
    rank: int | None,
) -> Setup:
    import jax.numpy as jnp

    from lobra_jax.compilation import compile_threads
    from lobra_jax.config import model_config
    from lobra_jax.data.load import task_lengths
    from lobra_jax.devices import memory_limit, run_devices
    from lobra_jax.host import host_cores
    from lobra_jax.lora import adapted_targets
    from lobra_jax.optim import OPTIMIZERS
    from lobra_jax.tasks import keep_last_good, lora_spec
    from profiling.grid import default_lengths, default_max_tokens, parse_lengths
    from profiling.measure import Setup

    devices = run_devices(config.devices)
    limit_bytes = memory_limit(config.devices, devices[0])
    measured = parse_lengths(lengths) if lengths is not None else default_lengths(task_lengths(config))
    is_cpu = devices[0].platform == "cpu"
    cores = host_cores()
    return Setup(
        model=model_config(config),
        dtype=jnp.dtype(config.model.dtype),
        num_tasks=num_tasks or len(config.tasks),
        rank=rank or max(task.rank for task in config.tasks),
        targets=adapted_targets([lora_spec(task) for task in config.tasks]),
        dropout=any(task.dropout > 0 for task in config.tasks),
        dora=any(task.dora for task in config.tasks),
        optimizers=tuple(kind for kind in OPTIMIZERS if any(task.optimizer == kind for task in config.tasks)),
        averages=any(task.ema_decay is not None for task in config.tasks),
        last_good=keep_last_good(config.tasks),
        devices=devices,
        limit_bytes=limit_bytes,
        lengths=measured,
        max_tokens=max_tokens or default_max_tokens(measured[-1], devices[0].platform),
        repeats=repeats,
        cores=cores if is_cpu else None,
        num_threads=compile_threads(),
        packed=config.training.batching != "padded",
        quantization=config.model.quantization,
    )


def wanted_configs(config: RunConfig, setup: Setup, names: str | None) -> tuple[ParallelConfig, ...]:
    from profiling.grid import parallel_configs, parse_configs

    configs = parallel_configs(
        setup.model,
        num_devices=len(setup.devices),
        max_tp=config.planner.max_tp,
        max_pp=config.planner.max_pp,
        remats=config.planner.remats,
    )
    return configs if names is None else parse_configs(names, configs)


def make_header(setup: Setup, configs: Sequence[ParallelConfig]) -> Header:
    import jax

    from profiling.table import Header

    device = setup.devices[0]
    hardware: dict[str, Any] = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": len(setup.devices),
        "memory_bytes": setup.limit_bytes,
    }
    if setup.cores is not None:
        shares = {c.num_devices: setup.share(c) for c in configs}
        hardware["host_cores"] = setup.cores
        hardware["host_sharing"] = {
            "note": "devices share the host's cores: `copies` replicas ran at once, seconds are times `factor`, "
            "as when all devices are busy; by devices of a replica",
            "by_devices": {str(g): {"copies": s.copies, "factor": s.factor} for g, s in sorted(shares.items())},
        }
    return Header(
        model=setup.model.name,
        model_fingerprint=setup.model.fingerprint,
        hardware=hardware,
        provenance={
            "command": "lobra profile",
            "lobra_jax": __version__,
            "jax": jax.__version__,
            "dtype": str(setup.dtype),
            "quantization": setup.quantization,
            "num_tasks": setup.num_tasks,
            "rank": setup.rank,
            "targets": list(setup.targets),
            "dropout": setup.dropout,
            "dora": setup.dora,
            "optimizers": list(setup.optimizers),
            "averages": setup.averages,
            "last_good": setup.last_good,
            "lengths": list(setup.lengths),
            "max_tokens": setup.max_tokens,
            "repeats": setup.repeats,
            "side_by_side": setup.cores is None and len(setup.devices) > 1,
            **({"packed": True} if setup.packed else {}),
            **(
                {"known_capacities": {str(c): tokens for c, tokens in setup.expected.items()}} if setup.expected else {}
            ),
        },
    )


@contextlib.contextmanager
def progress_bar(
    console: Console, total: int, done: int
) -> Iterator[Callable[[ParallelConfig, ConfigCost | str], None]]:
    """Call what it yields with each config's outcome: it moves the bar and prints why a config is left out.

    Where no terminal shows a bar, what is done is printed.
    """
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("profile", total=total, completed=done)

        def advance(config: ParallelConfig, outcome: ConfigCost | str) -> None:
            bar.update(task, advance=1, description=f"profile {config}")
            if isinstance(outcome, str):
                bar.console.print(f"{config} is left out: {outcome}", highlight=False)
            elif not console.is_terminal:
                count = f"{int(bar.tasks[task].completed)} of {total} configs"
                console.print(f"{config}: up to {outcome.capacity_tokens:,} tokens ({count})", highlight=False)

        yield advance


def print_summary(
    console: Console, table: CostTable, dropped: Mapping[ParallelConfig, str], out: Path, total_s: float
) -> None:
    from rich.table import Table

    view = Table(title=f"{table.model} on {table.hardware['num_devices']} x {table.hardware['device_kind']}")
    view.add_column("config", no_wrap=True, min_width=max(len(str(cost.config)) for cost in table.configs))
    for name in ("capacity, tokens", "tokens/s", "fixed, ms", "shapes", "error, mean", "error, max"):
        view.add_column(name, justify="right")
    for cost in table.configs:
        error = cost.fit_error
        view.add_row(
            str(cost.config),
            f"{cost.capacity_tokens:,}",
            f"{max(point.rows * point.length / point.seconds for point in cost.points):,.0f}",
            f"{1e3 * cost.fixed_s:.1f}",
            str(len(cost.points)),
            "-" if error is None else f"{error.mean:.1%}",
            "-" if error is None else f"{error.max:.1%}",
        )
    console.print(view)
    left_out = f", {len(dropped)} left out" if dropped else ""
    console.print(
        f"{len(table.configs)} configs{left_out}; gradient sum and update {1e3 * table.step_overhead_s:.1f} ms a step; "
        f"{total_s:.1f} s in all; written to {out}",
        highlight=False,
    )
