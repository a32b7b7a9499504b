"""`lobra bench experiment`: the systems of `profiling.systems` on the devices present, on the same batches.

The config says model, tasks, lengths and devices; weights are random. Costs are measured first unless there are some.
Each system is planned from the same table, compiled, and timed over the same steps: forward, backward, gradient sum and
update, dispatch ahead of them. GPU-seconds are a step's seconds times all devices given, idle ones too; a system that
trains its tasks one after the other takes the sum of their steps.

OUT/experiment.json is written after each part, and a part that is there is not run again. OUT/costs.json is the table,
OUT/timeline-*.json the last step of each part.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax.commands.options import config_options
from planner.errors import UserError
from planner.files import check_folder
from planner.plan import REMATS
from profiling.bench.options import command_line, parse_names
from profiling.systems import SYSTEMS, System, plan_part, workloads

if TYPE_CHECKING:
    from lobra_jax.config import RunConfig
    from planner.constraints import Constraints
    from planner.cost import CostTable
    from planner.plan import Plan
    from planner.problem import PlanningProblem
    from planner.workload import Workload
    from profiling.bench.experiment_record import Results
    from profiling.bench.experiment_run import Scene

DEFAULT_SYSTEMS = "task-sequential,task-fused,lobra,ours-remat"
COSTS_FILE = "costs.json"


@click.command(
    epilog="\b\nExample:\n  lobra bench experiment --config configs/runs/llama2_7b_40gib.yaml "
    "--batch-scale 0.25 --out results"
)
@config_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--costs", "costs_path", type=click.Path(path_type=Path), help="A costs.json; by default it is measured.")
@click.option(
    "--systems", default=DEFAULT_SYSTEMS, show_default=True, metavar="S,...", help=f"Of {', '.join(SYSTEMS)}."
)
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True, help="Timed steps of each.")
@click.option("--batch-scale", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Of the tasks' batch sizes.")  # fmt: skip
@click.option("--remat", type=click.Choice(REMATS), default="none", show_default=True,
              help="Of systems that do not choose it.")  # fmt: skip
@click.option("--lengths", metavar="L,L,...", help="Lengths to measure costs at, as of lobra profile.")
@click.option("--max-tokens", type=click.IntRange(min=16), help="Largest micro-batch to measure, as of lobra profile.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Readings of a shape's costs."
)
@click.option("--refine", is_flag=True, help="Time each plan's own micro-batches first, as lobra profile --plan does.")
def main(
    config_path: Path, overrides: tuple[str, ...], out: Path, costs_path: Path | None, systems: str, **options: Any
) -> None:
    """Train the same batches as Task-Sequential, Task-Fused, LobRA and we would, and compare GPU-seconds.

    An interrupted experiment goes on where it stopped when it is started again with the same options.
    """
    from lobra_jax.config import load_config
    from lobra_jax.devices import configure

    chosen = list(dict.fromkeys(parse_names("--systems", systems, list(SYSTEMS))))
    if not out.parent.is_dir():
        raise UserError("no such folder", key="--out", value=str(out), expected="a folder in an existing one")
    check_folder(out)
    config = _config(load_config(config_path, overrides), options["batch_scale"], options["steps"])
    configure(config.devices, cache_dir=config.data.cache_dir)
    out.mkdir(exist_ok=True)
    costs = _costs(config, config_path, out, costs_path, options)
    scene = _scene(config, costs)

    from profiling.bench.experiment_record import Results, print_table, set_up

    command = command_line(
        "lobra bench experiment",
        {"config": config_path, **_numbered("set", overrides), "systems": systems, "costs": costs_path, **options},
    )
    refine = options["repeats"] if options["refine"] else 0
    shared = set_up(scene, remat=options["remat"], refined=options["refine"])
    results = Results.begin(out / "experiment.json", shared, command)
    costs.save(out / COSTS_FILE)
    for key in chosen:
        _run_system(key, scene, costs, results, out, options["remat"], refine)
    print_table(results, chosen)
    failed = results.failed(chosen)
    if failed:
        raise click.ClickException(f"did not run: {', '.join(failed)} (reasons above); run it again to try them again")


def _numbered(name: str, values: tuple[str, ...]) -> dict[str, str | None]:
    """Repeated values of one option, for a command line."""
    return {name: f" --{name} ".join(values) if values else None}


def _config(config: RunConfig, batch_scale: float, steps: int) -> RunConfig:
    """The config with scaled batches, as many steps as are run, and nothing held out."""
    from lobra_jax.config import ScheduleConfig
    from profiling.bench.experiment_run import NUM_WARM_UPS

    if config.training.batching != "padded":
        key, value = "training.batching", config.training.batching
        raise UserError("the compared systems pad their rows", key=key, value=value, expected="padded")
    changes = {
        "steps": NUM_WARM_UPS + steps,
        "schedule": ScheduleConfig(),
        "eval_fraction": 0.0,
        "eval_files": (),
        "eval_interval": None,
        "patience": None,
    }
    tasks = tuple(
        task.model_copy(update={**changes, "batch_size": max(1, round(task.batch_size * batch_scale))})
        for task in config.tasks
    )
    return config.model_copy(update={"tasks": tasks})


def _costs(
    config: RunConfig, config_path: Path, out: Path, costs_path: Path | None, options: dict[str, Any]
) -> CostTable:
    """The table given, else the one in `out`, else the config's, else measured now and kept in `out`."""
    from rich.console import Console

    from lobra_jax.commands.plan import config_costs
    from lobra_jax.commands.train import check_measured
    from lobra_jax.devices import memory_limit, run_devices
    from profiling.cli import run_profile

    kept = out / COSTS_FILE
    path = costs_path or (kept if kept.is_file() else config.planner.costs)
    if path is None:
        grid = {name: options[name] for name in ("lengths", "max_tokens", "repeats")}
        return run_profile(config, kept, Console(), **grid)
    costs = config_costs(config, path, config_path)
    check_measured(costs, config, path)
    device = run_devices(config.devices)[0]
    limit, measured = memory_limit(config.devices, device), costs.hardware.get("memory_bytes")
    if measured is not None and measured > limit:
        raise UserError(
            "the cost table was measured with more memory than there is",
            file=path,
            key="hardware.memory_bytes",
            value=measured,
            expected=f"at most {limit}",
        )
    if costs.estimate_note is not None:
        click.echo(costs.estimate_note)
    if costs.hardware.get("device_kind") != device.device_kind:
        click.echo(
            f"{path}: costs are of {costs.hardware.get('device_kind')}, the devices here are {device.device_kind}"
        )
    return costs


