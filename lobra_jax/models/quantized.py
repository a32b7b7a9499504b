"""Frozen linears in fewer bits: how their weights are stored, read back, and multiplied with.

Stored beside each other are values and scales, `q` and `q_scale`. With i an input, o an output, b a block of 64:

    int8   w_io ~ s_o v_io,          v in -127..127,       s_o  = max_i |w_io| / 127       (1)
    nf4    w_io ~ s_b NF4[v_io],     v a 4-bit code,       s_b  = max_(i,o in b) |w_io|    (2)
    fp8    w_io ~ s_o v_io,          v float8 e4m3,        s_o  = max_i |w_io| / 448       (3)

Blocks of (2) and the two codes of a byte lie along the hidden axis, which no mesh cuts: in of q, k, v, gate, up, out of
o, down. So the numbers are the same at every tensor-parallel size that the model has.

With int8 and nf4 each matmul reads its weight back to the activations' dtype, in the forward and again in the backward:
it is never kept. With fp8 the matmul itself is in float8: activations x, by row n, and gradients d are rounded too,

    y_no = s_o r_n sum_i v_io e4m3(x_ni / r_n),             r_n = max_i |x_ni| / 448       (4)
    dx_ni = t_n sum_o v_io e4m3(d_no s_o / t_n),            t_n = max_o |d_no s_o| / 448   (5)

with a scale for each row (token), because one for the whole tensor would let tenants feel each other. Scales come after
the product, which is what XLA needs to hand it to cuBLASLt (its own scales are scalars). Gradients are e4m3 as well:
with a scale a row their range suffices, and e5m2 has half the precision.

Sources: NF4 from QLoRA (Dettmers et al., 2023), appendix E.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.models.config import NF4_BLOCK

SCALE = "_scale"
"""A quantised weight's scales are called as it is, with this behind."""

