"""Padded against packed rows on skewed lengths: `lobra bench packing --out FILE`.

One replica of one device, lengths as LobRA's six tasks have them. The default is a small model and lengths shortened by
a constant, so that a CPU can do it. The cost table is measured first, both ways; the same batches are then dispatched
and run both ways in turn. Wall and CPU seconds are both reported: on a machine that others use too, the CPU seconds are
the ones to compare.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from lobra_jax.config import DevicesConfig, PlannerConfig
from lobra_jax.data.batches import TaskData, TaskSampler, task_key
from lobra_jax.data.dataset import TokenStore, whole
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.models.config import PRESETS, LlamaConfig
from lobra_jax.models.weights import weight_shapes
from planner.batching import choose_batching
from planner.bucketing import planning_buckets
from planner.cost import CostTable
from planner.errors import UserError
from planner.files import check_out, write_json
from planner.packed_dispatch import packed_replicas
from planner.plan import REMATS, ParallelConfig, Plan, ReplicaGroup
from planner.workload import TaskLengths, Workload
from profiling.bench.options import command_line
from profiling.bench.provenance import provenance

if TYPE_CHECKING:
    from profiling.measure import Setup

LENGTHS = Path(__file__).resolve().parents[2] / "configs" / "lengths" / "lobra_six_tasks.json"
SMALL = LlamaConfig(
    name="small",
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)
MODELS = {SMALL.name: SMALL, **PRESETS}
NUM_BUCKETS = 7
HOST_LIMIT_BYTES = 8 * 2**30
"""CPU devices do not tell their memory."""
STATE_BYTES = 4 * 4
"""Of each number of an adapter: master, two moments and a gradient, in float32."""

EXAMPLES_A_TASK = 512
BATCHINGS = ("padded", "packed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run both ways.

    Attributes:
      shorter: divides the tasks' lengths, which then end at `context_length`.
      batch_scale: multiplies their batch sizes.
      max_tokens: largest micro-batch; smaller where memory has no room for it.
    """

    model: LlamaConfig
    dtype: str
    spec: LoraSpec
    config: ParallelConfig
    shorter: int
    context_length: int
    batch_scale: float
    max_tokens: int
    seed: int


@click.command(
    epilog="\b\nExamples:\n  lobra bench packing --out packing.json\n"
    "  lobra bench packing --model llama2-7b --dtype bfloat16 --remat dots --rank 16 --shorter 1 --context-length 8192 "
    "--max-tokens 16384 --out packing.json"
)
@click.option("--model", type=click.Choice(list(MODELS)), default=SMALL.name, show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the model has.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="float32", show_default=True)
@click.option("--remat", type=click.Choice(REMATS), default="none", show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=4, show_default=True, help="Of the adapters.")
@click.option("--shorter", type=click.IntRange(min=1), default=8, show_default=True, help="Divides the lengths.")
@click.option("--context-length", type=click.IntRange(min=16), default=512, show_default=True,
              help="Where lengths end.")  # fmt: skip
