"""`adapted_swiglu` in one pass over memory: Pallas kernels for NVIDIA GPUs, compiled by Triton.

A program goes over tiles of the three activations, makes in registers what adapters add to them, and takes what goes
into and out of their ranks from a tile while it is there. The forward's programs go along the features of a block of
tokens, the backward's along the tokens of a tile's features, so that the larger of what each sums up stays in
registers; the rest comes out in parts that are added up afterwards, in one order: the same inputs give the same bits.

What was tried is in profiling/results/h200_swiglu_kernel.json. On an H200, 8 x 2048 tokens of 11,008 features, three
arrays read or written forward and five backward take 0.27 and 0.45 ms; with the adapters' work 0.35 and 0.75 in these
kernels, 0.74 and 1.86 as XLA's.

Shape letters as in `lora`; R the ranks of a row's slots side by side, padded to a power of two; P parts of a sum.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lobra_jax.low_rank import bounded

TOKENS = FEATURES = 64
"""Of a tile."""

COMPILER = triton.CompilerParams(num_warps=4, num_stages=3)

LEAST_RANK = 16
"""What Triton multiplies at least."""

MOST_RANK = 32
"""Of a row's slots in all. In 64 the backward takes 176 KiB of shared memory, so that one program runs on a
multiprocessor at a time, and is no quicker than XLA's."""

CAPABILITIES = ("8.0", "9.0", "10.0", "10.3")
"""Of GPUs with shared memory for the backward's 98 KiB, 116 for ranks over 16."""

FORWARD_PARTS = 8
"""Programs that share the features of a block of tokens."""

PROGRAMS = 1024
"""So many keep a large GPU busy: where tiles and rows are fewer, programs share a row's tokens in the backward."""


def has_tiles(num_features: int, ranks: int, dtype: jnp.dtype) -> bool:
    """Whether there are kernels for so many features, the ranks of a row's slots of so much in all, and the dtype.

    What is traced where there is no GPU is taken to be for a large one.
    """
    capabilities = {getattr(device, "compute_capability", CAPABILITIES[0]) for device in jax.devices()}
    return (
        capabilities <= set(CAPABILITIES)
        and dtype == jnp.bfloat16
        and ranks <= MOST_RANK
        and num_features % FEATURES == 0
    )


