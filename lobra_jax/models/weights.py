"""Base weights by flat name: their shapes, and the sources that hand them out slice by slice. Imports no JAX.

Names and layouts (Linear weights are [in, out], the transpose of Hugging Face's):

    embed [vocab, hidden]
    layers.{i}.attn_norm, layers.{i}.mlp_norm [hidden]
    layers.{i}.{q,k,v,o,gate,up,down} [in, out]     layers.{i}.{q,k,v}_bias [out] with `qkv_bias`
    final_norm [hidden]
    head [hidden, vocab] unless embeddings are tied

A source never holds more than a tensor at a time in memory: every device asks for its own slice.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lobra_jax.host import host_cores
from lobra_jax.models.config import LlamaConfig

EMBEDDING_STD = 0.02
"""Standard deviation of random embeddings, head and biases (GPT-2's and Llama's)."""

BLOCK_SIZE = 2**22
"""Numbers of a random tensor that come from one stream: enough that threads seldom wait for the interpreter."""

PIECE_SIZE = 2**18
"""Of these, those that are drawn at a time: what NumPy needs beside them stays in a core's cache. A multiple of 4, as
64 bits make four."""

NUM_LEVELS = 2**16
"""Values that a random weight may have before it is rounded, each as likely as any other: a normal distribution's
quantiles. Looking up 16 random bits takes a sixth of the time of an exact draw, and a start waits for billions."""

DRAWING = 2
"""How random weights come from a seed; a run on other weights cannot be resumed."""

DRAWN_AND_KEPT = 4
"""Random tensors kept, as many as are read at once (`lobra_jax.replica.LOAD_THREADS`)."""


class WeightSource(Protocol):
    """Anything base weights can be read from: a checkpoint folder, a random generator, arrays in memory."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` (one slice a dim, as JAX gives them to a shard's callback) of tensor `name`.

        The dtype is the source's own (float32, float16 or `ml_dtypes.bfloat16`); whoever reads it casts.
        Raises KeyError for a name the model does not have.
        """
        ...


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every base tensor, in the order they are used."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "attn_norm"] = (config.hidden_size,)
        shapes[prefix + "mlp_norm"] = (config.hidden_size,)
        for target, (num_in, num_out) in config.target_shapes.items():
            shapes[prefix + target] = (num_in, num_out)
            if config.qkv_bias and target in ("q", "k", "v"):
                shapes[f"{prefix}{target}_bias"] = (num_out,)
    shapes["final_norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["head"] = (config.hidden_size, config.vocab_size)
    return shapes


def numpy_dtype(name: str) -> np.dtype:
    """Of a config's dtype; NumPy itself has no bfloat16."""
    return np.dtype(getattr(ml_dtypes, name, name))


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The index that reads all of a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


class RandomWeights:
    """Weights of an untrained model: a function of (seed, tensor name) alone, float32 values rounded to `dtype`.

    Each tensor is drawn whole, so that its values do not depend on how it is sharded; in blocks, each from a stream of
    its own, on as many threads as there are cores. Norms are one, linears normal with variance 1/in (those that write
    to the residual stream 1/(2 num_layers in)), the rest normal with standard deviation 0.02, each of `NUM_LEVELS`
    values.
    """

    def __init__(self, config: LlamaConfig, seed: int, dtype: Any = np.float32) -> None:
        self.config = config
        self.seed = seed
        self.dtype = np.dtype(dtype)
        drawers = ThreadPoolExecutor(host_cores(), thread_name_prefix="draw")
        draw = functools.partial(_drawn, config, weight_shapes(config), seed, self.dtype, drawers)
        # A tensor's shards are read one after the other, some tensors at once: keeping the last ones drawn spares
        # drawing each once a device. The cache does not hold `self`, so that tensors and threads end with it.
        self._last = functools.lru_cache(maxsize=DRAWN_AND_KEPT)(draw)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.ascontiguousarray(self._last(name)[index])


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """[NUM_LEVELS] float32 in the middle of equal shares of a normal distribution, ascending, of variance 1."""
    inverse = statistics.NormalDist().inv_cdf
    upper = np.array([inverse((level + 0.5) / NUM_LEVELS) for level in range(NUM_LEVELS // 2, NUM_LEVELS)])
    return (np.concatenate([-upper[::-1], upper]) / np.sqrt(np.mean(upper**2))).astype(np.float32)


def _drawn(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    dtype: np.dtype,
    drawers: ThreadPoolExecutor,
    name: str,
) -> np.ndarray:
    """A tensor of `RandomWeights`."""
    shape = shapes[name]
    kind = name.rpartition(".")[2]
    if kind.endswith("norm"):
        return np.ones(shape, dtype)
    std = EMBEDDING_STD
    if kind in config.target_shapes:
        num_residual_writes = 2 * config.num_layers if kind in ("o", "down") else 1
        std = 1 / math.sqrt(shape[0] * num_residual_writes)
    digest = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    levels = (_normal_quantiles() * np.float32(std)).astype(dtype)
    weights = np.empty(math.prod(shape), dtype)
    # NumPy looks up integers faster than a dtype that is not its own.
    plain = np.dtype(f"u{dtype.itemsize}")

    def draw_block(start: int) -> None:
        block = weights[start : start + BLOCK_SIZE]
        stream = np.random.SFC64(np.random.SeedSequence([digest, start // BLOCK_SIZE]))
        for piece in (block[first : first + PIECE_SIZE] for first in range(0, len(block), PIECE_SIZE)):
            bits = stream.random_raw(-(-len(piece) // 4)).view(np.uint16)[: len(piece)]
            np.take(levels.view(plain), bits, out=piece.view(plain), mode="clip")  # "clip" looks up without a buffer

    for _ in drawers.map(draw_block, range(0, len(weights), BLOCK_SIZE)):
        pass
    return weights.reshape(shape)


class ArrayWeights:
    """Weights already in memory: flat name -> array in the layout above."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return np.ascontiguousarray(self.tensors[name][index])
