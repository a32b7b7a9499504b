"""`lobra bench submeshes`: one replica of every (tp, pp) that fits, or of some, each running the same micro-batches.

All in one process: programs of all submeshes are compiled together, then each is timed over joint steps, gradient sum
and update included, and its weights are let go before the next one's are made. Efficiency is tokens/s a device against
(tp1, pp1) of the same run. The predicted step is the cost model's, t(M) = fixed + (M + pp - 1) slot + sum and update,
with slot and fixed seconds read off steps of few micro-batches as `lobra profile` does.

A pipeline of pp stages is idle (pp - 1) / (M + pp - 1) of a step whatever it does: `bubble_share`. `stage_idle_share`
is what each stage was by the timeline, where a transfer that is not hidden shows as a longer action.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lobra_jax.devices import set_accelerator_flags
from planner.errors import UserError
from planner.files import check_out, write_json
from planner.plan import REMATS
from profiling.bench.options import command_line, parse_names, parse_preset, parse_shapes
from profiling.bench.provenance import provenance

if TYPE_CHECKING:
    from lobra_jax.engine import Engine
    from lobra_jax.models.config import LlamaConfig
    from lobra_jax.step_times import StepResult
    from profiling.bench.step_case import Case

GIB = 2**30
FEW_READINGS = 3


@click.command(epilog="\b\nExample:\n  lobra bench submeshes --model llama2-7b --shape 8x2048 --out submeshes.json")
@click.option("--model", "preset", default="llama2-7b", show_default=True, help="Shape of the base, by preset.")
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the preset has.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Of base and arithmetic.")  # fmt: skip
@click.option("--shape", default="8x2048", show_default=True, metavar="RxL", help="The micro-batches, ROWSxLENGTH.")
@click.option("--micro-batches", type=click.IntRange(min=1), default=8, show_default=True, help="A step.")
@click.option("--remat", type=click.Choice(REMATS), default="dots", show_default=True)
@click.option("--tasks", type=click.IntRange(min=1), default=6, show_default=True, help="Adapters.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapters.")
@click.option("--targets", help="Adapted linears, of q,k,v,o,gate,up,down; by default all.")
@click.option("--devices", type=click.IntRange(min=1), help="Use only so many.")
@click.option("--configs", metavar="TPxPP,...", help="Time only these, such as 1x1,2x1; by default all.")
@click.option("--steps", type=click.IntRange(min=3), default=5, show_default=True, help="Timed steps of each.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(out: Path | None, **options: Any) -> None:
    """Time every way to cut a replica over the devices present."""
    check_out(out)
    shapes = parse_shapes("--shape", options["shape"])
    if len(shapes) != 1:
        raise UserError("more than one", key="--shape", value=options["shape"], expected="one ROWSxLENGTH")
    model = parse_preset("--model", options["preset"])
    model = dataclasses.replace(model, num_layers=options["layers"] or model.num_layers)
    set_accelerator_flags()
    import jax

    present = jax.devices()
    if options["devices"] is not None and options["devices"] > len(present):
        expected = f"at most {len(present)} ({present[0].device_kind})"
        raise UserError("more than there are", key="--devices", value=options["devices"], expected=expected)
    devices = present[: options["devices"]]
    record = {
        "what": "one replica of each (tp, pp), the same micro-batches; forward to update; medians over steps",
        "command": command_line("lobra bench submeshes", {"model": options["preset"], **options, "preset": None}),
        **provenance(("jax", "jaxlib", "numpy")),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "rows": [],
    }
    failed = []
    for row in _rows(_cases(options, model, shapes[0], len(devices)), devices, options["steps"]):
        record["rows"].append(row)
        click.echo(_line(row))
        if out is not None:
            write_json(out, record)
        if not row["passed"]:
            failed.append(f"(tp{row['tp']},pp{row['pp']})")
    if failed:
        raise click.ClickException(f"the numbers are wrong: {', '.join(failed)}")


def _cases(options: dict[str, Any], model: LlamaConfig, shape: tuple[int, int], num_devices: int) -> list[Case]:
    """Narrow ones first."""
    from lobra_jax.models.config import TARGETS
    from profiling.bench.step_case import Case
    from profiling.grid import parallel_configs, parse_configs

    configs = parallel_configs(model, num_devices=num_devices, remats=(options["remat"],))
    if options["configs"] is not None:
        configs = parse_configs(options["configs"], configs)
    targets = parse_names("--targets", options["targets"] or ",".join(TARGETS), TARGETS)
    return [
        Case(
            model=model,
            dtype=options["dtype"],
            config=config,
            replicas=1,
            rows=shape[0],
            length=shape[1],
            micro_batches=options["micro_batches"],
            ranks=(options["rank"],) * options["tasks"],
            targets=targets,
            dropout=0.0,
        )
        for config in configs
    ]


def _rows(cases: Sequence[Case], devices: Sequence[Any], steps: int) -> Iterator[dict[str, Any]]:
    from profiling.bench.step_check import check

    checks = check(cases, devices)
    entries = list(zip(cases, checks, _compiled(cases, devices), strict=True))
    one_device: float | None = None
    while entries:
        case, found, (engine, compile_s) = entries.pop(0)
        row = _row(case, engine, devices, steps, one_device)
        if case.num_devices == 1:
            one_device = row.get("tokens_per_s_per_device")
        del engine
        gc.collect()
        yield {**case.described, **dataclasses.asdict(found), "passed": found.passed, "compile_s": compile_s, **row}


def _compiled(cases: Sequence[Case], devices: Sequence[Any]) -> list[tuple[Engine, float]]:
    """(engine, seconds to compile it among the others) of each case."""
    from lobra_jax.compilation import compile_threads

    def compile_one(case: Case) -> tuple[Engine, float]:
        engine, start = case.engine(devices[: case.num_devices]), time.perf_counter()
        for _ in engine.compile([[(case.rows, case.length)]], [()], num_threads=1):
            pass
        return engine, time.perf_counter() - start

    with ThreadPoolExecutor(compile_threads(), thread_name_prefix="case") as executor:
        return list(executor.map(compile_one, cases))


def _row(case: Case, engine: Engine, devices: Sequence[Any], steps: int, one_device: float | None) -> dict[str, Any]:
    """What was measured, or {"left_out": why}."""
    from lobra_jax.out_of_memory import NoRoomForUpdateError, OutOfMemoryError
    from profiling.bench.step_case import late_s, predicted_bytes, run_case
    from profiling.made_up import random_params

    own = devices[: case.num_devices]
    needed, limit = predicted_bytes(case, engine, own), (own[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and needed > limit:
        return {"left_out": f"needs {needed / GIB:.1f} GiB of {limit / GIB:.1f}", "predicted_bytes": needed}
    try:
        results, issue_s = run_case(case, engine, [random_params(r) for r in engine.replicas], steps=steps)
        predicted_s = _predicted_s(case, engine)
    except (OutOfMemoryError, NoRoomForUpdateError) as error:
        return {"left_out": str(error), "predicted_bytes": needed}
    step_s = statistics.median(result.total_s for result in results)
    tokens_per_s = case.tokens / step_s / case.num_devices
    reference = tokens_per_s if case.num_devices == 1 else one_device
    bubble_share = (case.config.pp - 1) / (case.micro_batches + case.config.pp - 1)
    efficiency = None if reference is None else tokens_per_s / reference
    return {
        "step_s": step_s,
        "all_step_s": [result.total_s for result in results],
        "tokens_per_s_per_device": tokens_per_s,
        "efficiency": efficiency,
        "efficiency_without_bubble": None if efficiency is None else efficiency / (1 - bubble_share),
        "predicted_step_s": predicted_s,
        "prediction_error": abs(predicted_s - step_s) / step_s,
        "stage_idle_share": _stage_idle_share(results, case.config.pp),
        "bubble_share": bubble_share,
        "sum_update_share": statistics.median(result.sum_update_s / result.total_s for result in results),
        "issue_s_per_micro_batch": issue_s / case.micro_batches,
        "host_late_s_per_micro_batch": late_s(results) / case.micro_batches,
        "predicted_bytes": needed,
    }


def _predicted_s(case: Case, engine: Engine) -> float:
    """Of a step of the case, from steps of one and of few micro-batches."""
    from profiling.bench.step_case import case_inputs
    from profiling.timing import slots, time_steps

    overheads = []

    def run(micro_batches: int) -> float:
        result = engine.finish(engine.issue(*case_inputs(case, micro_batches)))
        overheads.append(result.sum_update_s)
        return result.execute_s

    shape, pp = (case.rows, case.length), case.config.pp
    seconds, fixed_s = slots({shape: time_steps(run, pp=pp, repeats=FEW_READINGS)}, pp=pp)
    return fixed_s + (case.micro_batches + pp - 1) * seconds[shape] + statistics.median(overheads)


def _stage_idle_share(results: Sequence[StepResult], num_stages: int) -> list[float]:
    """By stage, over all steps: the part of the micro-batches' time in which it had none to work on."""
    execute_s = sum(result.execute_s for result in results)
    busy_s = [0.0] * num_stages
    for item in itertools.chain(*(own for result in results for own in result.actions)):
        busy_s[item.action.stage] += item.end_s - item.start_s
    # A host too busy to see any end before the step's leaves no time at all to share out.
    return [1 - busy / execute_s if execute_s > 0 else 0.0 for busy in busy_s]


def _line(row: dict[str, Any]) -> str:
    """One submesh, for people."""
    name = f"(tp{row['tp']},pp{row['pp']},{row['remat']})"
    if "left_out" in row:
        return f"{name}: left out, {row['left_out']}"
    efficiency = "" if row["efficiency"] is None else f", {row['efficiency']:.3f} of one device's"
    idle = "/".join(f"{share:.1%}" for share in row["stage_idle_share"])
    return (
        f"{name}: step {row['step_s'] * 1e3:.1f} ms (predicted {row['predicted_step_s'] * 1e3:.1f}), "
        f"{row['tokens_per_s_per_device']:,.0f} tokens/s a device{efficiency}; stages idle {idle} "
        f"(bubble {row['bubble_share']:.1%}), sum and update {row['sum_update_share']:.1%}, host late by "
        f"{row['host_late_s_per_micro_batch'] * 1e3:.1f} ms a micro-batch, gradients off {row['gradient_error']:.1e}, "
        f"compiled in {row['compile_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
