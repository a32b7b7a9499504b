"""Twenty AdamW steps here and in `peft` + torch, from the same weights, batches and hyper-parameters, compared.

`python -m profiling.bench.parity --out parity.json` (extra `parity`) trains six unlike tasks jointly on an uneven plan
of simulated devices, each of them alone on one device, and each with PEFT and `torch.optim.AdamW`, and prints for
every task how far loss curve and adapter are from PEFT's.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from lobra_jax.config import DevicesConfig, PlannerConfig
from lobra_jax.data.batches import TaskData, TaskSampler, task_key
from lobra_jax.data.dataset import TokenStore, whole
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.models.config import LlamaConfig
from planner.config_cost import ConfigCost
from planner.cost import CostTable
from planner.files import check_out, write_json
from planner.plan import ParallelConfig, Plan, ReplicaGroup
from profiling.bench.provenance import provenance

NUM_STEPS = 20
NUM_DEVICES = 8
MAX_LENGTH = 48
NUM_EXAMPLES = 40
MODEL = LlamaConfig(
    name="parity",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
UNEVEN = ((1, 1, "none", 96), (2, 1, "full", 192), (1, 2, "dots", 384))
"""(tp, pp, remat, capacity in tokens) of the joint run's replicas."""

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityTask:
    """One task: its data, adapter and AdamW settings, as both sides take them."""

    data: TaskData
    spec: LoraSpec
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    seed: int


def parity_tasks() -> tuple[ParityTask, ...]:
    """Six tasks unlike in rank, scaling, kind, targets, lr, schedule, weight decay, clipping, batch and lengths."""
    rows = (
        ("answers", 8, LoraSpec(rank=8, alpha=16), 2e-3, "cosine", 4, 0.0, 1.0),
        ("titles", 3, LoraSpec(rank=2, alpha=8, targets=("q", "v"), dora=True), 5e-3, "linear", 0, 0.01, math.inf),
        ("code", 4, LoraSpec(rank=16, alpha=16, rslora=True), 1e-3, "constant", 0, 0.1, 0.3),
        ("maths", 6, LoraSpec(rank=4, alpha=4, targets=("gate", "up", "down")), 3e-3, "cosine", 2, 0.0, 0.5),
        ("bills", 1, LoraSpec(rank=4, alpha=8, targets=("k", "o", "down")), 2e-3, "linear", 5, 0.05, 1.0),
        (
            "chat",
            5,
            LoraSpec(rank=3, alpha=6, rslora=True, targets=("q", "k", "v", "o")),
            4e-3,
            "constant",
            3,
            0.0,
            2.0,
        ),
    )
    return tuple(
        ParityTask(
            data=_data(name, batch_size, seed),
            spec=spec,
            lr=lr,
            schedule=schedule,
            warmup_steps=warmup,
            weight_decay=decay,
            clip_norm=clip,
            seed=seed,
        )
        for seed, (name, batch_size, spec, lr, schedule, warmup, decay, clip) in enumerate(rows, start=1)
    )


