"""`lobra train`: a run directory out of a config; measures and plans by itself where no plan is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax.commands.options import config_options
from lobra_jax.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, COSTS_FILE, LENGTHS_FILE, PLAN_FILE
from planner.errors import UserError
from planner.files import NEW_SUFFIX, check_folder
from planner.inputs import beside, found_beside

if TYPE_CHECKING:
    from lobra_jax.config import RunConfig
    from lobra_jax.data.batches import TaskData
    from lobra_jax.models.config import LlamaConfig
    from lobra_jax.peft_folder import TaskAdapter
    from lobra_jax.trace_steps import TracedSteps
    from planner.cost import CostTable
    from planner.plan import Plan
    from planner.workload import Workload

MEASURED_FILES = (CONFIG_FILE, COSTS_FILE, f"{COSTS_FILE}.partial")
"""What a run leaves that was stopped while it measured; the next one may go on from it."""


@click.command(
    epilog="\b\nExample:\n  lobra train --config C.yaml --out runs/first\n"
    "  lobra train --config C.yaml --out runs/first --resume\n"
    "  lobra train --config C.yaml --plan plan.yaml --tasks answers,titles --out runs/two\n"
    "  lobra train --config C.yaml --out runs/traced --trace 3-4"
)
@config_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory: new, or with --resume.")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="A plan.yaml; by default one is made.")
@click.option("--tasks", metavar="A,B", help="Train only these tasks of the config.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
@click.option("--trace", metavar="FIRST-LAST", help="Trace these steps into OUT/trace, such as 3-4 (`lobra trace`).")
def train(
    config_path: Path,
    overrides: tuple[str, ...],
    out: Path,
    plan_path: Path | None,
    tasks: str | None,
    resume: bool,
    trace: str | None,
) -> None:
    """Train every task's adapter jointly on the planned replicas.

    The run directory receives config, plan, cost table, metrics.jsonl, TensorBoard, checkpoints, and each task's
    adapter as PEFT reads it.
    """
    from lobra_jax.config import load_config, model_config, save_config, select_tasks
    from lobra_jax.data.load import load_tasks, workload_of
    from lobra_jax.devices import configure, run_devices
    from lobra_jax.feeder import check_lengths
    from lobra_jax.models.hf import base_weights

    config = load_config(config_path, overrides)
    if tasks is not None:
        config = select_tasks(config, [name.strip() for name in tasks.split(",") if name.strip()])
    _check_out(out, resume)
    check_folder(out)
    traced = None if trace is None else _traced_steps(trace, config)
    if plan_path is not None:
        _check_plan(plan_path, config)
    model = model_config(config)
    # What is wrong with these files is said before anything is tokenised or measured.
    base_weights(model, path=config.model.path, init_seed=config.model.init_seed)
    adapters = _given_adapters(config, model)
    data = load_tasks(config)
    costs = _costs(config, model, config_path, out, plan_path, resume)
    workload = workload_of(data, config_path)
    plan = _plan(config, workload, costs, out, plan_path, resume)
    check_lengths(data, plan)
    batching = _batching(config, plan, costs, workload)
    configure(config.devices, cache_dir=config.data.cache_dir)

    from lobra_jax.train import Inputs
    from lobra_jax.train import train as run

    devices = run_devices(config.devices)
    if resume:
        _check_checkpoint(config, model, data, out, traced)
    _check_devices(plan, model, devices)
    save_config(config, out / CONFIG_FILE)
    costs.save(out / COSTS_FILE)
    plan.save(out / PLAN_FILE)  # from here on the run can be resumed
    workload.save(out / LENGTHS_FILE)
    _report_data(data)
    click.echo(f"plan: {plan}")
    inputs = Inputs(
        config=config,
        model=model,
        tasks=data,
        plan=plan,
        costs=costs,
        devices=tuple(devices),
        adapters=adapters,
        batching=batching,
        trace=traced,
    )
    run(inputs, out, resume=resume, say=click.echo)
    click.echo(f"{out}: adapters of {', '.join(task.name for task in config.tasks)}")


def _traced_steps(text: str, config: RunConfig) -> TracedSteps:
    from lobra_jax.trace_steps import check_steps, parse_steps

    steps = parse_steps(text)
    check_steps(steps, done=0, num_steps=_num_steps(config))
    return steps


def _num_steps(config: RunConfig) -> int:
    return max(task.steps for task in config.tasks)


def _given_adapters(config: RunConfig, model: LlamaConfig) -> dict[str, TaskAdapter]:
    """The adapters that tasks go on training, by task."""
    from lobra_jax.peft_folder import check_fits, read_peft_adapter

    given = {}
    for task in config.tasks:
        if task.adapter is not None:
            _, given[task.name] = read_peft_adapter(task.adapter)
            check_fits(task.adapter, given[task.name], model)
    return given


def _report_data(data: tuple[TaskData, ...]) -> None:
    for task in data:
        for source in task.sources:
            if source.num_truncated or source.num_dropped:
                click.echo(
                    f"{task.name} ({source.split}): {source.num_truncated} of {source.num_records} records truncated "
                    f"to context_length, {source.num_dropped} dropped without a trainable token"
                )


def _check_out(out: Path, resume: bool) -> None:
    if resume:
        if not (out / PLAN_FILE).is_file():
            raise UserError("nothing to resume", file=out, key="--resume", expected="a run directory of `lobra train`")
    elif out.exists() and (not out.is_dir() or not _only_measured(out)):
        raise UserError("already exists", file=out, key="--out", expected="a new or empty directory, or --resume")


def _only_measured(out: Path) -> bool:
    """Whether a folder has nothing but what measuring left, or was about to."""
    return all(path.name.removesuffix(NEW_SUFFIX) in MEASURED_FILES for path in out.iterdir())


def _check_plan(path: Path, config: RunConfig) -> None:
    """What can be said of a plan before a cost table is at hand: it can be read, and asks for no more devices than the
    config says there are."""
    from planner.lobra_files import is_strategy_file
    from planner.plan import Plan

    if is_strategy_file(path):
        return
    present = config.devices.num_devices or config.devices.simulated
    needed = Plan.load(path).used_devices
    if present is not None and needed > present:
        raise UserError(
            "the plan needs more devices than there are",
            file=path,
            key="replicas",
            value=needed,
            expected=f"at most {present}, as the config's devices say",
        )


def _costs(
    config: RunConfig, model: LlamaConfig, config_path: Path, out: Path, plan_path: Path | None, resume: bool
) -> CostTable:
    """The run's own table when resuming, else the one that `lobra plan` left with the plan, else `planner.costs`, else
    that of the run directory in which the plan lies, else measured now."""
    from planner.cost import CostTable

    path = out / COSTS_FILE if resume else costs_path(config, plan_path)
    if path is None:
        measured = out / COSTS_FILE
        path = measured if measured.is_file() else _measure(config, config_path, out)
    costs = CostTable.load(path)
    if costs.estimate_note is not None:
        click.echo(costs.estimate_note)
    check_measured(costs, config, path)
    if costs.model_fingerprint != model.fingerprint:
        raise UserError(
            "cost table of another model",
            file=path,
            key="model",
            value=f"{costs.model} {costs.model_fingerprint}",
            expected=f"{model.name} {model.fingerprint}",
        )
    return costs


def costs_path(config: RunConfig, plan_path: Path | None) -> Path | None:
    """Where the costs of a plan given by hand are: see `_costs`; None where nothing says."""
    if plan_path is not None and beside(plan_path, "costs").is_file():
        return beside(plan_path, "costs")
    if plan_path is not None and config.planner.costs is None:
        return found_beside(plan_path, "costs")
    return config.planner.costs


def check_measured(costs: CostTable, config: RunConfig, path: Path) -> None:
    """Refuses a table whose times and capacities are of less than this run needs; tables from elsewhere do not say."""
    from lobra_jax.commands.plan import check_quantization_of
    from lobra_jax.tasks import keep_last_good

    wanted = {
        "num_tasks": len(config.tasks),
        "rank": max(task.rank for task in config.tasks),
        "dropout": any(task.dropout > 0 for task in config.tasks),
        "dora": any(task.dora for task in config.tasks),
        "averages": any(task.ema_decay is not None for task in config.tasks),
        "last_good": keep_last_good(config.tasks),
        "targets": {target for task in config.tasks for target in task.targets},
        "optimizers": {task.optimizer for task in config.tasks},
    }
    for key, needed in wanted.items():
        found = costs.provenance.get(key)
        if found is None:
            continue
        if isinstance(needed, set):
            is_enough, expected = needed <= set(found), f"{', '.join(sorted(needed))} among them"
        else:
            is_enough, expected = found >= needed, f"{needed}{'' if needed is True else ' or more'}"
        if not is_enough:
            raise UserError(
                "the cost table was measured with less than this run has",
                file=path,
                key=f"provenance.{key}",
                value=found,
                expected=f"{expected}: run lobra profile again",
            )
    dtype = costs.provenance.get("dtype")
    if dtype is not None and dtype != config.model.dtype:
        raise UserError(
            "the cost table was measured in another dtype",
            file=path,
            key="provenance.dtype",
            value=dtype,
            expected=config.model.dtype,
        )
    check_quantization_of(costs, config, path)
    limit, measured = config.devices.memory_bytes, costs.hardware.get("memory_bytes")
    if limit is not None and measured is not None and limit < measured:
        raise UserError(
            "the cost table was measured with more memory than this run may use",
            file=path,
            key="hardware.memory_bytes",
            value=measured,
            expected=f"at most devices.memory_bytes = {limit}",
        )


def _measure(config: RunConfig, config_path: Path, out: Path) -> Path:
    """Runs `lobra profile` in a process of its own, which leaves this one's devices alone."""
    from lobra_jax.config import save_config

    click.echo(f"no cost table for {config_path}: measuring one (lobra profile)")
    save_config(config, out / CONFIG_FILE)
    costs = out / COSTS_FILE
    command = [sys.executable, "-m", "lobra_jax", "profile", "--config", str(out / CONFIG_FILE), "--out", str(costs)]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise UserError(
            f"lobra profile failed with status {status}",
            file=config_path,
            key="planner.costs",
            expected="its one-line reason above, or a costs.json in planner.costs",
        )
    return costs


