"""Training on a quantised base: the numerical contract holds, and no dense copy of the weights is kept."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.data.batches import MicroBatchArrays
from lobra_jax.lora import LoraSpec, adapted_targets, init_adapters, set_magnitudes, task_inputs
from lobra_jax.mesh import make_submesh
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.quantized import SCALE, block_dim, dequantized, quantized
from lobra_jax.models.weights import ArrayWeights, RandomWeights, weight_shapes, whole
from lobra_jax.replica import Replica, ReplicaRun
from lobra_jax.sharding import TARGET_AXES
from lobra_jax.stage import Residuals
from planner.errors import UserError
from planner.plan import ParallelConfig

TOLERANCE = 1e-5
FP8_TOLERANCE = 0.3
"""Activations and gradients of float8 are off by up to 1/16; gradients of a made-up model are sums that cancel."""
MODEL = LlamaConfig(
    name="quantised",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=72,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
)
SPECS = (LoraSpec(rank=3, alpha=4.0, targets=("down",)), LoraSpec(rank=2, alpha=4.0, targets=("q", "down"), dora=True))
SHAPE = (3, 6)


def make_replica(config, quantization, *, model=MODEL, specs=SPECS):
    tp, pp, remat = config
    return Replica(
        index=0,
        model=model,
        submesh=make_submesh(ParallelConfig(tp=tp, pp=pp, remat=remat), jax.devices()[: tp * pp]),
        num_tasks=len(specs),
        max_rank=max(spec.rank for spec in specs),
        targets=adapted_targets(specs),
        dropout=any(spec.dropout for spec in specs),
        dora=any(spec.dora for spec in specs),
        dtype=jnp.float32,
        quantization=quantization,
    )


def gradients(replica, source):
    """{layer: {target: ...}} of one micro-batch, and its losses [T]; no factor of the adapters is zero."""
    replica.load(source)
    rng = np.random.default_rng(0)
    adapters = init_adapters(MODEL, SPECS, [1, 2])
    set_magnitudes(adapters, SPECS, replica.column_norms(adapted_targets(SPECS)))
    for targets in adapters.values():
        for target, pair in targets.items():
            for task, spec in enumerate(SPECS):
                if target in spec.targets:
                    pair["b"][task, : spec.rank] = rng.normal(0, 0.05, (spec.rank, pair["b"].shape[2]))
    tokens, targets = rng.integers(0, MODEL.vocab_size, (2, *SHAPE), dtype=np.int32)
    batch = MicroBatchArrays(
        tokens=tokens,
        targets=targets,
        loss_weights=rng.random(SHAPE, np.float32) / 10,
        task_ids=np.array([0, 1, 0], np.int32),
        dropout_ids=np.arange(SHAPE[0], dtype=np.uint32),
    )
    for compile_program in replica.compilations([SHAPE]):
        compile_program()
    placed = [
        {
            layer: jax.device_put(adapters[layer], jax.tree.map(lambda leaf: leaf.sharding, pairs))
            for layer, pairs in layout.adapters.items()
        }
        for layout in replica.layouts
    ]
    run = ReplicaRun(gradients=replica.zero_gradients())
    replica.issue(run, [batch], placed, replica.place_tasks(task_inputs(SPECS)))
    found = {layer: jax.tree.map(np.asarray, pairs) for stage in run.gradients for layer, pairs in stage.items()}
    return found, np.asarray(run.losses[0])


def read_back(kind):
    """Dense weights that hold what a quantised base stands for."""
    source = RandomWeights(MODEL, seed=0)

    def of(name, weight):
        if (target := name.rpartition(".")[2]) not in TARGET_AXES:
            return weight
        dim = block_dim(TARGET_AXES[target])
        return np.asarray(dequantized(*quantized(jnp.asarray(weight), kind, dim), kind, dim, jnp.float32))

    return ArrayWeights({name: of(name, source.read(name, whole(s))) for name, s in weight_shapes(MODEL).items()})


@pytest.fixture(scope="module")
def dense_replica():
    return make_replica((1, 1, "none"), "none")


@pytest.mark.parametrize(
    ("kind", "config"),
    [("int8", (2, 1, "full")), ("nf4", (1, 2, "dots"))],
)
def test_any_plan_has_the_gradients_of_the_weights_read_back_on_one_device(world, dense_replica, kind, config):
    """With DoRA too, whose norms are those of the weights read back."""
    expected, expected_losses = gradients(dense_replica, read_back(kind))
    found, losses = gradients(make_replica(config, kind), RandomWeights(MODEL, seed=0))
    assert world.difference(found, expected) < TOLERANCE
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
    assert all(np.abs(pair["m"]).max() > 0 for layer in found.values() for pair in (layer["q"], layer["down"]))


def test_with_fp8_gradients_are_near_those_of_the_weights_read_back(world, dense_replica):
    expected, expected_losses = gradients(dense_replica, read_back("fp8"))
    found, losses = gradients(make_replica((1, 1, "none"), "fp8"), RandomWeights(MODEL, seed=0))
    assert TOLERANCE < world.difference(found, expected) < FP8_TOLERANCE
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-2)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_every_mesh_holds_the_same_numbers(kind):
    one, eight = (make_replica((tp, 1, "none"), kind) for tp in (1, 8))
    for replica in (one, eight):
        replica.load(RandomWeights(MODEL, seed=0))
    assert "layers.1.down" + SCALE in one.params[0]
    assert one.params[0]["layers.1.down"].dtype.itemsize == 1
    for name, array in eight.params[0].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(one.params[0][name]))


WIDE = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=512, num_layers=4, head_dim=32)
DENSE_LAYER_BYTES = 4 * sum(fan_in * fan_out for fan_in, fan_out in WIDE.target_shapes.values())
MEMORY_FIRST = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""XLA's schedule for CPUs otherwise begins with all that needs parameters alone, to keep cores busy."""
KEEPS_BARRIERS = (0, 11, 0)
"""From here on XLA heeds optimisation barriers on CPUs too, which keep a forward's work from serving the backward."""