def forward(
    gate_BLF: Array,
    up_BLF: Array,
    h_gate_BLKR: Array,
    h_up_BLKR: Array,
    *factors_BKRF: Array,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """`adapted_swiglu` of each row's factors: b of gate, b of up, a of down."""
    rows, length, num_features = gate_BLF.shape
    ranks = math.prod(h_gate_BLKR.shape[2:])
    num_tiles = num_features // FEATURES
    parts = min(FORWARD_PARTS, num_tiles)
    act_BLF, h_down_PBLR = pl.pallas_call(
        functools.partial(_forward_kernel, tiles=pl.cdiv(num_tiles, parts), num_tiles=num_tiles),
        grid=(pl.cdiv(length, TOKENS), parts, rows),
        out_shape=(
            jax.ShapeDtypeStruct(gate_BLF.shape, gate_BLF.dtype),
            jax.ShapeDtypeStruct((parts, rows, length, _padded(ranks)), jnp.float32),
        ),
        compiler_params=COMPILER,
        interpret=interpret,
        name="adapted_swiglu",
    )(gate_BLF, up_BLF, *map(_slots_last, (h_gate_BLKR, h_up_BLKR)), *map(_slots_first, factors_BKRF))
    return act_BLF, h_down_PBLR.sum(axis=0)[..., :ranks].reshape(h_gate_BLKR.shape)


def backward(
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
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Gradients of the first four, and of each row's factors in fp32."""
    rows, length, num_features = gate_BLF.shape
    ranks, dtype = math.prod(h_gate_BLKR.shape[2:]), gate_BLF.dtype
    num_tiles, num_blocks = num_features // FEATURES, pl.cdiv(length, TOKENS)
    parts = max(1, min(num_blocks, PROGRAMS // (num_tiles * rows)))
    # As many parts as tiles: rounded, they take half the room, and their sum is off by no more than one rounding.
    d_h = jax.ShapeDtypeStruct((num_tiles, rows, length, _padded(ranks)), dtype)
    d_factor = jax.ShapeDtypeStruct((parts, rows, _padded(ranks), num_features), jnp.float32)
    h_gate, h_up, d_h_down = map(_slots_last, (h_gate_BLKR, h_up_BLKR, d_h_down_BLKR))
    factors = map(_slots_first, (b_gate_BKRF, b_up_BKRF, a_down_BKRF))
    d_gate, d_up, *d_hs, d_b_gate, d_b_up, d_a_down = pl.pallas_call(
        functools.partial(
            _backward_kernel, blocks=pl.cdiv(num_blocks, parts), num_blocks=num_blocks, finite=_finite(shared)
        ),
        grid=(num_tiles, parts, rows),
        out_shape=(*[jax.ShapeDtypeStruct(gate_BLF.shape, dtype)] * 2, d_h, d_h, *[d_factor] * 3),
        compiler_params=COMPILER,
        interpret=interpret,
        name="adapted_swiglu_backward",
    )(gate_BLF, up_BLF, h_gate, h_up, *factors, d_act_BLF, d_h_down)
    d_hs = (jnp.sum(d_PBLR, axis=0, dtype=jnp.float32)[..., :ranks].astype(dtype) for d_PBLR in d_hs)
    d_factors = (d_PBRF.sum(axis=0)[:, :ranks] for d_PBRF in (d_b_gate, d_b_up, d_a_down))
    return (
        *(d_gate, d_up, *(d_BLR.reshape(h_gate_BLKR.shape) for d_BLR in d_hs)),
        *(d_BRF.reshape(b_gate_BKRF.shape) for d_BRF in d_factors),
    )


def _forward_kernel(
    gate: Any,
    up: Any,
    h_gate: Any,
    h_up: Any,
    b_gate: Any,
    b_up: Any,
    a_down: Any,
    act: Any,
    h_down: Any,
    *,
    tiles: int,
    num_tiles: int,
) -> None:
    """A block of tokens, and so many tiles of their features."""
    block, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens, exist = pl.ds(block * TOKENS, TOKENS), _exist(block, gate.shape[1])
    h_gate_LR, h_up_LR = _load(h_gate, (row, tokens), exist), _load(h_up, (row, tokens), exist)

    def one(tile: Array, h_down_LR: Array) -> Array:
        features = pl.ds(tile * FEATURES, FEATURES)
        at = row, tokens, features
        gate_LF = _adapted(_load(gate, at, exist), h_gate_LR, b_gate[row, :, features])
        up_LF = _adapted(_load(up, at, exist), h_up_LR, b_up[row, :, features])
        act_LF = (gate_LF * jax.nn.sigmoid(gate_LF) * up_LF).astype(act.dtype)
        _store(act, at, act_LF, exist)
        return h_down_LR + triton.dot(act_LF, a_down[row, :, features], trans_b=True)

    last = jnp.minimum((part + 1) * tiles, num_tiles)
    h_down_LR = jax.lax.fori_loop(part * tiles, last, one, jnp.zeros((TOKENS, h_down.shape[-1]), jnp.float32))
    _store(h_down, (part, row, tokens), h_down_LR, exist)


def _backward_kernel(
    gate: Any,
    up: Any,
    h_gate: Any,
    h_up: Any,
    b_gate: Any,
    b_up: Any,
    a_down: Any,
    d_act: Any,
    d_h_down: Any,
    d_gate: Any,
    d_up: Any,
    d_h_gate: Any,
    d_h_up: Any,
    d_b_gate: Any,
    d_b_up: Any,
    d_a_down: Any,
    *,
    blocks: int,
    num_blocks: int,
    finite: Any,
) -> None:
    """A tile's features, and so many blocks of tokens."""
    tile, part, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    features = pl.ds(tile * FEATURES, FEATURES)
    b_gate_RF, b_up_RF, a_down_RF = (factor[row, :, features] for factor in (b_gate, b_up, a_down))

    def one(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tokens, exist = pl.ds(block * TOKENS, TOKENS), _exist(block, gate.shape[1])
        at = row, tokens, features
        h_gate_LR, h_up_LR, d_h_down_LR = (_load(h, (row, tokens), exist) for h in (h_gate, h_up, d_h_down))
        gate_LF = _adapted(_load(gate, at, exist), h_gate_LR, b_gate_RF)
        up_LF = _adapted(_load(up, at, exist), h_up_LR, b_up_RF)
        d_act_LF = _adapted(_load(d_act, at, exist), d_h_down_LR, a_down_RF)
        sigmoid_LF = jax.nn.sigmoid(gate_LF)
        silu_LF = gate_LF * sigmoid_LF
        act_LF = (silu_LF * up_LF).astype(d_gate.dtype)
        d_gate_LF = (d_act_LF * up_LF * (sigmoid_LF + silu_LF * (1 - sigmoid_LF))).astype(d_gate.dtype)
        d_up_LF = (d_act_LF * silu_LF).astype(d_up.dtype)
        _store(d_gate, at, d_gate_LF, exist)
        _store(d_up, at, d_up_LF, exist)
        of_ranks = tile, row, tokens
        _store(d_h_gate, of_ranks, triton.dot(d_gate_LF, b_gate_RF, trans_b=True).astype(d_h_gate.dtype), exist)
        _store(d_h_up, of_ranks, triton.dot(d_up_LF, b_up_RF, trans_b=True).astype(d_h_up.dtype), exist)
        pairs = (h_gate_LR, d_gate_LF), (h_up_LR, d_up_LF), (d_h_down_LR, act_LF)
        return tuple(total + triton.dot(h, finite(x), trans_a=True) for total, (h, x) in zip(sums, pairs, strict=True))

    zeros = jnp.zeros(b_gate_RF.shape, jnp.float32)
    last = jnp.minimum((part + 1) * blocks, num_blocks)
    sums = jax.lax.fori_loop(part * blocks, last, one, (zeros, zeros, zeros))
    for d_factor, total in zip((d_b_gate, d_b_up, d_a_down), sums, strict=True):
        d_factor[part, row, :, features] = total


def _adapted(x_LF: Array, h_LR: Array, factor_RF: Array) -> Array:
    """x + h factor in fp32, the product rounded as x is: so it crosses shared memory in half the bytes."""
    return x_LF.astype(jnp.float32) + triton.dot(h_LR, factor_RF).astype(x_LF.dtype).astype(jnp.float32)


def _finite(shared: bool) -> Any:
    return bounded if shared else lambda x: x


def _exist(block: Array, length: int) -> Array | None:
    """[L, 1] which of a block's tokens there are; None where all blocks are whole."""
    if length % TOKENS == 0:
        return None
    return (block * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32) < length)[:, None]


def _load(ref: Any, at: tuple, exist: Array | None) -> Array:
    """Zeros for tokens that there are not."""
    tile = ref.at[at]
    return tile[...] if exist is None else triton.load(tile, mask=jnp.broadcast_to(exist, tile.shape), other=0.0)


def _store(ref: Any, at: tuple, x: Array, exist: Array | None) -> None:
    triton.store(ref.at[at], x, mask=None if exist is None else jnp.broadcast_to(exist, x.shape))


def _padded(ranks: int) -> int:
    return max(LEAST_RANK, pl.next_power_of_2(ranks))


def _slots_last(h_BLKR: Array) -> Array:
    """[B, L, R], padded with zeros."""
    h_BLR = h_BLKR.reshape(*h_BLKR.shape[:2], -1)
    return jnp.pad(h_BLR, ((0, 0), (0, 0), (0, _padded(h_BLR.shape[2]) - h_BLR.shape[2])))


def _slots_first(factor_BKRF: Array) -> Array:
    """[B, R, F], padded with zeros."""
    factor_BRF = factor_BKRF.reshape(factor_BKRF.shape[0], -1, factor_BKRF.shape[-1])
    return jnp.pad(factor_BRF, ((0, 0), (0, _padded(factor_BRF.shape[1]) - factor_BRF.shape[1]), (0, 0)))
