"""A small world for the runtime's tests: a tiny model, three unlike tasks, plans by hand, any dispatch at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lobra_jax.data.batches import GlobalBatch, TaskData, TaskSampler, fill_micro_batch, global_batch, task_key
from lobra_jax.data.dataset import TokenStore, whole
from lobra_jax.lora import LoraSpec, init_adapters, task_adapter
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.weights import RandomWeights
from lobra_jax.optim import TaskOptimizer, learning_rates, step_inputs
from planner.plan import ParallelConfig, Plan, ReplicaGroup

MODEL = LlamaConfig(
    name="test",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
)
MAX_LENGTH = 24
DEFAULT_SPEC = LoraSpec(rank=4, alpha=8)
ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the tests: its data, adapter and optimiser."""

    data: TaskData
    spec: LoraSpec
    optimizer: TaskOptimizer
    steps: int
    seed: int


def make_task(
    name: str, *, batch_size: int, steps: int, seed: int, clip: float, spec: LoraSpec = DEFAULT_SPEC, **schedule: Any
) -> Task:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.12, 23) + 2, MAX_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    trainable = rng.random(offsets[-1]) < 0.8
    trainable[offsets[:-1]] = False
    trainable[offsets[1:] - 1] = True
    store = TokenStore(
        tokens=rng.integers(0, MODEL.vocab_size, offsets[-1], dtype=np.int32),
        trainable=trainable,
        offsets=offsets,
        sources=np.arange(len(lengths)),
    )
    key = task_key(seed=0, task_seed=seed, name=name, purpose="batches")
    data = whole(name, store)
    return Task(
        data=TaskData(name=name, train=data, evaluation=None, sampler=TaskSampler(data, key, batch_size), sources=()),
        spec=spec,
        optimizer=TaskOptimizer(
            learning_rates=learning_rates(steps=steps, **schedule),
            weight_decay=0.01 * seed,
            beta1=0.9,
            beta2=min(0.99 + 0.001 * seed, 0.999),
            # Where a gradient element cancels to rounding noise Adam moves it by noise / (noise + epsilon): with the
            # usual 1e-8 one such element decides a comparison to 1e-5.
            epsilon=1e-6,
            clip_norm=clip,
        ),
        steps=steps,
        seed=seed,
    )


def unlike_tasks() -> dict[str, Task]:
    """Unlike in rank, dropout, targets, scaling, lr, schedule, clipping, batch size and steps."""
    tasks = [
        make_task(
            "a", batch_size=6, spec=LoraSpec(rank=4, alpha=8, dropout=0.2), steps=20, seed=1, clip=0.5,
            kind="cosine", peak=3e-3, warmup_steps=3, final_fraction=0.1,
        ),
        make_task(
            "b", batch_size=3, spec=LoraSpec(rank=8, alpha=16, rslora=True, targets=("q", "v", "down")), steps=12,
            seed=2, clip=math.inf, kind="constant", peak=1e-3, warmup_steps=0, final_fraction=1.0,
        ),
        make_task(
            "c", batch_size=2, spec=LoraSpec(rank=2, alpha=2, dropout=0.1), steps=20, seed=3, clip=0.05,
            kind="linear", peak=5e-3, warmup_steps=5, final_fraction=0.0,
        ),
    ]  # fmt: skip
    return {task.data.name: task for task in tasks}


def make_plan(*configs: tuple[int, int, str], buckets: tuple[int, ...] = (MAX_LENGTH,), num_devices: int = 8) -> Plan:
    """One replica for each (tp, pp, remat); of several policies the first buckets are each the most that one holds."""
    return Plan(
        model=MODEL.name,
        num_devices=num_devices,
        replicas=tuple(
            ReplicaGroup(
                count=1,
                config=ParallelConfig(tp=tp, pp=pp, remat=remat),
                capacity_tokens=ROWS * buckets[-1],
                smaller_capacities=buckets[: remat.count("+")],
            )
            for tp, pp, remat in configs
        ),
        buckets=buckets,
    )


def any_dispatch(batch: GlobalBatch, plan: Plan, seed: int, *, idle: Sequence[int] = ()) -> list[list[Any]]:
    """[replica][micro-batch] of a random dispatch: each sequence once, in its bucket, replicas in `idle` empty."""
    from planner.dispatch import MicroBatch

    rng = np.random.default_rng(seed)
    working = [r for r in range(plan.num_replicas) if r not in idle]
    out: list[list[Any]] = [[] for _ in range(plan.num_replicas)]
    buckets = np.searchsorted(plan.buckets, batch.lengths)
    for bucket, length in enumerate(plan.buckets):
        mine = rng.permutation(np.flatnonzero(buckets == bucket))
        for start in range(0, len(mine), ROWS):
            chosen = tuple(int(i) for i in mine[start : start + ROWS])
            replica = working[int(rng.integers(len(working)))]
            micro_batch = MicroBatch(rows=ROWS, length=length, sequences=chosen)
            out[replica].append(fill_micro_batch(batch, micro_batch))
    return out


