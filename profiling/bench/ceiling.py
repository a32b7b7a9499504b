"""What bounds a step: the operations it cannot do without, and the rate of the matmuls it is made of.

Floor FLOPs of T tokens in rows of L, for a base of P linear parameters in `num_layers` layers (its head apart):

    linears    4 P T                       forward and the gradient of the input; frozen weights have none
    head       4 hidden vocab T
    attention  3.5 x 2 T L heads head_dim a layer, causal: forward, and 2.5 times that backward

Nothing counts for adapters, for what remat redoes, or for elementwise work.
"""

from __future__ import annotations

import time
from typing import Any

from lobra_jax.models.config import LlamaConfig

ATTENTION_PASSES = 3.5
"""Forward once, backward 2.5 times: five matmuls for the forward's two."""
SECONDS_A_MATMUL = 0.05
"""Each matmul is repeated for about as long."""


def floor_flops(config: LlamaConfig, rows: int, length: int) -> float:
    """Of one micro-batch."""
    tokens = rows * length
    linears = sum(fan_in * fan_out for fan_in, fan_out in config.target_shapes.values())
    attention = 2 * tokens * length * config.num_heads * config.head_dim
    return (
        4.0 * tokens * (linears * config.num_layers + config.hidden_size * config.vocab_size)
        + ATTENTION_PASSES * attention * config.num_layers
    )


def matmul_rate(config: LlamaConfig, tokens: int, dtype: Any, *, tp: int = 1) -> dict[str, float]:
    """FLOP/s of the model's own matmuls on one device, forward and for the gradient of the input.

    By linear, and "all": their operations over their seconds, each as often as a step does it. With tp, one device's
    share of each.
    """
    import jax
    import jax.numpy as jnp

    def random(*shape: int) -> jax.Array:
        return (jax.random.normal(jax.random.key(sum(shape)), shape, jnp.float32) * 0.02).astype(dtype)

    forward = jax.jit(lambda x, w: x @ w)
    backward = jax.jit(lambda y, w: y @ w.T)
    linears = {name: (shape, config.num_layers) for name, shape in config.target_shapes.items()}
    linears["head"] = ((config.hidden_size, config.vocab_size), 1)
    rates, flops_all, seconds_all = {}, 0.0, 0.0
    measured: dict[tuple[int, int], float] = {}
    for name, ((fan_in, fan_out), times) in linears.items():
        splits_inputs = name in ("o", "down")
        fan_in, fan_out = (fan_in // tp, fan_out) if splits_inputs else (fan_in, fan_out // tp)
        if (fan_in, fan_out) not in measured:
            x, y, w = random(tokens, fan_in), random(tokens, fan_out), random(fan_in, fan_out)
            measured[fan_in, fan_out] = _seconds(forward, x, w) + _seconds(backward, y, w)
        seconds, flops = measured[fan_in, fan_out], 4.0 * tokens * fan_in * fan_out
        rates[name] = flops / seconds
        flops_all += times * flops
        seconds_all += times * seconds
    return {"all": flops_all / seconds_all, **rates}


def _seconds(function: Any, *arguments: Any) -> float:
    """Of one call among many in a row."""
    function(*arguments).block_until_ready()
    start = time.perf_counter()
    function(*arguments).block_until_ready()
    count = max(3, round(SECONDS_A_MATMUL / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        out = function(*arguments)
    out.block_until_ready()
    return (time.perf_counter() - start) / count