@click.option("--batch-scale", type=click.FloatRange(min=0, min_open=True), default=1 / 16, show_default=True,
              help="Of the tasks' batch sizes.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(min=16), default=2048, show_default=True,
              help="Largest micro-batch, as of lobra profile.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=6, show_default=True, help="Timed steps each way.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of lengths and batches.")
@click.option("--refine", is_flag=True, help="Time the padded micro-batches before, as lobra profile --plan does.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(
    model: str,
    layers: int | None,
    dtype: str,
    remat: str,
    rank: int,
    steps: int,
    refine: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Run the same steps with padded and with packed rows."""
    check_out(out)
    if options["context_length"] > options["max_tokens"]:
        key, value = "--context-length", options["context_length"]
        raise UserError("longer than a micro-batch", key=key, value=value, expected=f"at most {options['max_tokens']}")
    shape = MODELS[model] if layers is None else dataclasses.replace(MODELS[model], num_layers=layers)
    config, spec = ParallelConfig(tp=1, pp=1, remat=remat), LoraSpec(rank=rank, alpha=2 * rank)
    case = Case(model=shape, dtype=dtype, spec=spec, config=config, **options)
    tasks = _tasks(case)
    workload = Workload.from_samples({t.name: (t.sampler.batch_size, t.train.lengths.tolist()) for t in tasks})
    setup = _setup(case, len(tasks), workload)
    costs = _measure(setup, case)
    capacity = costs[config].capacity_tokens
    if capacity < workload.max_length:
        expected = f"at most {capacity}, which memory has room for with both ways at once"
        raise UserError("too long", key="--context-length", value=workload.max_length, expected=expected)
    plan = Plan(
        model=shape.name,
        num_devices=1,
        replicas=(ReplicaGroup(count=1, config=config, capacity_tokens=capacity),),
        buckets=planning_buckets(workload, NUM_BUCKETS),
    )
    if refine:
        from profiling.plan_shapes import refined, time_shapes, wanted_shapes

        costs = refined(costs, plan, time_shapes(setup, wanted_shapes(plan), costs))
    choice = choose_batching(plan, costs, workload, seed=case.seed, max_buckets=NUM_BUCKETS)
    click.echo(str(choice))
    rows = _run(case, tasks, plan, costs, steps)
    for name, row in rows.items():
        click.echo(
            f"{name}: padding {row['padding_share']:.1%}, {row['tokens_per_s']:,.0f} tokens/s, "
            f"{row['tokens_per_cpu_s']:,.0f} tokens a CPU second, step {row['step_s']:.3f} s "
            f"(predicted {row['predicted_step_s']:.3f} s)"
        )
    if out is not None:
        given = {
            "model": model,
            "layers": layers,
            "dtype": dtype,
            "remat": remat,
            "rank": rank,
            "steps": steps,
            "refine": refine,
        }
        record = {
            "what": "the same steps with padded and with packed rows; medians over steps; costs measured before",
            "command": command_line("lobra bench packing", given | options),
            **provenance(("jax", "numpy")),
            "chosen": choice.batching,
            "plan": plan.to_dict(),
            "rows": rows,
        }
        write_json(out, record)
        click.echo(str(out))


def _tasks(case: Case) -> list[TaskData]:
    out = []
    for index, task in enumerate(Workload.load(LENGTHS).tasks):
        key = task_key(seed=case.seed, task_seed=index, name=task.name, purpose="batches")
        data = whole(task.name, _store(case, task, np.random.default_rng([case.seed, index])))
        sampler = TaskSampler(data, key, max(int(task.batch_size * case.batch_scale), 1))
        out.append(TaskData(name=task.name, train=data, evaluation=None, sampler=sampler))
    return out


def _store(case: Case, task: TaskLengths, rng: np.random.Generator) -> TokenStore:
    """Random tokens in sequences of the task's lengths, shortened."""
    values, shares = np.array(list(task.lengths)), np.array(list(task.lengths.values()))
    drawn = rng.choice(values, EXAMPLES_A_TASK, p=shares / shares.sum())
    lengths = np.clip(drawn // case.shorter, 1, case.context_length)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    trainable = np.ones(offsets[-1], bool)
    trainable[offsets[:-1]] = False
    tokens = rng.integers(0, case.model.vocab_size, offsets[-1], dtype=np.int32)
    return TokenStore(tokens=tokens, trainable=trainable, offsets=offsets, sources=np.arange(len(lengths)))


def _setup(case: Case, num_tasks: int, workload: Workload) -> Setup:
    import jax
    import jax.numpy as jnp

    from lobra_jax.compilation import compile_threads
    from lobra_jax.devices import memory_limit
    from profiling.grid import default_lengths
    from profiling.measure import Setup

    device = jax.devices()[0]
    on_host = device.platform == "cpu"
    limit_bytes = memory_limit(DevicesConfig(memory_bytes=HOST_LIMIT_BYTES if on_host else None), device)
    return Setup(
        model=case.model,
        dtype=jnp.dtype(case.dtype),
        num_tasks=num_tasks,
        rank=case.spec.rank,
        targets=case.spec.targets,
        dropout=False,
        dora=False,
        optimizers=("adamw",),
        averages=False,
        devices=[device],
        limit_bytes=limit_bytes - _held_bytes(case, num_tasks, jnp.dtype(case.dtype).itemsize),
        lengths=default_lengths(workload),
        max_tokens=case.max_tokens,
        repeats=3,
        cores=None,
        num_threads=compile_threads(),
    )


def _measure(setup: Setup, case: Case) -> CostTable:
    from profiling.config_cost import measure_config
    from profiling.packed import measure_packed

    cost = measure_config(setup, case.config)
    cost = dataclasses.replace(cost, packed=measure_packed(setup, case.config, cost.capacity_tokens))
    return CostTable(
        model=case.model.name, model_fingerprint=case.model.fingerprint, hardware={"num_devices": 1}, configs=(cost,)
    )


def _held_bytes(case: Case, num_tasks: int, weight_bytes: int) -> int:
    """What the engine that waits holds: weights, and each adapter's master, moments and gradient."""
    weights = sum(math.prod(shape) for shape in weight_shapes(case.model).values())
    features = sum(sum(case.model.target_shapes[target]) for target in case.spec.targets)
    adapters = num_tasks * case.spec.rank * features * case.model.num_layers
    return weight_bytes * weights + STATE_BYTES * adapters


def _run(case: Case, tasks: Sequence[TaskData], plan: Plan, costs: CostTable, steps: int) -> dict[str, dict[str, Any]]:
    """By batching: what its steps took; the first step of each is not counted."""
    import jax.numpy as jnp

    from lobra_jax.compilation import compile_threads
    from lobra_jax.engine import Engine
    from lobra_jax.feeder import Feeder
    from lobra_jax.optim import TaskOptimizer, learning_rates, step_inputs
    from profiling.measure import make_up_weights

    rates = learning_rates("constant", 1e-4, steps=steps + 1, warmup_steps=0, final_fraction=1.0)
    optimizer = TaskOptimizer(
        learning_rates=rates, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1.0
    )
    engines, prepared = {}, {}
    for batching in BATCHINGS:
        dtype, packed = jnp.dtype(case.dtype), batching == "packed"
        engine = Engine(plan, case.model, [case.spec] * len(tasks), dtype=dtype, packed=packed)
        on_host = engine.replicas[0].submesh.devices[0].platform == "cpu"
        make_up_weights(engine.replicas[0], on_host=on_host)
        engine.init_adapters(list(range(len(tasks))))
        shapes = [list(r.shapes) for r in packed_replicas(plan, costs)] if packed else engine.shapes()
        for _ in engine.compile(shapes, [()] * plan.num_replicas, num_threads=compile_threads()):
            pass
        engine.warm_up(None if on_host else shapes)
        click.echo(f"{batching}: {sum(map(len, shapes))} shapes ready")
        settings = PlannerConfig(max_dispatch_buckets=NUM_BUCKETS)
        with Feeder(tasks, plan, costs, settings, batching=batching) as feeder:
            names = [task.name for task in tasks]
            prepared[batching] = [feeder.prepare(dict.fromkeys(names, step)) for step in range(steps + 1)]
        engines[batching] = engine
    taken: dict[str, list[tuple[float, float]]] = {batching: [] for batching in BATCHINGS}
    for step in range(steps + 1):
        for batching in BATCHINGS:
            wall, cpu = time.perf_counter(), time.process_time()
            hyper = step_inputs([optimizer] * len(tasks), [step] * len(tasks))
            engines[batching].finish(engines[batching].issue(prepared[batching][step].arrays, hyper))
            taken[batching].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {batching: _row(taken[batching][1:], prepared[batching][1:]) for batching in BATCHINGS}


def _row(taken: Sequence[tuple[float, float]], prepared: Sequence[Any]) -> dict[str, Any]:
    tokens = [step.batch.num_tokens for step in prepared]
    return {
        "tokens_a_step": statistics.mean(tokens),
        "padding_share": 1 - sum(tokens) / sum(step.padded_tokens for step in prepared),
        "micro_batches_a_step": statistics.mean(len(step.dispatch.replicas[0]) for step in prepared),
        "step_s": statistics.median(wall for wall, _ in taken),
        "step_cpu_s": statistics.median(cpu for _, cpu in taken),
        "tokens_per_s": statistics.median(n / wall for n, (wall, _) in zip(tokens, taken, strict=True)),
        "tokens_per_cpu_s": statistics.median(n / cpu for n, (_, cpu) in zip(tokens, taken, strict=True)),
        "predicted_step_s": statistics.median(max(step.dispatch.predicted_s) for step in prepared),
        "dispatch_s": statistics.median(step.dispatch.solve_s for step in prepared),
    }


if __name__ == "__main__":
    main()
