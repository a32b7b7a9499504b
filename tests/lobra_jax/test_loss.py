"""The chunked loss against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lobra_jax import loss
from lobra_jax.models.attention import QUERY_CHUNK, chunked_attention


def unsharded(x, *axes):
    return x


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("max_tokens", [1, 10, 4096])
def test_losses_and_gradients_equal_the_plain_ones(monkeypatch, length, max_tokens):
    monkeypatch.setattr(loss, "MAX_CHUNK_TOKENS", max_tokens)
    rng = np.random.default_rng(length)
    hidden = jnp.asarray(rng.normal(size=(3, length, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(8, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (3, length)), jnp.int32)
    weights = jnp.asarray(rng.random((3, length)) * (rng.random((3, length)) < 0.7), jnp.float32)
    cotangent = jnp.asarray([1.0, 0.5, -2.0], jnp.float32)

    def plain(hidden):
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
        return jnp.sum(losses * weights, axis=-1)

    def chunked(hidden):
        return loss.weighted_row_losses(hidden, head, targets, weights, unsharded)

    np.testing.assert_allclose(chunked(hidden), plain(hidden), rtol=1e-5, atol=1e-6)
    found = jax.grad(lambda h: chunked(h) @ cotangent)(hidden)
    np.testing.assert_allclose(found, jax.grad(lambda h: plain(h) @ cotangent)(hidden), rtol=1e-4, atol=1e-5)


def test_a_masked_position_adds_nothing_even_if_its_loss_is_not_finite():
    hidden = jnp.asarray([[[jnp.inf, 1.0], [1.0, 2.0]]], jnp.float32)
    weights = jnp.asarray([[0.0, 1.0]], jnp.float32)
    found = loss.weighted_row_losses(hidden, jnp.eye(2), jnp.zeros((1, 2), jnp.int32), weights, unsharded)
    assert np.isfinite(found).all()


def test_chunked_attention_equals_the_whole_with_grouped_queries():
    rng = np.random.default_rng(0)
    length = 2 * QUERY_CHUNK + 37
    q = jnp.asarray(rng.normal(size=(2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32) for _ in range(2))

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    def summed(function):
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v))), argnums=(0, 1, 2))(q, k, v)

    np.testing.assert_allclose(chunked_attention(q, k, v), whole(q, k, v), rtol=1e-4, atol=1e-5)
    for found, expected in zip(summed(chunked_attention), summed(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
