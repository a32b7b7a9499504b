"""SwiGLU between adapters: what gate's and up's add, the activation, and what goes into down's ranks, as one function.

Adapters read and write the feed-forward's activations, a layer's largest, again and again. On a GPU the kernels of
`adapted_swiglu_kernel` do all of that while a tile of them is at hand; elsewhere it is plain JAX. Either way the
backward keeps no more than what the function was given. That is worth it with the kernels alone (`has_kernels`): plain
JAX makes what adapters add to gate and up once more in the backward.

Shape letters as in `low_rank`; F feed-forward features.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.low_rank import NO_PIN, bounded, by_task, own_factors


def has_kernels(num_features: int, ranks: int, dtype: jnp.dtype) -> bool:
    """Whether GPUs have kernels for so many features, the ranks of a row's slots of so much in all, and the dtype."""
    return _kernels().has_tiles(num_features, ranks, dtype)


def _kernels() -> ModuleType:
    """Imported late: Pallas takes a quarter of a second, of what trains alone."""
    return importlib.import_module("lobra_jax.models.adapted_swiglu_kernel")


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def adapted_swiglu(
    gate_BLF: Array,
    up_BLF: Array,
    h_gate_BLKR: Array,
    h_up_BLKR: Array,
    b_gate_TRF: Array,
    b_up_TRF: Array,
    a_down_TRF: Array,
    task_ids_BK: Array,
    shared: bool,
) -> tuple[Array, Array]:
    """(act = silu(gate + h_gate b_gate) * (up + h_up b_up) [B, L, F], act a_down^T [B, L, K, R] in fp32).

    `shared` as in `low_rank.into_ranks`.
    """
    factors = (b_gate_TRF, b_up_TRF, a_down_TRF)
    given = (gate_BLF, up_BLF, h_gate_BLKR, h_up_BLKR, *_own(factors, task_ids_BK, gate_BLF.dtype))
    return jax.lax.platform_dependent(*given, cuda=_kernels().forward, default=_forward)


def _fwd(*given: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return adapted_swiglu(*given), given[:-1]


def _bwd(shared: bool, saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    gate_BLF, up_BLF, h_gate_BLKR, h_up_BLKR, *factors, task_ids_BK = saved
    d_act_BLF, d_h_down_BLKR = cotangents
    given = (
        *(gate_BLF, up_BLF, h_gate_BLKR, h_up_BLKR, *_own(factors, task_ids_BK, gate_BLF.dtype)),
        *(d_act_BLF, d_h_down_BLKR.astype(gate_BLF.dtype)),  # zero in all slots but the token's own
    )
    by_kernel, plain = (functools.partial(each, shared=shared) for each in (_kernels().backward, _backward))
    *of_tokens, d_b_gate, d_b_up, d_a_down = jax.lax.platform_dependent(*given, cuda=by_kernel, default=plain)
    num_tasks = factors[0].shape[0]
    of_tasks = (by_task(d, task_ids_BK, num_tasks, NO_PIN) for d in (d_b_gate, d_b_up, d_a_down))
    return *of_tokens, *of_tasks, None


adapted_swiglu.defvjp(_fwd, _bwd)


def _own(factors: tuple[Array, ...] | list[Array], task_ids_BK: Array, dtype: jnp.dtype) -> tuple[Array, ...]:
    return tuple(own_factors(factor, task_ids_BK, dtype) for factor in factors)


def _out_of_ranks(h_BLKR: Array, factors_BKRF: Array) -> Array:
    return jnp.einsum("blkr,bkrf->blf", h_BLKR, factors_BKRF)


def _forward(
    gate_BLF: Array,
    up_BLF: Array,
    h_gate_BLKR: Array,
    h_up_BLKR: Array,
    b_gate_BKRF: Array,
    b_up_BKRF: Array,
    a_down_BKRF: Array,
) -> tuple[Array, Array]:
    gate_BLF = gate_BLF + _out_of_ranks(h_gate_BLKR, b_gate_BKRF)
    up_BLF = up_BLF + _out_of_ranks(h_up_BLKR, b_up_BKRF)
    act_BLF = jax.nn.silu(gate_BLF) * up_BLF
    return act_BLF, jnp.einsum("blf,bkrf->blkr", act_BLF, a_down_BKRF, preferred_element_type=jnp.float32)


def _backward(
    gate_BLF: Array,
    up_BLF: Array,
    h_gate_BLKR: Array,
    h_up_BLKR: Array,
    b_gate_BKRF: Array,
    b_up_BKRF: Array,
    a_down_BKRF: Array,
    d_act_BLF: Array,
    d_h_down_BLKR: Array,
    *,
    shared: bool,
) -> tuple[Array, ...]:
    """Gradients of the first four, and of each row's factors [B, K, R, F] in fp32."""
    gate_BLF = gate_BLF + _out_of_ranks(h_gate_BLKR, b_gate_BKRF)
    up_BLF = up_BLF + _out_of_ranks(h_up_BLKR, b_up_BKRF)
    d_act_BLF = d_act_BLF + _out_of_ranks(d_h_down_BLKR, a_down_BKRF)
    act_BLF, vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_BLF, up_BLF)
    d_gate_BLF, d_up_BLF = vjp(d_act_BLF)

    def of_h(d_BLF: Array, b_BKRF: Array) -> Array:
        return jnp.einsum("blf,bkrf->blkr", d_BLF, b_BKRF)

    def of_factors(h_BLKR: Array, x_BLF: Array) -> Array:
        x_BLF = bounded(x_BLF) if shared else x_BLF
        return jnp.einsum("blkr,blf->bkrf", h_BLKR, x_BLF, preferred_element_type=jnp.float32)

    return (
        *(d_gate_BLF, d_up_BLF, of_h(d_gate_BLF, b_gate_BKRF), of_h(d_up_BLF, b_up_BKRF)),
        *(of_factors(h_gate_BLKR, d_gate_BLF), of_factors(h_up_BLKR, d_up_BLF), of_factors(d_h_down_BLKR, act_BLF)),
    )