def _plan(
    config: RunConfig,
    workload: Workload,
    costs: CostTable,
    out: Path,
    plan_path: Path | None,
    resume: bool,
) -> Plan:
    if resume or plan_path is not None:
        from planner.inputs import load_plan

        path = plan_path if plan_path is not None else out / PLAN_FILE
        plan = load_plan(path, None, costs=costs, workload=workload)
        if plan.model != costs.model:
            raise UserError("plan of another model", file=path, key="model", value=plan.model, expected=costs.model)
        check_costs_of(plan, costs, path)
        return plan
    return _make_plan(config, workload, costs)


def check_costs_of(plan: Plan, costs: CostTable, path: Path) -> None:
    """Refuses a plan, of the file `path`, with a config that the cost table lacks."""
    for group in plan.replicas:
        try:
            costs.of(group)
        except KeyError:
            raise UserError(
                "the cost table lacks a config of the plan",
                file=path,
                key="replicas",
                value=str(group.config),
                expected="one of " + ", ".join(str(c) for c in sorted(cost.config for cost in costs.configs)),
            ) from None


def _make_plan(config: RunConfig, workload: Workload, costs: CostTable) -> Plan:
    from lobra_jax.commands.plan import config_flags, planned_devices
    from planner.plan_output import bucket_line
    from planner.planning import choose_plan

    chosen = choose_plan(workload, costs, planned_devices(config, costs, None), config_flags(config))
    if chosen.lengths is not None:
        click.echo(bucket_line(chosen.lengths, chosen.lengths_s))
    return chosen.plan


