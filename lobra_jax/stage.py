"""The jitted programs of one pipeline stage on one submesh, compiled ahead of time per micro-batch shape.

A stage that is not the last has a forward that hands its residuals out of the program and a backward that takes them
back, so nothing is computed twice beyond what the remat policy asks for. The last stage does forward, loss and
backward in one program. Gradients are added into donated accumulators. Shape letters as in `models.llama`; T task.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lobra_jax.kept_programs import Programs, describe, kept
from lobra_jax.lora import Adapters, RowInputs, TaskInputs, row_inputs
from lobra_jax.loss import weighted_row_losses, weighted_token_losses
from lobra_jax.models.llama import AbstractStage
from lobra_jax.models.remat import SPARING
from lobra_jax.packed import PackedRows, SegmentInputs, packed_rows
from lobra_jax.program_names import EVALUATION, named, stage_detail
from lobra_jax.schedule import BACKWARD, FORWARD, FUSED
from lobra_jax.sharding import StageSharding
from planner.packing import max_segments, max_tasks

Params = Mapping[str, Array]

_TRACING = threading.Lock()
"""Taken to trace: the interpreter does one at a time anyway, and by turns of all they and others would wait for it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchInputs:
    """One micro-batch on one stage: token ids on the first, targets and weights on the last, else None.

    Attributes:
      task_ids: [B] int32; [B, K] the tasks of each row's slots where rows are packed.
      dropout_ids: [B] uint32, identify (task, task step, sequence); [B, M] by segment where rows are packed.
      tokens: [B, L] int32.
      targets: [B, L] int32.
      loss_weights: [B, L] float32.
      segments: where sequences lie in packed rows; None where a row is a sequence.
    """

    task_ids: Array
    dropout_ids: Array
    tokens: Array | None = None
    targets: Array | None = None
    loss_weights: Array | None = None
    segments: SegmentInputs | None = None


class Residuals:
    """How what a forward program keeps for its backward is put together again: learnt when the forward is traced.

    Residuals that are the program's own inputs (weights, adapters) are left out and put back by position, or each
    micro-batch in flight would carry a copy of the weights.
    """

    def __init__(self) -> None:
        self._tree: Any = None
        self._input_slots: tuple[int | None, ...] = ()

    def take_apart(self, vjp: Callable, inputs: Any) -> tuple[Array, ...]:
        """The arrays of a `jax.vjp` function; `inputs` is the pytree that `restore` will get again."""
        slots = {id(leaf): slot for slot, leaf in enumerate(jax.tree.leaves(inputs))}
        leaves, self._tree = jax.tree.flatten(vjp)
        # Were JAX to hand out other objects for its inputs, every micro-batch in flight would hold the weights.
        assert any(id(leaf) in slots for leaf in leaves), "no residual is an input: the weights would be carried along"
        self._input_slots = tuple(slots.get(id(leaf)) for leaf in leaves)
        return tuple(leaf for leaf, slot in zip(leaves, self._input_slots, strict=True) if slot is None)

    def restore(self, arrays: Sequence[Array], inputs: Any) -> Callable:
        remaining, given = iter(arrays), jax.tree.leaves(inputs)
        leaves = [next(remaining) if slot is None else given[slot] for slot in self._input_slots]
        return jax.tree.unflatten(self._tree, leaves)


