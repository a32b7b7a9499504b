"""Rotary position embeddings, with Llama 3.1's scaling of frequencies.

Shape letters as in `models.llama`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from lobra_jax.models.config import LlamaConfig, RopeScaling


def rope_tables(config: LlamaConfig, length: int) -> tuple[Array, Array]:
    """(cos, sin), each [L, H/2] fp32, of positions 0..L-1."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is not None:
        frequency = scale_frequencies(frequency, config.rope_scaling)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    return jnp.cos(angle), jnp.sin(angle)


def scale_frequencies(frequency: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_positions / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def apply_rope(x_BLNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), the convention of Hugging Face checkpoints.

    The tables are [L, H/2], or [B, L, H/2] where rows are packed.
    """
    cos, sin = (table[None, :, None, :] if table.ndim == 2 else table[:, :, None, :] for table in rope)
    x1, x2 = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLNH.dtype)
