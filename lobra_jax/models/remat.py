"""Rematerialisation of a layer: what each policy keeps for the backward, and how far a feed-forward is cut up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

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


def mlp_chunks(rows: int, length: int) -> int:
    """The fewest equal chunks along the length of at most MLP_CHUNK_TOKENS tokens each (at least one position)."""
    wanted = max(1, -(-rows * length // MLP_CHUNK_TOKENS))
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)
