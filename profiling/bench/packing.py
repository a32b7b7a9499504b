"""Padded against packed rows on skewed lengths: `lobra bench packing --out FILE`.

A small model on one device, lengths as LobRA's six tasks have them, shortened by a constant so that a CPU can do it.
The cost table is measured first, both ways; the same batches are then dispatched and run both ways in turn. Wall and
CPU seconds are both reported: on a machine that others use too, the CPU seconds are the ones to compare.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from lobra_jax.config import PlannerConfig
from lobra_jax.data.batches import TaskData, TaskSampler, task_key
from lobra_jax.data.dataset import TokenStore, whole
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.models.config import LlamaConfig
from planner.batching import choose_batching
from planner.bucketing import planning_buckets
from planner.cost import CostTable
from planner.packed_dispatch import packed_replicas
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from planner.workload import TaskLengths, Workload
from profiling.bench.provenance import provenance

LENGTHS = Path(__file__).resolve().parents[2] / "configs" / "lengths" / "lobra_six_tasks.json"
MODEL = LlamaConfig(
    name="bench",
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)
CONFIG = ParallelConfig(tp=1, pp=1, remat="none")
SPEC = LoraSpec(rank=4, alpha=8)
SHORTER = 8
"""Lengths are divided by this."""
FEWER = 16
"""Batch sizes are divided by this."""
CONTEXT_LENGTH = 512
CAPACITY_TOKENS = 2048
NUM_BUCKETS = 7
LIMIT_BYTES = 8 * 2**30
EXAMPLES_A_TASK = 512
BATCHINGS = ("padded", "packed")


@click.command(epilog="\b\nExample:\n  lobra bench packing --out profiling/results/cpu_packing.json")
@click.option("--steps", type=click.IntRange(min=1), default=6, show_default=True, help="Timed steps each way.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of lengths and batches.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the result as JSON.")
def main(steps: int, seed: int, out: Path | None) -> None:
    """Run the same steps with padded and with packed rows."""
    tasks = _tasks(seed)
    workload = Workload.from_samples({t.name: (t.sampler.batch_size, t.train.lengths.tolist()) for t in tasks})
    costs = _measure(len(tasks), workload)
    capacity = costs[CONFIG].capacity_tokens
    plan = Plan(
        model=MODEL.name,
        num_devices=1,
        replicas=(ReplicaGroup(count=1, config=CONFIG, capacity_tokens=capacity),),
        buckets=planning_buckets(workload, NUM_BUCKETS),
    )
    choice = choose_batching(plan, costs, workload, seed=seed, max_buckets=NUM_BUCKETS)
    click.echo(str(choice))
    rows = _run(tasks, plan, costs, steps)
    for name, row in rows.items():
        click.echo(
            f"{name}: padding {row['padding_share']:.1%}, {row['tokens_per_s']:,.0f} tokens/s, "
            f"{row['tokens_per_cpu_s']:,.0f} tokens a CPU second, step {row['step_s']:.3f} s "
            f"(predicted {row['predicted_step_s']:.3f} s)"
        )
    if out is not None:
        record = {
            "what": "the same steps with padded and with packed rows; medians over steps; costs measured before",
            "command": f"lobra bench packing --steps {steps} --seed {seed}",
            **provenance(("jax", "numpy")),
            "chosen": choice.batching,
            "plan": plan.to_dict(),
            "rows": rows,
        }
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        click.echo(str(out))


def _tasks(seed: int) -> list[TaskData]:
    out = []
    for index, task in enumerate(Workload.load(LENGTHS).tasks):
        key = task_key(seed=seed, task_seed=index, name=task.name, purpose="batches")
        data = whole(task.name, _store(task, np.random.default_rng([seed, index])))
        sampler = TaskSampler(data, key, max(task.batch_size // FEWER, 1))
        out.append(TaskData(name=task.name, train=data, evaluation=None, sampler=sampler))
    return out


def _store(task: TaskLengths, rng: np.random.Generator) -> TokenStore:
    """Random tokens in sequences of the task's lengths, shortened."""
    values, shares = np.array(list(task.lengths)), np.array(list(task.lengths.values()))
    drawn = rng.choice(values, EXAMPLES_A_TASK, p=shares / shares.sum())
    lengths = np.clip(drawn // SHORTER, 1, CONTEXT_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    trainable = np.ones(offsets[-1], bool)
    trainable[offsets[:-1]] = False
    tokens = rng.integers(0, MODEL.vocab_size, offsets[-1], dtype=np.int32)
    return TokenStore(tokens=tokens, trainable=trainable, offsets=offsets, sources=np.arange(len(lengths)))


def _measure(num_tasks: int, workload: Workload) -> CostTable:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from profiling.grid import default_lengths
    from profiling.measure import Setup, measure_config
    from profiling.packed import measure_packed

    setup = Setup(
        model=MODEL,
        dtype=jnp.float32,
        num_tasks=num_tasks,
        rank=SPEC.rank,
        targets=SPEC.targets,
        dropout=False,
        dora=False,
        optimizers=("adamw",),
        averages=False,
        devices=jax.devices()[:1],
        limit_bytes=LIMIT_BYTES,
        lengths=default_lengths(workload),
        max_tokens=CAPACITY_TOKENS,
        repeats=3,
        cores=None,
        num_threads=os.cpu_count() or 1,
    )
    cost = measure_config(setup, CONFIG)
    cost = dataclasses.replace(cost, packed=measure_packed(setup, CONFIG, cost.capacity_tokens))
    return CostTable(
        model=MODEL.name, model_fingerprint=MODEL.fingerprint, hardware={"num_devices": 1}, configs=(cost,)
    )


def _run(tasks: Sequence[TaskData], plan: Plan, costs: CostTable, steps: int) -> dict[str, dict[str, Any]]:
    """By batching: what its steps took; the first step of each is not counted."""
    import jax.numpy as jnp

    from lobra_jax.engine import Engine
    from lobra_jax.feeder import Feeder
    from lobra_jax.models.weights import RandomWeights
    from lobra_jax.optim import TaskOptimizer, learning_rates, step_inputs

    rates = learning_rates("constant", 1e-4, steps=steps + 1, warmup_steps=0, final_fraction=1.0)
    optimizer = TaskOptimizer(
        learning_rates=rates, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1.0
    )
    engines, prepared = {}, {}
    for batching in BATCHINGS:
        engine = Engine(plan, MODEL, [SPEC] * len(tasks), dtype=jnp.float32, packed=batching == "packed")
        engine.load(RandomWeights(MODEL, seed=0))
        engine.init_adapters(list(range(len(tasks))))
        shapes = [list(r.shapes) for r in packed_replicas(plan, costs)] if batching == "packed" else engine.shapes()
        for _ in engine.compile(shapes, [()] * plan.num_replicas, num_threads=os.cpu_count() or 1):
            pass
        engine.warm_up()
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