def make_engine(plan: Plan, tasks: Sequence[Task], model: LlamaConfig = MODEL, *, idle: Sequence[int] = ()) -> Any:
    """Loaded and compiled, for the replicas in `idle` without programs for any micro-batch."""
    import jax.numpy as jnp

    from lobra_jax.engine import Engine

    kinds = {task.optimizer.kind for task in tasks}
    engine = Engine(plan, model, [task.spec for task in tasks], dtype=jnp.float32, optimizers=kinds)
    engine.load(RandomWeights(model, seed=0))
    engine.init_adapters([task.seed for task in tasks])
    each = [(ROWS, bucket) for bucket in plan.buckets]
    shapes = [[] if index in idle else each for index in range(plan.num_replicas)]
    for _ in engine.compile(shapes, [()] * plan.num_replicas, num_threads=2):
        pass
    return engine


def step_of(tasks: Sequence[Task], step: int) -> dict[str, int | None]:
    return {task.data.name: step if step < task.steps else None for task in tasks}


def train_steps(engine: Any, tasks: Sequence[Task], num_steps: int, *, seed: int = 0, idle: Sequence[int] = ()) -> Any:
    """Runs steps 0..num_steps-1; returns {task name: its own adapter} and the losses [step][task]."""
    import jax

    losses = []
    for step in range(num_steps):
        steps = step_of(tasks, step)
        batch = global_batch([task.data for task in tasks], steps)
        arrays = any_dispatch(batch, engine.plan, seed + step, idle=idle)
        hyper = step_inputs([task.optimizer for task in tasks], list(steps.values()))
        losses.append(engine.finish(engine.issue(arrays, hyper)).losses)
    adapters = jax.tree.map(np.asarray, engine.state.adapters)
    return {task.data.name: task_adapter(adapters, i, task.spec) for i, task in enumerate(tasks)}, np.array(losses)


def step_gradients(engine: Any, tasks: Sequence[Task], *, seed: int = 0) -> dict[str, Any]:
    """{task name: gradient of its own adapter} of the first step, b drawn at random so that a's gradient is not 0."""
    import jax

    from lobra_jax.replica import ReplicaRun

    adapters = init_adapters(engine.model, [task.spec for task in tasks], [task.seed for task in tasks])
    for index, task in enumerate(tasks):
        rng = np.random.default_rng(task.seed)
        for layer in adapters:
            for target in task.spec.targets:
                b = adapters[layer][target]["b"]
                b[index, : task.spec.rank] = rng.normal(0, 0.05, b[index, : task.spec.rank].shape)
    engine.set_state(engine.gradient_sum.init(adapters))
    batch = global_batch([task.data for task in tasks], step_of(tasks, 0))
    arrays = any_dispatch(batch, engine.plan, seed)
    total: Any = None
    for replica in engine.replicas:
        run = ReplicaRun(gradients=replica.zero_gradients())
        spread = engine.gradient_sum.spread(engine.state.adapters)[replica.index]
        replica.issue(run, arrays[replica.index], spread, engine.tasks[replica.index])
        own = {layer: jax.tree.map(np.asarray, pairs) for stage in run.gradients for layer, pairs in stage.items()}
        total = own if total is None else jax.tree.map(np.add, total, own)
    return {"stacked": total} | {task.data.name: task_adapter(total, i, task.spec) for i, task in enumerate(tasks)}


def relative_difference(found: Any, expected: Any) -> float:
    """Largest over the leaves of |found - expected| / |expected|, Euclidean norms of whole arrays."""
    import jax

    worst = 0.0
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.linalg.norm(y)
        difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        worst = max(worst, float(difference / scale) if scale > 0 else math.inf if difference > 0 else 0.0)
    return worst


@dataclasses.dataclass(frozen=True)
class World:
    """What tests take from here, as one fixture."""

    model: LlamaConfig
    tasks: Mapping[str, Task]
    max_length: int
    rows: int
    plan: Callable[..., Plan]
    engine: Callable[..., Any]
    dispatch: Callable[..., list[list[Any]]]
    make_task: Callable[..., Task]
    train: Callable[..., Any]
    gradients: Callable[..., dict[str, Any]]
    difference: Callable[[Any, Any], float]


@pytest.fixture(scope="session")
def world() -> World:
    return World(
        model=MODEL,
        tasks=unlike_tasks(),
        max_length=MAX_LENGTH,
        rows=ROWS,
        plan=make_plan,
        engine=make_engine,
        dispatch=any_dispatch,
        make_task=make_task,
        train=train_steps,
        gradients=step_gradients,
        difference=relative_difference,
    )


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Tests change functions that are traced, which programs kept by an earlier test would not know of."""
    monkeypatch.setattr("lobra_jax.kept_programs.programs_folder", lambda: None)
