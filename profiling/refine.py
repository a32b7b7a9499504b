"""`lobra profile --plan`: a cost table that knows what a plan's own micro-batches take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lobra_jax.config import RunConfig
    from planner.config_cost import ConfigCost
    from planner.cost import CostTable
    from planner.plan import ParallelConfig, Plan
    from profiling.measure import Setup


def run_refine(config: RunConfig, plan_path: Path, out: Path, console: Console, *, repeats: int) -> None:
    """Times the plan's micro-batches on the devices present and writes the plan's costs with them; prints what changed.

    Costs are those that `lobra train` would take for the plan. Raises `UserError` before any device is asked for.
    """
    from lobra_jax.commands.train import check_costs_of, check_measured, costs_path
    from lobra_jax.config import model_config
    from lobra_jax.devices import configure
    from planner.cost import CostTable
    from planner.inputs import beside
    from planner.plan import Plan

    if out.exists() and plan_path.exists() and out.samefile(plan_path):
        raise UserError(
            "the plan itself", key="--out", value=str(out), expected=f"{beside(plan_path, 'costs').name}, say"
        )
    if config.training.batching == "packed":
        value, expected = config.training.batching, "padded or auto: packed micro-batches are not timed one by one"
        raise UserError("not with --plan", key="training.batching", value=value, expected=expected)
    plan = Plan.load(plan_path)
    path = costs_path(config, plan_path)
    if path is None:
        expected = f"the cost table that {plan_path} was made from, or {plan_path.stem}.costs.json beside it"
        raise UserError("no cost table for the plan", key="planner.costs", expected=expected)
    costs = CostTable.load(path)
    check_measured(costs, config, path)
    shapes = model_config(config)
    if costs.model_fingerprint != shapes.fingerprint:
        raise UserError("cost table of another model", file=path, key="model", value=costs.model, expected=shapes.name)
    if plan.model != costs.model:
        raise UserError("plan of another model", file=plan_path, key="model", value=plan.model, expected=costs.model)
    check_costs_of(plan, costs, plan_path)
    _check_capacities(plan, plan_path, costs, path)
    configure(config.devices, cache_dir=config.data.cache_dir)
    _time_and_write(config, plan, plan_path, costs, path, out, console, repeats)


def _time_and_write(
    config: RunConfig,
    plan: Plan,
    plan_path: Path,
    costs: CostTable,
    costs_file: Path,
    out: Path,
    console: Console,
    repeats: int,
) -> None:
    import jax

    from lobra_jax.out_of_memory import OutOfMemoryError, is_out_of_memory
    from profiling.cli import make_setup, progress_bar
    from profiling.plan_shapes import refined, time_shapes, wanted_shapes

    started = time.perf_counter()
    lengths = ",".join(map(str, plan.buckets))
    setup = make_setup(config, lengths, plan.buckets[-1], repeats, None, None)
    _check_devices(setup, plan, plan_path, costs, costs_file)
    wanted = wanted_shapes(plan)
    with progress_bar(console, len(wanted), 0) as advance:
        try:
            times = time_shapes(setup, wanted, costs, lambda done: advance(done, costs[done]))
        except OutOfMemoryError as error:
            raise _no_room(str(error), plan_path) from error
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _no_room("out of device memory for weights and adapters", plan_path) from error
    new = refined(costs, plan, times)
    new.save(out)
    for parallel in wanted:
        console.print(_change_line(parallel, costs[parallel], new[parallel]), highlight=False)
    console.print(f"{time.perf_counter() - started:.1f} s in all; written to {out}", highlight=False)


def _no_room(problem: str, plan_path: Path) -> UserError:
    expected = "a plan whose capacity_tokens fit: lobra profile again, and lobra plan"
    return UserError(problem, file=plan_path, key="replicas", expected=expected)


def _check_capacities(plan: Plan, plan_path: Path, costs: CostTable, costs_file: Path) -> None:
    for group in plan.replicas:
        held = costs[group.config].capacities
        if any(tokens > most for tokens, most in zip(group.capacities, held, strict=True)):
            expected = f"at most {'/'.join(map(str, held))}, as {costs_file} says"
            key, problem = "capacity_tokens", f"more than {group.config} holds"
            raise UserError(problem, file=plan_path, key=key, value=group.tokens, expected=expected)


def _check_devices(setup: Setup, plan: Plan, plan_path: Path, costs: CostTable, costs_file: Path) -> None:
    """Refuses a plan of more devices than there are, and costs of other devices."""
    if plan.used_devices > len(setup.devices):
        value, expected = plan.used_devices, f"at most {len(setup.devices)}"
        raise UserError(
            "the plan needs more devices than there are", file=plan_path, key="replicas", value=value, expected=expected
        )
    present, measured = setup.devices[0].device_kind, costs.hardware.get("device_kind")
    if measured not in (None, present):
        key = "hardware.device_kind"
        raise UserError("the costs are of other devices", file=costs_file, key=key, value=measured, expected=present)


def _change_line(config: ParallelConfig, before: ConfigCost, after: ConfigCost) -> str:
    """How far the fitted times were off, over the config's micro-batches."""
    changes = [before.micro_batch_s(time.rows, time.length) / time.seconds - 1 for time in after.timed]
    mean = sum(map(abs, changes)) / len(changes)
    return (
        f"{config}: {len(changes)} micro-batches timed, expected before {min(changes):+.1%} to {max(changes):+.1%}, "
        f"{mean:.1%} off in the mean"
    )
