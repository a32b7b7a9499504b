"""The Llama-family model as pipeline stages, in Flax NNX, functional at the jit boundary.

Each weight is one line: shape and logical axes. A stage is built abstract (`ShapeDtypeStruct` leaves), so the same
model goes onto any submesh by `lobra_jax.sharding`'s rules, and `nnx.merge` puts placed arrays in inside `jit`.
The code is single-device code; where a mesh matters it calls `shard(x, *logical axes)`.

Shape letters: B row, L position, D hidden, N head, K key/value head, H head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lobra_jax.lora import (
    DROPOUT_SITES,
    Adapters,
    RowInputs,
    drop,
    low_rank_deltas,
    low_rank_values,
    magnitude_ratios,
    scaled_values,
)
from lobra_jax.low_rank import Pin, Pins, out_of_ranks
from lobra_jax.models.adapted_swiglu import adapted_swiglu, has_kernels
from lobra_jax.models.attention import attention, packed_attention
from lobra_jax.models.config import LlamaConfig
from lobra_jax.models.quantized import SCALE, block_dim, dequantized, frozen_product, stored
from lobra_jax.models.remat import in_chunks, in_turn, mlp_chunks, with_remat
from lobra_jax.models.rope import apply_rope, rope_tables
from lobra_jax.packed import PackedRows, drop_packed, packed_ratios
from lobra_jax.sharding import TARGET_AXES, Shard

Rows = RowInputs | PackedRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """An abstract weight of a stage: shape, dtype and logical axes."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]


