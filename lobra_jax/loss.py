"""Next-token loss in token chunks, so that logits [tokens, vocab] never exist at once.

The vocabulary projection is frozen: the gradient of the hidden states is formed beside the loss, chunk by chunk, and
kept instead of the logits. Shape letters as in `models.llama`; C chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.chunks import num_chunks
from lobra_jax.sharding import Shard

MAX_CHUNK_TOKENS = 2048
"""Tokens of a micro-batch whose logits are alive together."""


def _chunk(h_BLD: Array, head_DV: Array, targets_BL: Array, shard: Shard) -> tuple[Array, Array]:
    """(token losses [B, L], softmax minus one-hot [B, L, V]) of one chunk, fp32."""
    logits = jnp.einsum("bld,dv->blv", h_BLD, head_DV, preferred_element_type=jnp.float32)
    logits = shard(logits, "batch", "position", "vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets_BL[..., None]
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    probabilities = jnp.exp(logits - log_z[..., None])
    return log_z - picked, probabilities - is_target.astype(jnp.float32)


def _split(x: Array, chunks: int) -> Array:
    """[B, L, ...] -> [chunks, B, L / chunks, ...]."""
    b, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, chunks, length // chunks, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """[chunks, B, C, ...] -> [B, L, ...]: undoes `_split`."""
    chunks, b, length = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, chunks * length, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_row_losses(h_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, shard: Shard) -> Array:
    """[B] fp32: sum over positions of weight x negative log-likelihood. Differentiable in `h_BLD` only."""
    return _by_row(h_BLD, head_DV, targets_BL, weights_BL, shard, with_gradient=False)[0]


def _by_row(
    h_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, shard: Shard, *, with_gradient: bool
) -> tuple[Array, Array | None]:
    def body(total_B: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
        losses, d_h = _weighted(chunk, head_DV, shard, with_gradient=with_gradient)
        return total_B + jnp.sum(losses, axis=-1), d_h

    zero = jnp.zeros(targets_BL.shape[:1], jnp.float32)
    total_B, d_h = jax.lax.scan(body, zero, _chunks(h_BLD, targets_BL, weights_BL, shard))
    return total_B, _join(d_h) if with_gradient else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_token_losses(h_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, shard: Shard) -> Array:
    """[B, L] fp32: weight x negative log-likelihood, for rows that several tasks share. As `weighted_row_losses`."""
    return _by_token(h_BLD, head_DV, targets_BL, weights_BL, shard, with_gradient=False)[0]


def _by_token(
    h_BLD: Array, head_DV: Array, targets_BL: Array, weights_BL: Array, shard: Shard, *, with_gradient: bool
) -> tuple[Array, Array | None]:
    def body(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array | None]]:
        return None, _weighted(chunk, head_DV, shard, with_gradient=with_gradient)

    _, (losses, d_h) = jax.lax.scan(body, None, _chunks(h_BLD, targets_BL, weights_BL, shard))
    return _join(losses), _join(d_h) if with_gradient else None


def _chunks(h_BLD: Array, targets_BL: Array, weights_BL: Array, shard: Shard) -> tuple[Array, ...]:
    h_BLD = shard(h_BLD, "batch", "position", "hidden")
    chunks = num_chunks(*targets_BL.shape, MAX_CHUNK_TOKENS)
    return tuple(_split(x, chunks) for x in (h_BLD, targets_BL, weights_BL))


def _weighted(
    chunk: tuple[Array, Array, Array], head_DV: Array, shard: Shard, *, with_gradient: bool
) -> tuple[Array, Array | None]:
    """(weighted token losses, their gradient in the hidden states) of one chunk."""
    h, targets, weights = chunk
    losses, d_logits = _chunk(h, head_DV, targets, shard)
    # A position of weight zero adds nothing even where its loss is not finite.
    losses = jnp.where(weights == 0, 0.0, weights * losses)
    if not with_gradient:
        return losses, None
    d_logits = (d_logits * weights[..., None]).astype(h.dtype)
    return losses, jnp.einsum("blv,dv->bld", d_logits, head_DV)


def _fwd(forward: Callable, *args: Any) -> tuple[Array, Array]:
    return forward(*args, with_gradient=True)


def _row_bwd(shard: Shard, d_h_BLD: Array, cotangent_B: Array) -> tuple[Array, None, None, None]:
    return (d_h_BLD * cotangent_B[:, None, None].astype(d_h_BLD.dtype), None, None, None)


def _token_bwd(shard: Shard, d_h_BLD: Array, cotangent_BL: Array) -> tuple[Array, None, None, None]:
    return (d_h_BLD * cotangent_BL[..., None].astype(d_h_BLD.dtype), None, None, None)


weighted_row_losses.defvjp(functools.partial(_fwd, _by_row), _row_bwd)
weighted_token_losses.defvjp(functools.partial(_fwd, _by_token), _token_bwd)
