"""A quantised base beside the same unquantised: `lobra bench quantization --out FILE`.

One stage with all layers on one device, forward and backward of a made-up micro-batch. Every row of one run is of the
same weights, adapters and tokens: bytes of the weights, XLA's count of the peak, medians of wall and CPU seconds, loss,
and the adapters' gradients against those of the unquantised base. Made-up weights are normal with the variances of
`RandomWeights` and tokens random; `--path` and `--text` take a model folder's weights, and its tokens of a text.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from lobra_jax.devices import set_accelerator_flags
from lobra_jax.models.config import PRESETS, QUANTIZATIONS, TARGETS, LlamaConfig
from planner.errors import UserError
from planner.files import check_out, write_json
from planner.lattice import Shape
from planner.plan import REMATS, ParallelConfig
from profiling.bench.options import command_line, parse_shapes
from profiling.bench.provenance import provenance

if TYPE_CHECKING:
    from lobra_jax.data.batches import MicroBatchArrays
    from lobra_jax.models.weights import WeightSource
    from profiling.measure import Bench, Setup


FP8_MATMUL = "__cublas$lt$matmul$f8"
"""What XLA calls a float8 matmul that it has handed to cuBLASLt."""
GIB = 2**30


@click.command(epilog="\b\nExample:\n  lobra bench quantization --shapes 8x2048,1x2048 --out quantization.json")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama2-7b", show_default=True, help="Shape.")
@click.option("--path", type=click.Path(path_type=Path, file_okay=False), help="Instead: a model folder.")
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), help="With --path: tokens from this file.")
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the model has.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--shapes", default="8x2048", show_default=True, metavar="RxL,...", help="Micro-batches, ROWSxLENGTH.")
@click.option("--remat", type=click.Choice(REMATS), default="dots", show_default=True)
@click.option("--tasks", "num_tasks", type=click.IntRange(min=1), default=6, show_default=True, help="Adapters.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the adapters.")
@click.option("--quantizations", default=",".join(QUANTIZATIONS), show_default=True, metavar="Q,...")
@click.option("--micro-batches", type=click.IntRange(min=1), default=1, show_default=True, help="A timed step.")
@click.option("--repeats", type=click.IntRange(min=1), default=8, show_default=True, help="Timed steps.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(path: Path | None, text: Path | None, out: Path | None, **options: Any) -> None:
    """Measure memory, time and differences of quantised bases."""
    kinds = options["quantizations"].split(",")
    for kind in kinds:
        if kind not in QUANTIZATIONS:
            expected = "some of " + ",".join(QUANTIZATIONS)
            raise UserError("unknown quantization", key="--quantizations", value=kind, expected=expected)
    shapes = parse_shapes("--shapes", options["shapes"])
    check_out(out)
    if text is not None and path is None:
        raise UserError("--text without --path", key="--text", value=str(text), expected="the folder of its tokenizer")
    set_accelerator_flags()
    import jax

    from profiling.measure import Setup

    model = _model(path, options["preset"], options["layers"])
    setup = Setup(
        model=model,
        dtype=jax.numpy.dtype(options["dtype"]),
        num_tasks=options["num_tasks"],
        rank=options["rank"],
        targets=TARGETS,
        dropout=False,
        dora=False,
        optimizers=("adamw",),
        averages=False,
        devices=jax.devices()[:1],
        limit_bytes=0,
        lengths=tuple(sorted({length for _, length in shapes})),
        max_tokens=max(rows * length for rows, length in shapes),
        repeats=options["repeats"],
        cores=None,
        num_threads=1,
    )
    record = {
        "what": "forward and backward of equal micro-batches, all layers on one device; seconds are medians of steps",
        "command": command_line(
            "lobra bench quantization",
            {"path": path, "text": text, "tasks": options["num_tasks"], **options, "num_tasks": None},
        ),
        **provenance(("jax", "jaxlib", "numpy")),
        "device": jax.devices()[0].device_kind,
        "model": dataclasses.asdict(model),
        "rows": [],
    }
    source = _weights(model, path)
    batches = [_batch(setup, shape, path, text) for shape in shapes]
    # The unquantised base goes first, as the others are compared with it.
    kinds = ["none", *(kind for kind in kinds if kind != "none")]
    for row in _rows(setup, source, kinds, batches, options["remat"], options["micro_batches"]):
        record["rows"].append(row)
        click.echo(_line(row))
        if out is not None:
            write_json(out, record)


def _model(path: Path | None, preset: str, layers: int | None) -> LlamaConfig:
    from lobra_jax.models.hf_config import load_llama_config

    model = PRESETS[preset] if path is None else load_llama_config(path)
    return model if layers is None else dataclasses.replace(model, num_layers=layers)


def _weights(model: LlamaConfig, path: Path | None) -> WeightSource:
    from lobra_jax.models.hf import HFWeights
    from lobra_jax.models.weights import EMBEDDING_STD
    from profiling.measure import Filler

    class Normal(Filler):
        """Repeats a few normal numbers with the variances of `RandomWeights`, at no cost in time."""

        def read(self, name: str, index: tuple[slice, ...]) -> Any:
            values = super().read(name, index)
            target = name.rpartition(".")[2]
            if target not in model.target_shapes:
                return values
            writes = 2 * model.num_layers if target in ("o", "down") else 1
            return values * (1 / (EMBEDDING_STD * math.sqrt(model.target_shapes[target][0] * writes)))

    return Normal(model) if path is None else HFWeights(path, model)


def _batch(setup: Setup, shape: Shape, path: Path | None, text: Path | None) -> MicroBatchArrays:
    """Full rows of random tokens, or of the start of a text."""
    from tokenizers import Tokenizer

    from profiling.measure import made_up_batch

    batch = made_up_batch(setup, shape)
    if path is None or text is None:
        return batch
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    wanted = shape[0] * shape[1] + 1
    if len(ids) < wanted:
        raise UserError("too short a text", file=text, value=f"{len(ids)} tokens", expected=f"{wanted} or more")
    tokens = np.asarray(ids[:wanted], np.int32)
    return dataclasses.replace(batch, tokens=tokens[:-1].reshape(shape), targets=tokens[1:].reshape(shape))


def _rows(
    setup: Setup,
    source: WeightSource,
    kinds: list[str],
    batches: list[MicroBatchArrays],
    remat: str,
    micro_batches: int,
) -> Iterator[dict[str, Any]]:
    from profiling.measure import Bench

    shapes: list[Shape] = [batch.tokens.shape for batch in batches]
    config = ParallelConfig(tp=1, pp=1, remat=remat)
    unquantised: dict[Shape, tuple[float, dict[str, Any]]] = {}
    for kind in kinds:
        bench = Bench(dataclasses.replace(setup, quantization=kind), config, copies=1)
        started = time.perf_counter()
        bench.compile(shapes, copies=1)
        compile_s = time.perf_counter() - started
        started = time.perf_counter()
        bench.place(source)
        load_s = time.perf_counter() - started
        for shape, batch in zip(shapes, batches, strict=True):
            row, loss, gradients = _measure(bench, batch, micro_batches)
            unquantised.setdefault(shape, (loss, gradients))
            yield {
                "quantization": kind,
                "rows": shape[0],
                "length": shape[1],
                **row,
                **_differences(loss, gradients, *unquantised[shape]),
                "compile_s": compile_s,
                "load_s": load_s,
            }
        del bench
        gc.collect()


def _measure(bench: Bench, batch: MicroBatchArrays, micro_batches: int) -> tuple[dict[str, Any], float, dict[str, Any]]:
    import jax

    from lobra_jax.memory import memory_bytes

    replica, shape = bench.replicas[0], batch.tokens.shape
    (run,), _ = bench.run([batch])
    loss = float(np.sum(np.asarray(run.losses[0], np.float64)))
    gradients = jax.tree.map(np.asarray, run.gradients[0])
    del run
    wall, cpu = [], []
    for _ in range(bench.setup.repeats):
        started = time.process_time()
        wall.append(bench.run_s([batch] * micro_batches))
        cpu.append(time.process_time() - started)
    program = replica.training_programs(shape)[0].fused
    row = {
        "weight_bytes": sum(array.nbytes for array in replica.params[0].values()),
        "linear_bytes": sum(a.nbytes for name, a in replica.params[0].items() if _is_linear(name)),
        "peak_bytes": memory_bytes(replica, shape),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "fp8_matmuls": program.as_text().count(FP8_MATMUL),
        "micro_batches": micro_batches,
        "step_s": statistics.median(wall),
        "step_s_least": min(wall),
        "step_cpu_s": statistics.median(cpu),
        "tokens_per_s": micro_batches * shape[0] * shape[1] / statistics.median(wall),
    }
    return row, loss, gradients


def _is_linear(name: str) -> bool:
    from lobra_jax.models.quantized import SCALE

    return name.rpartition(".")[2].removesuffix(SCALE) in TARGETS


def _differences(
    loss: float, gradients: dict[str, Any], expected_loss: float, expected: dict[str, Any]
) -> dict[str, float]:
    """Against the unquantised base; of gradients |found - expected| / |expected| over all adapters, and the worst."""
    import jax

    squares = [
        (float(np.sum(np.square(x - y, dtype=np.float64))), float(np.sum(np.square(y, dtype=np.float64))))
        for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True)
    ]
    return {
        "loss": loss,
        "loss_difference": (loss - expected_loss) / expected_loss,
        "gradient_difference": math.sqrt(sum(d for d, _ in squares) / sum(norm for _, norm in squares)),
        "worst_gradient_difference": max(math.sqrt(d / norm) for d, norm in squares if norm > 0),
    }


def _line(row: dict[str, Any]) -> str:
    fp8 = f", {row['fp8_matmuls']} cuBLASLt fp8 matmuls" if row["quantization"] == "fp8" else ""
    return (
        f"{row['quantization']} {row['rows']}x{row['length']}: weights {row['weight_bytes'] / GIB:.2f} GiB, "
        f"peak {row['peak_bytes'] / GIB:.2f} GiB, step {row['step_s'] * 1e3:.1f} ms ({row['step_cpu_s']:.2f} CPU s), "
        f"{row['tokens_per_s']:,.0f} tokens/s, loss {row['loss']:.5f} ({row['loss_difference']:+.2e}), "
        f"gradients {row['gradient_difference']:.2e}{fp8}"
    )


if __name__ == "__main__":
    main()
