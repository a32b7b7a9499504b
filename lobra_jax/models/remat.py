"""Rematerialisation of a layer: what each policy keeps for the backward, and how far a feed-forward is cut up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.chunks import num_chunks
from lobra_jax.low_rank import LOW_RANK
from lobra_jax.models.attention import FLASH_FORWARD

SAVED_NAMES = {
    "dots": ("q", "k", "v", "attention", "residual_mid", "gate", "up", LOW_RANK),
    "attention": ("attention", "residual_mid", LOW_RANK),
}
"""What remat "dots" and "attention" keep of a layer beside its input and a flash kernel's results.

With dots norms, SwiGLU and what comes out of the ranks are redone; with attention q, k, v, gate and up as well.
A byte of any linear's output spares the same work, one of attention's the more the longer the sequence; the residual in
the middle spares `o`. bf16 bytes of a token and layer of Llama-2 7B, adapters aside: full 8,192, attention 24,704,
dots 93,312.
"""

SPARING = ("attention", "full")
"""What is taken where memory is short."""

MLP_CHUNK_TOKENS = 8192
"""Tokens of a micro-batch whose feed-forward activations exist at once where the backward makes them anew."""


def with_remat(function: Callable[..., Array], remat: str) -> Callable[..., Array]:
    """Applies a parallel config's rematerialisation to one layer."""
    if remat == "none":
        return function
    if remat == "full":
        return jax.checkpoint(function)
    if remat in SAVED_NAMES:
        policies = jax.checkpoint_policies
        named = policies.save_only_these_names(*SAVED_NAMES[remat])
        return jax.checkpoint(function, policy=policies.save_from_both_policies(named, _is_flash_forward))
    raise ValueError(f"remat = {remat!r}: expected none, full or one of {', '.join(SAVED_NAMES)}")


def _is_flash_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == FLASH_FORWARD


@jax.custom_vjp
def in_turn(x: Array, adapters: Any) -> tuple[Array, Any]:
    """A layer's input and adapters as they are; in the backward the gradient of x waits for those of the adapters.

    So the layer before begins when this one has let go of its activations. Else XLA, which on several devices looks for
    work to hide collectives behind, makes those of some layers anew at a time: of Llama-3.1 8B on two H200 remat full
    took 33 GiB for 8 rows of 2,048 tokens, with this 13 by XLA's analysis; where fewer gradients were waited for, 16,
    and steps no longer (profiling/results/h200_tries.json). All of what waits is used from then on, or XLA would take
    out of the barrier what is not.
    """
    return x, adapters


in_turn.defvjp(lambda x, adapters: ((x, adapters), None), lambda _, d: jax.lax.optimization_barrier(d))


def mlp_chunks(rows: int, length: int) -> int:
    """Chunks of a feed-forward whose activations are made anew."""
    return num_chunks(rows, length, MLP_CHUNK_TOKENS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(function: Callable[..., Array], num_chunks: int, x: Array, adapters: Any, constants: Any) -> Array:
    """function(x, adapters, constants) for chunk after chunk along x's second axis; no gradient for the constants.

    The backward makes a chunk's activations anew when it comes to it. Each loop writes over what it was given, x or the
    result's gradient, chunk by chunk: results of their own, as those of `jax.lax.map`, XLA may have for all layers at
    once.
    """

    def one(i: Array, done: Array) -> Array:
        return _put(done, i, function(_chunk(done, i, num_chunks), adapters, constants))

    return jax.lax.fori_loop(0, num_chunks, one, x)


def _in_chunks_fwd(
    function: Callable[..., Array], num_chunks: int, x: Array, adapters: Any, constants: Any
) -> tuple[Array, tuple]:
    return in_chunks(function, num_chunks, x, adapters, constants), (x, adapters, constants)


def _in_chunks_bwd(function: Callable[..., Array], num_chunks: int, saved: tuple, dy: Array) -> tuple[Array, Any, None]:
    x, adapters, constants = saved

    def one(i: Array, done: tuple[Array, Any]) -> tuple[Array, Any]:
        d, d_adapters = done
        _, vjp = jax.vjp(lambda x, own: function(x, own, constants), _chunk(x, i, num_chunks), adapters)
        d_x, d_own = vjp(_chunk(d, i, num_chunks))
        return _put(d, i, d_x), jax.tree.map(jnp.add, d_adapters, d_own)

    return *jax.lax.fori_loop(0, num_chunks, one, (dy, jax.tree.map(jnp.zeros_like, adapters))), None


in_chunks.defvjp(_in_chunks_fwd, _in_chunks_bwd)


def _chunk(x: Array, i: Array, num_chunks: int) -> Array:
    size = x.shape[1] // num_chunks
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _put(x: Array, i: Array, chunk: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, chunk, i * chunk.shape[1], axis=1)
