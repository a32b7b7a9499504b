"""`lobra bench step`: the joint step, sum and update included, beside the matmul ceiling and the frozen base alone.

All of one run of the command is measured in one process on the same devices: the rate of the model's matmuls, the
frozen base in the same program form, and the step of every shape and remat asked for. Weights and tokens are random.
"""

from __future__ import annotations

import dataclasses
import itertools
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
    from profiling.bench.step_case import Case

DTYPES = ("bfloat16", "float32")
GIB = 2**30


@click.command(
    epilog="\b\nExample:\n  lobra bench step --model llama2-7b --shapes 8x2048,32x512 --remats dots --out step.json"
)
@click.option("--model", "preset", default="llama2-7b", show_default=True, help="Shape of the base, by preset.")
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the preset has.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of base and arithmetic."
)
@click.option("--shapes", default="8x2048", show_default=True, metavar="RxL,...", help="Micro-batches, ROWSxLENGTH.")
@click.option("--micro-batches", type=click.IntRange(min=1), default=1, show_default=True, help="A replica, a step.")
@click.option("--remats", default="dots", show_default=True, metavar="REMAT,...", help=f"Of {', '.join(REMATS)}.")
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Devices that share a layer.")
@click.option("--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline stages.")
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Of that shape.")
@click.option("--tasks", default="6", show_default=True, metavar="N,...", help="Numbers of adapters to measure with.")
@click.option("--ranks", default="16", show_default=True, metavar="R,...", help="Of the adapters, in turn.")
@click.option("--targets", help="Adapted linears, of q,k,v,o,gate,up,down; by default all.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True, help="Of LoRA.")
@click.option("--steps", type=click.IntRange(min=3), default=8, show_default=True, help="Timed steps.")
@click.option("--trace", type=click.Path(path_type=Path, file_okay=False), help="Folder for a trace of each case.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(out: Path | None, **options: Any) -> None:
    """Time joint steps of made-up micro-batches on the devices present."""
    check_out(out)
    cases = _cases(options)
    set_accelerator_flags()
    from profiling.bench.step_case import Bench

    bench = Bench(cases, steps=options["steps"], trace=options["trace"])
    click.echo(f"{bench.devices}: {bench.check}")
    record = {
        "what": "joint steps of made-up micro-batches: forward, backward, gradient sum, update; medians over steps",
        "command": command_line("lobra bench step", {"model": options["preset"], **options, "preset": None}),
        **provenance(("jax", "jaxlib", "numpy")),
        "devices": bench.devices,
        "check": dataclasses.asdict(bench.check),
        "rows": [],
    }
    for row in bench.rows():
        record["rows"].append(row)
        click.echo(_line(row))
        if out is not None:
            write_json(out, record)
    if not bench.check.passed:
        raise click.ClickException(f"the numbers are wrong: {bench.check}")


def _cases(options: dict[str, Any]) -> list[Case]:
    """Every combination asked for."""
    from lobra_jax.models.config import TARGETS
    from planner.plan import ParallelConfig
    from profiling.bench.step_case import Case

    model = parse_preset("--model", options["preset"])
    if options["layers"] is not None:
        model = dataclasses.replace(model, num_layers=options["layers"])
    targets = parse_names("--targets", options["targets"] or ",".join(TARGETS), TARGETS)
    remats = parse_names("--remats", options["remats"], REMATS)
    ranks = _numbers("--ranks", options["ranks"])
    return [
        Case(
            model=model,
            dtype=options["dtype"],
            config=ParallelConfig(tp=options["tp"], pp=options["pp"], remat=remat),
            replicas=options["replicas"],
            rows=rows,
            length=length,
            micro_batches=options["micro_batches"],
            ranks=tuple(itertools.islice(itertools.cycle(ranks), num_tasks)),
            targets=targets,
            dropout=options["dropout"],
        )
        for (rows, length), remat, num_tasks in itertools.product(
            parse_shapes("--shapes", options["shapes"]),
            remats,
            _numbers("--tasks", options["tasks"]),
        )
    ]


def _numbers(key: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError("not a list of numbers", key=key, value=text, expected="numbers from 1 on, such as 4,16")
    return [int(part) for part in parts]


def _line(row: dict[str, Any]) -> str:
    """One case, for people."""
    if "out_of_memory" in row:
        return f"{row['case']}: {row['out_of_memory']} (GiB predicted {row['predicted_bytes'] / GIB:.1f})"
    peak = "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.1f}"
    base = "" if row["base_s"] is None else f", frozen base {row['base_s'] * 1e3:.1f} ms"
    return (
        f"{row['case']}: step {row['step_s'] * 1e3:.1f} ms (sum and update {row['sum_update_s'] * 1e3:.1f}), "
        f"{row['tokens_per_s_per_device']:,.0f} tokens/s a device, {row['floor_flop_rate'] / 1e12:.0f} TFLOP/s, "
        f"{row['share_of_ceiling']:.3f} of the matmuls' {row['matmul_rate'] / 1e12:.0f}{base}, "
        f"GiB predicted {row['predicted_bytes'] / GIB:.1f}, measured {peak}, compiled in {row['compile_s']:.0f} s, "
        f"ms a micro-batch: host late {row['host_late_s_per_micro_batch'] * 1e3:.1f}, issuing with waits for room in "
        f"the device's queue {row['issue_s_per_micro_batch'] * 1e3:.1f}"
    )


if __name__ == "__main__":
    main()
