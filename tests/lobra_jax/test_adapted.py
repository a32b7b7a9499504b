"""`adapted_linears` against the plain path, with the kernel's place taken by sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.adapted import adapted_linears
from lobra_jax.lora import low_rank_deltas
from lobra_jax.low_rank import Slots
from lobra_jax.rank_matmul import TILE_TOKENS

NUM_TASKS, FEATURES, RANK = 3, 16, 4
OUT = {"q": 24, "k": 8, "v": 12}


def written_out(lhs, rhs, ranks, *, transposed):
    """What the kernel promises, tile by tile."""
    total = sum(a @ (b.T if transposed else b) for a, b in zip(lhs, rhs, strict=True))
    if ranks is None:
        return total
    depth = ranks.factors.shape[2 if transposed else 1]
    num_steps = ranks.h.shape[1] // depth
    parts = []
    for tile, start in enumerate(range(0, len(total), TILE_TOKENS)):
        h = ranks.h[start : start + TILE_TOKENS].reshape(-1, num_steps, depth)
        for step in range(num_steps):
            factors = ranks.factors[ranks.which[tile * num_steps + step]]
            part = h[:, step] @ (factors.T if transposed else factors)
            if step == 0:
                parts.append(part)
            else:
                parts[-1] = parts[-1] + part
    return total + jnp.concatenate(parts)


def arrays(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def slots_of(rng, rows, length, *, packed):
    if not packed:
        ids = rng.integers(0, NUM_TASKS, (rows, 1))
        return Slots(task_ids=jnp.asarray(ids, jnp.int32), scales=arrays(rng, rows, 1, 1, 1))
    ids = np.array([rng.permutation(NUM_TASKS)[:2] for _ in range(rows)])
    own = rng.integers(0, 2, (rows, length, 1)) == np.arange(2)
    return Slots(
        task_ids=jnp.asarray(ids, jnp.int32), scales=arrays(rng, rows, length, 1, 1), own=jnp.asarray(own[..., None])
    )


# Rows of a whole tile, of several tiles, of a part of one, and as many as there are tasks or fewer.
@pytest.mark.parametrize("rows, length", [(4, 256), (2, 512), (5, 208), (16, 48), (1, 80)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_values_and_gradients_are_the_plain_paths(rows, length, packed, dropout):
    rng = np.random.default_rng(rows * length + packed)
    x, kept = arrays(rng, rows, length, FEATURES), jnp.asarray(rng.integers(0, 2, (rows, length, FEATURES)) * 2.0)
    weights = tuple(arrays(rng, FEATURES, n) for n in OUT.values())
    pairs = {
        name: {"a": arrays(rng, NUM_TASKS, RANK, FEATURES), "b": arrays(rng, NUM_TASKS, RANK, n)}
        for name, n in OUT.items()
        if name != "k"
    }
    slots = slots_of(rng, rows, length, packed=packed)
    cotangents = tuple(arrays(rng, rows, length, n) for n in OUT.values())

    def plain(x, pairs):
        deltas = dict(zip(pairs, low_rank_deltas(x * kept if dropout else x, pairs, list(pairs), slots), strict=True))
        return tuple(x @ weight + deltas.get(name, 0.0) for name, weight in zip(OUT, weights, strict=True))

    def inside(x, pairs):
        dropped = x * kept if dropout else None
        return adapted_linears(written_out, x, dropped, weights, tuple(pairs.get(name) for name in OUT), slots)

    with jax.default_matmul_precision("float32"):
        expected, expected_vjp = jax.vjp(plain, x, pairs)
        outs, vjp = jax.vjp(inside, x, pairs)
        expected_gradients, gradients = expected_vjp(cotangents), vjp(cotangents)
    for one, other in zip(
        jax.tree.leaves((outs, gradients)), jax.tree.leaves((expected, expected_gradients)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(other))))


def test_a_backward_keeps_what_its_policy_names_and_the_programs_own_inputs():
    """No copies of weights or adapters among the residuals, and h by its name."""
    rng = np.random.default_rng(0)
    weight, pair = (
        arrays(rng, FEATURES, 8),
        {"a": arrays(rng, NUM_TASKS, RANK, FEATURES), "b": arrays(rng, NUM_TASKS, RANK, 8)},
    )
    slots = slots_of(rng, 4, 256, packed=False)

    @jax.jit
    def layer(x, weight, pair):
        return adapted_linears(written_out, x, None, (weight,), (pair,), slots)[0]

    def forward(x, weight, pair):
        names = jax.checkpoint_policies.save_only_these_names("low_rank")
        return jax.vjp(lambda x, pair: jax.checkpoint(layer, policy=names)(x, weight, pair), x, pair)

    kept = [
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(forward, arrays(rng, 4, 256, FEATURES), weight, pair)[1])
    ]
    assert (4, 256, 1, RANK) in kept
    assert kept.count(weight.shape) == 1
    assert (4, 256, 8) not in kept
