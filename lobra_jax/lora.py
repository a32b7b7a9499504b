"""Stacked LoRA adapters: many tasks' low-rank pairs in one array per linear, each batch row using its own task's.

Adapters are a plain pytree, `adapters[layer][target] = {"a": [task, rank, in], "b": [task, rank, out]}` in fp32, handed
to the model as an argument and to `grad` as the differentiated part. Both have the rank before the feature, as rows of
16 numbers are slow to gather and to put together. Where any task uses DoRA there is a magnitude `"m": [task, out]` as
well. Knows neither optimiser nor mesh.

Shape letters: T task, B row, L position, I in features, O out features, R padded rank.

A task of lower rank, or one that does not adapt a linear, holds exact zeros there. Both factors being zero, their
gradients are exactly zero too (d/da = (dy b^T)^T x, d/db = (x a^T)^T dy), so padding never reaches a norm or an export.
The same holds for the magnitudes of a task that has none, which are masked.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lobra_jax.host import host_cores
from lobra_jax.lora_spec import LoraSpec
from lobra_jax.low_rank import LOW_RANK, NO_PINS, Pins, Slots, into_ranks, out_of_ranks
from lobra_jax.models.config import TARGETS, LlamaConfig
from lobra_jax.peft_folder import TaskAdapter

Adapters = dict[str, dict[str, dict[str, Array]]]
"""layer index as a string -> target -> {"a", "b"}, and "m" where any task uses DoRA."""

DROPOUT_SITES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
"""Linears that read the same activation share one dropout mask."""
NUM_DROPOUT_SITES = 4

TINY_NORM = 1e-30
"""Keeps the norm of a column of zeros from being divided by."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Per-task values of one step, arrays so that no value is compiled in.

    Attributes:
      scales: [T] float32, alpha / rank.
      dropout_rates: [T] float32.
      magnitudes: target -> [T] bool, which tasks have a magnitude there; None where no task uses DoRA.
    """

    scales: Array
    dropout_rates: Array
    magnitudes: dict[str, Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowInputs:
    """What the adapters need to know of each row of a micro-batch.

    Attributes:
      task_ids: [B] int32.
      tasks: the values by task.
      scales: [B] float32.
      dropout_keys: [B] keys, or None when no task of the run uses dropout.
      keep_rates: [B] float32, 1 - dropout; None with `dropout_keys`.
    """

    task_ids: Array
    tasks: TaskInputs
    scales: Array
    dropout_keys: Array | None
    keep_rates: Array | None

    @property
    def rank_slots(self) -> Slots:
        return Slots(task_ids=self.task_ids[:, None], scales=self.scales[:, None, None, None])


def adapted_targets(specs: Sequence[LoraSpec]) -> tuple[str, ...]:
    """The linears that any task adapts, in the model's order; the others have no adapters at all."""
    return tuple(target for target in TARGETS if any(target in spec.targets for spec in specs))


def task_inputs(specs: Sequence[LoraSpec]) -> TaskInputs:
    """The tasks' values as NumPy arrays."""
    has_magnitude = {t: np.asarray([spec.dora and t in spec.targets for spec in specs]) for t in adapted_targets(specs)}
    return TaskInputs(
        scales=np.asarray([spec.scale for spec in specs], np.float32),
        dropout_rates=np.asarray([spec.dropout for spec in specs], np.float32),
        magnitudes=has_magnitude if any(spec.dora for spec in specs) else None,
    )