def _batching(config: RunConfig, plan: Plan, costs: CostTable, workload: Workload) -> str:
    """Padded or packed; `auto` is the same choice on every start of a run, as it looks at nothing that changes."""
    from planner.batching import choose_batching, packed_problem

    if config.training.batching != "auto":
        problem = packed_problem(plan, costs, workload) if config.training.batching == "packed" else ""
        if problem:
            raise UserError(problem, key="training.batching", value="packed", expected="padded or auto")
        return config.training.batching
    buckets = config.planner.max_dispatch_buckets
    choice = choose_batching(plan, costs, workload, seed=config.training.seed, max_buckets=buckets)
    click.echo(str(choice))
    return choice.batching


def _check_devices(plan: Plan, model: LlamaConfig, devices: list[Any]) -> None:
    """What can be said before a replica is built: enough devices, and a model that every config divides."""
    from lobra_jax.mesh import check_model_fits, cut

    cut(plan, devices)
    for group in plan.replicas:
        check_model_fits(model, group.config)


def _check_checkpoint(
    config: RunConfig, model: LlamaConfig, data: tuple[TaskData, ...], out: Path, traced: TracedSteps | None
) -> None:
    from lobra_jax import standing
    from lobra_jax.checkpoint import Checkpoints
    from lobra_jax.run_state import run_metadata
    from lobra_jax.trace_steps import check_steps

    with Checkpoints(out / CHECKPOINTS_FOLDER, keep=config.training.keep_checkpoints) as checkpoints:
        checkpoints.check(run_metadata(config, model, data, {}))
        done = checkpoints.latest_step() or 0
        if done:
            file = checkpoints.folder / str(done)
            standing.check_steps(config.tasks, checkpoints.metadata(done).position, done, file)
        if traced is not None:
            check_steps(traced, done=done, num_steps=_num_steps(config))
