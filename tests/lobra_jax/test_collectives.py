"""What tensor parallelism sends: whole activations at the borders of a layer's halves, nothing for adapters alone."""

from __future__ import annotations

import re

import pytest

LENGTH = 24


def gathered(program) -> list[tuple[int, ...]]:
    """Shapes of a compiled program's all-gathers of activations."""
    found = re.findall(r"= \(?(?:f32|bf16)\[([\d,]+)\]\S* all-gather(?:-start)?\(", program.as_text())
    return [shape for one in found if len(shape := tuple(map(int, one.split(",")))) > 2]


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_adapters_gather_nothing_of_their_own(world, remat):
    flat = {"kind": "constant", "peak": 1e-3, "warmup_steps": 0, "final_fraction": 1.0}
    tasks = [
        world.make_task(name, batch_size=2, steps=2, seed=seed, clip=1.0, **flat) for seed, name in enumerate("ab")
    ]
    engine = world.engine(world.plan((2, 1, remat), buckets=(LENGTH,)), tasks)
    (program,) = engine.replicas[0].training_programs((world.rows, LENGTH))
    hidden, layers = (world.rows, LENGTH, world.model.hidden_size), world.model.num_layers
    shapes = gathered(program.fused)
    assert set(shapes) == {hidden}
    # Forward: attention's and the feed-forward's input; backward: the gradient of what each of them gave. The loss.
    assert len(shapes) == 4 * layers + 1