def init_adapters(config: LlamaConfig, specs: Sequence[LoraSpec], seeds: Sequence[int]) -> Adapters:
    """Fresh adapters as NumPy arrays: a ~ U(-1/sqrt(in), 1/sqrt(in)) (PEFT's Kaiming with slope sqrt 5), b = 0.

    A task's values depend on its own seed, rank and targets alone, not on its co-tenants. Magnitudes are the column
    norms of the base's weights, which this module does not know: they are left zero for `set_magnitudes`.
    """
    max_rank = max(spec.rank for spec in specs)

    def pairs_of(layer: int) -> dict[str, dict[str, np.ndarray]]:
        pairs = {}
        for target in adapted_targets(specs):
            fan_in, fan_out = config.target_shapes[target]
            a = np.zeros((len(specs), max_rank, fan_in), np.float32)
            b = np.zeros((len(specs), max_rank, fan_out), np.float32)
            for task, (spec, seed) in enumerate(zip(specs, seeds, strict=True)):
                if target in spec.targets:
                    name = zlib.crc32(f"layers.{layer}.{target}".encode())
                    rng = np.random.Generator(np.random.Philox(key=[seed, name]))
                    bound = 1 / math.sqrt(fan_in)
                    a[task, : spec.rank] = rng.uniform(-bound, bound, (fan_in, spec.rank)).T
            pairs[target] = {"a": a, "b": b}
            if any(spec.dora for spec in specs):
                pairs[target]["m"] = np.zeros((len(specs), fan_out), np.float32)
        return pairs

    with ThreadPoolExecutor(host_cores(), thread_name_prefix="draw") as executor:
        return {str(layer): pairs for layer, pairs in enumerate(executor.map(pairs_of, range(config.num_layers)))}


