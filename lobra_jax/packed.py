"""Adapters on packed rows: sequences of several tasks lie one after another in a row, each token using its own task's.

A row names at most K tasks, its slots. All K adapters are applied to every token of the row and each token keeps its
own slot's low-rank values: h = x [a_1 .. a_K], h of other slots set to zero, h [b_1; ..; b_K]. That is two plain
matmuls of K x rank columns whatever the number of tasks in the run; sequences need no alignment, and the values are
those of a padded row to rounding. (Cutting rows into blocks of one task each would gather an adapter per block, which
costs as much memory traffic as the activations themselves for blocks short enough not to waste their tails.)

What is not finite in one task's tokens stays there: a product of two tasks' values is always with an exact zero, and
`low_rank.bounded` keeps infinities and NaN, for which 0 x inf is not 0, out of those sums.

Shape letters as in `lora`; K slots of a row, M segments of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry2x32_p

from lobra_jax.lora import NUM_DROPOUT_SITES, TaskInputs, task_ratios
from lobra_jax.low_rank import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentInputs:
    """Where sequences lie in the rows of a packed micro-batch. What is left of a row is a segment of its own.

    Attributes:
      segment_ids: [B, L] int32, which segment of its row each token belongs to, ascending from 0 without gaps.
      positions: [B, L] int32, from 0 in each segment.
      slots: [B, M] int32, which of its row's tasks a segment belongs to.
    """

    segment_ids: Array
    positions: Array
    slots: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """What the model needs to know of each row of a packed micro-batch; the packed form of `lora.RowInputs`.

    Attributes:
      segments: where sequences lie.
      task_ids: [B, K] int32, the tasks of a row's slots.
      tasks: the values by task.
      slots: [B, L] int32, each token's slot.
      scales: [B, L] float32, of each token's task.
      dropout_keys: [B, M] keys, or None when no task of the run uses dropout.
      keep_rates: [B, L] float32, 1 - dropout; None with `dropout_keys`.
    """

    segments: SegmentInputs
    task_ids: Array
    tasks: TaskInputs
    slots: Array
    scales: Array
    dropout_keys: Array | None
    keep_rates: Array | None

    @property
    def token_tasks(self) -> Array:
        """[B, L] int32: each token's task."""
        return jnp.take_along_axis(self.task_ids, self.slots, axis=1)

    @property
    def rank_slots(self) -> Slots:
        own = self.slots[..., None] == jnp.arange(self.task_ids.shape[1], dtype=jnp.int32)[None, None]
        return Slots(task_ids=self.task_ids, scales=self.scales[..., None, None], own=own[..., None])


def packed_rows(
    tasks: TaskInputs, task_ids: Array, dropout_ids: Array, segments: SegmentInputs, *, dropout: bool
) -> PackedRows:
    """Looks up each token's task values; `task_ids` [B, K], `dropout_ids` [B, M] (see `lora.row_inputs`)."""
    slots = jnp.take_along_axis(segments.slots, segments.segment_ids, axis=1)
    token_tasks = jnp.take_along_axis(task_ids, slots, axis=1)
    keys = keep_rates = None
    if dropout:
        keys = jax.vmap(jax.vmap(lambda mark: jax.random.key(mark, impl="threefry2x32")))(dropout_ids)
        keep_rates = 1 - tasks.dropout_rates[token_tasks]
    return PackedRows(
        segments=segments,
        task_ids=task_ids,
        tasks=tasks,
        slots=slots,
        scales=tasks.scales[token_tasks],
        dropout_keys=keys,
        keep_rates=keep_rates,
    )


def drop_packed(x_BLI: Array, rows: PackedRows, layer: Array | int, site: int) -> Array:
    """`lora.drop` where positions count from each sequence's own start: the same values fall out as in a padded row."""
    if rows.dropout_keys is None:
        return x_BLI
    fold = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, layer * NUM_DROPOUT_SITES + site)))
    words_BM2 = jax.random.key_data(fold(rows.dropout_keys))
    words_BL2 = jnp.take_along_axis(words_BM2, rows.segments.segment_ids[..., None], axis=1)
    kept = uniform_at(words_BL2, rows.segments.positions, x_BLI.shape[-1]) < rows.keep_rates[..., None]
    return x_BLI * jnp.where(kept, 1 / rows.keep_rates[..., None], 0.0).astype(x_BLI.dtype)


def uniform_at(words_BL2: Array, positions_BL: Array, features: int) -> Array:
    """Rows `positions` of `jax.random.uniform(key, [.., features])`, partitionable threefry, each token its own key."""
    b, length = positions_BL.shape
    assert length * features < 2**32, "a counter of a mask exceeds 32 bits"
    feature = jax.lax.broadcasted_iota(jnp.uint32, (b, length, features), 2)
    counts = positions_BL.astype(jnp.uint32)[..., None] * jnp.uint32(features) + feature
    first, second = (jnp.broadcast_to(words_BL2[..., i : i + 1], counts.shape) for i in (0, 1))
    high, low = threefry2x32_p.bind(first, second, jnp.zeros_like(counts), counts)
    one_to_two = jax.lax.shift_right_logical(high ^ low, jnp.uint32(9)) | jnp.uint32(0x3F80_0000)
    return jax.lax.bitcast_convert_type(one_to_two, jnp.float32) - 1.0


def packed_ratios(weight_IO: Array, pair: Mapping[str, Array], target: str, rows: PackedRows) -> Array:
    """[B, L, O] float32: `lora.task_ratios` of each token's task, chosen slot by slot without a product."""
    ratios_BKO = task_ratios(weight_IO, pair, target, rows.tasks)[rows.task_ids]
    ratio = ratios_BKO[:, :1]
    for slot in range(1, rows.task_ids.shape[1]):
        ratio = jnp.where((rows.slots == slot)[..., None], ratios_BKO[:, slot : slot + 1], ratio)
    return ratio
