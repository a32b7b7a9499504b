"""Causal attention: cuDNN's flash kernel on a GPU, else XLA's, in chunks of queries where the sequence is long.

Rows are padded on the right, so the causal mask alone hides the padding from real tokens. Shape letters as in
`models.llama`; C queries of a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

QUERY_CHUNK = 256
"""Queries whose scores against all keys exist at once where there is no flash kernel."""


def attention(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array) -> Array:
    """Softmax(q k^T / sqrt(H)) v over earlier and same positions; grouped queries where K < N. [B, L, N, H]."""
    if jax.default_backend() == "gpu" and q_BLNH.dtype != jnp.float32:
        return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True, implementation="cudnn")
    if q_BLNH.shape[1] <= 2 * QUERY_CHUNK:
        return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True, implementation="xla")
    return chunked_attention(q_BLNH, k_BLKH, v_BLKH)


def chunked_attention(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array) -> Array:
    """As `attention`, holding [B, N, C, L] scores instead of [B, N, L, L]; the backward recomputes them."""
    b, length, n, h = q_BLNH.shape
    chunks = -(-length // QUERY_CHUNK)
    padding = chunks * QUERY_CHUNK - length
    q = jnp.pad(q_BLNH, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(b, chunks, QUERY_CHUNK, n, h)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(start: Array, q_BCNH: Array) -> Array:
        query = start + jax.lax.broadcasted_iota(jnp.int32, (QUERY_CHUNK, length), 0)
        key = jax.lax.broadcasted_iota(jnp.int32, (QUERY_CHUNK, length), 1)
        return jax.nn.dot_product_attention(
            q_BCNH, k_BLKH, v_BLKH, mask=(key <= query)[None, None], implementation="xla"
        )

    starts = jnp.arange(chunks, dtype=jnp.int32) * QUERY_CHUNK
    out = jax.lax.map(lambda chunk: one_chunk(*chunk), (starts, jnp.moveaxis(q, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(b, chunks * QUERY_CHUNK, n, h)[:, :length]