def program_bytes(quantization):
    """Residuals, and temporaries of forward, backward and the last stage's both, of two layers and one short row."""
    replica = make_replica((1, 2, "none"), quantization, model=WIDE, specs=[LoraSpec(rank=1, alpha=1.0)])
    layout, last = replica.layouts
    batch = layout.batch(1, 4)
    arguments = (layout.params, layout.adapters, layout.tasks)
    kept = Residuals()
    forward = jax.jit(functools.partial(layout.functions.forward, kept)).lower(*arguments, batch.tokens, batch)
    residuals = forward.out_info[1]
    backward = jax.jit(functools.partial(layout.functions.backward, kept)).lower(
        layout.adapters, *arguments, batch, residuals, layout.hidden(1, 4)
    )
    programs = [forward, backward]
    if jax.__version_info__ >= KEEPS_BARRIERS:
        arguments = (last.adapters, last.params, last.adapters, last.tasks, last.hidden(1, 4), last.batch(1, 4))
        programs.append(jax.jit(last.functions.fused).lower(*arguments))
    temporary = [program.compile().memory_analysis().temp_size_in_bytes for program in programs]
    return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals)), *temporary]


def test_no_dense_copy_of_the_weights_outlives_its_matmul():
    command = [sys.executable, __file__]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {MEMORY_FIRST}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=True)
    assert max(json.loads(done.stdout)) < 0.6 * DENSE_LAYER_BYTES


def test_nf4_refuses_a_hidden_size_that_blocks_do_not_fill():
    with pytest.raises(UserError, match=r"model.quantization: .*hidden size 80 \(got 'nf4'\).* multiple of 64"):
        make_replica((1, 1, "none"), "nf4", model=dataclasses.replace(MODEL, hidden_size=80))


if __name__ == "__main__":
    print(json.dumps(program_bytes("nf4")))
