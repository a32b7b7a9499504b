"""What bounds a step: the operations it cannot do without, and the rate of the matmuls it is made of.

Floor FLOPs of T tokens in rows of L, for a base of P linear parameters in `num_layers` layers (its head apart):

    linears    4 P T                       forward and the gradient of the input; frozen weights have none
    head       4 hidden vocab T
    attention  3.5 x 2 T L heads head_dim a layer, causal: forward, and 2.5 times that backward

Nothing counts for adapters, for what remat redoes, or for elementwise work.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from lobra_jax.models.config import LlamaConfig

ATTENTION_PASSES = 3.5
"""Forward once, backward 2.5 times: five matmuls for the forward's two."""
SPLIT_INPUTS = ("o", "down")
"""Linears whose input features are cut over a stage's devices, not their output features."""
VALUE_STD = 0.02
SUSTAINED_S = 4.0


def floor_flops(config: LlamaConfig, rows: int, length: int) -> float:
    """Of one micro-batch."""
    tokens = rows * length
    linears = sum(fan_in * fan_out for fan_in, fan_out in config.target_shapes.values())
    attention = 2 * tokens * length * config.num_heads * config.head_dim
    return (
        4.0 * tokens * (linears * config.num_layers + config.hidden_size * config.vocab_size)
        + ATTENTION_PASSES * attention * config.num_layers
    )


def matmul_rate(config: LlamaConfig, tokens: int, dtype: Any, *, tp: int = 1) -> float:
    """FLOP/s of one device over the model's own matmuls, back to back for as long as steps are timed.

    Every linear of every layer and the head, forward and for the gradient of the input; with tp one device's share of
    each. A few matmuls alone run faster than that: under load the device lowers its clock to keep within its power.
    """
    import jax
    import jax.numpy as jnp

    def random(*shape: int) -> jax.Array:
        return (jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float32) * VALUE_STD).astype(dtype)

    forward = jax.jit(lambda x, w: x @ w)
    backward = jax.jit(lambda y, w: y @ w.T)
    shapes = [
        (fan_in // tp, fan_out) if name in SPLIT_INPUTS else (fan_in, fan_out // tp)
        for name, (fan_in, fan_out) in config.target_shapes.items()
    ] * config.num_layers
    shapes.append((config.hidden_size, config.vocab_size // tp))
    operands = {shape: (random(tokens, shape[0]), random(tokens, shape[1]), random(*shape)) for shape in set(shapes)}

    def run() -> float:
        start = time.perf_counter()
        for shape in shapes:
            x, y, w = operands[shape]
            outs = forward(x, w), backward(y, w)
        jax.block_until_ready(outs)
        return time.perf_counter() - start

    run()
    times = [run()]
    while sum(times) < SUSTAINED_S:
        times.append(run())
    return 4.0 * tokens * sum(fan_in * fan_out for fan_in, fan_out in shapes) / statistics.median(times)