@dataclasses.dataclass(frozen=True)
class StageFunctions:
    """The traced functions of one stage. `remat` and whether any task uses dropout or DoRA are compiled in, values are
    not."""

    abstract: AbstractStage
    sharding: StageSharding
    remat: str
    dropout: bool
    dora: bool
    num_tasks: int

    @property
    def is_first(self) -> bool:
        return self.abstract.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.abstract.layers.stop == self.abstract.config.num_layers

    def _hidden(self, params: Params, adapters: Adapters, tasks: TaskInputs, x: Array, batch: BatchInputs) -> Array:
        stage = self.abstract.merge(params)
        rows, shard = self._rows(tasks, batch), self.sharding
        turns = self.remat in SPARING and self.sharding.num_devices > 1
        return stage(x, adapters, rows, remat=self.remat, shard=shard, chunked=self._chunked(rows), turns=turns)

    def _chunked(self, rows: RowInputs | PackedRows) -> bool:
        """Whether long feed-forwards go in chunks: where they are made anew, and nothing depends on a token's position.

        Dropout masks and packed rows do; and positions that lie on several devices would have to be gathered.
        """
        depends = isinstance(rows, PackedRows) or rows.dropout_keys is not None
        return self.remat in SPARING and self.sharding.num_devices == 1 and not depends

    def _rows(self, tasks: TaskInputs, batch: BatchInputs) -> RowInputs | PackedRows:
        if batch.segments is None:
            return row_inputs(tasks, batch.task_ids, batch.dropout_ids, dropout=self.dropout)
        return packed_rows(tasks, batch.task_ids, batch.dropout_ids, batch.segments, dropout=self.dropout)

    def _losses(self, params: Params, adapters: Adapters, tasks: TaskInputs, x: Array, batch: BatchInputs) -> Array:
        """Weighted losses of rows [B], or of tokens [B, L] where rows are packed."""
        hidden = self._hidden(params, adapters, tasks, x, batch)
        head = self.abstract.merge(params).unembedding
        losses = weighted_row_losses if batch.segments is None else weighted_token_losses
        return losses(hidden, head, batch.targets, batch.loss_weights, self.sharding)

    def _by_task(self, losses: Array, tasks: TaskInputs, batch: BatchInputs) -> Array:
        """[T]: the sums of `_losses` over each task's rows or tokens."""
        rows = self._rows(tasks, batch)
        task_ids = rows.token_tasks if isinstance(rows, PackedRows) else rows.task_ids
        return jax.ops.segment_sum(losses.reshape(-1), task_ids.reshape(-1), num_segments=self.num_tasks)

    def _differentiated(self, function: Callable[[Adapters, Array], Any], adapters: Adapters, x: Array) -> tuple:
        """(function's value, vjp), in (adapters, x), or in adapters alone where x is token ids."""
        if self.is_first:
            return jax.vjp(lambda adapters: function(adapters, x), adapters)
        return jax.vjp(function, adapters, x)

    def forward(
        self, residuals: Residuals, params: Params, adapters: Adapters, tasks: TaskInputs, x: Array, batch: BatchInputs
    ) -> tuple[Array, tuple[Array, ...], Array]:
        """(hidden [B, L, D], what `residuals` took apart, done): `done` is a scalar by which the end can be awaited."""
        y, vjp = self._differentiated(lambda a, x: self._hidden(params, a, tasks, x, batch), adapters, x)
        return y, residuals.take_apart(vjp, (params, adapters, tasks, batch)), _done()

    def backward(
        self,
        residuals: Residuals,
        gradients: Adapters,
        params: Params,
        adapters: Adapters,
        tasks: TaskInputs,
        batch: BatchInputs,
        arrays: tuple[Array, ...],
        dy: Array,
    ) -> tuple[Adapters, Array | None, Array]:
        """(gradients, dx or None on the first stage, done); `arrays` are what the forward's `residuals` took apart."""
        d_adapters, *dx = residuals.restore(arrays, (params, adapters, tasks, batch))(dy)
        return jax.tree.map(jnp.add, gradients, d_adapters), dx[0] if dx else None, _done()

    def fused(
        self, gradients: Adapters, params: Params, adapters: Adapters, tasks: TaskInputs, x: Array, batch: BatchInputs
    ) -> tuple[Adapters, Array | None, Array]:
        """(gradients, dx or None on the first stage, losses [T]): forward, loss and backward at once."""
        losses, vjp = self._differentiated(lambda a, x: self._losses(params, a, tasks, x, batch), adapters, x)
        d_adapters, *dx = vjp(jnp.ones_like(losses))
        losses_T = self._by_task(losses, tasks, batch)
        return jax.tree.map(jnp.add, gradients, d_adapters), dx[0] if dx else None, losses_T

    def evaluate(self, params: Params, adapters: Adapters, tasks: TaskInputs, x: Array, batch: BatchInputs) -> Array:
        """Forward without dropout: hidden states, or on the last stage losses [T]."""
        quiet = dataclasses.replace(self, dropout=False, remat="none")
        if not self.is_last:
            return quiet._hidden(params, adapters, tasks, x, batch)
        return self._by_task(quiet._losses(params, adapters, tasks, x, batch), tasks, batch)


