"""Causal attention: cuDNN's flash kernel on a GPU, else XLA's, in chunks of queries where the sequence is long.

Rows are padded on the right, so the causal mask alone hides the padding from real tokens. A packed row holds several
segments, which `packed_attention` keeps apart. Shape letters as in `models.llama`; C queries of a chunk, M segments.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lobra_jax.low_rank import FINITE_LIMIT, bounded
from lobra_jax.packed import SegmentInputs

QUERY_CHUNK = 256
"""Queries whose scores against all keys exist at once where there is no flash kernel."""

FLASH_FORWARD = "dot_product_attention_fwd_wrapper"
"""The primitive of cuDNN's forward, whose outputs (the values, and each query's softmax sum) its backward needs: saving
them both is what spares a second forward. Elsewhere the output is named "attention"."""

GROUPED_OFFSETS_FROM = (0, 11, 2)
"""JAX before this takes a key's offset in a packed row for a query's, which is wrong where heads share keys."""


def attention(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array) -> Array:
    """Softmax(q k^T / sqrt(H)) v over earlier and same positions; grouped queries where K < N. [B, L, N, H]."""
    if has_flash_kernel(q_BLNH):
        return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True, implementation="cudnn")
    if q_BLNH.shape[1] <= 2 * QUERY_CHUNK:
        out = jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True, implementation="xla")
    else:
        out = chunked_attention(q_BLNH, k_BLKH, v_BLKH)
    return checkpoint_name(out, "attention")


def packed_attention(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array, segments: SegmentInputs) -> Array:
    """`attention` within each segment of a row. With the flash kernel its cost is that of the segments alone."""
    if has_flash_kernel(q_BLNH):
        return _flash_segments(q_BLNH, k_BLKH, v_BLKH, segments)
    overflow_BL = functools.reduce(jnp.logical_or, (_overflows(x) for x in (q_BLNH, k_BLKH, v_BLKH)))
    q, k, v = (bounded(x) for x in (q_BLNH, k_BLKH, v_BLKH))
    if q.shape[1] <= 2 * QUERY_CHUNK:
        same = segments.segment_ids[:, :, None] == segments.segment_ids[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=same[:, None], is_causal=True, implementation="xla")
    else:
        out = chunked_attention(q, k, v, segments.segment_ids)
    return checkpoint_name(jnp.where(overflow_BL[..., None, None], jnp.nan, _bounded_cotangent(out)), "attention")


def _overflows(x_BLNH: Array) -> Array:
    """[B, L]: whether a token has values that `bounded` takes away; its own task must still see them."""
    return ~jnp.all(jnp.abs(x_BLNH) <= FINITE_LIMIT, axis=(2, 3))


def has_flash_kernel(q: Array) -> bool:
    """Whether attention of such queries runs cuDNN's kernel."""
    return jax.default_backend() == "gpu" and q.dtype != jnp.float32


def _flash_segments(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array, segments: SegmentInputs) -> Array:
    """cuDNN's kernel on a packed layout (Hopper or newer), which `jax.nn` does not pass on."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if jax.__version_info__ < GROUPED_OFFSETS_FROM:
        groups = q_BLNH.shape[2] // k_BLKH.shape[2]
        k_BLKH, v_BLKH = (jnp.repeat(x, groups, axis=2) for x in (k_BLKH, v_BLKH))
    lengths, offsets = segment_layout(segments.segment_ids, segments.slots.shape[1])
    return dot_product_attention(
        q_BLNH,
        k_BLKH,
        v_BLKH,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q_BLNH.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )


def segment_layout(segment_ids_BL: Array, num_segments: int) -> tuple[Array, Array]:
    """(lengths [B, M], starts [B, M + 1]) int32 of each row's segments, -1 where a row has fewer than M."""
    own = segment_ids_BL[:, :, None] == jnp.arange(num_segments, dtype=jnp.int32)[None, None]
    lengths = jnp.sum(own, axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    lengths, starts = (jnp.where(lengths > 0, x, -1) for x in (lengths, starts))
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


@jax.custom_vjp
def _bounded_cotangent(x: Array) -> Array:
    """x; what is not finite in its gradient stays out of the sums over positions that follow."""
    return x


_bounded_cotangent.defvjp(lambda x: (x, None), lambda _, dx: (bounded(dx),))


def chunked_attention(q_BLNH: Array, k_BLKH: Array, v_BLKH: Array, segment_ids_BL: Array | None = None) -> Array:
    """As `attention`, holding [B, N, C, L] scores instead of [B, N, L, L]; the backward recomputes them."""
    b, length, n, h = q_BLNH.shape
    chunks = -(-length // QUERY_CHUNK)
    padding = chunks * QUERY_CHUNK - length
    q = jnp.pad(q_BLNH, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(b, chunks, QUERY_CHUNK, n, h)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(start: Array, q_BCNH: Array) -> Array:
        query = start + jax.lax.broadcasted_iota(jnp.int32, (QUERY_CHUNK, length), 0)
        key = jax.lax.broadcasted_iota(jnp.int32, (QUERY_CHUNK, length), 1)
        mask = (key <= query)[None, None]
        if segment_ids_BL is not None:
            mask = mask & _same_segment(segment_ids_BL, query[:, 0])[:, None]
        return jax.nn.dot_product_attention(q_BCNH, k_BLKH, v_BLKH, mask=mask, implementation="xla")

    starts = jnp.arange(chunks, dtype=jnp.int32) * QUERY_CHUNK
    out = jax.lax.map(lambda chunk: one_chunk(*chunk), (starts, jnp.moveaxis(q, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(b, chunks * QUERY_CHUNK, n, h)[:, :length]


def _same_segment(segment_ids_BL: Array, query_C: Array) -> Array:
    """[B, C, L]: whether a query's segment is a key's; queries beyond the row count as its last position."""
    last = segment_ids_BL.shape[1] - 1
    own_BC = jnp.take(segment_ids_BL, jnp.minimum(query_C, last), axis=1)
    return own_BC[:, :, None] == segment_ids_BL[:, None]