def set_magnitudes(
    adapters: Adapters, specs: Sequence[LoraSpec], norms: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Starts the magnitudes of fresh adapters (NumPy) where DoRA does: at the base's column norms, so nothing changes.

    `norms` is layer -> target -> [out] float32.
    """
    for task, spec in enumerate(specs):
        for layer, pairs in adapters.items():
            for target in spec.targets if spec.dora else ():
                pairs[target]["m"][task] = norms[layer][target]


def set_task_adapter(adapters: Adapters, task: int, given: TaskAdapter) -> None:
    """Puts one task's own adapter into its place in fresh stacked ones (NumPy), padding left zero."""
    for layer, targets in given.items():
        for target, pair in targets.items():
            rank = pair["a"].shape[1]
            adapters[layer][target]["a"][task, :rank] = pair["a"].T
            adapters[layer][target]["b"][task, :rank] = pair["b"]
            if "m" in pair:
                adapters[layer][target]["m"][task] = pair["m"]


def task_adapter(adapters: Adapters, task: int, spec: LoraSpec) -> Adapters:
    """One task's own adapter, padding cut off: {layer: {target: {"a": [in, rank], "b": [rank, out]}}}, "m" too."""
    return {
        layer: {
            target: {
                "a": np.asarray(pair["a"])[task, : spec.rank].T,
                "b": np.asarray(pair["b"])[task, : spec.rank],
                **({"m": np.asarray(pair["m"])[task]} if spec.dora else {}),
            }
            for target, pair in targets.items()
            if target in spec.targets
        }
        for layer, targets in adapters.items()
    }


def row_inputs(tasks: TaskInputs, task_ids: Array, dropout_ids: Array, *, dropout: bool) -> RowInputs:
    """Looks up each row's task values; `dropout_ids` [B] uint32 identify (task, task step, sequence)."""
    keys = keep_rates = None
    if dropout:
        keys = jax.vmap(lambda row: jax.random.key(row, impl="threefry2x32"))(dropout_ids)
        keep_rates = 1 - tasks.dropout_rates[task_ids]
    return RowInputs(
        task_ids=task_ids, tasks=tasks, scales=tasks.scales[task_ids], dropout_keys=keys, keep_rates=keep_rates
    )


def drop(x_BLI: Array, rows: RowInputs, layer: Array | int, site: int) -> Array:
    """LoRA dropout on one activation.

    A value's fate depends on (task, task step, sequence, layer, site, position, feature) only: partitionable threefry
    gives position l of a [L, I] mask the same bits whatever L is, and whatever the sharding.
    """
    if rows.dropout_keys is None:
        return x_BLI

    def mask(key: Array, keep: Array) -> Array:
        bits = jax.random.uniform(jax.random.fold_in(key, layer * NUM_DROPOUT_SITES + site), x_BLI.shape[1:])
        return jnp.where(bits < keep, 1 / keep, 0.0)

    return x_BLI * jax.vmap(mask)(rows.dropout_keys, rows.keep_rates).astype(x_BLI.dtype)


def low_rank_values(
    x_BLI: Array, pairs: Mapping[str, dict[str, Array]], targets: Sequence[str], slots: Slots, pins: Pins = NO_PINS
) -> list[Array]:
    """scale * x a_t^T for linears that read the same `x`, one [B, L, K, R] each, zero but in a token's own slot."""
    a_TRI = jnp.concatenate([pairs[t]["a"] for t in targets], axis=1)
    h_BLKR = into_ranks(x_BLI, a_TRI, slots.task_ids, slots.shared, pins.read)
    h_BLKR = scaled_values(h_BLKR, slots.whole(pins.read), x_BLI.dtype)
    ranks = np.cumsum([pairs[t]["a"].shape[1] for t in targets])[:-1].tolist()
    return jnp.split(h_BLKR, ranks, axis=-1)


def scaled_values(h_BLKR: Array, slots: Slots, dtype: jnp.dtype) -> Array:
    """What came into the ranks, scaled. Of packed rows it is mostly zeros: remat policies keep that of padded alone."""
    h_BLKR = slots.scaled(h_BLKR, dtype)
    return h_BLKR if slots.shared else checkpoint_name(h_BLKR, LOW_RANK)


def low_rank_deltas(
    x_BLI: Array, pairs: Mapping[str, dict[str, Array]], targets: Sequence[str], slots: Slots, pins: Pins = NO_PINS
) -> list[Array]:
    """scale * x a_t^T b_t for linears that read the same `x`, one [B, L, O] each; one input matmul for all."""
    return [
        out_of_ranks(h_BLKR, pairs[t]["b"], slots.task_ids, slots.shared, pins.written)
        for t, h_BLKR in zip(targets, low_rank_values(x_BLI, pairs, targets, slots, pins), strict=True)
    ]


def column_norms(weight_IO: Array, pair: Mapping[str, Array], scales_T: Array) -> Array:
    """[T, O] float32: each task's ||W + scale a^T b|| by output feature, without ever making W + scale a^T b.

    With w, a, b for columns: ||w + s a b||^2 = w.w + 2 s (w a).b + s^2 b (a a) b; all but w.w is of the rank's size.
    """
    a_TRI = pair["a"]
    b_TRO = pair["b"] * scales_T[:, None, None]
    weight_square_O = jnp.sum(jnp.square(weight_IO.astype(jnp.float32)), axis=0)
    a_low = a_TRI.astype(weight_IO.dtype)
    cross_TRO = jnp.einsum("io,tri->tro", weight_IO, a_low, preferred_element_type=jnp.float32)
    gram_TRQ = jnp.einsum("tri,tqi->trq", a_TRI, a_TRI)
    low_rank_TRO = 2 * cross_TRO + jnp.einsum("trq,tqo->tro", gram_TRQ, b_TRO)
    return jnp.sqrt(jnp.maximum(weight_square_O[None] + jnp.sum(b_TRO * low_rank_TRO, axis=1), TINY_NORM))


def magnitude_ratios(weight_IO: Array, pair: Mapping[str, Array], target: str, rows: RowInputs) -> Array:
    """[B, 1, O] float32: `task_ratios` of each row's task."""
    return task_ratios(weight_IO, pair, target, rows.tasks)[rows.task_ids][:, None]


def task_ratios(weight_IO: Array, pair: Mapping[str, Array], target: str, tasks: TaskInputs) -> Array:
    """[T, O] float32: DoRA's m / ||W + scale a^T b|| of each task; 1 for a task that has no magnitude here.

    The norm counts as a constant of the gradient (DoRA, section 4.3), as in PEFT.
    """
    assert tasks.magnitudes is not None
    has_magnitude_T = tasks.magnitudes[target]
    norms_TO = jax.lax.stop_gradient(column_norms(weight_IO, jax.lax.stop_gradient(dict(pair)), tasks.scales))
    return jnp.where(has_magnitude_T[:, None], pair["m"] / norms_TO, 1.0)