def _data(name: str, batch_size: int, seed: int) -> TaskData:
    """Random tokens in skewed lengths; about a third of each example is a prompt that does not count."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.03 * seed, NUM_EXAMPLES) + 3, MAX_LENGTH)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    trainable = np.concatenate([np.arange(n + 1) > n // 3 for n in lengths])
    store = TokenStore(
        tokens=rng.integers(0, MODEL.vocab_size, offsets[-1], dtype=np.int32),
        trainable=trainable,
        offsets=offsets,
        sources=np.arange(NUM_EXAMPLES),
    )
    data = whole(name, store)
    key = task_key(seed=0, task_seed=seed, name=name, purpose="batches")
    return TaskData(name=name, train=data, evaluation=None, sampler=TaskSampler(data, key, batch_size))


def one_device() -> tuple[Plan, CostTable]:
    return _plan(((1, 1, "none", 384),))


def uneven() -> tuple[Plan, CostTable]:
    return _plan(UNEVEN)


def _plan(configs: Sequence[tuple[int, int, str, int]]) -> tuple[Plan, CostTable]:
    costs = tuple(
        ConfigCost(
            config=ParallelConfig(tp=tp, pp=pp, remat=remat),
            capacity_tokens=capacity,
            coefficients=(0.0, 0.0, 1e-5 / tp, 0.0, 0.0, 1e-3),
        )
        for tp, pp, remat, capacity in configs
    )
    groups = tuple(ReplicaGroup(count=1, config=cost.config, capacity_tokens=cost.capacity_tokens) for cost in costs)
    plan = Plan(model=MODEL.name, num_devices=NUM_DEVICES, replicas=groups, buckets=(MAX_LENGTH,))
    table = CostTable(
        model=MODEL.name, model_fingerprint=MODEL.fingerprint, hardware={"num_devices": NUM_DEVICES}, configs=costs
    )
    return plan, table


def train_here(
    tasks: Sequence[ParityTask], plan: Plan, costs: CostTable, base: Path, num_steps: int
) -> dict[str, tuple[np.ndarray, Any]]:
    """{task: (losses [num_steps], its own adapter)} of one joint run."""
    import jax
    import jax.numpy as jnp

    from lobra_jax.compilation import compile_threads
    from lobra_jax.engine import Engine
    from lobra_jax.feeder import Feeder
    from lobra_jax.lora import task_adapter
    from lobra_jax.models.hf import HFWeights
    from lobra_jax.optim import step_inputs

    optimizers = [_optimizer(task, num_steps) for task in tasks]
    engine = Engine(plan, MODEL, [task.spec for task in tasks], dtype=jnp.float32)
    engine.load(HFWeights(base, MODEL))
    engine.init_adapters([task.seed for task in tasks])
    names = [task.data.name for task in tasks]
    losses = []
    with Feeder([task.data for task in tasks], plan, costs, PlannerConfig()) as feeder:
        prepared = [feeder.prepare(dict.fromkeys(names, step)) for step in range(num_steps)]
    used = [sorted({a.tokens.shape for step in prepared for a in step.arrays[r]}) for r in range(plan.num_replicas)]
    for _ in engine.compile(used, [()] * plan.num_replicas, num_threads=compile_threads()):
        pass
    for step, ready in enumerate(prepared):
        hyper = step_inputs(optimizers, [step] * len(tasks))
        losses.append(engine.finish(engine.issue(ready.arrays, hyper)).losses)
    adapters = jax.tree.map(np.asarray, engine.state.adapters)
    return {
        task.data.name: (np.array(losses)[:, index], task_adapter(adapters, index, task.spec))
        for index, task in enumerate(tasks)
    }


def _optimizer(task: ParityTask, num_steps: int) -> Any:
    from lobra_jax.optim import TaskOptimizer, learning_rates

    rates = learning_rates(task.schedule, task.lr, steps=num_steps, warmup_steps=task.warmup_steps, final_fraction=0.1)
    return TaskOptimizer(
        learning_rates=rates,
        weight_decay=task.weight_decay,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=task.clip_norm,
    )


def train_with_peft(task: ParityTask, base: Path, folder: Path, num_steps: int) -> tuple[np.ndarray, Any]:
    """(losses [num_steps], adapter) of `peft` and `torch.optim.AdamW` from the same start; files go into `folder`."""
    import peft
    import torch
    import transformers

    from lobra_jax.peft_folder import read_peft_adapter, write_peft_adapter

    write_peft_adapter(folder / "start", task.spec, start_of(task, base), str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder / "start", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=task.weight_decay)
    rates = _optimizer(task, num_steps).learning_rates
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        loss = _torch_loss(model, task, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, task.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder / "end")
    _, adapter = read_peft_adapter(folder / "end")
    return np.array(losses), adapter


def _torch_loss(model: Any, task: ParityTask, step: int) -> Any:
    """The mean over the targets of the task's batch of this step."""
    import torch

    sequences = [task.data.train.sequence(row) for row in task.data.sampler.indices(step)]
    length = max(len(tokens) for tokens, _ in sequences)
    tokens = torch.zeros(len(sequences), length, dtype=torch.long)
    labels = torch.full((len(sequences), length), -100)
    attention = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, (ids, trainable) in enumerate(sequences):
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        attention[row, : len(ids)] = 1
        counted = np.where(trainable, ids, -100).astype(np.int64)
        labels[row, : len(ids)] = torch.from_numpy(counted)
    logits = model(input_ids=tokens, attention_mask=attention).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def start_of(task: ParityTask, base: Path) -> Any:
    """The fresh adapter that a task begins with."""
    from lobra_jax.lora import init_adapters, set_magnitudes, task_adapter
    from lobra_jax.models.hf import HFWeights
    from lobra_jax.models.weights import whole as all_of

    adapters = init_adapters(MODEL, [task.spec], [task.seed])
    source = HFWeights(base, MODEL)
    norms = {
        layer: {
            target: np.linalg.norm(source.read(f"layers.{layer}.{target}", all_of(MODEL.target_shapes[target])), axis=0)
            for target in pairs
        }
        for layer, pairs in adapters.items()
    }
    set_magnitudes(adapters, [task.spec], norms)
    return task_adapter(adapters, 0, task.spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """From PEFT: the loss curve at its worst step, relative; the adapter as a share of how far training moved it."""

    loss: float
    adapter: float


def difference(found: tuple[np.ndarray, Any], expected: tuple[np.ndarray, Any], start: Any) -> Difference:
    """`start` is the adapter that both sides began with; norms are Euclidean, over the whole adapter."""

    def distance(left: Any, right: Any) -> float:
        squares = (
            float(np.sum((left[layer][target][factor] - right[layer][target][factor]) ** 2.0))
            for layer, targets in right.items()
            for target, pair in targets.items()
            for factor in pair
        )
        return math.sqrt(sum(squares))

    return Difference(
        loss=float(np.max(np.abs(found[0] / expected[0] - 1))),
        adapter=distance(found[1], expected[1]) / distance(expected[1], start),
    )


def write_base(folder: Path) -> Path:
    """A random base model as `transformers` loads it."""
    from lobra_jax.models.hf import save_hf
    from lobra_jax.models.weights import RandomWeights

    save_hf(folder, MODEL, RandomWeights(MODEL, seed=0))
    return folder


def compare(
    alone: Sequence[str], folder: Path, num_steps: int = NUM_STEPS
) -> tuple[Mapping[str, Difference], Mapping[str, Difference]]:
    """({task: solo - PEFT} of the tasks in `alone`, {task: joint on the uneven plan - PEFT} of these)."""
    tasks = parity_tasks()
    base = write_base(folder / "base")
    joint = train_here(tasks, *uneven(), base, num_steps)
    solo_differences, joint_differences = {}, {}
    for task in tasks:
        name = task.data.name
        if name in alone:
            expected = train_with_peft(task, base, folder / name, num_steps)
            solo = train_here([task], *one_device(), base, num_steps)
            solo_differences[name] = difference(solo[name], expected, start_of(task, base))
            joint_differences[name] = difference(joint[name], expected, start_of(task, base))
    return solo_differences, joint_differences


@click.command(epilog="\b\nExample:\n  python -m profiling.bench.parity --out parity.json")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The JSON file to write.")
def main(out: Path) -> None:
    """Compare training here with PEFT and torch, task by task, alone and among others."""
    from lobra_jax.devices import configure

    check_out(out)
    with tempfile.TemporaryDirectory() as name:
        configure(DevicesConfig(simulated=NUM_DEVICES), cache_dir=Path(name))
        tasks = parity_tasks()
        solo, joint = compare([task.data.name for task in tasks], Path(name))
    rows = []
    click.echo("| task | rank | targets | schedule | loss, alone | adapter, alone | loss, jointly | adapter, jointly |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        key, spec = task.data.name, task.spec
        numbers = {"alone": dataclasses.asdict(solo[key]), "jointly": dataclasses.asdict(joint[key])}
        rows.append({"task": key, **numbers})
        cells = (f"{value:.0e}" for side in numbers.values() for value in side.values())
        kinds = ", ".join(name for name, used in (("rsLoRA", spec.rslora), ("DoRA", spec.dora)) if used)
        rank = f"{spec.rank} ({kinds})" if kinds else str(spec.rank)
        targets = "all" if spec.targets == TARGETS else " ".join(spec.targets)
        click.echo(f"| {key} | {rank} | {targets} | {task.schedule} | {' | '.join(cells)} |")
    record = {
        **provenance(("jax", "torch", "transformers", "peft", "optax")),
        "simulated_devices": NUM_DEVICES,
        "num_steps": NUM_STEPS,
        "joint_plan": [f"({tp},{pp}) {remat}" for tp, pp, remat, _ in UNEVEN],
        "relative_difference_from_peft": rows,
    }
    write_json(out, record)


if __name__ == "__main__":
    main()