def _done() -> Array:
    """An output that keeps no memory and is ready when the program's other outputs are."""
    return jnp.zeros((), jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLayout:
    """Abstract inputs of a stage's programs, with shardings: all that compiling needs."""

    functions: StageFunctions
    params: Mapping[str, jax.ShapeDtypeStruct]
    adapters: Mapping[str, Any]
    tasks: TaskInputs
    dtype: Any

    @property
    def devices(self) -> list[Any]:
        return list(self.functions.sharding.mesh.devices.flat)

    def made_of(self, what: str, rows: int, length: int, packed: bool) -> list[str]:
        """In words, all that the programs of that shape are traced from, but for sources, versions and flags."""
        f = self.functions
        stage = (f.abstract.config, f.abstract.layers, f.abstract.quantization, f.remat, f.dropout, f.dora, f.num_tasks)
        arrays = (self.params, self.adapters, self.tasks, self.batch(rows, length, packed=packed))
        shape = f"{what} {rows}x{length} packed={packed} {jnp.dtype(self.dtype)} by_rows={f.sharding.by_rows}"
        return [shape, repr(stage), f"{f.sharding.mesh.axis_names}{f.sharding.mesh.axis_types}", describe(arrays)]

    def with_remat(self, remat: str) -> StageLayout:
        return dataclasses.replace(self, functions=dataclasses.replace(self.functions, remat=remat))

    def batch(self, rows: int, length: int, *, packed: bool = False) -> BatchInputs:
        f, everywhere = self.functions, self.functions.sharding.replicated

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

        slots = (max_tasks(f.num_tasks),) if packed else ()
        marks = (max_segments(length),) if packed else ()
        segments = SegmentInputs(
            segment_ids=array(jnp.int32, rows, length),
            positions=array(jnp.int32, rows, length),
            slots=array(jnp.int32, rows, *marks),
        )
        return BatchInputs(
            task_ids=array(jnp.int32, rows, *slots),
            dropout_ids=array(jnp.uint32, rows, *marks),
            tokens=array(jnp.int32, rows, length) if f.is_first else None,
            targets=array(jnp.int32, rows, length) if f.is_last else None,
            loss_weights=array(jnp.float32, rows, length) if f.is_last else None,
            segments=segments if packed else None,
        )

    def hidden(self, rows: int, length: int) -> jax.ShapeDtypeStruct:
        """Activations at a stage's border, [B, L, D]."""
        f = self.functions
        shape = (rows, length, f.abstract.config.hidden_size)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=f.sharding.named(("batch", "length", "hidden"), shape))


