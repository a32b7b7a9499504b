"""RMSNorm, alone and where its input goes on as the residual.

Its gradient needs two sums over a row before it can be written. XLA makes that two passes over memory, the residual's sum
being part of the second; on a GPU one Pallas kernel (Triton) reads a row once and does all of it.

Shape letters as in `models.llama`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lobra_jax.sharding import StageSharding

WIDEST = 16384
"""Features of a row that a kernel's registers hold."""
NUM_WARPS = 4
MOST_VALUES = 2**31 - 1
"""Of an array that a kernel takes, as its offsets are 32 bits."""

AXES = ("batch", "length", "hidden")


def rms_norm(x_BLD: Array, scale_D: Array, eps: float) -> Array:
    x = x_BLD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BLD.dtype) * scale_D[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_and_residual(x_BLD: Array, scale_D: Array, eps: float, sharding: StageSharding) -> tuple[Array, Array]:
    """(`rms_norm` of x, x); the scale is frozen. Only the arguments are kept for the backward."""
    return rms_norm(x_BLD, scale_D, eps), x_BLD


def _fwd(x_BLD: Array, scale_D: Array, eps: float, sharding: StageSharding) -> tuple[tuple[Array, Array], tuple]:
    return norm_and_residual(x_BLD, scale_D, eps, sharding), (x_BLD, scale_D)


def _bwd(
    eps: float, sharding: StageSharding, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, None]:
    x_BLD, scale_D = saved
    d_norm_BLD, d_residual_BLD = cotangents
    if not has_kernel(x_BLD):
        _, vjp = jax.vjp(lambda x: rms_norm(x, scale_D, eps), x_BLD)
        return d_residual_BLD + vjp(d_norm_BLD)[0], None
    kernel = sharding.per_device(
        functools.partial(gradient, eps=eps), (AXES, ("hidden",), AXES, AXES), AXES, x_BLD.shape
    )
    return kernel(x_BLD, scale_D, d_norm_BLD, d_residual_BLD), None


norm_and_residual.defvjp(_fwd, _bwd)


def has_kernel(x_BLD: Array) -> bool:
    """Whether the gradient of such activations is a kernel's."""
    is_gpu = jax.default_backend() == "gpu" and x_BLD.dtype in (jnp.bfloat16, jnp.float16)
    return is_gpu and x_BLD.shape[-1] <= WIDEST and x_BLD.size <= MOST_VALUES


def gradient(
    x_BLD: Array, scale_D: Array, d_norm_BLD: Array, d_residual_BLD: Array, *, eps: float, interpret: bool = False
) -> Array:
    """d residual + d x of `rms_norm`, [B, L, D]; in fp32, rounded once."""
    *rows, features = x_BLD.shape
    x, d_norm, d_residual = (a.reshape(-1, features) for a in (x_BLD, d_norm_BLD, d_residual_BLD))
    out = pl.pallas_call(
        functools.partial(_gradient_kernel, eps=eps, features=features),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(len(x),),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        input_output_aliases={3: 0},
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="rms_norm_gradient",
    )(x, scale_D, d_norm, d_residual)
    return out.reshape(*rows, features)


def _gradient_kernel(x: Any, scale: Any, d_norm: Any, d_residual: Any, out: Any, *, eps: float, features: int) -> None:
    """One row: d_residual + r (g - n mean(g n)) with r = 1 / rms(x), n = r x and g = d_norm scale."""
    row, columns = pl.program_id(0), pl.ds(0, pl.next_power_of_2(features))
    inside = jnp.arange(pl.next_power_of_2(features)) < features

    def load(ref: Any) -> Array:
        return triton.load(ref.at[row, columns], mask=inside, other=0.0).astype(jnp.float32)

    x32 = load(x)
    g = load(d_norm) * triton.load(scale.at[columns], mask=inside, other=0.0).astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.sum(x32 * x32) / features + eps)
    normed = x32 * r
    d_x = r * (g - normed * (jnp.sum(g * normed) / features))
    triton.store(out.at[row, columns], (load(d_residual) + d_x).astype(out.dtype), mask=inside)
