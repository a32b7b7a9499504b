"""Linears with their adapters' part added inside the matmul, where `rank_matmul` runs: same numbers, fewer passes.

Shape letters as in `lora`; K slots of a row (see `low_rank`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lobra_jax.low_rank import LOW_RANK, Slots, a_gradient, b_gradient, input_gradient, into_ranks, rank_gradient
from lobra_jax.rank_matmul import rank_steps

Pair = Mapping[str, Array]
Product = Callable[..., Array]
"""`rank_matmul.matmul`, or what tests put in its place."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted_linears(
    product: Product,
    x_BLI: Array,
    dropped_BLI: Array | None,
    weights: tuple[Array, ...],
    pairs: tuple[Pair | None, ...],
    slots: Slots,
) -> tuple[Array, ...]:
    """x W + scale d a_t^T b_t for linears that read the same x, one [B, L, O] each; d is x after dropout.

    Weights are frozen: their gradients are zero.

    Args:
      dropped_BLI: d; None where it is x.
      pairs: the factors of each linear, None for one without adapters.
    """
    return _forward(product, x_BLI, dropped_BLI, weights, pairs, slots)[0]


def _forward(
    product: Product,
    x_BLI: Array,
    dropped_BLI: Array | None,
    weights: tuple[Array, ...],
    pairs: tuple[Pair | None, ...],
    slots: Slots,
) -> tuple[tuple[Array, ...], Any]:
    a_TRI, bounds = _stacked(pairs)
    read = x_BLI if dropped_BLI is None else dropped_BLI
    h_BLKR = checkpoint_name(slots.scaled(into_ranks(read, a_TRI, slots.task_ids, slots.shared), read.dtype), LOW_RANK)
    values = iter(jnp.split(h_BLKR, bounds, axis=-1))
    outs = tuple(
        jnp.einsum("bli,io->blo", x_BLI, weight)
        if pair is None
        else _product(product, [x_BLI], [weight], next(values), pair["b"], slots)
        for weight, pair in zip(weights, pairs, strict=True)
    )
    return outs, (x_BLI, dropped_BLI, weights, pairs, slots, h_BLKR)


def _backward(product: Product, saved: Any, d_outs: tuple[Array, ...]) -> tuple[Any, ...]:
    x_BLI, dropped_BLI, weights, pairs, slots, h_BLKR = saved
    a_TRI, bounds = _stacked(pairs)
    adapted = [(pair, d_out) for pair, d_out in zip(pairs, d_outs, strict=True) if pair is not None]
    d_b = [
        b_gradient(d_out, h, pair["b"], slots.task_ids, slots.shared)
        for (pair, d_out), h in zip(adapted, jnp.split(h_BLKR, bounds, axis=-1), strict=True)
    ]
    d_h_BLKR = jnp.concatenate([rank_gradient(d_out, pair["b"], slots.task_ids) for pair, d_out in adapted], axis=-1)
    d_h_BLKR = slots.scaled(d_h_BLKR.astype(jnp.float32), x_BLI.dtype)  # scaling and choosing are their own transpose
    read = x_BLI if dropped_BLI is None else dropped_BLI
    d_a = jnp.split(a_gradient(d_h_BLKR, read, a_TRI, slots.task_ids, slots.shared), bounds, axis=1)
    factors = iter([{"a": a, "b": b} for a, b in zip(d_a, d_b, strict=True)])
    d_pairs = tuple(None if pair is None else next(factors) for pair in pairs)
    if dropped_BLI is None:
        d_x = _product(product, d_outs, weights, d_h_BLKR, a_TRI, slots, transposed=True)
        return d_x, None, None, d_pairs, None
    d_x = _product(product, d_outs, weights, None, None, slots, transposed=True)
    return d_x, input_gradient(d_h_BLKR, a_TRI, slots.task_ids), None, d_pairs, None


adapted_linears.defvjp(_forward, _backward)


def _stacked(pairs: Sequence[Pair | None]) -> tuple[Array, list[int]]:
    """([T, R, I] of all adapters, where each but the first begins in R)."""
    a = [pair["a"] for pair in pairs if pair is not None]
    return jnp.concatenate(a, axis=1), np.cumsum([one.shape[1] for one in a])[:-1].tolist()


def _product(
    product: Product,
    lhs: Sequence[Array],
    weights: Sequence[Array],
    h_BLKR: Array | None,
    factors_TRN: Array | None,
    slots: Slots,
    *,
    transposed: bool = False,
) -> Array:
    """[B, L, N]."""
    rows, length = lhs[0].shape[:2]
    flat = [x.reshape(rows * length, -1) for x in lhs]
    ranks = None
    if h_BLKR is not None and factors_TRN is not None:
        ranks = rank_steps(h_BLKR, factors_TRN, slots.task_ids, transposed=transposed)
    return product(flat, weights, ranks, transposed=transposed).reshape(rows, length, -1)