def stage_layout(functions: StageFunctions, max_rank: int, targets: Sequence[str]) -> StageLayout:
    abstract, sharding = functions.abstract, functions.sharding
    params = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding.named(spec.axes, spec.shape))
        for name, spec in abstract.weights.items()
    }
    shapes = {
        target: {
            "a": (functions.num_tasks, max_rank, fan_in),
            "b": (functions.num_tasks, max_rank, fan_out),
            "m": (functions.num_tasks, fan_out),
        }
        for target, (fan_in, fan_out) in abstract.config.target_shapes.items()
        if target in targets
    }
    placements = sharding.adapters(abstract.layers, targets, dora=functions.dora)
    adapters = {
        layer: {
            target: {
                name: jax.ShapeDtypeStruct(shapes[target][name], jnp.float32, sharding=placement)
                for name, placement in pair.items()
            }
            for target, pair in pairs.items()
        }
        for layer, pairs in placements.items()
    }
    per_task = functools.partial(jax.ShapeDtypeStruct, (functions.num_tasks,), sharding=sharding.replicated)
    tasks = TaskInputs(
        scales=per_task(jnp.float32),
        dropout_rates=per_task(jnp.float32),
        magnitudes={target: per_task(jnp.bool_) for target in targets} if functions.dora else None,
    )
    return StageLayout(functions=functions, params=params, adapters=adapters, tasks=tasks, dtype=abstract.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageProgram:
    """One stage's compiled programs for one micro-batch shape; those a stage does not have are None.

    `memory` is XLA's memory analysis of each program there is: a large one takes long to tell it, which is better done
    on the thread that compiles it than when devices wait for a step.
    """

    forward: jax.stages.Compiled | None = None
    backward: jax.stages.Compiled | None = None
    fused: jax.stages.Compiled | None = None
    memory: Mapping[str, Any]

    @classmethod
    def of(cls, **programs: jax.stages.Compiled) -> StageProgram:
        """Of the programs by name, their memory analysed."""
        return cls(**programs, memory={name: program.memory_analysis() for name, program in programs.items()})


def compile_training(layout: StageLayout, rows: int, length: int, *, packed: bool = False) -> StageProgram:
    """What training needs for a [rows, length] micro-batch, compiled or as kept. Thread-safe."""
    make = functools.partial(_training, layout, rows, length, packed)
    return StageProgram.of(**kept(layout.made_of("training", rows, length, packed), layout.devices, make))


def compile_evaluation(layout: StageLayout, rows: int, length: int) -> jax.stages.Compiled:
    """The loss-only program for a [rows, length] micro-batch, compiled or as kept."""
    quiet = dataclasses.replace(layout.functions, dropout=False, remat="none")
    layout = dataclasses.replace(layout, functions=quiet)  # the same whatever training's are
    make = functools.partial(_evaluation, layout, rows, length)
    return kept(layout.made_of(EVALUATION, rows, length, False), layout.devices, make)[EVALUATION]


def _training(layout: StageLayout, rows: int, length: int, packed: bool) -> Programs:
    """Compiles them; XLA releases the interpreter."""
    f = layout.functions
    batch = layout.batch(rows, length, packed=packed)
    hidden = layout.hidden(rows, length)
    x = batch.tokens if f.is_first else hidden
    gradients = jax.tree.map(lambda leaf: leaf.sharding, layout.adapters)
    dx = None if f.is_first else hidden.sharding
    detail, options = stage_detail(f.abstract.layers, rows, length), f.sharding.compiler_options
    if f.is_last:
        shardings = (gradients, dx, f.sharding.replicated)
        fused = jax.jit(named(f.fused, FUSED, detail), donate_argnums=0, out_shardings=shardings)
        with _TRACING:
            lowered = fused.lower(layout.adapters, layout.params, layout.adapters, layout.tasks, x, batch)
        return {FUSED: lowered.compile(options)}
    done, residuals = f.sharding.replicated, Residuals()
    jitted = jax.jit(
        named(functools.partial(f.forward, residuals), FORWARD, detail), out_shardings=(hidden.sharding, None, done)
    )
    with _TRACING:
        lowered = jitted.lower(layout.params, layout.adapters, layout.tasks, x, batch)
    forward = lowered.compile(options)
    kept_arrays = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info[1],
        forward.output_shardings[1],
    )
    shardings = (gradients, dx, done)
    jitted = jax.jit(
        named(functools.partial(f.backward, residuals), BACKWARD, detail), donate_argnums=0, out_shardings=shardings
    )
    with _TRACING:
        lowered = jitted.lower(
            layout.adapters, layout.params, layout.adapters, layout.tasks, batch, kept_arrays, hidden
        )
    return {FORWARD: forward, BACKWARD: lowered.compile(options)}


def _evaluation(layout: StageLayout, rows: int, length: int) -> Programs:
    f = layout.functions
    batch = layout.batch(rows, length)
    hidden = layout.hidden(rows, length)
    out = f.sharding.replicated if f.is_last else hidden.sharding
    x = batch.tokens if f.is_first else hidden
    detail = stage_detail(f.abstract.layers, rows, length)
    evaluate = jax.jit(named(f.evaluate, EVALUATION, detail), out_shardings=out)
    with _TRACING:
        lowered = evaluate.lower(layout.params, layout.adapters, layout.tasks, x, batch)
    return {EVALUATION: lowered.compile(f.sharding.compiler_options)}