def _scene(config: RunConfig, costs: CostTable) -> Scene:
    from lobra_jax.data.load import load_tasks
    from lobra_jax.devices import run_devices
    from profiling.bench.experiment_run import Scene

    return Scene(config=config, tasks=load_tasks(config), costs=costs, devices=tuple(run_devices(config.devices)))


def _run_system(key: str, scene: Scene, costs: CostTable, results: Results, out: Path, remat: str, refine: int) -> None:
    """Runs what the results lack of a system, keeping each part as soon as it is done.

    `refine`: readings of each of a plan's micro-batches before its steps; 0 for none.
    """
    from lobra_jax.data.load import workload_of

    system = SYSTEMS[key]
    for part in workloads(system, workload_of(scene.tasks)):
        name = key if system.is_joint else f"{key}/{part.tasks[0].name}"
        if name in results:
            click.echo(f"{name}: was run before")
            continue
        results.keep(name, _run_part(name, system, part, scene, costs, out, remat, refine))
        click.echo(results.line(name))


def _run_part(
    name: str, system: System, workload: Workload, scene: Scene, costs: CostTable, out: Path, remat: str, refine: int
) -> dict[str, Any]:
    """What was measured, or {"failed": why}: a system that cannot run these tasks on these devices is a result too."""
    from profiling.bench.experiment_run import FailedError, run_part

    def build(part: Workload, costs: CostTable, constraints: Constraints) -> PlanningProblem:
        from lobra_jax.commands.plan import config_flags
        from planner.problem import DEFAULT_NUM_BUCKETS, build_problem

        section, own = scene.config.planner, config_flags(scene.config).constraints
        return build_problem(
            part,
            costs,
            len(scene.devices),
            buckets=section.buckets,
            num_buckets=section.num_buckets or DEFAULT_NUM_BUCKETS,
            row_options=section.row_options,
            constraints=dataclasses.replace(
                own, remats=constraints.remats or own.remats, mix_remats=constraints.mix_remats
            ),
            proposal=section.proposal,
            time_limit_s=section.solve_time_limit_s,
        )

    try:
        plan = plan_part(system, workload, costs, remat, build)
    except UserError as error:
        return {"failed": f"no plan: {error}"}
    click.echo(f"{name}: {plan}")
    try:
        scene = scene.only([task.name for task in workload.tasks])
        if refine:
            scene = _refined(scene, plan, refine)
        return run_part(scene, plan, out / f"timeline-{name.replace('/', '-')}.json")
    except FailedError as error:
        return {"failed": str(error), "replicas": str(plan)}


def _refined(scene: Scene, plan: Plan, repeats: int) -> Scene:
    """With costs that know the plan's own micro-batches, of which nothing stays on the devices."""
    from profiling.bench.experiment_run import failing_without_room
    from profiling.cli import make_setup
    from profiling.plan_shapes import refined, time_shapes, wanted_shapes

    lengths = ",".join(map(str, plan.buckets))
    setup = make_setup(scene.config, lengths, plan.buckets[-1], repeats, None, None)
    with failing_without_room():
        times = time_shapes(setup, wanted_shapes(plan), scene.costs)
    return dataclasses.replace(scene, costs=refined(scene.costs, plan, times))


if __name__ == "__main__":
    main()
