"""What tensor parallelism sends: whole activations at the borders of a layer's halves, as without adapters."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lobra_jax.lora import LoraSpec
from lobra_jax.mesh import make_submesh
from lobra_jax.models.llama import fan_out
from planner.plan import ParallelConfig

LENGTH = 24


def gathered(program) -> list[tuple[int, ...]]:
    """Shapes of a compiled program's all-gathers of activations."""
    found = re.findall(r"= \(?(?:f32|bf16)\[([\d,]+)\]\S* all-gather(?:-start)?\(", program.as_text())
    return [shape for one in found if len(shape := tuple(map(int, one.split(",")))) > 2]


@pytest.mark.parametrize("kind", ["plain", "dropout", "dora"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_adapters_gather_no_activation_of_their_own(world, remat, kind):
    flat = {"kind": "constant", "peak": 1e-3, "warmup_steps": 0, "final_fraction": 1.0}
    spec = LoraSpec(rank=4, alpha=8, dropout=0.1 if kind == "dropout" else 0.0, dora=kind == "dora")
    tasks = [world.make_task(name, batch_size=2, steps=2, seed=9, clip=1.0, spec=spec, **flat) for name in "ab"]
    engine = world.engine(world.plan((2, 1, remat), buckets=(LENGTH,)), tasks)
    (program,) = engine.replicas[0].training_programs((world.rows, LENGTH))
    whole, layers = (world.rows, LENGTH, world.model.hidden_size), world.model.num_layers
    shapes = gathered(program.fused)
    # Forward: attention's and the feed-forward's input; backward: the gradient of what each of them gave. The loss.
    least = 4 * layers + 1
    # With DoRA and dots, base products are redone for the ratio's gradient, and read the two inputs again.
    redone = 2 * layers if (kind, remat) == ("dora", "dots") else 0
    assert shapes.count(whole) == least + redone
    if kind == "plain":
        assert set(shapes) == {whole}
    # Nor keys of dropout, nor which task a row is of: little ones in hundreds.
    assert not re.findall(r"= [^=]*\b[su]32\[[^=]* all-gather(?:-start)?\(", program.fused.as_text())


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((4, 24, 16), ("tensor", None, None)), ((3, 24, 16), (None, "tensor", None)), ((3, 25, 16), (None, None, None))],
)
def test_norm_regions_are_cut_by_rows_else_by_positions(shape, spec):
    sharding = make_submesh(ParallelConfig(tp=2, pp=1, remat="none"), jax.devices()[:2]).stages[0]
    assert sharding.num_devices == 2
    assert sharding.named(("batch", "length", "hidden"), shape).spec == PartitionSpec(*spec)
    # Where heads take the mesh axis, rows and positions are whole.
    assert sharding.named(("batch", "position", "heads"), shape).spec == PartitionSpec(None, None, "tensor")


@pytest.mark.parametrize(("split", "total"), [(False, 0.0), (True, 1.0)])
def test_gradients_of_products_add_up_before_the_adapters_where_they_are_parts_of_sums(split, total):
    _, vjp = jax.vjp(lambda x: fan_out(x, 3, split), jnp.float32(0))
    assert vjp((jnp.float32(1e8), jnp.float32(-1e8), jnp.float32(1)))[0] == total  # 1 is lost if it is added first