INT8_MAX = 127
FP8 = jnp.float8_e4m3fn
FP8_MAX = float(jnp.finfo(FP8).max)
CODES_A_BYTE = 2
CODE_BITS = 4

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, zero among them."""

Spec = tuple[tuple[int, ...], Any, tuple[str, ...]]
"""Shape, dtype and logical axes of an array."""


def stored(kind: str, shape: tuple[int, int], axes: tuple[str, str], dtype: Any) -> dict[str, Spec]:
    """What a linear [in, out] is stored as: by suffix of its name, "" and `SCALE`."""
    if kind == "none":
        return {"": (shape, dtype, axes)}
    if kind in ("int8", "fp8"):
        return {"": (shape, jnp.int8 if kind == "int8" else FP8, axes), SCALE: (shape[1:], jnp.float32, axes[1:])}
    assert kind == "nf4", kind
    dim = block_dim(axes)
    if shape[dim] % NF4_BLOCK:
        raise ValueError(f"nf4 of {shape}: dim {dim} is not a multiple of {NF4_BLOCK}")
    return {
        "": (_divided(shape, dim, CODES_A_BYTE), jnp.uint8, axes),
        SCALE: (_divided(shape, dim, NF4_BLOCK), jnp.float32, axes),
    }


def block_dim(axes: Sequence[str]) -> int:
    """The dim of a linear along which blocks lie."""
    return axes.index("hidden")


def _divided(shape: tuple[int, ...], dim: int, divisor: int) -> tuple[int, ...]:
    return (*shape[:dim], shape[dim] // divisor, *shape[dim + 1 :])


def _split(x: Array, dim: int, size: int) -> Array:
    """[.., n, ..] as [.., n / size, size, ..]."""
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


def quantized(weight_IO: Array, kind: str, dim: int) -> tuple[Array, Array]:
    """(values, scales) of a weight, (1) to (3); a scale of zeros is one, or with nf4 zero."""
    weight = weight_IO.astype(jnp.float32)
    if kind == "nf4":
        blocks = _split(weight, dim, NF4_BLOCK)
        scale = jnp.max(jnp.abs(blocks), axis=dim + 1)
        codes = nf4_codes(blocks / _or_one(jnp.expand_dims(scale, dim + 1))).reshape(weight.shape)
        pairs = _split(codes, dim, CODES_A_BYTE)
        low, high = (jax.lax.index_in_dim(pairs, i, dim + 1, keepdims=False) for i in range(CODES_A_BYTE))
        return low | (high << CODE_BITS), scale
    limit = INT8_MAX if kind == "int8" else FP8_MAX
    scale = _or_one(jnp.max(jnp.abs(weight), axis=0) / limit)
    values = weight / scale[None]
    return (jnp.round(values).astype(jnp.int8) if kind == "int8" else values.astype(FP8)), scale


def _or_one(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1.0)


def nf4_codes(x: Array) -> Array:
    """uint8, the number of the nearest NF4 value."""
    codes = jnp.zeros(x.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += (x > (low + high) / 2).astype(jnp.uint8)
    return codes


def dequantized(values: Array, scale: Array, kind: str, dim: int, dtype: Any) -> Array:
    """The weight [in, out] that values and scales stand for."""
    if kind != "nf4":
        return (values.astype(jnp.float32) * scale[None]).astype(dtype)
    shifts = jnp.arange(CODES_A_BYTE, dtype=jnp.uint8) * CODE_BITS
    shifts = jnp.expand_dims(shifts, tuple(d for d in range(values.ndim + 1) if d != dim + 1))
    codes = (jnp.expand_dims(values, dim + 1) >> shifts) & (2**CODE_BITS - 1)
    shape = (*values.shape[:dim], values.shape[dim] * CODES_A_BYTE, *values.shape[dim + 1 :])
    blocks = _split(codes.reshape(shape), dim, NF4_BLOCK)
    weight = jnp.take(jnp.asarray(NF4, jnp.float32), blocks, mode="clip") * jnp.expand_dims(scale, dim + 1)
    return weight.reshape(shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def frozen_product(x_BLI: Array, values: Array, scale: Array, kind: str, dim: int) -> Array:
    """x W of a quantised W, [B, L, O] in x's dtype; W has no gradient and is not kept for x's."""
    if kind == "fp8":
        return _fp8_product("bli,io->blo", x_BLI, values, x_BLI.dtype, scale[None, None])
    weight_IO, x_BLI = _weight_for(x_BLI, values, scale, kind, dim)
    return jnp.einsum("bli,io->blo", x_BLI, weight_IO)


def _weight_for(x: Array, values: Array, scale: Array, kind: str, dim: int) -> tuple[Array, Array]:
    """(The weight, x). It is made once x is there: XLA would else make the weights of all layers at the start, or take
    the forward's for the backward's."""
    x, values, scale = jax.lax.optimization_barrier((x, values, scale))
    return dequantized(values, scale, kind, dim, x.dtype), x


def _frozen_product_fwd(
    x_BLI: Array, values: Array, scale: Array, kind: str, dim: int
) -> tuple[Array, tuple[Array, Array]]:
    return frozen_product(x_BLI, values, scale, kind, dim), (values, scale)


def _frozen_product_bwd(kind: str, dim: int, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, None, None]:
    values, scale = saved
    if kind == "fp8":
        return _fp8_product("blo,io->bli", d_y.astype(jnp.float32) * scale[None, None], values, d_y.dtype), None, None
    weight_IO, d_y = _weight_for(d_y, values, scale, kind, dim)
    return jnp.einsum("blo,io->bli", d_y, weight_IO), None, None


frozen_product.defvjp(_frozen_product_fwd, _frozen_product_bwd)


def _fp8_product(formula: str, x: Array, values: Array, dtype: Any, scale: Array | float = 1.0) -> Array:
    """(4) without s_o, which is `scale`; (5) of an x that has it already."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Rows of zeros, and those that would be zeros in a scale of float32: one does.
    row_scale = jnp.where(largest > FP8_MAX * jnp.finfo(jnp.float32).tiny, largest / FP8_MAX, 1.0)
    product = jnp.einsum(formula, (x / row_scale).astype(FP8), values, preferred_element_type=dtype)
    return (product.astype(jnp.float32) * row_scale * scale).astype(dtype)
