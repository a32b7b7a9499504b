"""A quantised base: what is stored, what it reads back as, and training on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra_jax.models.quantized import NF4, block_dim, dequantized, frozen_product, quantized
from lobra_jax.sharding import TARGET_AXES

BLOCK = 64
FP8_MAX = 448.0
IN, OUT = 128, 192


def weights(seed, shape=(IN, OUT)):
    """Normal, with columns and rows of unlike size and some zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, np.float32) * rng.uniform(0.01, 3, shape[1]).astype(np.float32)
    values[:, 0] = 0
    values[:BLOCK] *= 5
    return values


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored_and_read(weight, kind, dim):
    values, scale = quantized(weight, kind, dim)
    return dequantized(values, scale, kind, dim, jnp.float32), values, scale


def read_back(weight, kind, dim):
    weight, values, scale = stored_and_read(weight, kind, dim)
    return np.asarray(weight), values, scale


def expected_int8(weight):
    scale = np.abs(weight).max(0) / 127
    return np.round(weight / np.where(scale > 0, scale, 1)) * scale


def expected_nf4(weight, dim):
    """Blocks of 64 in a row, each times its largest magnitude, every value the nearest of the code's."""
    flat = np.moveaxis(weight, dim, -1).reshape(-1, BLOCK)
    largest = np.abs(flat).max(1, keepdims=True)
    ratio = flat / np.where(largest > 0, largest, 1)
    nearest = np.abs(ratio[..., None] - np.asarray(NF4, np.float32)).argmin(-1)
    blocks = np.asarray(NF4, np.float32)[nearest] * largest
    return np.moveaxis(blocks.reshape(np.moveaxis(weight, dim, -1).shape), -1, dim)


def nearest_fp8(x):
    """e4m3 by its definition: three bits behind the leading one, down to 2^-6, then steps of 2^-9."""
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6))) - 3)
    return np.round(x / step) * step


@pytest.mark.parametrize("dim", [0, 1])
def test_int8_and_nf4_read_back_as_their_definitions_say(dim):
    weight = weights(0)
    np.testing.assert_allclose(read_back(weight, "int8", dim)[0], expected_int8(weight), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(read_back(weight, "nf4", dim)[0], expected_nf4(weight, dim), rtol=1e-6, atol=1e-9)


def test_fp8_reads_back_as_its_definition_says():
    weight = weights(1)
    scale = np.abs(weight).max(0) / np.float32(FP8_MAX)
    scale = np.where(scale > 0, scale, 1)
    np.testing.assert_allclose(read_back(weight, "fp8", 0)[0], nearest_fp8(weight / scale) * scale, rtol=1e-6)


def test_the_code_of_nf4_is_that_of_the_paper():
    """Quantiles of a normal distribution: 8 of the positive half and 9 of the negative, which share the zero."""
    from scipy.stats import norm

    offset = 0.5 * (1 - 1 / 30 + 1 - 1 / 32)
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    code = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4, code / code.max(), atol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("fp8", 8.25), ("nf4", 4.5)])
def test_a_weight_takes_so_many_bits(kind, bits):
    _, values, scale = read_back(weights(2), kind, 0)
    assert 8 * (values.nbytes + scale.nbytes) <= bits * IN * OUT


@given(seed=st.integers(0, 2**16), kind=st.sampled_from(["int8", "nf4", "fp8"]), dim=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_reading_back_and_storing_again_changes_nothing(seed, kind, dim):
    once, _, _ = read_back(weights(seed), kind, dim)
    np.testing.assert_allclose(read_back(once, kind, dim)[0], once, rtol=2e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_product_and_its_gradient_are_those_of_the_weight_read_back(kind):
    weight, values, scale = read_back(weights(3), kind, 0)
    x = np.random.default_rng(4).standard_normal((2, 5, IN), np.float32)
    d_y = np.random.default_rng(5).standard_normal((2, 5, OUT), np.float32)
    y, vjp = jax.vjp(lambda x: frozen_product(x, values, scale, kind, 0), x)
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(vjp(d_y)[0], d_y @ weight.T, rtol=1e-5, atol=1e-4)


def test_the_fp8_product_and_its_gradient_round_each_row_by_itself():
    weight, values, scale = read_back(weights(6), "fp8", 0)
    x = np.random.default_rng(7).standard_normal((2, 5, IN), np.float32)
    d_y = np.random.default_rng(8).standard_normal((2, 5, OUT), np.float32)
    x[0, 1] *= 1e6
    y, vjp = jax.vjp(lambda x: frozen_product(x, values, scale, "fp8", 0), x)

    def rounded(rows):
        row_scale = np.abs(rows).max(-1, keepdims=True) / np.float32(FP8_MAX)
        return nearest_fp8(rows / row_scale) * row_scale

    np.testing.assert_allclose(y, rounded(x) @ weight, rtol=1e-4, atol=1e-3)
    unscaled = weight / np.asarray(scale)
    np.testing.assert_allclose(vjp(d_y)[0], rounded(d_y * np.asarray(scale)) @ unscaled.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e30, np.nan])
def test_with_fp8_rows_do_not_feel_each_other(value):
    """Whatever one row holds, the others' products and gradients keep every bit."""
    _, values, scale = read_back(weights(9), "fp8", 0)
    x = np.random.default_rng(10).standard_normal((2, 5, IN), np.float32)
    other = x.copy()
    other[0, 1] *= np.float32(value)

    @jax.jit
    def run(x):
        y, vjp = jax.vjp(lambda x: frozen_product(x, values, scale, "fp8", 0), x)
        return y, vjp(y)[0]

    for found, expected in zip(run(other), run(x), strict=True):
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0, 2:], expected[0, 2:])
        assert np.all(np.isfinite(found[0, 1])) == np.isfinite(value)


def test_blocks_lie_along_the_axis_that_no_mesh_cuts():
    assert {target: block_dim(axes) for target, axes in TARGET_AXES.items()} == {
        "q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1,
    }  # fmt: skip