def _weight(dtype: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


class Layer(nnx.Module):
    """One transformer layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    It does not know its number, so that all layers of a stage are one function, traced once.
    """

    def __init__(self, config: LlamaConfig, dtype: Any, quantization: str) -> None:
        d = config.hidden_size
        self.config = config
        self.dtype = dtype
        self.quantization = quantization
        self.attn_norm = _weight(dtype, (d,), ("hidden",))
        self.mlp_norm = _weight(dtype, (d,), ("hidden",))
        for target, shape in config.target_shapes.items():
            for suffix, (its_shape, its_dtype, axes) in stored(quantization, shape, TARGET_AXES[target], dtype).items():
                setattr(self, target + suffix, _weight(its_dtype, its_shape, axes))
            if config.qkv_bias and target in ("q", "k", "v"):
                setattr(self, f"{target}_bias", _weight(dtype, shape[1:], TARGET_AXES[target][1:]))

    def linears(
        self,
        x: Array,
        targets: Sequence[str],
        adapters: Mapping,
        rows: Rows | None,
        index: Array,
        shard: Shard,
        residual: Array | None = None,
    ) -> list[Array]:
        """x W (+ bias) (+ low-rank delta) (+ residual) for linears that read the same input.

        What is added to x W is added up before: matmuls then take it as what they accumulate onto.

        With DoRA the row's task gives x W + bias + (ratio - 1) x W + ratio delta, in which both products of the added
        part see the input after dropout.
        """
        *inputs, own = fan_out(x, len(targets) + 1, shard.num_devices > 1)
        bases = {target: self._product(x, target) for x, target in zip(inputs, targets, strict=True)}
        added = {} if residual is None else dict.fromkeys(targets, residual)
        adapted = [target for target in targets if target in adapters] if rows is not None else []
        if adapted:
            deltas = self._deltas(own, adapted, adapters, rows, index, bases, shard)
            for target, delta in zip(adapted, deltas, strict=True):
                added[target] = added[target] + delta if target in added else delta
        outs = {target: base + added[target] if target in added else base for target, base in bases.items()}
        if self.config.qkv_bias:
            for target in outs.keys() & {"q", "k", "v"}:
                outs[target] = outs[target] + getattr(self, f"{target}_bias")[...][None, None]
        return list(outs.values())

    def _deltas(
        self,
        x: Array,
        adapted: Sequence[str],
        adapters: Mapping,
        rows: Rows,
        index: Array,
        bases: Mapping[str, Array],
        shard: Shard,
    ) -> list[Array]:
        """What each row's task adds to x W."""
        packed = isinstance(rows, PackedRows)
        dropped = (drop_packed if packed else drop)(x, rows, index, DROPOUT_SITES[adapted[0]])
        deltas = low_rank_deltas(dropped, adapters, adapted, rows.rank_slots, _pins(adapted[0], rows, shard))
        if rows.tasks.magnitudes is None:
            return deltas
        ratios = packed_ratios if packed else magnitude_ratios
        scaled = []
        for target, delta in zip(adapted, deltas, strict=True):
            ratio = ratios(self._weight(target), adapters[target], target, rows)
            base = bases[target] if rows.dropout_keys is None else self._product(dropped, target)
            scaled.append((ratio - 1).astype(x.dtype) * base + ratio.astype(x.dtype) * delta)
        return scaled

    def _product(self, x_BLI: Array, target: str) -> Array:
        if self.quantization == "none":
            return jnp.einsum("bli,io->blo", x_BLI, self._weight(target))
        return frozen_product(x_BLI, *self._stored(target))

    def _weight(self, target: str) -> Array:
        """[in, out]."""
        if self.quantization == "none":
            return getattr(self, target)[...]
        return dequantized(*self._stored(target), self.dtype)

    def _stored(self, target: str) -> tuple[Array, Array, str, int]:
        values, scale = getattr(self, target)[...], getattr(self, target + SCALE)[...]
        return values, scale, self.quantization, block_dim(TARGET_AXES[target])

    def __call__(
        self,
        x_BLD: Array,
        adapters: Mapping,
        rows: Rows | None,
        rope: tuple[Array, Array],
        index: Array,
        shard: Shard,
        mlp_chunks: int = 1,
    ) -> Array:
        """`index` is the layer's number in the model, a scalar; the feed-forward goes in `mlp_chunks` equal chunks."""
        x_BLD = self._attend(x_BLD, adapters, rows, rope, index, shard)
        if mlp_chunks == 1:
            return self._feed_forward(x_BLD, adapters, rows, index, shard)
        graph, state = nnx.split(self)

        def one_chunk(x: Array, adapters: Mapping, constants: tuple) -> Array:
            state, rows, index = constants
            return nnx.merge(graph, state)._feed_forward(x, adapters, rows, index, shard)

        return in_chunks(one_chunk, mlp_chunks, x_BLD, adapters, (state, rows, index))

    def _attend(
        self,
        x_BLD: Array,
        adapters: Mapping,
        rows: Rows | None,
        rope: tuple[Array, Array],
        index: Array,
        shard: Shard,
    ) -> Array:
        c = self.config
        b, length, _ = x_BLD.shape
        h_BLD = rms_norm(x_BLD, self.attn_norm[...], c.rms_norm_eps)
        q, k, v = self.linears(h_BLD, ("q", "k", "v"), adapters, rows, index, shard)
        q = shard(q, "batch", "position", "heads").reshape(b, length, c.num_heads, c.head_dim)
        k = shard(k, "batch", "position", "kv_heads").reshape(b, length, c.num_kv_heads, c.head_dim)
        v = shard(v, "batch", "position", "kv_heads").reshape(b, length, c.num_kv_heads, c.head_dim)
        q, k = checkpoint_name(apply_rope(q, rope), "q"), checkpoint_name(apply_rope(k, rope), "k")
        v = checkpoint_name(v, "v")
        out = packed_attention(q, k, v, rows.segments) if isinstance(rows, PackedRows) else attention(q, k, v)
        out = shard(out.reshape(b, length, c.num_heads * c.head_dim), "batch", "position", "heads")
        (x_BLD,) = self.linears(out, ("o",), adapters, rows, index, shard, residual=x_BLD)
        return checkpoint_name(shard(x_BLD, "batch", "length", "hidden"), "residual_mid")

    def _feed_forward(self, x_BLD: Array, adapters: Mapping, rows: Rows | None, index: Array, shard: Shard) -> Array:
        h_BLD = rms_norm(x_BLD, self.mlp_norm[...], self.config.rms_norm_eps)
        if rows is not None and shard.num_devices == 1 and _has_kernels(adapters, rows, h_BLD.dtype):
            return self._adapted_feed_forward(h_BLD, x_BLD, adapters, rows)
        gate, up = self.linears(h_BLD, ("gate", "up"), adapters, rows, index, shard)
        gate = checkpoint_name(shard(gate, "batch", "position", "mlp"), "gate")
        up = checkpoint_name(shard(up, "batch", "position", "mlp"), "up")
        (x_BLD,) = self.linears(swiglu(gate, up), ("down",), adapters, rows, index, shard, residual=x_BLD)
        return shard(x_BLD, "batch", "length", "hidden")

    def _adapted_feed_forward(self, h_BLD: Array, residual_BLD: Array, adapters: Mapping, rows: Rows) -> Array:
        """The same, on one device with adapters that only add: all they do between gate, up and down is one function.

        Gate and up are kept as the base's products, without what adapters add.
        """
        slots = rows.rank_slots
        to_gate, to_up, own = fan_out(h_BLD, 3, False)
        gate = checkpoint_name(self._product(to_gate, "gate"), "gate")
        up = checkpoint_name(self._product(to_up, "up"), "up")
        h_gate, h_up = low_rank_values(own, adapters, ("gate", "up"), slots)
        factors = adapters["gate"]["b"], adapters["up"]["b"], adapters["down"]["a"]
        act, h_down = adapted_swiglu(gate, up, h_gate, h_up, *factors, slots.task_ids, slots.shared)
        h_down = scaled_values(h_down, slots, act.dtype)
        delta = out_of_ranks(h_down, adapters["down"]["b"], slots.task_ids, slots.shared)
        return self._product(act, "down") + (residual_BLD + delta)


class Stage(nnx.Module):
    """Consecutive layers of the model; the first stage embeds tokens, the last norms and projects to the vocabulary."""

    def __init__(self, config: LlamaConfig, layers: range, *, dtype: Any, quantization: str) -> None:
        v, d = config.vocab_size, config.hidden_size
        self.config = config
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_layers
        self.layers = nnx.Dict({str(i): Layer(config, dtype, quantization) for i in layers})
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.embed = _weight(dtype, (v, d), ("vocab", "hidden"))
        if self.is_last:
            self.final_norm = _weight(dtype, (d,), ("hidden",))
            if not config.tie_embeddings:
                self.head = _weight(dtype, (d, v), ("hidden", "vocab"))

    def __call__(
        self,
        x: Array,
        adapters: Adapters,
        rows: Rows | None,
        *,
        remat: str,
        shard: Shard,
        chunked: bool = False,
        turns: bool = False,
    ) -> Array:
        """tokens [B, L] (first stage) or hidden [B, L, D] -> hidden [B, L, D], normed on the last stage.

        `rows=None` runs the frozen base alone; `chunked` lets long feed-forwards go chunk by chunk, `turns` layers'
        backwards one after the other (`remat.in_turn`).
        """
        if self.is_first:
            x = shard(embed_tokens(x, self.embed[...]), "batch", "length", "hidden")
        rope = rope_tables(self.config, x.shape[1])
        if isinstance(rows, PackedRows):
            rope = tuple(table[rows.segments.positions] for table in rope)
        graph, _ = nnx.split(next(iter(self.layers.values())))
        chunks = mlp_chunks(*x.shape[:2]) if chunked else 1

        def run(params: Any, x: Array, pairs: Mapping, rows: Rows | None, rope: Any, index: Array) -> Array:
            return nnx.merge(graph, params)(x, pairs, rows, rope, index, shard, chunks)

        run_once_traced = jax.jit(with_remat(run, remat))
        for index, layer in self.layers.items():
            pairs = adapters[index] if rows is not None else {}
            if turns:
                x, pairs = in_turn(x, pairs)
            x = run_once_traced(nnx.state(layer), x, pairs, rows, rope, jnp.uint32(int(index)))
        if self.is_last:
            x = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        return x

    @property
    def unembedding(self) -> Array:
        """[D, V]: the head, or the transposed embedding when tied."""
        return self.embed[...].T if self.config.tie_embeddings else self.head[...]


@dataclasses.dataclass(frozen=True)
class AbstractStage:
    """A stage without values: its module graph and its weights' specs by flat name ("layers.3.q")."""

    config: LlamaConfig
    layers: range
    dtype: Any
    quantization: str
    graph: nnx.GraphDef
    weights: Mapping[str, WeightSpec]

    def merge(self, params: Mapping[str, Array]) -> Stage:
        """The module with these values; call it inside `jit`."""
        return nnx.merge(self.graph, nnx.from_flat_state({tuple(name.split(".")): x for name, x in params.items()}))


def abstract_stage(config: LlamaConfig, layers: range, dtype: Any, quantization: str = "none") -> AbstractStage:
    graph, state = nnx.split(Stage(config, layers, dtype=dtype, quantization=quantization))
    weights = {
        ".".join(str(part) for part in path): WeightSpec(
            shape=param.get_value().shape, dtype=param.get_value().dtype, axes=param.axes
        )
        for path, param in nnx.to_flat_state(state)
    }
    return AbstractStage(
        config=config, layers=layers, dtype=dtype, quantization=quantization, graph=graph, weights=weights
    )


def _has_kernels(adapters: Mapping, rows: Rows, dtype: jnp.dtype) -> bool:
    """Whether the feed-forward's linears are all adapted, by low-rank products alone, for which a GPU has kernels."""
    is_added = rows.dropout_keys is None and rows.tasks.magnitudes is None
    if not is_added or not {"gate", "up", "down"} <= adapters.keys():
        return False
    _, rank, num_features = adapters["gate"]["b"].shape
    return has_kernels(num_features, rows.rank_slots.task_ids.shape[1] * rank, dtype)


def _pins(target: str, rows: Rows, shard: Shard) -> Pins:
    """Where adapters read what the base's product gathers too, and write what its gradient gathers."""
    reads, writes = (axis == "hidden" for axis in TARGET_AXES[target])
    dora = rows.tasks.magnitudes is not None  # its product sees the input after dropout, its ratio scales the delta
    read = reads and (rows.dropout_keys is None or dora)
    return Pins(read=Pin(shard, read), written=Pin(shard, writes and not dora))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fan_out(x: Array, count: int, split: bool) -> tuple[Array, ...]:
    """x for each of `count` readers, adapters the last of them, whose gradients add up from the last to the first.

    XLA's matmuls take a sum that they are the first term of as what they accumulate onto. In the order in which JAX
    would add up, every second sum costs passes over memory of its own. Where x is `split` over devices, gradients of
    the base's products are parts of sums over them, and the adapters' is not: it comes last, after one reduce-scatter
    of the others' sum instead of one of each.
    """
    return (x,) * count


def _fan_out_bwd(count: int, split: bool, _: None, cotangents: tuple[Array, ...]) -> tuple[Array]:
    *products, adapters = cotangents
    order = [*reversed(products), adapters] if split else [adapters, *reversed(products)]
    return (functools.reduce(lambda total, own: own + total, order),)


fan_out.defvjp(lambda x, count, split: (fan_out(x, count, split), None), _fan_out_bwd)


def embed_tokens(tokens_BL: Array, embed_VD: Array) -> Array:
    return jnp.take(embed_VD, tokens_BL, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BLD: Array, scale_D: Array, eps: float) -> Array:
    """Its backward keeps x alone, in its own dtype, whatever the remat: the rest is cheap to make anew."""
    return _rms_norm(x_BLD, scale_D, eps)


def _rms_norm(x_BLD: Array, scale_D: Array, eps: float) -> Array:
    x = x_BLD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BLD.dtype) * scale_D[None, None]


def _rms_norm_bwd(eps: float, saved: tuple[Array, Array], d_norm_BLD: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, scale: _rms_norm(x, scale, eps), *saved)[1](d_norm_BLD)


rms_norm.defvjp(lambda x, scale, eps: (_rms_norm(x, scale, eps), (x, scale)), _rms_norm_bwd)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up; its backward keeps these two alone, as `rms_norm`'s."""
    return jax.nn.silu(gate) * up


swiglu.defvjp(
    lambda gate, up: (swiglu(gate, up), (gate, up)),
    lambda saved, d_act: jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *saved)[1](d_act),
)
