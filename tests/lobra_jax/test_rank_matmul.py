"""The kernel's own code, run by Pallas' interpreter, which knows barriers and shared memory but no GPU.

What the interpreter lacks (products of transposed operands, tiles that reach over the end of an array) is lowered here;
tests marked gpu run it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lobra_jax.rank_matmul import matmul, rank_steps


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def operands(seed, depths, features, rows, length, rank, num_tasks, num_slots, *, transposed=False):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(0.1 * rng.standard_normal(shape), jnp.bfloat16)

    lhs = [array(rows * length, depth) for depth in depths]
    rhs = [array(features, depth) if transposed else array(depth, features) for depth in depths]
    own = rng.integers(0, num_slots, (rows, length, 1, 1)) == np.arange(num_slots)[:, None]
    h = jnp.where(own, array(rows, length, num_slots, rank), 0)
    ids = jnp.asarray(rng.integers(0, num_tasks, (rows, num_slots)), jnp.int32)
    return lhs, rhs, h, array(num_tasks, rank, features), ids


@pytest.mark.parametrize(
    "depths, rows, length, rank, num_tasks, num_slots",
    [
        pytest.param((64,), 2, 256, 16, 2, 1, id="a row a tile, factors by task"),
        pytest.param((64, 128), 1, 512, 16, 3, 1, id="two products in one sum, factors by row"),
        pytest.param((64,), 16, 48, 16, 2, 1, id="rows that begin within tiles"),
        pytest.param((64,), 2, 256, 80, 3, 2, id="packed rows of ranks that take several steps"),
    ],
)
def test_sums_products_and_the_ranks_of_each_row(depths, rows, length, rank, num_tasks, num_slots):
    lhs, rhs, h, factors, ids = operands(0, depths, 128, rows, length, rank, num_tasks, num_slots)
    ranks = rank_steps(h, factors, ids, transposed=False)
    out = matmul(lhs, rhs, ranks, transposed=False, interpret=interpreter())
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected_of(lhs, rhs, h, factors, ids), rtol=2**-8, atol=1e-3
    )


def expected_of(lhs, rhs, h, factors, ids, *, transposed=False):
    wide = [[np.asarray(array, np.float32) for array in arrays] for arrays in (lhs, rhs, [h, factors])]
    base = sum(a @ (b.T if transposed else b) for a, b in zip(wide[0], wide[1], strict=True))
    return base + np.einsum("blkr,bkro->blo", wide[2][0], wide[2][1][np.asarray(ids)]).reshape(base.shape)


def test_without_ranks_it_is_a_matmul():
    lhs, rhs, *_ = operands(1, (128,), 256, 1, 256, 16, 1, 1)
    out = matmul(lhs, rhs, None, transposed=False, interpret=interpreter())
    expected = np.asarray(lhs[0], np.float32) @ np.asarray(rhs[0], np.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_lowers_to_a_gpu_program_for_tiles_that_reach_over_the_end(transposed, monkeypatch):
    monkeypatch.setattr("lobra_jax.rank_matmul._num_processors", lambda: 132)
    lhs, rhs, h, factors, ids = operands(2, (128, 64), 256, 3, 208, 16, 2, 1, transposed=transposed)
    ranks = rank_steps(h, factors, ids, transposed=transposed)

    def run(lhs, rhs, ranks):
        return matmul(lhs, rhs, ranks, transposed=transposed)

    traced = jax.jit(run).trace(lhs, rhs, ranks)
    assert "rank_matmul" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "rows, length, num_slots", [(8, 256, 1), (3, 208, 1), (1, 688, 1), (1, 48, 1), (40, 16, 1), (2, 1000, 3)]
)
@pytest.mark.parametrize("rank", [16, 80])
def test_agrees_with_products_in_fp32_on_a_gpu(rows, length, num_slots, rank, transposed):
    lhs, rhs, h, factors, ids = operands(3, (256, 192), 768, rows, length, rank, 4, num_slots, transposed=transposed)
    ranks = rank_steps(h, factors, ids, transposed=transposed)
    out = matmul(lhs, rhs, ranks, transposed=transposed)
    expected = expected_of(lhs, rhs, h, factors, ids, transposed=transposed)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2**-8, atol=2e-3)
